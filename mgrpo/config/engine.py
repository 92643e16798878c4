"""Options of the rollout engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mgrpo.config.option import option


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The rollout engine."""

    name: Literal["transformers", "vllm"] = "transformers"
    """`transformers` decodes with the trainer's own model; `vllm` with an engine beside it (pip install vllm)."""
    batch_size: int = option(256, least=1)
    """Largest number of sequences decoded together; bounds the KV cache. vLLM chooses it itself."""
    placement: Literal["one-engine", "two-engines", "server"] = option("one-engine", resumable=True)
    """Place of vLLM: in this process, momentum and then policy; in two processes started here, both concurrently; or in
    running servers."""
    servers: tuple[str, ...] = option((), resumable=True)
    """URLs of one vLLM server, or of two: for the policy and for the momentum model."""
    devices: tuple[str, ...] = option((), resumable=True)
    """CUDA devices of the two engines, policy first, as CUDA_VISIBLE_DEVICES names them; without it both see all."""
    weights_host: str = option("127.0.0.1", resumable=True)
    """Address of this machine under which servers fetch weights."""
    transfer: Literal["http", "nccl"] = option("http", resumable=True)
    """Transfer of weights to other processes: `http` anywhere, `nccl` from GPU to GPU by vLLM's own transfer."""
    timeout_s: float = option(600.0, above=0, resumable=True)
    """Longest time without a finished prompt from vLLM, in seconds; beyond it the engine counts as hung."""
    tensor_parallel: int = option(1, least=1, resumable=True)
    """Parts of vLLM's weights, each on a GPU of its own: in processes of the run, or in those of engines it starts."""
    sleep: bool = option(False, resumable=True)
    """Free vLLM's GPU memory for the trainer between rollouts; its weights are kept on the host."""
    gpu_memory: float = option(0.4, above=0, most=1, resumable=True)
    """Share of a GPU's memory for vLLM, its weights included."""
    kv_cache_gib: float | None = option(None, above=0, resumable=True)
    """KV cache of vLLM in GiB; None is the rest of `gpu-memory`, and 1 GiB on a CPU."""
