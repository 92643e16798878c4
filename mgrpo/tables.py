"""Rows of parquet files and of arrow tables, every size counted before it takes memory."""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy
import pyarrow
import pyarrow.compute
import pyarrow.parquet

# Rows at a time. Arrow copies the texts of a row group that came before for each batch of a parquet file; of a mapped
# table it may copy the batch.
PARQUET_CHUNK, TABLE_CHUNK = 4096, 64
# A row group is decoded with all values of a nested row at once, at up to 20 bytes each.
MAX_NESTED_VALUES = 1 << 25
MAX_MESSAGES = 1 << 14
MAX_FOOTER_BYTES = 16 << 20
MAX_PAGE_BYTES = 256 << 20  # a page is unpacked as a whole, and its texts copied up to three times
types: Any = pyarrow.types
compute: Any = pyarrow.compute  # its functions are made when it is imported


class TableError(ValueError):
    """A table that cannot be read, or not within the limits: the message names it and the remedy."""


class _HeaderError(Exception):
    """The footer or a page header of a parquet file makes no sense."""


class Budget(Protocol):
    """What may still be read; each method raises an error that names `where` if more is asked for."""

    def spend(self, num_bytes: int, where: str) -> None:
        """Takes bytes off."""
        ...

    def expect(self, num_bytes: int, where: str) -> None:
        """Asks for bytes that are taken off later."""
        ...

    def check_record(self, num_bytes: int, where: str) -> None:
        """Asks for one record of that many bytes."""
        ...

    def check_records(self, num_records: int, where: str) -> None:
        """Asks for that many records."""
        ...


def read_rows(path: Path, keys: list[str], budget: Budget) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the wanted columns of the rows of a parquet file, each with its position.

    Args:
        path: the file. Its footer and page headers are checked first; no page is unpacked before that.
        keys: columns to read, the prompt's first; the others may be absent.
        budget: what may still be read.

    Raises:
        TableError: a wanted column is of another type than text, number or list of messages, messages are too many,
            or the file cannot be read.

    """
    position = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            leaves = [file.schema.column(i) for i in range(len(file.schema))]
            texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        # A text that comes again and again is kept once, so that its copies can be counted before they are made.
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            schema = file.schema_arrow
            if keys[0] not in schema.names:
                yield from [(" row 1", dict.fromkeys(schema.names))] if file.metadata.num_rows else []
                return
            columns = choose_columns(schema, keys, str(path))
            wanted = _find_leaves(schema, columns, leaves, str(path))
            budget.check_records(file.metadata.num_rows, str(path))
            try:
                _check_sizes(path, {i: leaves[i].max_repetition_level > 0 for i in wanted}, budget)
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise _HeaderError("a footer or page header lacks a size") from error
            for group in range(file.metadata.num_row_groups):  # a batch over several would hold all their texts
                for batch in file.iter_batches(PARQUET_CHUNK, [group], columns):
                    for row in unpack(batch, str(path), position, budget):
                        position += 1
                        yield f" row {position}", row
    except MemoryError:  # arrow's own is an ArrowException too
        raise
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, _HeaderError, RecursionError) as error:
        message = f"{path}: not a readable parquet file after row {position}: {error}. Write or download it again."
        raise TableError(message) from error


def read_table(dataset: Any, source: str, keys: list[str], budget: Budget) -> Iterator[tuple[str, dict[str, Any]]]:
    """`read_rows` for a data set of the package datasets, whose tables are mapped from the disk."""
    position, schema = 0, dataset.features.arrow_schema
    if keys[0] not in schema.names:
        yield from [(" row 1", dict.fromkeys(schema.names))] if len(dataset) else []
        return
    columns = choose_columns(schema, keys, source)
    budget.check_records(len(dataset), source)
    try:
        for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=TABLE_CHUNK):
            for batch in table.to_batches():
                for row in unpack(batch, source, position, budget):
                    position += 1
                    yield f" row {position}", row
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        message = f"{source}: not a readable table after row {position}: {error}. Download it again."
        raise TableError(message) from error


def choose_columns(schema: pyarrow.Schema, keys: list[str], where: str) -> list[str]:
    """The wanted columns that are there, each once and of a type that can be counted."""
    columns = [key for key in keys if key in schema.names]
    for column in columns:
        if schema.names.count(column) > 1:
            raise TableError(f"{where}: column names must differ, got {column!r} twice. Rename the columns.")
        kind = schema.field(column).type
        if not (_is_scalar(kind) or _is_messages(kind)):
            shown = re.sub(r"dictionary<values=(\w+), indices=\w+, ordered=0>", r"\1", str(kind))
            raise TableError(
                f"{where}: column {column!r} must be text, a number or a list of chat messages with fields of those, "
                f"got {shown:.200}. Turn it into text or name another key with --data.prompt-key or --data.answer-key."
            )
    return columns


def unpack(batch: pyarrow.RecordBatch, where: str, position: int, budget: Budget) -> Iterator[dict[str, Any]]:
    """Yields the rows of a batch that follows `position` rows, their texts counted before they are made."""
    sizes = sum((_row_bytes(column) for column in batch.columns), numpy.zeros(batch.num_rows, numpy.int64))
    budget.spend(int(sizes.sum()), f"{where} row {position + batch.num_rows}")
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for i in range(batch.num_rows):
        place = f"{where} row {position + i + 1}"
        budget.check_record(int(sizes[i]), place)
        row = {name: column[i] for name, column in columns.items()}
        for name, value in row.items():
            if _is_messages(value.type) and value.is_valid and len(value) > MAX_MESSAGES:
                raise TableError(
                    f"{place}: {name!r} must have at most {MAX_MESSAGES} messages, got {len(value)}. Split the record."
                )
        yield {name: value.as_py() for name, value in row.items()}


def _is_scalar(kind: pyarrow.DataType) -> bool:
    """Whether values of a type are single texts or numbers."""
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    tests = (types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_decimal)
    return _is_text(kind) or any(test(kind) for test in tests)


def _is_text(kind: pyarrow.DataType) -> bool:
    """Whether values of a type are texts, each as long as it says."""
    return types.is_string(kind) or types.is_large_string(kind)


def _is_messages(kind: pyarrow.DataType) -> bool:
    """Whether values of a type are lists of chat messages."""
    if not (types.is_list(kind) or types.is_large_list(kind)) or not types.is_struct(kind.value_type):
        return False
    return all(_is_scalar(field.type) for field in kind.value_type)


def _row_bytes(column: Any) -> numpy.ndarray:
    """Bytes of each row of a column of arrow data, a text counted as often as it comes."""
    kind = column.type
    if types.is_dictionary(kind):
        lengths = compute.binary_length(column.dictionary).take(column.indices)
    elif _is_text(kind):
        lengths = compute.binary_length(column)
    elif types.is_struct(kind):
        return sum(map(_row_bytes, column.flatten()), numpy.zeros(len(column), numpy.int64))
    elif types.is_list(kind) or types.is_large_list(kind):
        ends = numpy.concatenate([[0], numpy.cumsum(_row_bytes(column.values))])
        return numpy.diff(ends[column.offsets.to_numpy()])
    else:
        return numpy.full(len(column), 8, numpy.int64)
    return compute.fill_null(lengths, 0).to_numpy(zero_copy_only=False).astype(numpy.int64)


def _num_leaves(kind: pyarrow.DataType) -> int:
    """Columns that parquet stores for a type."""
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _num_leaves(kind.storage_type)
    if types.is_map(kind):
        return _num_leaves(kind.key_type) + _num_leaves(kind.item_type)
    return sum(_num_leaves(kind.field(i).type) for i in range(kind.num_fields)) if kind.num_fields else 1


def _find_leaves(schema: pyarrow.Schema, columns: list[str], leaves: list[Any], where: str) -> list[int]:
    """Numbers of the stored columns that make up the wanted ones."""
    wanted, start = [], 0
    for field in schema:
        end = start + _num_leaves(field.type)
        wanted += range(start, end) if field.name in columns else []
        start = end
    paths = [leaf.path for leaf in leaves]
    named = [i for i, p in enumerate(paths) if any(p == c or p.startswith(c + ".") for c in columns)]
    if start != len(leaves) or named != wanted:  # pyarrow reads all that begin with the name and a dot
        raise TableError(f"{where}: names of other columns must not begin with {' or '.join(columns)}. Rename them.")
    return wanted


def _check_sizes(path: Path, wanted: dict[int, bool], budget: Budget) -> None:
    """Refuses a file whose page headers claim too much; `wanted` says of each stored column whether it is nested."""
    total = 0
    with path.open("rb") as file:
        for number, chunks in enumerate(_read_footer(file, path), 1):
            nested_values = 0
            for leaf, is_nested in wanted.items():
                size, values = _count_pages(file, chunks[leaf])
                total += size
                nested_values += values if is_nested else 0
            if nested_values > MAX_NESTED_VALUES:
                raise TableError(
                    f"{path}: row group {number} must have at most {MAX_NESTED_VALUES} values in its messages, "
                    f"got {nested_values}. Write the file with smaller row groups."
                )
            budget.expect(total, str(path))


def _read_footer(file: BinaryIO, path: Path) -> list[list[dict[int, Any]]]:
    """What the footer says of the stored columns of each row group; on a damaged one pyarrow may abort the process."""
    file.seek(-8, os.SEEK_END)
    (size,) = struct.unpack("<I", file.read(4))
    if size > MAX_FOOTER_BYTES:
        raise TableError(f"{path}: footer must have at most {MAX_FOOTER_BYTES >> 20} MiB, got more. Split the file.")
    file.seek(-8 - size, os.SEEK_END)
    groups = _read_struct(io.BytesIO(file.read(size)))[4]
    return [[chunk[3] for chunk in group[1]] for group in groups]


def _count_pages(file: BinaryIO, chunk: dict[int, Any]) -> tuple[int, int]:
    """Bytes and values of a stored column as its page headers claim them: those of the footer bind no reader."""
    num_values, stored, position, dictionary = chunk[5], chunk[7], chunk[9], chunk.get(11, 0)
    position = min(position, dictionary) if dictionary > 0 else position
    end = position + stored
    size = values = 0
    while position < end and values < num_values:
        file.seek(position)
        header = _read_struct(file)
        data = header.get(5) or header.get(8) or {1: 0}  # a page of data in version 1 or 2, or any other page
        if min(header[2], header[3], data[1]) < 0:
            raise _HeaderError("a page header claims a negative size")
        if header[2] > MAX_PAGE_BYTES:
            raise TableError(
                f"{file.name}: each page must have at most {MAX_PAGE_BYTES >> 20} MiB, got one of {header[2] >> 20}. "
                "Write the file with smaller pages."
            )
        size, values, position = size + header[2], values + data[1], file.tell() + header[3]
    return max(size, stored), values


def _read_struct(file: BinaryIO) -> dict[int, Any]:
    """Numbers and structs of a Thrift struct in the compact protocol by field; text is passed over."""
    fields: dict[int, Any] = {}
    number = 0
    while head := _read_byte(file):
        number = number + (head >> 4) if head >> 4 else _read_integer(file)
        fields[number] = _read_value(file, head & 15)
    return fields


def _read_value(file: BinaryIO, kind: int) -> Any:
    """One value of the compact protocol."""
    match kind:
        case 1 | 2:
            return kind == 1
        case 3:
            return _read_byte(file)
        case 4 | 5 | 6:
            return _read_integer(file)
        case 7:
            return [_read_byte(file) for _ in range(8)]
        case 8:
            file.seek(_read_varint(file), os.SEEK_CUR)
        case 9:
            head = _read_byte(file)
            size = _read_varint(file) if head >> 4 == 15 else head >> 4
            return [_read_byte(file) if head & 15 < 3 else _read_value(file, head & 15) for _ in range(size)]
        case 12:
            return _read_struct(file)
        case _:
            raise _HeaderError(f"a header has a field of type {kind}")


def _read_integer(file: BinaryIO) -> int:
    """A signed number in zigzag form."""
    number = _read_varint(file)
    return (number >> 1) ^ -(number & 1)


def _read_varint(file: BinaryIO) -> int:
    """A number of seven bits a byte, at most 64 in all."""
    number = 0
    for shift in range(0, 70, 7):
        byte = _read_byte(file)
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise _HeaderError("a header has a number of more than 64 bits")


def _read_byte(file: BinaryIO) -> int:
    """One byte."""
    byte = file.read(1)
    if not byte:
        raise _HeaderError("a header is cut off")
    return byte[0]
