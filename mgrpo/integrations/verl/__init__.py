"""The plug-in that verl loads: trainer mode `mgrpo` and advantage estimator `mgrpo`, with no fork.

verl imports this package in every process, including Ray's workers, by its entry point `verl.plugins` or by
VERL_USE_EXTERNAL_MODULES=mgrpo.integrations.verl, which registers both. Without verl, the modules that do not need it
can still be imported.
"""

import sys

from mgrpo.integrations.verl.plugin import check_processes, describe, load

__all__ = ["check_processes", "describe", "load"]

if "verl" in sys.modules:
    load()
