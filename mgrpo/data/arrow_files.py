"""Reads rows of .arrow files from `Dataset.save_to_disk`, the cache of the package datasets or pyarrow."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc

from mgrpo.data.keys import Keys
from mgrpo.data.tables import TABLE_CHUNK, choose_columns, pick, read_batches
from mgrpo.errors import InputError
from mgrpo.inputs import Budget

MAGIC = b"ARROW1\0\0"  # of the file format, in which the stream follows
RECORD_BATCH, DICTIONARY = "record batch", "dictionary"


def read_arrow(path: Path, keys: Keys, budget: Budget) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the wanted values of the rows of an arrow file by key, each row with its position.

    The file is memory-mapped, and every batch is validated before its values are read.

    Raises:
        InputError: as in `read_parquet`, or the file is compressed.

    """
    batches = _read_batches(path, keys, budget)
    return read_batches(batches, str(path), budget, "arrow file", "Write or download it again.")


def _read_batches(path: Path, keys: Keys, budget: Budget) -> Iterator[pyarrow.RecordBatch]:
    """Batches of the wanted columns."""
    with pyarrow.memory_map(str(path)) as source:
        start = len(MAGIC) if source.read(len(MAGIC)) == MAGIC else 0
        _check_packing(source, start, path)
        source.seek(start)
        with pyarrow.ipc.open_stream(source) as reader:
            schema = reader.schema
            columns = choose_columns(schema, keys, str(path))
        numbers = sorted({schema.names.index(column.name) for column in columns})
        options = pyarrow.ipc.IpcReadOptions(included_fields=numbers)
        source.seek(start)
        with pyarrow.ipc.open_stream(source, options=options) as reader:
            for batch in reader:
                budget.check_records(batch.num_rows, str(path))
                batch.validate(full=True)
                for first in range(0, batch.num_rows, TABLE_CHUNK):
                    yield pick(batch.slice(first, TABLE_CHUNK), columns)


def _check_packing(source: Any, start: int, path: Path) -> None:
    """Refuses compressed values, which may take any amount of memory once decompressed."""
    source.seek(start)
    for message in pyarrow.ipc.MessageReader.open_stream(source):
        if message.type in (RECORD_BATCH, DICTIONARY) and _is_packed(message.metadata.to_pybytes()):
            raise InputError(
                f"{path}: values must be uncompressed, got compressed ones. Write the file without compression or as "
                "Parquet."
            )


def _is_packed(header: bytes) -> bool:
    """Whether the flatbuffer header of a batch names a compression."""

    def read(form: str, place: int) -> int:
        return struct.unpack_from("<" + form, header, place)[0]

    def find(table: int, number: int) -> int:  # position of a field, 0 if absent
        vtable = table - read("i", table)
        entry = 4 + 2 * number
        offset = read("H", vtable + entry) if entry < read("H", vtable) else 0
        return table + offset if offset else 0

    def follow(place: int) -> int:
        return place + read("I", place)

    message = follow(0)
    batch = follow(find(message, 2))
    if read("B", find(message, 1)) == 2:  # a dictionary batch contains its record batch
        batch = follow(find(batch, 1))
    return find(batch, 3) > 0
