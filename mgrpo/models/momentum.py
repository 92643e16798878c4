"""The momentum model: an exponential moving average of the policy's weights, in separate storage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch

import mgrpo_kernels as K
from mgrpo.config import KernelsConfig, MomentumConfig
from mgrpo.distributed.sharding import fill, local, offset_of, reshard


def decay_at(config: MomentumConfig, step: int, num_steps: int) -> float:
    """Share of the old weights kept at optimiser step `step` (from 0) of `num_steps`.

    The cosine schedule moves 1 - m from 1 - decay to 1 - final_decay (Co-rewarding, arXiv 2508.00410).
    """
    if config.schedule == "constant":
        return config.decay
    progress = min(step / max(num_steps - 1, 1), 1.0)
    start, end = 1 - config.decay, 1 - config.final_decay
    return 1 - (end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress)))


class Momentum:
    """theta_k: averages every parameter of the policy once, copies its buffers."""

    def __init__(
        self,
        policy: torch.nn.Module,
        config: MomentumConfig,
        *,
        seed: int,
        kernels: KernelsConfig,
        engine_dtype: torch.dtype | None = None,
    ):
        self.config, self.seed, self.backend = config, seed, kernels.backend
        self.policy = policy
        reshard(policy)
        dtype = torch.float32 if config.dtype == "fp32" else torch.bfloat16
        device = torch.device("cpu") if config.device == "cpu" else None
        # named_parameters() yields a tied weight once, so it is averaged once. Frozen weights never change.
        trained = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
        self.weights = {name: w.detach().to(device=device, dtype=dtype, copy=True) for name, w in trained.items()}
        self.compensation = None
        if config.dtype == "bf16-kahan":
            # The compensation starts with the error of the first rounding to bf16.
            self.compensation = {
                name: (weight.detach().to(self.weights[name].device) - self.weights[name].float()).to(dtype)
                for name, weight in trained.items()
            }

        # A copy in the engine's dtype, written by the same kernel that averages.
        self.engine_weights = None
        if engine_dtype == torch.bfloat16 != dtype:
            self.engine_weights = {name: weight.to(engine_dtype) for name, weight in self.weights.items()}

    def update(self, step: int, num_steps: int) -> None:
        """Averages the policy in after optimiser step `step` (from 0) of `num_steps`."""
        if (step + 1) % self.config.every:
            return
        reshard(self.policy)
        names, stochastic = list(self.weights), self.config.dtype == "bf16-stochastic"
        parameters = dict(self.policy.named_parameters())

        def listed(tensors: Mapping[str, torch.Tensor] | None) -> list[torch.Tensor] | None:
            return [local(tensors[name]) for name in names] if tensors else None

        K.ema_update_(
            [local(self.weights[name]) for name in names],
            [local(parameters[name].detach().to(self.weights[name].device)) for name in names],
            decay_at(self.config, step, num_steps),
            rounding="stochastic" if stochastic else "nearest",
            compensation=listed(self.compensation),
            publish=listed(self.engine_weights),
            offsets=[offset_of(self.weights[name]) for name in names] if stochastic else None,
            seed=self.seed,
            step=step,
            backend=self.backend,
        )

    def state_dict(self, *, for_engine: bool = False) -> dict[str, torch.Tensor]:
        """A full state dict: averaged weights under every name they are tied to, and the policy's buffers.

        With `for_engine`, the weights are in the engine's dtype if a copy in it is kept.
        """
        reshard(self.policy)
        weights = self.engine_weights if for_engine and self.engine_weights else self.weights
        parameters = self.policy.named_parameters()
        averaged = {id(parameter): weights[name] for name, parameter in parameters if name in weights}
        full: dict[str, torch.Tensor] = self.policy.state_dict(keep_vars=True)
        return {name: averaged.get(id(tensor), tensor.detach()) for name, tensor in full.items()}

    def swapped(self) -> AbstractContextManager[None]:
        """Lets the policy compute with these weights for a while; nothing is copied where dtype and device agree."""
        return borrowed_weights(self.policy, self.state_dict())

    def load(self, weights: Mapping[str, torch.Tensor], compensation: Mapping[str, torch.Tensor] | None = None) -> None:
        """Restores saved weights and Kahan terms, bit for bit."""
        for name, weight in self.weights.items():
            fill(weight, weights[name])
            if self.engine_weights:
                self.engine_weights[name].copy_(weight)
        for name, term in (self.compensation or {}).items():
            fill(term, (compensation or {})[name])


@contextmanager
def borrowed_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Lets `model` compute with other weights for a while; nothing is copied where dtype and device agree.

    Of a sharded model the shards are exchanged in place, because FSDP gathers from memory of its own.
    """
    undo: dict[str, Callable[[torch.Tensor], object]] = {}
    reshard(model)
    try:
        for name, p in model.named_parameters():
            if local(p) is not p:
                own, other = local(p.detach()), local(weights[name])
                if own.data_ptr() != other.data_ptr():  # a frozen weight is its own average
                    undo[name] = _exchange(own, other)
            else:
                undo[name] = partial(_set_data, data=p.data)
                p.data = weights[name].to(device=p.device, dtype=p.dtype)
        yield
    finally:
        reshard(model)
        for name, p in model.named_parameters():
            if name in undo:
                undo[name](p)


def _set_data(parameter: torch.Tensor, *, data: torch.Tensor) -> None:
    """Gives a parameter other memory."""
    parameter.data = data


def _exchange(own: torch.Tensor, other: torch.Tensor) -> Callable[[torch.Tensor], object]:
    """Exchanges the values of two shards, or keeps a copy where their dtypes differ.

    Returns what undoes it for the parameter, whose shard may have moved to another device.
    """
    kept = own.clone()
    own.copy_(other)
    if (own.dtype, own.device) != (other.dtype, other.device):
        return lambda parameter: local(parameter.detach()).copy_(kept)
    other.copy_(kept)

    def undo(parameter: torch.Tensor) -> None:
        shard = local(parameter.detach())
        lent = shard.to(other.device, copy=True)
        shard.copy_(other)
        other.copy_(lent)

    return undo
