"""AdamW whose moments are on the host, for a model whose moments do not fit on its GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw


class HostAdamW(torch.optim.AdamW):
    """AdamW that keeps its moments on the host and steps there, one parameter at a time.

    Weights and gradients stay on their device: of each parameter both are copied to the host, and the weight back. On a
    CPU nothing is copied, and the bits are those of torch.optim.AdamW.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes one step on the gradients of the parameters; `closure` must be None."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _step(parameter, self.state[parameter], group)


def _step(parameter: torch.nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One step of a parameter."""
    assert parameter.grad is not None
    weight, gradient = parameter.detach().cpu(), parameter.grad.cpu()
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
    adamw(
        [weight],
        [gradient],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"]],
        foreach=False,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    parameter.copy_(weight)
