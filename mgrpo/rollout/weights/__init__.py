"""Transfer of weights to an engine: in this process, over HTTP, or by NCCL."""
