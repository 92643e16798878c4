"""Finds problems of a run before its first step: reads its inputs and tries its operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from mgrpo.algorithm.reward import needs_labels
from mgrpo.config import Config
from mgrpo.config.run import adapter_problems, process_problems
from mgrpo.data.load import check_records, load_prompts, needs_answers, require_answers, require_prompts
from mgrpo.data.records import Record
from mgrpo.distributed.together import on_first
from mgrpo.distributed.world import find_world
from mgrpo.errors import ConfigError
from mgrpo.grading.extract import make_extractor
from mgrpo.grading.labels import make_label_reader
from mgrpo.inputs import Problems
from mgrpo.models.adapter_folder import choose_config, is_adapter
from mgrpo.models.device import pick_backend, pick_device
from mgrpo.models.files import check_folder, running
from mgrpo.models.load import LoadedModel
from mgrpo.models.packing import pack
from mgrpo.models.save import saving, try_save, whole_or_zeros
from mgrpo.models.size import count_trained
from mgrpo.models.tokenizer import Tokenizer, load_tokenizer
from mgrpo.rollout.engine import Engine
from mgrpo.rollout.stop import make_stop
from mgrpo.run.directory import directory_of, refuse_directory, require_room, trial_folder
from mgrpo.training.trainer import Trainer
from mgrpo.types import Rollouts, Sampling, WeightTag, join


def find_problems(config: Config) -> list[str]:
    """Reads all inputs of a run except the weights, and lists every problem."""
    problems = Problems()
    problems.attempt(lambda: refuse_machine(config, directory_of(config)))
    problems.attempt(lambda: make_extractor(config.answer.extract))
    problems.attempt(lambda: make_label_reader(config.answer.label_extract))
    tokenizer, data = problems.attempt(lambda: load_tokenizer(config.model)), None
    if tokenizer:
        problems.attempt(lambda: count_adapter(config, tokenizer))
        problems.attempt(lambda: make_stop(config.rollout.stop, config.data.template, tokenizer.tokenizer))
        data = problems.attempt(lambda: load_prompts(config, tokenizer, config.data.train))
        if data and needs_labels(config.objective.reward):
            problems.attempt(lambda: require_answers(data, f"--objective.reward {config.objective.reward}"))
        if data:
            problems.attempt(lambda: require_prompts(data, config))
        if config.data.probe:
            eval_set = problems.attempt(lambda: load_prompts(config, tokenizer, str(config.data.probe)))
            if eval_set:
                problems.attempt(lambda: require_answers(eval_set, "--data.probe"))
    if data is None:
        problems += record_problems(config)
    return list(dict.fromkeys(problems))


def record_problems(config: Config) -> list[str]:
    """What is wrong with the data for any model."""
    problems = Problems()

    def read(source: str) -> list[Record]:
        return check_records(source, config.data, config.answer, need_answer=needs_answers(config, source))

    records = problems.attempt(lambda: read(config.data.train))
    if records is not None:
        problems.attempt(lambda: require_prompts(records, config))
    if probe := config.data.probe:
        problems.attempt(lambda: read(probe))
    return problems


def count_adapter(config: Config, tokenizer: Tokenizer) -> int | None:
    """Number of trained parameters of a run with LoRA, None of another; raises ConfigError for wrong targets."""
    adapter = choose_config(config.model.path, config.lora)
    trusted = config.model.trust_remote_code
    return adapter and count_trained(tokenizer.model_config, adapter, trust_remote_code=trusted)


def refuse_machine(config: Config, run_dir: Path) -> None:
    """Raises ConfigError with all problems of this machine: processes, run directory, device, kernels, engine."""
    problems = Problems()
    for step in (
        lambda: _refuse_processes(config),
        lambda: refuse_directory(run_dir, config),
        lambda: pick_backend(config.kernels.backend, planned_device(config)),
        lambda: _refuse_engine(config),
        lambda: _refuse_adapter(config),
    ):
        problems.attempt(step)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _refuse_processes(config: Config) -> None:
    """Raises ConfigError for options that do not fit the number of processes."""
    if problems := process_problems(config, num_processes(config)):
        raise ConfigError(problems)


def planned_device(config: Config) -> torch.device:
    """The device of the run, or with --dry-run-memory that of the plan."""
    return pick_device(config.model.device, planned=config.dry_run_memory is not None)


def num_processes(config: Config) -> int:
    """W, the processes that the run has: those that the command starts, else those that a launcher has started."""
    wanted = config.distributed.processes
    if wanted == "auto":
        return max(torch.cuda.device_count(), 1) if planned_device(config).type == "cuda" else 1
    return find_world().size if wanted is None else wanted


def _refuse_engine(config: Config) -> None:
    """Raises ConfigError if vLLM has to run here and is not installed."""
    if config.engine.name == "vllm" and config.engine.placement != "server" and find_spec("vllm") is None:
        raise ConfigError(["config: --engine.name vllm needs the package vllm, it is not installed. pip install vllm."])


def _refuse_adapter(config: Config) -> None:
    """Raises ConfigError or InputError for an adapter that cannot be trained."""
    check_folder(config.model.path)
    choose_config(config.model.path, config.lora)
    if is_adapter(config.model.path) and (problems := adapter_problems(config.momentum)):
        raise ConfigError(problems)


def try_start(config: Config) -> None:
    """Loads everything that a run loads, rehearses it and releases it; vLLM is not started."""
    vllm = config.engine.name == "vllm"
    trainer = Trainer(config, make_engine=NoEngine if vllm else None)
    try:
        rehearse(trainer, directory_of(config))
    finally:
        trainer.close()


def rehearse(trainer: Trainer, run_dir: Path) -> None:
    """Tries later operations of the run: room for checkpoints, a save, a token, a gradient. Leaves no trace.

    Raises:
        ConfigError: the disk has no room.
        InputError: the model cannot be saved, run or trained; the message has the whole cause.
        StorageError: a write to the disk failed.
    """
    config, model = trainer.config, trainer.model
    on_first(trainer.world, lambda: _try_save(trainer, run_dir))
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            with running(config.model.path, "generate a token and have a gradient"):
                _try_gradient(trainer, _try_token(trainer))
        finally:
            model.zero_grad(set_to_none=True)


def _try_save(trainer: Trainer, run_dir: Path) -> None:
    """Tries to save policy and momentum model where there is room for checkpoints."""
    require_room(run_dir, trainer.config, checkpoint_bytes(trainer))
    with trial_folder(run_dir) as folder:
        if trainer.loaded.adapter:
            with saving(folder):
                trainer.loaded.save(folder / "policy", whole_or_zeros(trainer.loaded.weights()))
        else:
            weights = {"policy": trainer.model.state_dict(), "momentum": trainer.momentum.state_dict()}
            try_save(folder, trainer.model, weights, trainer.loaded.tokenizer)


def _try_token(trainer: Trainer) -> Rollouts:
    """Generates one token after the first prompt with an engine in this process; vLLM is tried later."""
    if trainer.engine.weights_are_shared:
        engine, tag = trainer.engine, trainer.generator.update_weights("policy")
    else:
        engine, tag = NoEngine(trainer.loaded, trainer.config), WeightTag("policy", 0)
    return engine.generate([trainer.data.prompts[0].ids], 1, Sampling(max_new_tokens=1), tag)


class NoEngine(Engine):
    """A stand-in for an engine that is not started; every response is an end of text."""

    num_weight_slots = 2
    has_model_logprobs = False

    def __init__(self, loaded: LoadedModel, config: Config):
        self.eos_id = loaded.eos_ids[0]

    def update_weights(self, weights: Mapping[str, torch.Tensor], tag: WeightTag) -> None:
        """Ignores the weights."""

    def generate(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, tag: WeightTag) -> Rollouts:
        """See Engine."""
        rows = len(prompts) * n
        return Rollouts(
            tokens=torch.full((rows, 1), self.eos_id),
            lengths=torch.ones(rows, dtype=torch.int64),
            logprobs=torch.zeros(rows, 1),
            truncated=torch.zeros(rows, dtype=torch.bool),
            num_per_prompt=n,
            tag=tag,
        )


def _try_gradient(trainer: Trainer, rollouts: Rollouts) -> None:
    """Runs a backward pass through the log-prob of one token."""
    trajectories = join([trainer.data.prompts[0].ids], rollouts, None)
    batch = pack(trajectories, torch.tensor([0]), pad_id=trainer.loaded.pad_id)
    trainer.forward(trainer.model, batch).logprob.sum().backward()


def checkpoint_bytes(trainer: Trainer) -> int:
    """Bytes of a checkpoint: policy and AdamW's two moments in fp32, and the momentum state in its own dtype."""
    saved = trainer.learner.parameters if trainer.loaded.adapter else trainer.model.parameters()
    momentum = [*trainer.momentum.weights.values(), *(trainer.momentum.compensation or {}).values()]
    return 12 * sum(p.numel() for p in saved) + sum(tensor.nbytes for tensor in momentum)
