"""The engine of a configuration."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

from mgrpo.config import EngineConfig
from mgrpo.errors import EngineError
from mgrpo.models.load import LoadedModel
from mgrpo.rollout.engine import Engine
from mgrpo.rollout.stop import StopTexts
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.rollout.vllm.local import VllmEngine
from mgrpo.rollout.vllm.process import ServerProcess
from mgrpo.rollout.vllm.server import EnginePair, ServerEngine


def start_engine(loaded: LoadedModel, config: EngineConfig, *, stop: StopTexts | None, max_length: int) -> Engine:
    """The engine of a configuration.

    Args:
        loaded: model to generate with, and its tokenizer.
        config: the engine's options.
        stop: texts that end a response.
        max_length: tokens of the longest prompt and response together.

    Raises:
        EngineError: the engine cannot be started.
    """
    c = config
    model: dict[str, Any] = {"eos_ids": loaded.eos_ids, "pad_id": loaded.pad_id, "stop": stop}
    if c.name == "transformers":
        return TransformersEngine(loaded.model, **model, dtype=loaded.dtype, batch_size=c.batch_size)
    model |= {"dtype": loaded.dtype, "max_length": max_length, "timeout_s": c.timeout_s}
    on_gpu = next(loaded.model.parameters()).device.type == "cuda"
    if c.placement != "one-engine":
        if c.transfer == "nccl" and not on_gpu:
            raise EngineError("start: --engine.transfer nccl needs the model on a GPU. Take --engine.transfer http.")
        model |= {"weights_host": c.weights_host, "transfer": c.transfer}
    if c.placement == "server":
        engines = [ServerEngine(loaded.model, **model, url=url) for url in c.servers]
        return engines[0] if len(engines) == 1 else EnginePair(*engines)
    options = vllm_options(loaded, config, max_length=max_length)
    if c.placement == "one-engine":
        return VllmEngine(loaded.model, **model, options=options)
    if c.transfer == "nccl":
        options["weight_transfer_config"] = '{"backend": "nccl"}'
    processes: list[ServerProcess] = []
    try:
        for i in range(2):
            device = c.devices[i] if c.devices else ""
            start: dict[str, Any] = {"max_length": max_length, "options": options, "device": device, "stop": stop}
            processes.append(ServerProcess(loaded.model, dtype=loaded.dtype, **start))
        for process in processes:
            process.wait()
        engines = [ServerEngine(loaded.model, **model, url=process.url, process=process) for process in processes]
    except BaseException:
        for process in processes:
            process.close()
        raise
    return EnginePair(*engines)


def vllm_options(loaded: LoadedModel, c: EngineConfig, *, max_length: int) -> dict[str, Any]:
    """VLLM's options on this machine."""
    on_gpu = next(loaded.model.parameters()).device.type == "cuda"
    options: dict[str, Any] = {"gpu_memory_utilization": c.gpu_memory}
    if not on_gpu:
        check_head_width(loaded.model.config)
        # On a CPU a sequence with a seed cannot be prefilled in parts.
        whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, max_length)}
        options = {"enforce_eager": True, **whole}
    if c.kv_cache_gib or not on_gpu:
        options["kv_cache_memory_bytes"] = int((c.kv_cache_gib or 1.0) * 2**30)
    # On a CPU vLLM's sleep mode never returns.
    if c.sleep and on_gpu:
        options["enable_sleep_mode"] = True
    return options


def check_head_width(config: Any) -> None:
    """Raises EngineError for a head size that vLLM's attention on a CPU lacks; some versions do not list theirs."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    known: list[int] = []
    with contextlib.suppress(ImportError, AttributeError):
        backend = importlib.import_module("vllm.v1.attention.backends.cpu_attn").CPUAttentionBackend
        known = list(backend.get_supported_head_sizes())
    if known and width not in known:
        raise EngineError(
            f"start: the model's head size must be one of {', '.join(map(str, known))} for vLLM on a CPU, got {width}. "
            "Of the shipped models, --model.path builtin:arithmetic32 fits."
        )
