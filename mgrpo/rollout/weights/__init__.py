"""How weights reach an engine: in this process, over HTTP, or by NCCL."""
