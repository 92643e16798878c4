"""The plug-in that verl loads: trainer mode `mgrpo` and advantage estimator `mgrpo`, with no fork.

verl imports this package in every process, Ray's workers among them, by its entry point `verl.plugins`, or by
VERL_USE_EXTERNAL_MODULES=mgrpo.integrations.verl; everything is registered then. A program that has not imported verl
may import the modules that need none of it.
"""

import sys

from mgrpo.integrations.verl.plugin import check_processes, describe, load

__all__ = ["check_processes", "describe", "load"]

if "verl" in sys.modules:
    load()
