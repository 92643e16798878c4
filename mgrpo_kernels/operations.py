"""One row an operation: its kernels' folders, sample inputs and a call; for the doctor, the benchmarks and the tests.

Every operation has all backends of `backends()`. Letters: see the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import mgrpo_kernels as K
from mgrpo_kernels._sources import hash_python

Inputs = dict[str, Tensor]


class Sizes(NamedTuple):
    """Sizes of sample inputs."""

    num_tokens: int  # a multiple of 16
    hidden: int
    vocabulary: int
    head_vocabulary: int  # of the operations that take hidden states
    num_prompts: int
    group: int
    num_weights: int


class Samples:
    """Sample inputs in fp32; some logits of each row are raised, so that probabilities are not all tiny."""

    def __init__(self, device: torch.device, sizes: Sizes):
        generator = torch.Generator().manual_seed(0)
        tokens, hidden, vocabulary, head_vocabulary, *groups, num_weights = sizes

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator)).to(device)

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator).to(device)

        self.logits = normal(tokens, vocabulary)
        self.logits[:, ::1001] += 9
        self.targets = integers(0, head_vocabulary, tokens)
        self.rewards = integers(0, 2, *groups).float()
        self.answer_ids = integers(-1, 4, *groups)
        self.cu_seqlens = torch.arange(0, tokens + 1, 16, dtype=torch.int32, device=device)
        self.logprob = -normal(tokens).abs()
        mask = torch.ones(tokens, dtype=torch.bool, device=device)
        self.batch = {"mask": mask, "old_logprob": self.logprob + normal(tokens, scale=0.1)}
        self.batch |= {"advantage": normal(tokens), "cu_seqlens": self.cu_seqlens}
        self.head = {"hidden": normal(tokens, hidden), "weight": normal(head_vocabulary, hidden, scale=0.2)}
        self.token_entropy = normal(tokens).abs()
        self.momentum, self.policy = normal(num_weights), normal(num_weights)
        self.entropy = normal(*groups).abs()
        self.ref_logprob = self.logprob + normal(tokens, scale=0.1)


class Operation(NamedTuple):
    """A row of OPERATIONS."""

    folders: tuple[str, ...]  # whose kernels run it, its own first
    inputs: Callable[[Samples], Inputs]
    call: Callable[[Inputs, str], Sequence[Tensor]]  # on a backend; returns what it writes
    is_memory_bound: bool = True


def _ema_update(x: Inputs, backend: str) -> Sequence[Tensor]:
    K.ema_update_([x["momentum"]], [x["policy"]], 0.99, backend=backend)
    return [x["momentum"]]


OPERATIONS = {
    "token_logprob": Operation(
        ("token_logprob",),
        lambda s: {"logits": s.logits, "targets": s.targets},
        lambda x, backend: K.token_logprob(**x, temperature=0.9, backend=backend)[:3],
    ),
    "linear_token_logprob": Operation(
        ("linear_token_logprob", "token_logprob"),
        lambda s: s.head | {"targets": s.targets},
        lambda x, backend: K.linear_token_logprob(**x, backend=backend)[:3],
        is_memory_bound=False,
    ),
    "trajectory_entropy": Operation(
        ("trajectory_entropy",),
        lambda s: {"token_entropy": s.token_entropy, "cu_seqlens": s.cu_seqlens},
        lambda x, backend: [K.trajectory_entropy(**x, backend=backend)],
    ),
    "ema_update_": Operation(("ema_update",), lambda s: {"momentum": s.momentum, "policy": s.policy}, _ema_update),
    "group_advantage": Operation(
        ("group_advantage",),
        lambda s: {"rewards": s.rewards},
        lambda x, backend: [K.group_advantage(**x, backend=backend)],
    ),
    "majority_vote": Operation(
        ("majority_vote",),
        lambda s: {"answer_ids": s.answer_ids},
        lambda x, backend: K.majority_vote(**x, backend=backend),
    ),
    "iqr_filter": Operation(
        ("iqr_filter",), lambda s: {"entropy": s.entropy}, lambda x, backend: K.iqr_filter(**x, backend=backend)
    ),
    "grpo_loss": Operation(
        ("grpo_loss",),
        lambda s: s.batch | {"logprob": s.logprob, "ref_logprob": s.ref_logprob},
        lambda x, backend: [K.grpo_loss(**x, kl_coef=0.01, backend=backend).loss],
    ),
    "logits_grpo_loss": Operation(
        ("grpo_loss", "token_logprob"),
        lambda s: s.batch | {"logits": s.logits, "targets": s.targets},
        lambda x, backend: [K.logits_grpo_loss(**x, backend=backend).loss],
    ),
    "linear_grpo_loss": Operation(
        ("grpo_loss", "linear_token_logprob", "token_logprob"),
        lambda s: s.head | s.batch | {"targets": s.targets},
        lambda x, backend: [K.linear_grpo_loss(**x, backend=backend).loss],
        is_memory_bound=False,
    ),
}


def source_hash(op: str, backend: str, compiled: Mapping[str, str]) -> str:
    """Hash of the code that runs an operation on a GPU backend, without comments.

    Args:
        op: a name in OPERATIONS.
        backend: "triton" or "cuda".
        compiled: hashes of the CUDA sources by file name, such as `native.sources()` of the library; if it is empty,
            backend "cuda" has the hash "".
    """
    folders = OPERATIONS[op].folders
    module = "triton" if backend == "triton" else "native"
    python = hash_python(*(f"{folder}/{name}.py" for folder in folders for name in ("autograd", module, backend)))
    if backend == "triton":
        return python
    parts = [compiled[folder] for folder in folders if folder in compiled]
    return "-".join([python, *parts]) if parts else ""
