"""The plug-in that verl loads: trainer mode `mgrpo` and advantage estimator `mgrpo`, with no fork.

verl imports this package in every process, Ray's workers among them, by its entry point `verl.plugins`, or by
VERL_USE_EXTERNAL_MODULES=mgrpo.integrations.verl. Importing it registers everything with verl.
"""

from mgrpo.integrations.verl.plugin import check_processes, describe, load

__all__ = ["check_processes", "describe", "load"]

load()
