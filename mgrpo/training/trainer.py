"""The training loop: generate, forward, credit, update, observe.

Letters: B prompts, M policy and N momentum rollouts a prompt, G = M + N, R = B * G trajectories, L response tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch

from mgrpo.algorithm.reward import needs_labels
from mgrpo.config import Config
from mgrpo.data.load import load_prompts, require_answers, require_prompts
from mgrpo.data.prompts import Dataset
from mgrpo.data.sampler import Sampler
from mgrpo.distributed.sharding import shard_model
from mgrpo.distributed.world import ALONE, World
from mgrpo.models.adapter import INITIAL, MOMENTUM, POLICY, AdapterMomentum
from mgrpo.models.forward import Forward
from mgrpo.models.load import LoadedModel, load_model
from mgrpo.models.momentum import Momentum, borrowed_weights
from mgrpo.observe.retention import Retention
from mgrpo.observe.step import mean, step_metrics
from mgrpo.observe.timer import Timer
from mgrpo.rollout.ahead import RolloutsAhead
from mgrpo.rollout.build import make_ranked, start_engine
from mgrpo.rollout.engine import Engine
from mgrpo.rollout.generator import Generator
from mgrpo.rollout.source import RolloutsNow, RolloutSource
from mgrpo.rollout.stop import StopTexts, make_stop
from mgrpo.training.grader import Grader
from mgrpo.training.learner import Learner
from mgrpo.training.observers import Describer, Evaluator, RetentionWatch, StepResult
from mgrpo.training.passes import Passes
from mgrpo.training.schedule import is_due
from mgrpo.training.state import Checkpointer, Stateful, TrainState, digest, digest_tensors
from mgrpo.types import Metrics, Source, WeightTag


class Trainer:
    """Holds the parts of a run and takes its steps; every rank of a run has one, and all take each step together."""

    def __init__(
        self,
        config: Config,
        *,
        world: World = ALONE,
        make_engine: Callable[[LoadedModel, Config], Engine] | None = None,
    ):
        self.config, self.world, self.timer = config, world, Timer()
        # The embedded engine has a copy of the whole model anyway.
        by_rows = world.size > 1 and config.engine.name != "transformers"
        self.loaded = load_model(config.model, config.lora, seed=config.seed, by_rows=by_rows)
        self.model = self.loaded.model
        stop = make_stop(config.rollout.stop, config.data.template, self.loaded.tokenizer)
        self.data, self.probe = self._load_data()
        self.sampler = Sampler(len(self.data), config.rollout.num_prompts, config.seed)
        self.grader = Grader(config, self.loaded.tokenizer, stop, self.timer, self.world)
        self.engine = self._start_engine(make_engine, stop)
        self._shard()  # after the engine has copied the whole model
        self.forward = Forward(
            self.loaded,
            temperature=config.rollout.temperature,
            kernels=config.kernels,
            micro_batch_tokens=config.optim.micro_batch_tokens,
            packed=config.optim.packing == "packed",
            world=self.world,
            tree=config.distributed.tree,
        )
        self.momentum = self._make_momentum()
        self.learner = Learner(config, self.loaded, self.momentum, self.forward, self.timer, self.world)
        self.generator = Generator(
            self.engine, config.rollout, weights=self.weights, seed=config.seed, timer=self.timer
        )
        anchored = config.rollout.num_momentum > 0
        self.retention = Retention(config.monitor, num_prompts=config.rollout.num_prompts, anchored=anchored)
        self.watch = RetentionWatch(self.retention, self.grader, self.timer)
        initial = self._copy_initial() if needs_initial(config) and not self.loaded.adapter else None
        self.passes = Passes(
            config,
            self.loaded,
            self.momentum,
            self.forward,
            self.engine,
            initial=self._as_initial(initial),
            timer=self.timer,
        )
        self.source = self._make_source()
        self.evaluator = Evaluator(config, self.loaded, self.probe, self.generator, self.grader)
        self.describer = Describer(config, self.loaded.tokenizer)
        self.state = TrainState()
        self.checkpointer = Checkpointer(
            self.loaded,
            self.momentum,
            self.learner,
            self.source,
            parts=self._parts(),
            fingerprints=self._fingerprints(initial),
            trusted=config.model.trust_remote_code,
            world=self.world,
        )

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return self.state.step

    def train(self, num_steps: int) -> Iterator[Metrics]:
        """Takes steps up to `num_steps` and yields the metrics of each."""
        while self.step < num_steps:
            yield self.train_step().metrics

    def train_step(self) -> StepResult:
        """One step of M-GRPO."""
        self.timer.restart()
        with self.state.next_step(self.source) as step:  # an engine that dies leaves the state of the step before
            batch = self.source.next(step)  # rollouts of both models
            age = self.learner.step - batch.trajectories.version
            logprobs = self.passes.run(batch)  # old and reference log-probs, entropies
            credit = self.grader.assign_credit(batch, logprobs)  # answers, filter, vote, reward, advantage
            update = self.learner.learn(batch.trajectories, logprobs, credit)  # optimiser steps, each before an EMA
        return self.observe(
            StepResult(step=step, age=age, batch=batch, logprobs=logprobs, credit=credit, update=update)
        )

    def observe(self, result: StepResult) -> StepResult:
        """Adds metrics, samples and the report of faults to the result of a step."""
        t, logprobs, metrics = result.batch.trajectories, result.logprobs, result.metrics
        metrics |= step_metrics(result.step, result.credit) | result.update.metrics
        metrics["kl"] = metrics["kl"] if logprobs.reference is not None else None
        metrics |= {"kl_initial": logprobs.kl_initial, "rollbacks": self.state.rollbacks} | logprobs.parity
        metrics |= self.watch.after(result.batch, result.credit) | result.batch.metrics | {"rollout_age": result.age}
        metrics["logprob_gap"] = mean((logprobs.old - t.rollout_logprob).abs()[t.by_policy])
        if self.loaded.adapter:
            metrics["trained_parameters"] = sum(p.numel() for p in self.learner.parameters)
        if is_due(self.config.eval.every, result.step, self.config.steps):
            if self.probe:
                self.source.settle()
            with self.timer("eval"):
                self.evaluator.after(result)
        self.describer.after(result)
        metrics |= self.timer.metrics()
        metrics["tokens_per_s"] = int(t.mask.sum()) / (metrics["step_s"] - metrics.get("time_eval_s", 0.0))
        return result

    def weights(self, source: Source) -> tuple[Mapping[str, torch.Tensor], WeightTag]:
        """A source's weights for the engine, and their tag."""
        adapter, tag = self.loaded.adapter, WeightTag(source, self.learner.step)
        if adapter and not self.engine.weights_are_shared:
            return adapter.merged(source, self.loaded.dtype), tag
        if source == "momentum":
            return self.momentum.state_dict(for_engine=True), tag
        return adapter.weights(POLICY) if adapter else self.model.state_dict(), tag

    def save(self, folder: Path) -> None:
        """Writes all state that the next step depends on into a checkpoint folder."""
        self.snapshot(copy=False)(folder)

    def snapshot(self, *, copy: bool = True) -> Callable[[Path], None]:
        """Copies that state to the host; the returned function writes it, from any thread.

        Every rank must call it, and writes its part. Without `copy`, that must be before the next step.
        """
        return self.checkpointer.snapshot(copy=copy)

    def restore(self, folder: Path) -> None:
        """Restores what `save` wrote; raises CheckpointError if data or base model differ."""
        self.checkpointer.restore(folder)

    def roll_back(self, folder: Path) -> None:
        """Restores what `save` wrote, but goes on with the next prompts and counts the rollback.

        Rollouts in flight are dropped, those of now and those of the checkpoint: they belong to undone steps.
        """
        self.source.drop()
        rollbacks, place = self.state.rollbacks + 1, self.sampler.state_dict()
        self.restore(folder)
        self.source.drop()
        self.state.rollbacks = rollbacks
        self.sampler.load_state_dict(place)

    def close(self) -> None:
        """Ends the worker processes and closes the engine."""
        self.grader.checker.close()
        self.engine.close()
        self.source.close()

    def _start_engine(
        self, make_engine: Callable[[LoadedModel, Config], Engine] | None, stop: StopTexts | None
    ) -> Engine:
        """The engine, of all ranks where there are several."""
        tree = self.config.distributed.tree
        if make_engine:
            return make_ranked(partial(make_engine, self.loaded, self.config), self.world, tree=tree)
        options = {"stop": stop, "max_length": self._longest(), "world": self.world, "tree": tree}
        return start_engine(self.loaded, self.config.engine, **options)

    def _make_source(self) -> RolloutSource:
        """Rollouts of now, or of the step before."""
        options = {"requests": self.watch.requests, "timer": self.timer}
        if not self.config.rollout.ahead:
            return RolloutsNow(self.data, self.sampler, self.generator, **options)
        last_step = self.config.steps
        return RolloutsAhead(
            self.data, self.sampler, self.generator, **options, check=self.passes.check_engine, last_step=last_step
        )

    def _load_data(self) -> tuple[Dataset, Dataset | None]:
        """Prompts to train on, and the eval set."""
        c = self.config
        data = load_prompts(c, self.loaded, c.data.train)
        probe = load_prompts(c, self.loaded, c.data.probe) if c.data.probe else None
        if needs_labels(c.objective.reward):
            require_answers(data, f"--objective.reward {c.objective.reward}")
        if probe is not None:
            require_answers(probe, "--data.probe")
        require_prompts(data, c)
        return data, probe

    def _parts(self) -> dict[str, Stateful]:
        """The parts whose JSON state a checkpoint holds."""
        return {
            "train": self.state,
            "learner": self.learner,
            "sampler": self.sampler,
            "retention": self.retention,
        }

    def _longest(self) -> int:
        """Tokens of the longest prompt and the longest response together."""
        datasets = [self.data, *([self.probe] if self.probe else [])]
        return max(len(prompt.ids) for data in datasets for prompt in data.prompts) + self.config.rollout.max_new_tokens

    def _shard(self) -> None:
        """Divides the weights among the ranks, those of adapters too, and reads them if they were not read whole."""
        loaded = self.loaded
        dtype, empty = loaded.dtype, loaded.files is not None
        if loaded.adapter:
            if dtype != torch.float32:  # only now, because the engine compares ways of decoding in fp32
                loaded.adapter.cast_base(dtype, empty=empty)
            loaded.adapter.add_frozen(MOMENTUM)
            dtype = torch.float32  # frozen weights are in `dtype` already, the adapters stay in fp32
        shard_model(self.model, self.world, dtype=dtype, tree=self.config.distributed.tree)
        loaded.fill()

    def _make_momentum(self) -> Momentum:
        """The momentum model: a copy of the policy's weights, or a second adapter of its model."""
        c, adapter = self.config, self.loaded.adapter
        if adapter is None:
            engine_dtype = None if self.engine.weights_are_shared else self.loaded.dtype
            return Momentum(self.model, c.momentum, seed=c.seed, kernels=c.kernels, engine_dtype=engine_dtype)
        return AdapterMomentum(adapter, c.momentum, seed=c.seed, kernels=c.kernels)

    def _as_initial(self, initial: Mapping[str, torch.Tensor] | None) -> Callable[[], AbstractContextManager[None]]:
        """Returns a function that lets the policy compute as at the start of the run, given a copy of the weights."""
        if self.loaded.adapter:
            return partial(self.loaded.adapter.using, INITIAL)
        return partial(borrowed_weights, self.model, initial or {})

    def _copy_initial(self) -> dict[str, torch.Tensor]:
        """A copy of the starting weights, in the precision of forward passes."""
        return {name: p.detach().to(self.loaded.dtype, copy=True) for name, p in self.model.named_parameters()}

    def _fingerprints(self, initial: Mapping[str, torch.Tensor] | None) -> dict[str, str | None]:
        """Digests of inputs that a resumed run must find unchanged, by option and content; None if unused."""

        def of_answers(data: Dataset) -> str:
            return digest(json.dumps([prompt.answer for prompt in data.prompts]).encode())

        adapter = self.loaded.adapter
        initial = adapter.base_weights() if adapter else initial  # which no checkpoint holds

        return {
            "data.train/prompts": self.data.fingerprint,
            "data.train/labels": of_answers(self.data) if needs_labels(self.config.objective.reward) else None,
            "data.probe/prompts": self.probe.fingerprint if self.probe else None,
            "data.probe/answers": of_answers(self.probe) if self.probe else None,
            "model.path/weights": digest_tensors(initial) if initial else None,
            "model.path/adapter": digest_tensors(adapter.start) if adapter and adapter.start else None,
        }


def needs_initial(config: Config) -> bool:
    """Whether the run needs a copy of its initial weights."""
    o = config.objective
    return config.log.kl_initial_every > 0 or (o.kl_coef > 0 and o.kl_reference == "initial")
