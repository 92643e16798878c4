"""Fixtures of a small run."""

from small_training import (  # noqa: F401
    altered,
    command_line,
    launch,
    llama,
    make_llama,
    resume,
    rows_of,
    small,
    trained,
    weights_of,
)
from threads import one_thread  # noqa: F401
