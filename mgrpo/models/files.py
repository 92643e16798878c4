"""Checks of a model folder's files before transformers reads them, and of what it reports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging

from mgrpo.errors import EngineError, InputError, whole
from mgrpo.inputs import nearest
from mgrpo.process.disk import list_checkpoints


def quiet_transformers() -> None:
    """Switches the progress bars of transformers off."""
    logging.disable_progress_bar()


@contextmanager
def silence(library: Any = logging) -> Iterator[None]:
    """Lets a library log only errors within the block; `library` is its module of logging, by default transformers'."""
    verbosity = library.get_verbosity()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)


CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BUILTIN = "builtin:"
# Files whose damage transformers ignores, or reports without the file's name.
SMALL = (
    *(CONFIG, GENERATION, ADAPTER, "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", INDEX),
)
LARGE = ("tokenizer.json", "vocab.json")
NAMED_TENSORS = 5  # in messages


def check_folder(path: str) -> None:
    """Raises InputError for a path that is neither a model's folder nor a hub id, and for damaged files of JSON.

    The folder of a run is none, nor is a model and an adapter in one.
    """
    folder = Path(path)
    if not folder.is_dir() and not path.startswith(BUILTIN):
        _require_hub_id(path)
    if folder.is_dir():
        if not _is_model(folder) and (found := _find_models(folder)):
            raise InputError(
                f"model: --model.path must be a model folder, {path} is the folder of {found[0]}. "
                f"Name {' or '.join(map(str, found[1:]))}."
            )
        _refuse_damaged(folder, SMALL)
        if (folder / ADAPTER).is_file():
            _refuse_adapter(folder)
        if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
            _refuse_index(folder)


def _require_hub_id(path: str) -> None:
    """Raises InputError for what cannot be a hub id, or is rather a wrong path: the folder around it exists."""
    folder = Path(path)
    try:
        validate_repo_id(path)
        is_id = not folder.exists() and (folder.parent == Path() or not folder.parent.is_dir())
    except HFValidationError:
        is_id = False
    if is_id:
        return
    what = "is a file. Name its folder." if folder.exists() else "does not exist."
    with suppress(OSError):
        near = nearest(folder.name, (entry.name for entry in folder.parent.iterdir() if entry.is_dir()))
        what += f" Did you mean {folder.with_name(near)}?" if near else ""
    raise InputError(f"model: --model.path must be a model folder or a hub id, {path} {what}")


def _refuse_adapter(folder: Path) -> None:
    """Raises InputError for an adapter beside a whole model, or one without readable weights."""
    # Beside a model transformers ignores it, unless peft is installed.
    if beside := [name for name in (CONFIG, WEIGHTS, INDEX) if (folder / name).is_file()]:
        raise InputError(
            f"model: --model.path must be a whole model or an adapter, {folder} holds both, {beside[0]} and {ADAPTER}. "
            "Move one of them away."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"model: {folder} must hold {ADAPTER_WEIGHTS} beside {ADAPTER}, got none. Save it with peft.")


def _is_model(folder: Path) -> bool:
    """Whether a folder is of a model or an adapter; the directory of a run has a config.json of its own."""
    if (folder / ADAPTER).is_file():
        return True
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError):
        return True  # damaged; _refuse_damaged reports it
    return not (isinstance(content, dict) and "preset" in content and "model_type" not in content)


def _find_models(folder: Path) -> list[Any]:
    """Description of a folder of models, and the models in it that a user may mean; empty for other folders."""
    checkpoints = list_checkpoints(folder) or list_checkpoints(folder.parent) * (folder.name == "checkpoints")
    if checkpoints:
        names = [checkpoints[-1] / source for source in ("policy", "momentum")]
        return ["a run, whose newest models are in the last checkpoint", *names]
    if (folder / "checkpoints").is_dir() and (folder / CONFIG).is_file():
        return ["a run without a checkpoint", "another folder"]
    names = [folder / source for source in ("policy", "momentum") if _is_loadable(folder / source)]
    if names:
        return ["a checkpoint", *names]
    try:
        inner = sorted(path for path in folder.iterdir() if _is_loadable(path) and _is_model(path))
    except OSError:
        return []
    return ["several models", *inner[-2:]] if inner else []


def _is_loadable(folder: Path) -> bool:
    """Whether a folder has the configuration of a model or an adapter."""
    return any((folder / name).is_file() for name in (CONFIG, ADAPTER))


def _refuse_damaged(folder: Path, names: tuple[str, ...]) -> None:
    """Raises InputError for an existing file that holds no JSON object."""
    for name in names:
        path = folder / name
        if not path.exists():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"model: {path} must hold JSON, got: {whole(error)}. Fetch the file again.") from error
        if not isinstance(content, dict):
            raise InputError(f"model: {path} must hold a JSON object, got {content!r:.40}. Fetch the file again.")


def _refuse_index(folder: Path) -> None:
    """Raises InputError for an index of weights that lacks required keys or names absent files."""
    content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    names = content.get("weight_map")
    is_map = isinstance(names, dict) and names and all(isinstance(name, str) for name in names.values())
    if not is_map or not isinstance(content.get("metadata"), dict):
        raise InputError(
            f"model: {folder / INDEX} must hold metadata and a weight_map of tensors to files, got keys "
            f"{', '.join(content) or 'none'}. Fetch the file again."
        )
    absent = sorted({name for name in names.values() if not (folder / name).is_file()})
    if absent:
        raise InputError(
            f"model: {folder} must hold the files that its {INDEX} names, it lacks {_list(absent)}. "
            "Fetch the folder again."
        )


@contextmanager
def reading(path: str, file: str | None = None, *, unless: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns every error of transformers about a folder or hub id into InputError with its whole message.

    Args:
        path: folder or hub id.
        file: file that the call reads, named in the error if it exists.
        unless: classes of errors that may have other causes.
    """
    try:
        with silence(hub_logging):  # a line for each retry, beside the error that follows
            yield
    except InputError:
        raise
    # Wrong content of a file may raise anything: TypeError, AttributeError and others.
    except Exception as error:
        folder = Path(path)
        if folder.is_dir():
            _refuse_damaged(folder, LARGE)
            if f"no file named {WEIGHTS}" in str(error):
                raise InputError(_describe_weightless(folder)) from error
        if file is not None and (folder / file).is_file() and not isinstance(error, unless):
            message = f"model: {folder / file} must hold what transformers reads, got: {whole(error)}"
        else:
            message = f"model: {path} must be a model folder or a reachable hub id, got: {whole(error)}"
        raise InputError(message) from error


def _describe_weightless(folder: Path) -> str:
    """The error for a folder without weights that can be read."""
    suffixes = (".safetensors", ".bin", ".pth", ".gguf")
    others = sorted(path.name for path in folder.iterdir() if path.suffix in suffixes)
    got = f"only {_list(others)}. Convert or rename them" if others else "neither. Fetch the weights too"
    return f"model: {folder} must hold its weights as {WEIGHTS}, or as {INDEX} with the files it names, got {got}."


@contextmanager
def running(path: str, what: str) -> Iterator[None]:
    """Turns every error of a model's own code into InputError with its whole message.

    Args:
        path: folder or hub id.
        what: what the model must be able to do, for the message.
    """
    try:
        yield
    except (EngineError, InputError):
        raise
    except Exception as error:  # the model's code may raise anything
        raise InputError(f"model: {path} must {what}, got: {whole(error)}.") from error


def token_ids(value: Any, tokenizer: Any, where: str) -> list[int]:
    """The ids in an `eos_token_id`: none, one, or a list; InputError for anything else.

    Args:
        value: value in the file.
        tokenizer: gives the id of a token that is written as text.
        where: name of the file and its folder, for the message.
    """
    found = value if isinstance(value, list | tuple) else [] if value is None else [value]
    for entry in found:
        if type(entry) is int and entry >= 0:
            continue
        known = tokenizer.get_vocab().get(entry) if isinstance(entry, str) else None
        remedy = "Write the token's id." if known is None else f"Write {known}, which is its id."
        raise InputError(
            f"model: eos_token_id in {where} must be a token id or a list of them, got {value!r}. {remedy}"
        )
    return list(found)


def refuse_lost(loading: dict[str, Any], path: str) -> None:
    """Raises InputError for parameters that a folder lacks or has in another shape, which would be random.

    Args:
        loading: `output_loading_info` of transformers, where tied names are not missing.
        path: folder or hub id.
    """
    missing, mismatched = sorted(loading["missing_keys"]), sorted(loading["mismatched_keys"])
    if missing:
        raise InputError(
            f"model: {path} must hold every parameter of the model, it lacks {_list(missing)}. "
            "Fetch or convert the folder again."
        )
    if mismatched:
        shapes = [f"{name} {tuple(found)} in place of {tuple(wanted)}" for name, found, wanted in mismatched]
        raise InputError(
            f"model: {path} must hold parameters of the shapes that its {CONFIG} describes, got {_list(shapes)}. "
            "Fetch or convert the folder again."
        )


def _list(names: list[str]) -> str:
    """The first names and the number of the others."""
    others = len(names) - NAMED_TENSORS
    return ", ".join(names[:NAMED_TENSORS]) + (f" and {others} more" if others > 0 else "")
