"""The engine of a configuration."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mgrpo.config import EngineConfig
from mgrpo.distributed.together import failing_together
from mgrpo.distributed.world import ALONE, World
from mgrpo.errors import EngineError
from mgrpo.models.load import LoadedModel
from mgrpo.rollout.engine import Engine
from mgrpo.rollout.ranks import FirstRankEngine, RankedEngine
from mgrpo.rollout.stop import StopTexts
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.rollout.vllm.local import VllmEngine
from mgrpo.rollout.vllm.process import ServerProcess
from mgrpo.rollout.vllm.server import EnginePair, ServerEngine


def start_engine(
    loaded: LoadedModel,
    config: EngineConfig,
    *,
    stop: StopTexts | None,
    max_length: int,
    world: World = ALONE,
    tree: bool = False,
) -> Engine:
    """The engine of a configuration; with several ranks, or in tree mode, the engine of all.

    Args:
        loaded: model to generate with, whole for the embedded engine, and its tokenizer.
        config: the engine's options.
        stop: texts that end a response.
        max_length: tokens of the longest prompt and response together.
        world: of the run.
        tree: generate so that the bits do not depend on the number of ranks.

    Raises:
        EngineError: the engine cannot be started, on any rank.
    """
    c = config
    model: dict[str, Any] = {"eos_ids": loaded.eos_ids, "pad_id": loaded.pad_id, "stop": stop, "world": world}
    if c.name == "vllm":
        model |= {"max_length": max_length, "timeout_s": c.timeout_s}
        if c.placement != "one-engine":
            make = partial(_connect_servers, loaded, c, model)
            return FirstRankEngine(make, world, loaded.dtype) if world.size > 1 else make()

    def make_own() -> Engine:
        if c.name == "transformers":
            return TransformersEngine(loaded.model, **model, dtype=loaded.dtype, batch_size=c.batch_size)
        return VllmEngine(
            loaded.model, **model, dtype=loaded.dtype, options=vllm_options(loaded, c, max_length=max_length)
        )

    return make_ranked(make_own, world, tree=tree, parallel=c.tensor_parallel)


def make_ranked(make: Callable[[], Engine], world: World, *, tree: bool, parallel: int = 1) -> Engine:
    """Makes an engine on each rank; the engine of all ranks, or in a world of one the engine itself.

    `parallel` consecutive ranks are one engine.

    Raises:
        EngineError: on all ranks, if that of one cannot be made.
    """
    engines = []
    with failing_together(world):
        engines.append(make())
    return RankedEngine(engines[0], world, tree=tree, parallel=parallel) if tree or world.size > 1 else engines[0]


def _connect_servers(loaded: LoadedModel, c: EngineConfig, model: Mapping[str, Any]) -> Engine:
    """The engine of one or two servers, which run already or are started here."""
    on_gpu = loaded.device.type == "cuda"
    if c.transfer == "nccl" and not on_gpu:
        raise EngineError("start: --engine.transfer nccl needs the model on a GPU. Take --engine.transfer http.")
    connect = partial(
        ServerEngine, loaded.model, **model, dtype=loaded.dtype, weights_host=c.weights_host, transfer=c.transfer
    )
    if c.placement == "server":
        engines = [connect(url=url) for url in c.servers]
        return engines[0] if len(engines) == 1 else EnginePair(*engines)
    max_length = model["max_length"]
    options = vllm_options(loaded, c, max_length=max_length)
    if c.transfer == "nccl":
        options["weight_transfer_config"] = '{"backend": "nccl"}'
    processes: list[ServerProcess] = []
    try:
        for i in range(2):
            device = c.devices[i] if c.devices else ""
            start: dict[str, Any] = {"max_length": max_length, "options": options, "device": device}
            processes.append(ServerProcess(loaded.model, dtype=loaded.dtype, stop=model["stop"], **start))
        for process in processes:
            process.wait()
        engines = [connect(url=process.url, process=process) for process in processes]
    except BaseException:
        for process in processes:
            process.close()
        raise
    return EnginePair(*engines)


def vllm_options(loaded: LoadedModel, c: EngineConfig, *, max_length: int) -> dict[str, Any]:
    """VLLM's options on this machine."""
    on_gpu = loaded.device.type == "cuda"
    options: dict[str, Any] = {"gpu_memory_utilization": c.gpu_memory}
    if not on_gpu:
        check_head_width(loaded.model.config)
        # On a CPU a sequence with a seed cannot be prefilled in parts.
        whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, max_length)}
        options = {"enforce_eager": True, **whole}
    if c.tensor_parallel > 1:
        options["tensor_parallel_size"] = c.tensor_parallel
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
