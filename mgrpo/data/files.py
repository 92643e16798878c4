"""Lists the data files of a source, finds their formats and reads their bytes."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mgrpo.errors import InputError
from mgrpo.inputs import MAX_RECORD_BYTES, MAX_WHOLE_BYTES, Budget, list_names, nearest, parse_json, too_large

# Files that describe data without holding any; and the file names of splits, such as test-00000-of-00002.parquet.
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev)(?:[-_]\d[\w-]*)?\.")
_ALIASES: dict[str, str] = dict.fromkeys(("valid", "val", "dev"), "validation")
TEXT_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".ndjson")
FORMATS = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow", ".ndjson")
KNOWN = ", ".join(FORMATS[:-1])
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
UNREADABLE = (OSError, EOFError, zlib.error)  # errors of opening or decompressing a file


def format_of(path: Path) -> str | None:
    """The format by the file's name, None if unknown; text files may end in .gz."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        suffix = Path(path.stem).suffix.lower()
        return suffix if suffix in TEXT_FORMATS else None
    return suffix if suffix in FORMATS else None


def list_files(path: Path, split: str) -> list[Path]:
    """Lists the data files of a file or folder."""
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
        return tables  # a cache of the package datasets, whose .json files describe the tables
    files = [f for f in files if f.name not in DESCRIPTIONS] or files
    if not files:
        inner = sorted(f.name for f in path.iterdir() if f.is_dir() and any(format_of(g) for g in f.iterdir()))
        hint = f" There are some in {list_names(inner)}." if inner else ""
        raise InputError(
            f"{path}: folder must hold {KNOWN} files, got none.{hint} Name the folder that holds the data."
        )
    return _of_split(files, path, split)


def _of_split(files: list[Path], path: Path, split: str) -> list[Path]:
    """The files of a split if every file name is that of a split and there are several splits, else all files."""
    names = [match and match[1] for file in files if (match := SPLIT_NAME.match(file.name.lower())) or True]
    if not all(names) or len({_ALIASES.get(str(name), name) for name in names}) < 2:
        return files
    wanted = _ALIASES.get(split.lower(), split.lower())
    chosen = [file for file, name in zip(files, names, strict=True) if _ALIASES.get(str(name), name) == wanted]
    if not chosen:
        raise InputError(
            f"{path}: --data.split must be a split of its files, one of {list_names(dict.fromkeys(map(str, names)))}, "
            f"got {split!r}. Name one of them, or the file."
        )
    return chosen


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
    """The tables of a folder that Dataset.save_to_disk wrote, in order."""
    entries = _read_state(path / "state.json").get("_data_files")
    names = [entry.get("filename") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    if entries == []:
        raise InputError(f"{path}: data set must hold at least one record, got none. Add records or name other data.")
    if not names or not all(_is_plain(name) for name in names):
        raise InputError(f"{path}/state.json: file must name tables of its folder, got others. Save the data again.")
    return [path / str(name) for name in names]


def _read_state(path: Path) -> dict[str, Any]:
    """The JSON object of a small file that describes saved data."""
    with path.open("rb") as file:
        content = _read_up_to(MAX_RECORD_BYTES, file, f"{path}: file", "Save the data again.")
    state = parse_json(content.decode("utf-8-sig", "replace"), path, 1, "Save the data again.")
    return state if isinstance(state, dict) else {}


def _is_plain(name: Any) -> bool:
    """Whether a name is a plain file name, without folders."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def _read_up_to(limit: int, file: BinaryIO, what: str, remedy: str, start: bytes = b"") -> bytes:
    """`start` and the rest of a file; InputError if they have more bytes than the limit."""
    content = start + file.read(max(limit + 1 - len(start), 0))
    if len(content) > limit:
        raise too_large(what, limit, remedy)
    return content


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Opens a file of any name; gzip is decompressed while reading, and UTF-16 becomes UTF-8."""
    with path.open("rb") as file:
        is_packed = file.peek(2)[:2] == b"\x1f\x8b"
        source: Any = gzip.GzipFile(fileobj=file) if is_packed else file
        yield _recode(source, path) if source.peek(2)[:2] in UTF16_MARKS else source


def _recode(file: BinaryIO, path: Path) -> BinaryIO:
    """Converts a file in UTF-16, which spreadsheets write, to UTF-8."""
    content = _read_up_to(MAX_WHOLE_BYTES, file, f"{path}: file in UTF-16", "Save it as UTF-8.")
    try:
        return io.BytesIO(content.decode("utf-16").encode())
    except UnicodeError as error:
        raise InputError(f"{path}: not valid UTF-16: {error}. Save the file as UTF-8.") from error


def read_whole(file: BinaryIO, path: Path, budget: Budget, start: bytes = b"") -> bytes:
    """The bytes of a file that is parsed as a whole; `start` was read before."""
    remedy = "Turn it into .jsonl, which is read line by line."
    content = _read_up_to(MAX_WHOLE_BYTES, file, f"{path}: {format_of(path)} file", remedy, start)
    budget.spend(len(content), str(path))
    return content
