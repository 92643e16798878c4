"""Options of LoRA."""

from __future__ import annotations

from dataclasses import dataclass

from mgrpo.config.option import option


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA: train low-rank adapters of linear layers and leave the model's own weights as they are."""

    rank: int = option(0, least=0)
    """Rank of the adapters; 0 trains all weights, or the adapter that `--model.path` names."""
    alpha: int | None = option(None, least=1)
    """The product of an adapter's two matrices is scaled by alpha / rank. None is twice the rank."""
    targets: tuple[str, ...] | None = None
    """Names of the linear layers with an adapter, such as `q_proj v_proj`; None or `all-linear` is every linear layer
    except the head."""
