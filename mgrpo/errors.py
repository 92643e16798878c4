"""Every error that ends a run, each with the exit code that it ends it with."""

from __future__ import annotations

from enum import IntEnum

MAX_ERROR_CHARS = 2000  # transformers lists hundreds of classes


class Exit(IntEnum):
    """Exit codes of the command lines."""

    DONE = 0
    ERROR = 1
    BAD_INPUT = 2
    COLLAPSE = 3
    NON_FINITE = 4
    ENGINE = 5
    STORAGE = 6
    INTERRUPTED = 75  # by a signal; the run can be resumed
    KILLED = 130  # by a second Ctrl-C or SIGTERM, which saves nothing


class InputError(ValueError):
    """Bad input of the user: the message names the file, the line and the remedy."""

    exit_code = Exit.BAD_INPUT


class ConfigError(ValueError):
    """A configuration that makes no sense; `problems` lists every reason."""

    exit_code = Exit.BAD_INPUT

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged, or of another run."""

    exit_code = Exit.BAD_INPUT


class EngineError(RuntimeError):
    """The rollout engine is dead or returned something impossible."""

    exit_code = Exit.ENGINE


class StaleWeightsError(EngineError):
    """The engine holds another version of the weights than the caller asked for."""


class ParityError(StaleWeightsError):
    """The engine's log-probs are not the model's: nothing of what it wrote can be trained on."""


class StorageError(OSError):
    """Writing to the run directory failed."""

    exit_code = Exit.STORAGE


class Interrupted(BaseException):
    """A signal came before the first step. No Exception, so that no library takes it for a failure of its own."""

    exit_code = Exit.INTERRUPTED


class UnsupportedVersion(ImportError):
    """A package that is absent, or of a version that the plug-in does not know."""

    exit_code = Exit.ERROR


def whole(error: BaseException) -> str:
    """All that an error of a library says, in one line and without a full stop; its class where the words need it."""
    text = " ".join(str(error).split()).rstrip(" .:")
    if len(text) > MAX_ERROR_CHARS:
        text = text[:MAX_ERROR_CHARS].rpartition(" ")[0] + " ..."
    plain = isinstance(error, OSError | RuntimeError) or type(error) is ValueError
    return text if text and plain else f"{type(error).__name__}: {text}".rstrip(" :")
