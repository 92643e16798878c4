"""Settings that every test shares."""

from __future__ import annotations

import os

from hypothesis import settings

# The same examples on every run, so that a failure belongs to a change; `make fuzz` looks for new ones.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("fuzz", derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
