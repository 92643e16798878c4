"""Sharding of a model over the ranks of a run by FSDP2, and the operations on shards.

A weight is split by rows as torch.chunk does, so that a rank's shard may be shorter than others, or empty. Letters: W
ranks, R replicas of the shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor

from mgrpo.distributed.world import World
from mgrpo.errors import ConfigError

T = TypeVar("T")


def shard_model(model: Any, world: World, *, dtype: torch.dtype, tree: bool) -> None:
    """Shards the weights of a causal LM of transformers over the ranks, in place; nothing in a world of one.

    Each decoder layer is gathered on its own, an untied embedding too, and what remains with the root: the last norm,
    the head, and the embedding tied to it. Gradients are summed over ranks, in fp32.

    Args:
        model: with whole weights, equal on all ranks, or empty ones, which are read later.
        world: of the run.
        dtype: in which weights are gathered; in tree mode always their own, as one process computes.
        tree: sum gradients pairwise in the order of ranks, so that the bits do not depend on W.
    """
    if world.mesh is None:
        return
    in_bf16 = dtype == torch.bfloat16 and not tree
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if in_bf16
        else MixedPrecisionPolicy()
    )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or getattr(head, "weight", None) is embedding.weight
    try:
        # Explicitly resharded, or the root would keep its whole weights, and shards written later would go unseen.
        for module in [*([] if tied else [embedding]), *layers_of(model), model]:
            fully_shard(module, mesh=world.mesh, mp_policy=policy, reshard_after_forward=True)
    except (ValueError, NotImplementedError) as error:  # FSDP2 refuses scalar parameters and some containers so
        raise ConfigError([f"model: {type(model).__name__} cannot be sharded: {error}. Take one process."]) from error
    for module in model.modules():
        if isinstance(module, FSDPModule):  # neither setting applies to the modules within
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if tree:
                module.set_custom_reduce_scatter(TreeReduceScatter())
    model.run_whole = _call
    register_fsdp_forward_method(model, "run_whole")
    if in_bf16:  # the residual stream stays in fp32, as under autocast; otherwise each layer would round it
        embedding.register_forward_hook(lambda _module, _inputs, output: output.float())


def layers_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder layers: the list of modules with the most weights; empty if there is none."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=torch.nn.ModuleList())


def _call(function: Callable[[], Any]) -> Any:
    """Calls a function; as a forward method of FSDP, with the root's weights whole."""
    return function()


def reshard(model: torch.nn.Module) -> None:
    """Frees the weights that FSDP2 keeps whole after a pass, which would hide later changes of their shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def run_whole(model: torch.nn.Module, function: Callable[[], T]) -> T:
    """Calls a function that uses the decoder and the weight of the head."""
    sharded: Any = model
    return sharded.run_whole(function) if isinstance(model, FSDPModule) else function()


class TreeReduceScatter(ReduceScatter):
    """Sums the ranks' gradients pairwise in rank order: an all-to-all, then the sum where the shard is."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised buffer."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Writes this rank's part of the sum of `input_tensor` over ranks to `output_tensor`."""
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        output_tensor.copy_(tree_sum(list(received.chunk(group.size()))))


def tree_sum(values: list[torch.Tensor]) -> torch.Tensor:
    """Pairwise sum of a power of two of tensors: (0 + 1) + (2 + 3) and so on."""
    while len(values) > 1:
        values = [first + second for first, second in zip(values[::2], values[1::2], strict=True)]
    return values[0]


class Gradients:
    """Adds up the gradients of an optimiser step's micro-batches in the `.grad` of parameters.

    Args:
        parameters: of the optimiser.
        passes: backward passes of a rank in a round of tree mode, a power of two: their gradients are summed pairwise,
            then the rounds in order; None adds them as they come.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], passes: int | None):
        self.parameters, self.passes = list(parameters), passes
        self.partial: list[tuple[int, list[torch.Tensor]]] = []  # sums of a round by their number of passes
        self.total: list[torch.Tensor] | None = None
        for parameter in self.parameters:
            parameter.grad = None if passes else torch.zeros_like(parameter)

    def add(self) -> None:
        """Takes in the gradients of a backward pass."""
        if not self.passes:
            return
        count, found = 1, [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        while self.partial and self.partial[-1][0] == count:
            count, found = 2 * count, _added(self.partial.pop()[1], found)
        if count < self.passes:
            self.partial.append((count, found))
        else:
            self.total = found if self.total is None else _added(self.total, found)

    def finish(self) -> None:
        """Sets `.grad` to the sum."""
        if self.passes:
            for i, parameter in enumerate(self.parameters):
                parameter.grad = torch.zeros_like(parameter) if self.total is None else self.total[i]


def _added(first: list[torch.Tensor], second: list[torch.Tensor]) -> list[torch.Tensor]:
    """Sums of two lists of tensors."""
    return [a + b for a, b in zip(first, second, strict=True)]


def clip_by_rows(parameters: Sequence[torch.nn.Parameter], most: float, world: World) -> float:
    """Scales gradients down to a norm of at most `most`; returns the norm before.

    The squares of each row are summed in fp64 where the row is, then all of them exactly, so that the norm is the same
    on every rank and at every world size.
    """
    squares = []
    for parameter in parameters:
        assert parameter.grad is not None
        rows, own = torch.zeros(len(parameter), dtype=torch.float64), local(parameter.grad).double()
        rows[rows_of(parameter)] = own.flatten(1).square().sum(1).cpu() if own.ndim > 1 else own.square().cpu()
        squares.append(rows)
    sums = torch.cat(squares)
    if world.rank >= world.size // world.replicate:  # a replica, whose shards the first one counts
        sums.zero_()
    world.sum_(sums)
    norm = math.sqrt(math.fsum(values)) if all(map(math.isfinite, values := sums.tolist())) else math.nan
    scale = min(1.0, most / (norm + 1e-6)) if norm < math.inf else 1.0
    for parameter in parameters:
        local(parameter.grad).mul_(scale)
    return norm


def local(tensor: Any) -> torch.Tensor:
    """The shard of a tensor on this rank; a whole tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, gathered by all ranks at once; a whole tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: torch.Tensor) -> slice:
    """The rows of the whole tensor that are in this rank's shard."""
    if not isinstance(tensor, DTensor):
        return slice(None)
    mesh, rows = tensor.device_mesh, rows_of_rank(tensor)
    start = min(mesh.get_local_rank(mesh.ndim - 1) * rows, len(tensor))
    return slice(start, min(start + rows, len(tensor)))


def num_shards(tensor: DTensor) -> int:
    """Ranks among which the rows are divided: the last dimension of the mesh, after the replicas."""
    return tensor.device_mesh.size(tensor.device_mesh.ndim - 1)


def rows_of_rank(tensor: DTensor) -> int:
    """Rows of the longest shard."""
    return -(-len(tensor) // num_shards(tensor))


def offset_of(tensor: torch.Tensor) -> int:
    """Index of this rank's first element in the whole tensor."""
    start = rows_of(tensor).start
    return start * math.prod(tensor.shape[1:]) if start else 0


@torch.no_grad()
def fill(target: torch.Tensor, values: Any) -> None:
    """Copies this rank's rows of a whole tensor, or of one in a safetensors file, into a sharded one."""
    local(target).copy_(values[rows_of(target)] if target.ndim else values)


def sharded_like(tensor: torch.Tensor, values: Any) -> torch.Tensor:
    """This rank's rows of whole `values`, which may lie in a file, sharded like `tensor`, on its device."""
    own = values[rows_of(tensor)] if tensor.ndim else values
    return with_shard(tensor, own.to(local(tensor).device))


def with_shard(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A tensor sharded like another, of which `own` is this rank's shard."""
    own = own.contiguous()
    if not isinstance(tensor, DTensor):
        return own
    # Without shape and stride the whole would be taken for W times this shard.
    return DTensor.from_local(
        own, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
