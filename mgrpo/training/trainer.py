"""The training loop, which reads as the algorithm.

One step: prompts, rollouts of momentum and policy, scores, IQR filter, vote, rewards, advantages, clipped update, EMA.
Letters: B prompts, M policy and N momentum rollouts a prompt, G = M + N, R = B * G trajectories, L response tokens.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import mgrpo_kernels as K
from mgrpo.algorithm.credit import judge
from mgrpo.algorithm.loss import Batch
from mgrpo.config import Config
from mgrpo.data.load import load_prompts, require_answers, require_prompts
from mgrpo.data.prompts import Dataset, Prompt
from mgrpo.data.sampler import Sampler
from mgrpo.errors import CheckpointError, EngineError, StaleWeightsError
from mgrpo.evaluation.evaluate import Evaluation, evaluate
from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.extract import make_extractor
from mgrpo.grading.worker import StartError
from mgrpo.models.forward import Scorer, TokenScores
from mgrpo.models.load import LoadedModel, borrowed_weights, load_model, load_weights
from mgrpo.models.momentum import Momentum
from mgrpo.models.save import save_model
from mgrpo.observe.catalogue import KEYS
from mgrpo.observe.retention import Retention
from mgrpo.observe.step import Outcome, mean, outcome_metrics
from mgrpo.observe.timer import Timer
from mgrpo.rollout.build import start_engine
from mgrpo.rollout.engine import Engine
from mgrpo.rollout.parity import check_embedded, check_parity
from mgrpo.rollout.stop import make_stop, read_texts
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.rollout.vllm.base import CheckedEngine
from mgrpo.rollout.vllm.server import EnginePair
from mgrpo.training.learner import Learner
from mgrpo.training.state import (
    copy_tensors,
    digest,
    digest_tensors,
    load_optimizer,
    optimizer_tensors,
    rng_state,
    set_rng_state,
)
from mgrpo.types import Metrics, Rollouts, Sampling, Source, Trajectories, join

# After the first loads an engine is compared with the trainer at every step; later now and then.
PARITY_STEPS = 2
PARITY_ROWS = 8
MAX_FAULT_ROWS = 64  # trajectories written of a step that was not finite


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the scoring passes found; [R, L] with zeros at padding, [B, G] a trajectory."""

    old_logprob: torch.Tensor  # [R, L] fp32, under the policy
    ref_logprob: torch.Tensor | None  # [R, L] fp32, under the reference of the KL
    kl_initial: float | None  # mean k3 KL of the policy's tokens to the initial model
    entropy: torch.Tensor  # [B, G] fp32, mean token entropy under the policy
    judged_entropy: torch.Tensor  # [B, G] fp32, what the filter looks at
    self_certainty: torch.Tensor | None  # [B, G] fp32


class Trainer:
    """Holds everything that a run carries from step to step, and takes the steps."""

    def __init__(self, config: Config, *, make_engine: Callable[[LoadedModel, Config], Engine] | None = None):
        self.config = config
        self.extract = make_extractor(config.answer.extract)
        self.loaded = load_model(config.model)
        self.model = self.loaded.model
        self.stop = make_stop(config.rollout.stop, config.data.template, self.loaded.tokenizer)
        self.data = load_prompts(config, self.loaded, config.data.train)
        self.probe = load_prompts(config, self.loaded, config.data.probe) if config.data.probe else None
        if config.objective.reward == "labels":
            require_answers(self.data, "--objective.reward labels")
        if self.probe is not None:
            require_answers(self.probe, "--data.probe")
        require_prompts(self.data, config)
        self.sampler = Sampler(len(self.data), config.rollout.prompts, config.seed)
        answer = config.answer
        self.checker = AnswerChecker(mode=answer.equivalence, timeout_s=answer.timeout_s, num_workers=answer.workers)
        self.scorer = Scorer(
            self.loaded,
            temperature=config.rollout.temperature,
            kernels=config.kernels,
            micro_batch_tokens=config.optim.micro_batch_tokens,
        )
        self.engine = (make_engine or partial(start_engine, max_length=self._longest()))(self.loaded, config)
        publish = self.loaded.dtype if config.rollout.engine == "vllm" else None
        self.momentum = Momentum(self.model, config.momentum, seed=config.seed, kernels=config.kernels, publish=publish)
        self.learner = Learner(config, self.loaded, self.momentum, self.scorer)
        self.initial = self._copy_initial() if needs_initial(config) else None
        self.fingerprints = self._fingerprints()
        self.retention = Retention(
            config.monitor, num_prompts=config.rollout.prompts, anchored=config.rollout.momentum > 0
        )
        self.step = 0
        self.rollbacks = 0
        self.restored_threads: int | None = None  # of the process that wrote what was restored
        self.fault: dict[str, Any] | None = None  # what is known of the newest step, if it was not finite
        self.samples: list[dict[str, Any]] = []  # of the newest sampled step
        self.lost_engine: EngineError | None = None  # of an evaluation, after which no other step can be taken

    @property
    def version(self) -> int:
        """Version of the weights: optimiser steps so far."""
        return self.learner.step

    def train(self, num_steps: int) -> Iterator[Metrics]:
        """Takes steps up to `num_steps` and yields the metrics of each."""
        while self.step < num_steps:
            yield self.train_step()

    def train_step(self) -> Metrics:
        """One step of M-GRPO."""
        start, timer, place = time.perf_counter(), Timer(), self.sampler.state_dict()
        self.step += 1
        prompts = [self.data.prompts[i] for i in self.sampler.next()]
        try:
            with timer("rollout"):
                trajectories = self.roll_out(prompts, timer)
            with timer("monitor"):
                greedy = self.answer_greedily(self.retention.asks(self.step, [prompt.index for prompt in prompts]))
            if isinstance(self.engine, CheckedEngine):
                with timer("publish"):
                    self.engine.sleep()
        except EngineError:
            # Nothing has changed yet: the state is that of the step before, and can be saved.
            self.step -= 1
            self.sampler.load_state_dict(place)
            raise
        with timer("score"):
            scores = self.score(trajectories)
            parity = self.check_parity(trajectories, scores)
        with timer("vote"):
            try:
                outcome = self.judge(prompts, trajectories, scores)
            except StartError as error:
                self.step -= 1
                self.sampler.load_state_dict(place)
                raise EngineError(f"answers: {error}") from error
        with timer("update"):
            batch = Batch(
                mask=trajectories.mask,
                advantage=outcome.advantage.flatten(),
                old_logprob=scores.old_logprob,
                rollout_logprob=trajectories.rollout_logprob,
                ref_logprob=scores.ref_logprob,
            )
            sound = find_sound(trajectories, scores, outcome)
            update_metrics = self.learner.update(trajectories, batch, outcome.trains, timer, sound=sound)
        faults = self.learner.faults
        self.fault = self._describe_faults(prompts, trajectories, scores, outcome, sound) if faults else None
        metrics: Metrics = dict.fromkeys(KEYS) | {"step": self.step, **outcome_metrics(outcome), **update_metrics}
        metrics["kl"] = metrics["kl"] if scores.ref_logprob is not None else None
        metrics["kl_initial"] = scores.kl_initial
        metrics |= parity
        metrics["rollbacks"] = self.rollbacks
        with timer("monitor"):
            metrics["retention"] = self.watch_retention(prompts, greedy, outcome)
        if isinstance(self.engine, CheckedEngine | EnginePair):
            metrics |= {"kv_cache_usage": self.engine.kv_cache_usage, "redrawn": self.engine.redrawn}
        metrics["logprob_gap"] = mean(
            (scores.old_logprob - trajectories.rollout_logprob).abs()[self._by_policy(trajectories)]
        )
        if self._due(self.config.eval.every):
            with timer("eval"):
                metrics |= self.probe_metrics_if_alive()
            if self.config.log.samples:
                rows = range(min(self.config.log.samples, len(prompts)) * outcome.keep.shape[1])
                self.samples = self._describe(rows, prompts, trajectories, outcome)
        metrics |= timer.metrics()
        metrics["step_s"] = time.perf_counter() - start
        metrics["tokens_per_s"] = int(trajectories.mask.sum()) / (metrics["step_s"] - timer.seconds.get("eval", 0.0))
        return metrics

    def roll_out(self, prompts: Sequence[Prompt], timer: Timer) -> Trajectories:
        """Generates N momentum rollouts, then M policy rollouts of every prompt."""
        ids = [prompt.ids for prompt in prompts]
        counts: dict[Source, int] = {"momentum": self.config.rollout.momentum, "policy": self.config.rollout.policy}
        found: dict[Source, Rollouts] = {}
        if isinstance(self.engine, EnginePair):
            for source in counts:
                with timer("publish"):
                    self.publish(source)
            with ThreadPoolExecutor(len(counts)) as pool:
                asked: dict[Source, Any] = {s: pool.submit(self._generate, ids, n, s, timer) for s, n in counts.items()}
            found = {source: future.result() for source, future in asked.items()}
        else:
            for source, n in counts.items():
                if n:
                    with timer("publish"):
                        self.publish(source)
                    found[source] = self._generate(ids, n, source, timer)
        return join(ids, found["policy"], found.get("momentum"))

    def answer_greedily(self, indices: Sequence[int]) -> list[str | None]:
        """Answers of the policy that the engine holds to prompts, one each without chance; None where there is none."""
        if not indices:
            return []
        prompts = [self.data.prompts[i].ids for i in indices]
        sampling = Sampling(temperature=0.0, max_new_tokens=self.config.rollout.max_new_tokens)
        rollouts = self.engine.generate(prompts, 1, sampling, source="policy", version=self.version)
        return self._extract(prompts, [rollouts.response(row) for row in range(len(prompts))])

    def watch_retention(self, prompts: Sequence[Prompt], greedy: list[str | None], outcome: Outcome) -> float | None:
        """Remembers sure answers in the first steps; later the share of them that is left, where it was asked for."""
        if self.step <= self.retention.last_collected:
            shares, batch = outcome.vote.share.tolist(), [prompt.index for prompt in prompts]
            self.retention.collect(batch, greedy, outcome.labels, shares, self.checker)
            return None
        return self.retention.measure(greedy, self.checker) if greedy else None

    @torch.no_grad()
    def score(self, trajectories: Trajectories) -> Scores:
        """Takes old log-probs and entropies under the policy, and what filter and KL ask of other weights."""
        c = self.config
        under_policy = self._score(trajectories, self_certainty=c.objective.reward == "self-certainty")
        certainty = under_policy.self_certainty
        judged = under_policy.entropy
        if c.filter.score == "source" and c.rollout.momentum:
            rows = trajectories.is_momentum.flatten().nonzero().flatten()
            with borrowed_weights(self.model, self.momentum.state_dict()):
                judged = judged.index_copy(0, rows, self._score(trajectories, rows=rows).entropy[rows])
        under_initial = reference = kl_initial = None
        uses_reference = c.objective.kl_coef > 0
        if (uses_reference and c.objective.kl_reference == "initial") or self._due(c.log.kl_initial_every):
            assert self.initial is not None
            with borrowed_weights(self.model, self.initial):
                under_initial = self._score(trajectories).logprob
            difference = (under_initial - under_policy.logprob)[self._by_policy(trajectories)]
            kl_initial = mean(difference.exp() - difference - 1)
        if uses_reference and c.objective.kl_reference == "initial":
            reference = under_initial
        elif uses_reference:
            with borrowed_weights(self.model, self.momentum.state_dict()):
                reference = self._score(trajectories).logprob
        return Scores(
            old_logprob=under_policy.logprob,
            ref_logprob=reference,
            kl_initial=kl_initial,
            entropy=self._per_trajectory(under_policy.entropy, trajectories),
            judged_entropy=self._per_trajectory(judged, trajectories, reduce=c.filter.entropy),
            self_certainty=None if certainty is None else self._per_trajectory(certainty, trajectories),
        )

    @torch.no_grad()
    def check_parity(self, trajectories: Trajectories, scores: Scores) -> Metrics:
        """Compares a few log-probs of the engine under both weights with the trainer's, where due: {} where not.

        StaleWeightsError stops the run where they are too far apart.
        """
        c = self.config.rollout
        due = self.step <= PARITY_STEPS or (c.parity_every > 0 and self.step % c.parity_every == 0)
        # Under nucleus sampling vLLM divides by a mass that the trainer does not know.
        # An engine that a program brings has log-probs of its own making.
        is_foreign = c.engine != "vllm" and not isinstance(self.engine, TransformersEngine)
        if not due or is_foreign or (c.engine == "vllm" and c.top_p < 1):
            return {}
        metrics: Metrics = {}
        from_momentum = trajectories.is_momentum.flatten()
        check = check_parity if c.engine == "vllm" else partial(check_embedded, top_p=c.top_p)
        compare = partial(check, dtype=self.loaded.dtype, version=self.version)
        rows = (~from_momentum).nonzero().flatten()
        pair = (trajectories.rollout_logprob[rows], scores.old_logprob[rows], trajectories.mask[rows])
        metrics["parity_policy"] = compare(*pair, source="policy")
        if c.momentum:
            rows = from_momentum.nonzero().flatten()[:PARITY_ROWS]
            with borrowed_weights(self.model, self.momentum.state_dict()):
                expected = self._score(trajectories, rows=rows).logprob[rows]
            pair = (trajectories.rollout_logprob[rows], expected, trajectories.mask[rows])
            metrics["parity_momentum"] = compare(*pair, source="momentum")
        return metrics

    def judge(self, prompts: Sequence[Prompt], trajectories: Trajectories, scores: Scores) -> Outcome:
        """Filters, votes, rewards and compares within groups. True answers reach metrics and reward `labels` alone."""
        c = self.config
        judged = judge(
            self.read_answers(prompts, trajectories),
            scores.judged_entropy,
            trajectories.num_policy,
            filter=c.filter,
            vote=c.vote,
            objective=c.objective,
            checker=self.checker,
            may_train=self._may_train(trajectories),
            mean_entropy=scores.entropy,
            self_certainty=scores.self_certainty,
            true_answers=[prompt.answer for prompt in prompts] if c.objective.reward == "labels" else None,
            backend=c.kernels.backend,
        )
        return Outcome(
            **vars(judged),
            lengths=trajectories.lengths,
            truncated=trajectories.truncated,
            entropy=scores.entropy,
            label_correct=[
                self.checker.is_correct(label, prompt.answer)
                for label, prompt in zip(judged.labels, prompts, strict=True)
                if prompt.answer is not None
            ],
        )

    def read_answers(self, prompts: Sequence[Prompt], trajectories: Trajectories) -> list[list[str | None]]:
        """Answers of every trajectory, [B][G]; None where there is none."""
        num_prompts, group = trajectories.truncated.shape
        rows = range(num_prompts * group)
        answers = self._extract(
            [prompts[row // group].ids for row in rows], [trajectories.response(row) for row in rows]
        )
        return [answers[b * group : (b + 1) * group] for b in range(num_prompts)]

    def probe_metrics(self) -> Metrics:
        """Accuracy of policy and momentum on the probe; nothing without one."""
        metrics: Metrics = {}
        if self.probe is None:
            return metrics
        sources: list[Source] = ["policy", "momentum"] if self.config.rollout.momentum else ["policy"]
        for source in sources:
            result = self.evaluate_probe(source)
            metrics[f"probe_accuracy_{source}"] = result.avg_at_k
            metrics[f"probe_greedy_{source}"] = result.greedy
            metrics[f"probe_majority_{source}"] = result.maj_at_k
            metrics[f"probe_pass_{source}"] = result.pass_at_k
        return metrics

    def probe_metrics_if_alive(self) -> Metrics:
        """`probe_metrics`; {} of an engine that dies, for by then the step is taken. `lost_engine` has the error."""
        try:
            return self.probe_metrics()
        except StaleWeightsError:
            raise
        except EngineError as error:
            self.lost_engine = error
            return {}

    def evaluate_probe(self, source: Source) -> Evaluation:
        """Evaluates one source's weights on the probe."""
        assert self.probe is not None
        c = self.config
        self.publish(source)
        sampling = Sampling(
            temperature=c.rollout.temperature,
            top_p=c.rollout.top_p,
            max_new_tokens=c.rollout.max_new_tokens,
            seed=derive_seed(c.seed, self.step, "probe"),
        )
        return evaluate(
            self.engine,
            self.loaded,
            self.probe,
            self.extract,
            self.checker,
            sampling,
            samples=c.eval.samples,
            source=source,
            version=self.version,
            stop=self.stop,
        )

    def publish(self, source: Source) -> None:
        """Hands one source's weights to the engine under their version."""
        weights = self.model.state_dict() if source == "policy" else self.momentum.state_dict(published=True)
        self.engine.load(weights, source=source, version=self.version)

    def save(self, folder: Path) -> None:
        """Writes everything that the next step depends on into a checkpoint folder."""
        self._make_writer(lambda tensors: tensors)(folder)

    def snapshot(self) -> Callable[[Path], None]:
        """Copies everything that the next step depends on, on the host; the result writes it, from any thread."""
        return self._make_writer(copy_tensors)

    def _make_writer(
        self, take: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    ) -> Callable[[Path], None]:
        """`save` of what `take` makes of the tensors of this moment."""
        model, tokenizer = self.model, self.loaded.tokenizer
        weights = {"policy": take(model.state_dict()), "momentum": take(self.momentum.state_dict())}
        tensors = {"optimizer": take(optimizer_tensors(self.learner.optimizer, self.learner.names))}
        if self.momentum.compensation:
            tensors["momentum_compensation"] = take(self.momentum.compensation)
        state = json.dumps(
            {
                "step": self.step,
                "optimizer_step": self.learner.step,
                "nonfinite_steps": self.learner.nonfinite_steps,
                "nonfinite_in_row": self.learner.nonfinite_in_row,
                "sampler": self.sampler.state_dict(),
                "retention": self.retention.state_dict(),
                "rollbacks": self.rollbacks,
                "threads": torch.get_num_threads(),
                "fingerprints": self.fingerprints,
                "rng": rng_state(),
            }
        )

        def write(folder: Path) -> None:
            for source, values in weights.items():
                save_model(folder / source, model, values, tokenizer)
            for name, values in tensors.items():
                save_file(
                    {key: value.cpu().contiguous() for key, value in values.items()}, folder / f"{name}.safetensors"
                )
            (folder / "state.json").write_text(state)

        return write

    def restore(self, folder: Path) -> None:
        """Restores what `save` wrote; raises CheckpointError where data or base model are others."""
        state = json.loads((folder / "state.json").read_text())
        for name, current in self.fingerprints.items():
            if None not in (current, saved := state["fingerprints"][name]) and saved != current:
                option, content = name.split("/")
                raise CheckpointError(
                    f"resume: --{option} must hold the {content} that {folder} was trained with, got others."
                )
        trusted = self.config.model.trust_remote_code
        policy = load_weights(folder / "policy", trust_remote_code=trusted)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(policy[name])
        compensation = folder / "momentum_compensation.safetensors"
        self.momentum.load(
            load_weights(folder / "momentum", trust_remote_code=trusted),
            load_file(compensation) if self.momentum.compensation else None,
        )
        load_optimizer(folder / "optimizer.safetensors", self.learner.optimizer, self.learner.names)
        self.step = state["step"]
        self.restored_threads = state.get("threads")
        self.learner.step = state["optimizer_step"]
        self.learner.nonfinite_steps = state["nonfinite_steps"]
        self.learner.nonfinite_in_row = state["nonfinite_in_row"]
        self.sampler.load_state_dict(state["sampler"])
        self.retention.load_state_dict(state["retention"])
        self.rollbacks = state["rollbacks"]
        set_rng_state(state["rng"])

    def _longest(self) -> int:
        """Tokens of the longest prompt with a whole response."""
        datasets = [self.data, *([self.probe] if self.probe else [])]
        return max(len(prompt.ids) for data in datasets for prompt in data.prompts) + self.config.rollout.max_new_tokens

    def close(self) -> None:
        """Ends the worker processes and frees the engine."""
        self.checker.close()
        if isinstance(self.engine, CheckedEngine | EnginePair):
            self.engine.close()

    def _generate(self, ids: list[tuple[int, ...]], n: int, source: Source, timer: Timer) -> Rollouts:
        """Samples n rollouts a prompt from one source, whose weights are published."""
        c = self.config.rollout
        sampling = Sampling(
            temperature=c.temperature,
            top_p=c.top_p,
            max_new_tokens=c.max_new_tokens,
            seed=derive_seed(self.config.seed, self.step, source),
        )
        with timer(f"rollout_{source}"):
            return self.engine.generate(ids, n, sampling, source=source, version=self.version)

    def _score(self, trajectories: Trajectories, **options: Any) -> TokenScores:
        """Scores under the weights that the model holds just now."""
        return self.scorer.score(self.model, trajectories, **options)

    def _per_trajectory(self, values: torch.Tensor, trajectories: Trajectories, reduce: str = "mean") -> torch.Tensor:
        """Token values [R, L] to one number a trajectory, [B, G]."""
        reduced = K.trajectory_entropy(
            values, mask=trajectories.mask, reduce=reduce, backend=self.config.kernels.backend
        )
        return reduced.view(trajectories.truncated.shape)

    def _may_train(self, trajectories: Trajectories) -> torch.Tensor:
        """[B, G] bool, trajectories that the options let into the loss."""
        c = self.config
        may = (torch.arange(trajectories.truncated.shape[1]) < c.num_train).expand(trajectories.truncated.shape)
        if c.objective.momentum_in_loss:
            may = may | trajectories.is_momentum
        return may & ~trajectories.truncated if c.rollout.truncated == "mask" else may

    def _by_policy(self, trajectories: Trajectories) -> torch.Tensor:
        """[R, L] bool, response tokens that the policy wrote."""
        return trajectories.mask & ~trajectories.is_momentum.flatten()[:, None]

    def _due(self, every: int) -> bool:
        """Whether this step is one of every so many, or the last."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def _copy_initial(self) -> dict[str, torch.Tensor]:
        """A copy of the starting weights, in the precision of forward passes."""
        return {name: p.detach().to(self.loaded.dtype, copy=True) for name, p in self.model.named_parameters()}

    def _fingerprints(self) -> dict[str, str | None]:
        """Digests of what a resumed run reads anew and must find as it was, by option and content; None of what it does
        not use.
        """

        def of_answers(data: Dataset) -> str:
            return digest(json.dumps([prompt.answer for prompt in data.prompts]).encode())

        return {
            "data.train/prompts": self.data.fingerprint,
            "data.train/labels": of_answers(self.data) if self.config.objective.reward == "labels" else None,
            "data.probe/prompts": self.probe.fingerprint if self.probe else None,
            "data.probe/answers": of_answers(self.probe) if self.probe else None,
            "model.path/weights": digest_tensors(self.initial) if self.initial else None,
        }

    def _extract(self, prompts: Sequence[Sequence[int]], responses: list[list[int]]) -> list[str | None]:
        """Answers in responses of token ids to each one's prompt; None where there is none."""
        return [self.extract(t) for t in read_texts(self.loaded.tokenizer, responses, self.stop, prompts=prompts)]

    def _describe(
        self, rows: Sequence[int], prompts: Sequence[Prompt], t: Trajectories, o: Outcome
    ) -> list[dict[str, Any]]:
        """What a person wants to know of trajectories `rows`."""
        group = o.keep.shape[1]
        return [
            {
                "step": self.step,
                "prompt": prompts[b].text,
                "source": "momentum" if i >= o.num_policy else "policy",
                "response": response,
                "answer": o.answers[b][i],
                "pseudo_label": o.labels[b],
                "reward": float(o.rewards[b, i]),
                "advantage": float(o.advantage[b, i]),
                "entropy": float(o.entropy[b, i]),
                "kept": bool(o.keep[b, i]),
            }
            for row, response in zip(
                rows, self.loaded.tokenizer.batch_decode([t.response(row) for row in rows]), strict=True
            )
            for b, i in [divmod(row, group)]
        ]

    def _describe_faults(
        self, prompts: Sequence[Prompt], t: Trajectories, scores: Scores, o: Outcome, sound: torch.Tensor
    ) -> dict[str, Any]:
        """What helps to find out why optimiser steps were not finite: their trajectories, the suspect ones first."""
        sound = sound.flatten()
        rows = sorted({row for fault in self.learner.faults for row in fault.rows}, key=lambda row: bool(sound[row]))
        rows = rows[:MAX_FAULT_ROWS]
        return {
            "step": self.step,
            "optimizer_steps": [vars(fault) for fault in self.learner.faults],
            "trajectories": [
                entry
                | {
                    "finite": bool(sound[row]),
                    "tokens": t.response(row),
                    "old_logprob": scores.old_logprob[row, t.mask[row]].tolist(),
                    "rollout_logprob": t.rollout_logprob[row, t.mask[row]].tolist(),
                }
                for row, entry in zip(rows, self._describe(rows, prompts, t, o), strict=True)
            ],
        }


def find_sound(trajectories: Trajectories, scores: Scores, outcome: Outcome) -> torch.Tensor:
    """[B, G] bool, trajectories all of whose numbers are finite, at response tokens."""
    tokens = [scores.old_logprob, trajectories.rollout_logprob]
    tokens += [] if scores.ref_logprob is None else [scores.ref_logprob]
    finite = torch.stack([(values.isfinite() | ~trajectories.mask).all(1) for values in tokens]).all(0)
    whole = (scores.entropy, scores.judged_entropy, outcome.rewards, outcome.advantage)
    return finite.view(outcome.rewards.shape) & torch.stack([values.isfinite() for values in whole]).all(0)


def needs_initial(config: Config) -> bool:
    """Whether the run compares itself with its starting weights."""
    o = config.objective
    return config.log.kl_initial_every > 0 or (o.kl_coef > 0 and o.kl_reference == "initial")


def derive_seed(seed: int, step: int, stream: str) -> int:
    """A seed of its own for every step and stream of draws."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{stream}".encode()).digest()[:6])
