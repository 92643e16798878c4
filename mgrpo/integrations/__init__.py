"""M-GRPO and its kernels inside other trainers: plug-ins of the released packages, without a fork.

`mgrpo.integrations.trl` has MGRPOTrainer, `mgrpo.integrations.verl` a trainer mode; `patch_kernels` replaces the
log-probs and entropies of either, or of OpenRLHF, by our kernels.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from mgrpo.errors import UnsupportedVersion
from mgrpo.integrations.patching import Patch
from mgrpo.integrations.versions import SUPPORTED

__all__ = ["SUPPORTED", "Patch", "UnsupportedVersion", "patch_kernels"]


def patch_kernels(package: ModuleType) -> Patch:
    """Replaces a package's log-probs and entropies by `token_logprob` and `linear_token_logprob`.

        with patch_kernels(trl):
            trainer.train()

    Args:
        package: the imported `trl`, `verl` or `openrlhf`.

    Returns:
        The patch, already applied. `undo()`, or the end of the `with` block, restores the package's functions.

    Raises:
        ValueError: another package.
        UnsupportedVersion: an unsupported version.
    """
    name = package.__name__
    if name not in SUPPORTED:
        raise ValueError(f"patch_kernels: package must be one of {sorted(SUPPORTED)}, got {name}. Import it first.")
    return Patch(importlib.import_module(f"mgrpo.integrations.kernels.{name}").kernel_patches())
