"""The errors that end a run, each with its exit code."""

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


# Errors that another start may cure.
CURABLE = (Exit.ERROR, Exit.ENGINE, Exit.STORAGE)


class InputError(ValueError):
    """Bad input: the message names the file, the line and the remedy."""

    exit_code = Exit.BAD_INPUT


class ConfigError(ValueError):
    """An invalid configuration; `problems` lists every reason."""

    exit_code = Exit.BAD_INPUT

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged, or of another run."""

    exit_code = Exit.BAD_INPUT


class EngineError(RuntimeError):
    """The rollout engine ended or returned invalid data."""

    exit_code = Exit.ENGINE


class StaleWeightsError(EngineError):
    """The engine has another weight version than requested."""


class ParityError(StaleWeightsError):
    """The engine's log-probs differ from the model's, so its rollouts cannot be trained on."""


class PeerError(EngineError):
    """Another process of the run has failed in what all do at once; its own error says why."""


class StorageError(OSError):
    """Writing to the run directory failed."""

    exit_code = Exit.STORAGE


class Interrupted(BaseException):
    """A signal came before the first step. Not an Exception, so that no library catches it."""

    exit_code = Exit.INTERRUPTED


class Ended(Exception):
    """A run of several processes ends; its cause, if it has one, is the error to show."""

    def __init__(self, exit_code: int):
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code


class UnsupportedVersion(ImportError):
    """A package is absent, or its version is unknown to the plug-in."""

    exit_code = Exit.ERROR


def whole(error: BaseException) -> str:
    """The message of a library's error in one line, without a full stop; with its class unless the message is clear."""
    text = " ".join(str(error).split()).rstrip(" .:")
    if len(text) > MAX_ERROR_CHARS:
        text = text[:MAX_ERROR_CHARS].rpartition(" ")[0] + " ..."
    plain = isinstance(error, OSError | RuntimeError) or type(error) is ValueError
    return text if text and plain else f"{type(error).__name__}: {text}".rstrip(" :")
