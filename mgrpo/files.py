"""Data files: which a source stands for, of what format each is, and how its bytes are read."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mgrpo.inputs import MAX_RECORD_BYTES, MAX_WHOLE_BYTES, Budget, InputError, list_names, nearest, parse_json

TEXT_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".ndjson")
FORMATS = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow", ".ndjson")
KNOWN = ", ".join(FORMATS[:-1])
UNREADABLE = (OSError, EOFError, zlib.error)  # what opening or unpacking a file raises


def format_of(path: Path) -> str | None:
    """The format that a file's name tells, None where it tells none; text may be packed as .gz."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        suffix = Path(path.stem).suffix.lower()
        return suffix if suffix in TEXT_FORMATS else None
    return suffix if suffix in FORMATS else None


def list_files(path: Path, split: str) -> list[Path]:
    """Lists the data files that a file or folder stands for."""
    if not path.is_dir():
        if format_of(path) is None:
            raise InputError(
                f"{path}: file name must end in {KNOWN} or, for text, those and .gz, got {path.suffix!r}. "
                "Convert or rename the file."
            )
        return [path]
    if (path / "dataset_dict.json").is_file():
        return list_files(_pick_split(path, split), split)
    if (path / "state.json").is_file():
        return _list_saved(path)
    files = sorted(f for f in path.iterdir() if f.is_file() and format_of(f) and not f.name.startswith("."))
    if (path / "dataset_info.json").is_file() and (tables := [f for f in files if format_of(f) == ".arrow"]):
        return tables  # the cache of the package datasets, whose .json files describe the tables
    if not files:
        inner = sorted(f.name for f in path.iterdir() if f.is_dir() and any(format_of(g) for g in f.iterdir()))
        hint = f" There are some in {list_names(inner)}." if inner else ""
        raise InputError(
            f"{path}: folder must hold {KNOWN} files, got none.{hint} Name the folder that holds the data."
        )
    return files


def _pick_split(path: Path, split: str) -> Path:
    """The folder of a split of a saved DatasetDict."""
    names = _read_state(path / "dataset_dict.json").get("splits")
    names = [str(name) for name in names if _is_plain(name)] if isinstance(names, list) else []
    if split not in names:
        near = nearest(split, names)
        hint = f" Did you mean {near!r}?" if near else ""
        raise InputError(
            f"{path}: --data.split must be a split of the saved data, one of {list_names(names)}, got {split!r}.{hint} "
            "Name one of them."
        )
    return path / split


def _list_saved(path: Path) -> list[Path]:
    """The tables of a folder that Dataset.save_to_disk wrote, in their order."""
    entries = _read_state(path / "state.json").get("_data_files")
    names = [entry.get("filename") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    if not names or not all(_is_plain(name) for name in names):
        raise InputError(f"{path}/state.json: file must name the tables beside it, got others. Save the data again.")
    return [path / str(name) for name in names]


def _read_state(path: Path) -> dict[str, Any]:
    """The object in a small file that describes saved data."""
    with path.open("rb") as file:
        content = file.read(MAX_RECORD_BYTES + 1)
    if len(content) > MAX_RECORD_BYTES:
        raise InputError(f"{path}: file must have at most {MAX_RECORD_BYTES >> 20} MiB, got more. Save the data again.")
    state = parse_json(content.decode("utf-8-sig", "replace"), path, 1, "Save the data again.")
    return state if isinstance(state, dict) else {}


def _is_plain(name: Any) -> bool:
    """Whether a name is that of an entry of the same folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Opens a file, which is unpacked as it is read if it is packed by gzip, whatever its name."""
    with path.open("rb") as file:
        if file.peek(2)[:2] != b"\x1f\x8b":
            yield file
            return
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield unpacked  # pyright: ignore[reportReturnType]


def read_whole(file: BinaryIO, path: Path, budget: Budget, start: bytes = b"") -> bytes:
    """The bytes of a file that is parsed as one, of which `start` was read before."""
    content = start + file.read(max(MAX_WHOLE_BYTES + 1 - len(start), 0))
    if len(content) > MAX_WHOLE_BYTES:
        raise InputError(
            f"{path}: {format_of(path)} file must have at most {MAX_WHOLE_BYTES >> 20} MiB, got more. "
            "Turn it into .jsonl, which is read line by line."
        )
    budget.spend(len(content), str(path))
    return content
