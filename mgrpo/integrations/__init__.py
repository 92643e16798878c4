"""M-GRPO and its kernels inside other trainers: plug-ins of the packages as they are published, no fork.

`mgrpo.integrations.trl` has MGRPOTrainer, `mgrpo.integrations.verl` a trainer mode; `patch_kernels` puts our kernels
under the log-probs and entropies of either, or of OpenRLHF.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from mgrpo.errors import UnsupportedVersion
from mgrpo.integrations.patching import Patch
from mgrpo.integrations.versions import SUPPORTED

__all__ = ["SUPPORTED", "Patch", "UnsupportedVersion", "patch_kernels"]


def patch_kernels(package: ModuleType) -> Patch:
    """Lets a package's log-probs and entropies be computed by `token_logprob` and `linear_token_logprob`.

        with patch_kernels(trl):
            trainer.train()

    Args:
        package: the imported `trl`, `verl` or `openrlhf`.

    Returns:
        The patch, in force already. `undo()`, or the end of the `with` block, gives the package its functions back.

    Raises:
        ValueError: another package.
        UnsupportedVersion: a version whose hooks are not known.
    """
    name = package.__name__
    if name not in SUPPORTED:
        raise ValueError(f"patch_kernels: package must be one of {sorted(SUPPORTED)}, got {name}. Import it first.")
    return Patch(importlib.import_module(f"mgrpo.integrations.kernels.{name}").kernel_patches())
