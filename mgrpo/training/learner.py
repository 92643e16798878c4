"""The update: AdamW steps on the clipped objective, each followed by the EMA of the momentum model.

Letters: B prompts, G rollouts a prompt, R = B * G trajectories.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mgrpo.algorithm.loss import Batch, has_gradient, kl_cov_tokens, micro_batch_loss, normalizer
from mgrpo.config import Config
from mgrpo.config.distributed import LANES
from mgrpo.distributed.sharding import Gradients, clip_by_rows
from mgrpo.distributed.world import ALONE, World
from mgrpo.models.forward import Forward
from mgrpo.models.load import LoadedModel
from mgrpo.models.momentum import Momentum
from mgrpo.observe.step import Outcome
from mgrpo.observe.timer import Timer
from mgrpo.training.offload import HostAdamW
from mgrpo.training.passes import LogProbs
from mgrpo.training.schedule import learning_rate
from mgrpo.types import Metrics, TrajectoryBatch


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A non-finite optimiser step, which changed no weight."""

    optimizer_step: int
    loss: float
    grad_norm: float
    rows: list[int]  # trajectories of its minibatch that are in the loss or non-finite


@dataclass(frozen=True, kw_only=True)
class Update:
    """Result of the optimiser steps on one rollout batch."""

    metrics: Metrics
    faults: list[Fault]
    not_finite: torch.Tensor  # [B, G] bool, trajectories with a non-finite number


class Learner:
    """Updates the policy and, after each optimiser step, the momentum model."""

    def __init__(
        self,
        config: Config,
        loaded: LoadedModel,
        momentum: Momentum,
        forward: Forward,
        timer: Timer,
        world: World = ALONE,
    ):
        self.config, self.model, self.momentum, self.forward = config, loaded.model, momentum, forward
        self.world = world
        self.timer = timer  # times `update`, and `ema` within
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        # Norms and biases, of one dimension, have no weight decay.
        groups = [{"params": [p], "weight_decay": config.optim.weight_decay if p.ndim > 1 else 0.0} for _, p in named]
        optimizer = HostAdamW if config.optim.offload else torch.optim.AdamW
        self.optimizer = optimizer(groups, lr=config.optim.lr, betas=(config.optim.beta1, config.optim.beta2))
        self.step = 0  # optimiser steps taken or skipped
        self.nonfinite_steps = 0
        self.nonfinite_in_row = 0

    def learn(self, trajectories: TrajectoryBatch, logprobs: LogProbs, credit: Outcome) -> Update:
        """Takes every optimiser step of one rollout batch."""
        with self.timer("update"):
            batch = Batch(
                mask=trajectories.mask,
                advantage=credit.advantage.flatten(),
                old_logprob=logprobs.old,
                rollout_logprob=trajectories.rollout_logprob,
                ref_logprob=logprobs.reference,
            )
            finite = credit.rewards.isfinite() & credit.advantage.isfinite()
            not_finite = logprobs.not_finite(trajectories) | ~finite
            return self.update(trajectories, batch, credit.trains, not_finite=not_finite)

    def update(
        self,
        trajectories: TrajectoryBatch,
        batch: Batch,
        trains: torch.Tensor,
        *,
        not_finite: torch.Tensor | None = None,
    ) -> Update:
        """Takes every optimiser step on given advantages.

        Args:
            trajectories: rollouts.
            batch: what the loss needs of them.
            trains: [B, G] bool, trajectories in the loss.
            not_finite: [B, G] bool, trajectories with non-finite log-probs or rewards, none by default; the optimiser
                step of their prompt changes nothing, even if the filter has dropped them.
        """
        c = self.config.optim
        not_finite = torch.zeros_like(trains) if not_finite is None else not_finite
        rows = torch.arange(trains.numel()).view(trains.shape)
        steps: list[Metrics] = []
        faults: list[Fault] = []
        for _ in range(c.num_epochs):
            for part in torch.arange(len(rows)).tensor_split(c.num_minibatches):
                chosen, lost = rows[part][trains[part]], rows[part][not_finite[part]]
                metrics, fault = self.optimizer_step(trajectories, batch, chosen, not_finite=lost)
                steps.append(metrics)
                faults += [fault] if fault else []
        metrics = _mean_of_known(steps) | {"nonfinite_steps": self.nonfinite_steps}
        return Update(metrics=metrics, faults=faults, not_finite=not_finite)

    def optimizer_step(
        self,
        trajectories: TrajectoryBatch,
        batch: Batch,
        rows: torch.Tensor,
        *,
        not_finite: torch.Tensor | None = None,
    ) -> tuple[Metrics, Fault | None]:
        """One optimiser step on trajectories `rows` [r], then the EMA; its metrics.

        A non-finite step, or one with trajectories `not_finite` [s], changes no weight and is returned as a fault.
        """
        c = self.config
        lr = learning_rate(c, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, metrics = self.backward(trajectories, batch, rows)
        norm = self.clip()
        logprobs = (batch.old_logprob, batch.rollout_logprob)
        lost = [] if not_finite is None else not_finite.tolist()
        finite = not lost and all(bool(values[rows][batch.mask[rows]].isfinite().all()) for values in logprobs)
        fault = None
        if finite and math.isfinite(loss) and math.isfinite(norm):
            # A step without any gradient does not show that the weights are finite.
            self.nonfinite_in_row = self.nonfinite_in_row if metrics["ratio_mean"] is None else 0
            self.optimizer.step()
            with self.timer("ema"):
                self.momentum.update(self.step, c.num_optimizer_steps)
        else:
            self.nonfinite_in_row += 1
            self.nonfinite_steps += 1
            suspects = sorted({*rows.tolist(), *lost})
            fault = Fault(optimizer_step=self.step, loss=loss, grad_norm=norm, rows=suspects)
        self.step += 1
        return {"loss": loss, "grad_norm": norm, "lr": lr, **metrics}, fault

    def backward(self, trajectories: TrajectoryBatch, batch: Batch, rows: torch.Tensor) -> tuple[float, Metrics]:
        """Gradients of the objective on trajectories `rows` [r], of which each rank computes its micro-batches.

        Returns the loss, and means over tokens, None if nothing has a gradient; the same on every rank.
        """
        c = self.config
        divisor = normalizer(batch.mask[rows], c.objective.reduce, c.rollout.max_new_tokens)
        kl_cov = kl_cov_tokens(batch, rows, c.objective.kl_cov) if c.objective.kl_cov else None
        gradients = Gradients(self.parameters, LANES // self.world.size if c.distributed.tree else None)
        plan = self.forward.plan(trajectories, rows[has_gradient(batch.advantage[rows], c.objective)])
        device = next(self.model.parameters()).device
        results = torch.zeros(len(plan), 1 + len(_LOSS_METRICS), device=device)
        for index, packed in self.forward.own(trajectories, plan):
            found = self.forward(self.model, packed)
            result = micro_batch_loss(
                found.logprob,
                found.entropy,
                batch,
                packed.rows,
                divisor,
                c.objective,
                kl_cov=kl_cov,
                max_length=c.rollout.max_new_tokens,
                backend=c.kernels.backend,
            )
            # What is computed in place of an empty micro-batch has no weight.
            (result.loss if plan[index] else 0.0 * result.loss).backward()
            gradients.add()
            if plan[index]:
                results[index] = torch.stack([result.loss.detach(), *(result.metrics[key] for key in _LOSS_METRICS)])
        gradients.finish()
        self.world.sum_(results)
        return _combine(results, [int(batch.mask[group].sum()) for group in plan])

    def clip(self) -> float:
        """Scales the gradients down to `grad_clip`; returns their norm before."""
        most = self.config.optim.grad_clip
        if self.config.distributed.tree or self.world.size > 1:
            return clip_by_rows(self.parameters, most, self.world)
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, most))

    def state_dict(self) -> dict[str, int]:
        """The counters; Checkpointer writes weights and moments."""
        return {
            "step": self.step,
            "nonfinite_steps": self.nonfinite_steps,
            "nonfinite_in_row": self.nonfinite_in_row,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores the counters."""
        self.step = state["step"]
        self.nonfinite_steps, self.nonfinite_in_row = state["nonfinite_steps"], state["nonfinite_in_row"]


_LOSS_METRICS = ("ratio_mean", "clip_low_share", "clip_high_share", "kl", "tis_mean", "tis_clipped_share")


def _combine(results: torch.Tensor, weights: list[int]) -> tuple[float, Metrics]:
    """Sum of the losses of micro-batches, and token-weighted means of their metrics; one wait for the device.

    The means are None if nothing had a gradient.
    """
    losses, *columns = results.T.tolist()
    total = sum(weights)
    means = [sum(value * w for value, w in zip(values, weights, strict=True)) for values in columns]
    return sum(losses), {key: mean / total if total else None for key, mean in zip(_LOSS_METRICS, means, strict=True)}


def _mean_of_known(rows: list[Metrics]) -> Metrics:
    """Mean of each number over the rows that have it."""
    known = {key: [row[key] for row in rows if row[key] is not None] for key in rows[0]}
    return {key: sum(values) / len(values) if values else None for key, values in known.items()}
