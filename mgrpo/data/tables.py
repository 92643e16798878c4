"""Reads rows of parquet files and arrow tables; every size is counted before memory is used."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from mgrpo.data.keys import Keys
from mgrpo.data.parquet_pages import HeaderError, check_sizes
from mgrpo.errors import InputError
from mgrpo.grading.label_text import MAX_ANSWERS
from mgrpo.inputs import Budget

# Rows of a batch. For each batch of a parquet file, Arrow copies the earlier texts of its row group; of a mapped table
# it may copy the batch.
PARQUET_CHUNK, TABLE_CHUNK = 4096, 64
MAX_MESSAGES = 1 << 14
NESTED = 4  # levels of objects that keys may reach into
types: Any = pyarrow.types
compute: Any = pyarrow.compute  # its functions are created on import


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """The place of a key's values: a column, or a field of one."""

    key: str
    name: str  # of the column
    fields: tuple[str, ...]  # names of the nested fields, down to the values
    is_written: bool = False  # the values are objects written as text, in which the rest of the key is looked up

    @property
    def path(self) -> str:
        """Path of the values in a parquet file."""
        return ".".join((self.name, *self.fields))


def read_parquet(path: Path, keys: Keys, budget: Budget) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the wanted values of the rows of a parquet file by key, each row with its position.

    Args:
        path: the file. Its footer and page headers are checked before any page is decompressed.
        keys: keys to read; the answer's may be absent.
        budget: the data that may still be read.

    Raises:
        InputError: a wanted column is not text, numbers, lists of messages or, for answers, lists of text or numbers;
            there are too many messages; or the file cannot be read.

    """
    batches = _parquet_batches(path, keys, budget)
    return read_batches(batches, str(path), budget, "parquet file", "Write or download it again.")


def read_table(dataset: Any, source: str, keys: Keys, budget: Budget) -> Iterator[tuple[str, dict[str, Any]]]:
    """`read_parquet` for a data set of the package datasets, whose tables are memory-mapped."""
    return read_batches(_table_batches(dataset, source, keys, budget), source, budget, "table", "Download it again.")


def read_batches(
    batches: Iterator[pyarrow.RecordBatch], where: str, budget: Budget, what: str, remedy: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of all batches, each with its position; an error of arrow names the last row that was read."""
    position = 0
    try:
        for batch in batches:
            for row in unpack(batch, where, position, budget):
                position += 1
                yield f" row {position}", row
    except MemoryError:  # arrow's MemoryError is an ArrowException too
        raise
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, HeaderError, struct.error, RecursionError) as error:
        reason = str(error).rstrip(". ")
        raise InputError(f"{where}: not a readable {what} after row {position}: {reason}. {remedy}") from error


def _parquet_batches(path: Path, keys: Keys, budget: Budget) -> Iterator[pyarrow.RecordBatch]:
    """Batches of the wanted columns of a parquet file."""
    with pyarrow.parquet.ParquetFile(path) as file:
        leaves = [file.schema.column(i) for i in range(len(file.schema))]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    # Repeated texts are kept once, so that their copies are counted before they are made.
    with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
        schema, num_rows = file.schema_arrow, file.metadata.num_rows
        columns = choose_columns(schema, keys, str(path), is_empty=not num_rows)
        wanted = _find_leaves(schema, columns, leaves, str(path))
        budget.check_records(num_rows, str(path))
        try:
            check_sizes(path, {i: leaves[i].max_repetition_level > 0 for i in wanted}, budget)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise HeaderError("a footer or page header lacks a size") from error
        names = [column.path for column in columns]
        for group in range(file.metadata.num_row_groups):  # a batch over several groups would hold all their texts
            for batch in file.iter_batches(PARQUET_CHUNK, [group], names):
                yield pick(batch, columns)


def _table_batches(dataset: Any, source: str, keys: Keys, budget: Budget) -> Iterator[pyarrow.RecordBatch]:
    """Batches of the wanted columns of a data set."""
    columns = choose_columns(dataset.features.arrow_schema, keys, source, is_empty=not len(dataset))
    budget.check_records(len(dataset), source)
    names = list(dict.fromkeys(column.name for column in columns))
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=TABLE_CHUNK):
        for batch in table.to_batches():
            yield pick(batch, columns)


def choose_columns(schema: pyarrow.Schema, keys: Keys, where: str, *, is_empty: bool = False) -> list[Column]:
    """The columns of the wanted keys; InputError without a prompt's, and for types whose size cannot be counted."""
    keys.note(name for field in schema for name in _name_fields(field))
    columns = [column for key in keys.wanted if (column := _find_column(schema, key))]
    if not is_empty and not any(column.key == keys.prompt for column in columns):
        raise keys.no_prompt(list(keys.seen), f"{where} row 1")
    for column in columns:
        if schema.names.count(column.name) > 1:
            raise InputError(f"{where}: column names must differ, got {column.name!r} twice. Rename the columns.")
        field = schema.field(column.name)
        for name in column.fields:
            field = field.type.field(name)
        kind, is_answer = field.type, column.key != keys.prompt
        is_list = is_answer and _is_list(kind) and _is_scalar(kind.value_type)
        if not (_is_scalar(kind) or _is_messages(kind) or is_list):
            shown = re.sub(r"dictionary<values=(\w+), indices=\w+, ordered=0>", r"\1", str(kind))
            inner = list(_name_fields(field, column.key.removesuffix(field.name))) if types.is_struct(kind) else []
            raise InputError(
                f"{where}: column {column.key!r} must be text, a number or a list of chat messages with fields of "
                f"those, got {shown:.200}. Turn it into text or name another key with --data.prompt-key or "
                f"--data.answer-key{', such as ' + ' or '.join(inner[:9]) if inner else ''}."
            )
    return columns


def _find_column(schema: pyarrow.Schema, key: str) -> Column | None:
    """The column of a key, None if absent; a column with dots in its name comes first."""
    parts = key.split(".")
    for num in range(len(parts), 0, -1):
        name, fields = ".".join(parts[:num]), parts[num:]
        if name not in schema.names or len(fields) > NESTED:
            continue
        kind = schema.field(schema.names.index(name)).type
        for depth, field in enumerate(fields):
            if _is_text(kind) or (types.is_dictionary(kind) and _is_text(kind.value_type)):
                return Column(key=key, name=name, fields=tuple(fields[:depth]), is_written=True)
            if not types.is_struct(kind) or kind.get_field_index(field) < 0:
                break
            kind = kind.field(field).type
        else:
            return Column(key=key, name=name, fields=tuple(fields))
    return None


def _name_fields(field: pyarrow.Field, prefix: str = "", depth: int = NESTED) -> Iterator[str]:
    """The key of a column, or the keys of its nested fields."""
    if types.is_struct(field.type) and field.type.num_fields and depth:
        for i in range(field.type.num_fields):
            yield from _name_fields(field.type.field(i), f"{prefix}{field.name}.", depth - 1)
    else:
        yield f"{prefix}{field.name}"


def pick(batch: pyarrow.RecordBatch, columns: list[Column]) -> pyarrow.RecordBatch:
    """The values of each key as a separate column."""
    arrays = [
        compute.struct_field(batch.column(c.name), list(c.fields)) if c.fields else batch.column(c.name)
        for c in columns
    ]
    return pyarrow.RecordBatch.from_arrays(arrays, names=[c.path if c.is_written else c.key for c in columns])


def unpack(batch: pyarrow.RecordBatch, where: str, position: int, budget: Budget) -> Iterator[dict[str, Any]]:
    """Yields the rows of a batch behind `position` rows; texts are counted before they are created."""
    sizes = sum((_row_bytes(column) for column in batch.columns), numpy.zeros(batch.num_rows, numpy.int64))
    budget.spend(int(sizes.sum()), f"{where} row {position + batch.num_rows}")
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for i in range(batch.num_rows):
        place = f"{where} row {position + i + 1}"
        budget.check_record(int(sizes[i]), place)
        row = {name: column[i] for name, column in columns.items()}
        for name, value in row.items():
            _check_length(name, value, place)
        yield {name: _to_python(value) for name, value in row.items()}


def _to_python(value: Any) -> Any:
    """A value as a Python object; floats of fewer than 64 bits as numpy's, to keep their written digits."""
    kind = value.type.value_type if _is_list(value.type) else value.type
    if not value.is_valid or not (types.is_float32(kind) or types.is_float16(kind)):
        return value.as_py()
    if _is_list(value.type):
        return value.values.to_numpy(zero_copy_only=False)
    return kind.to_pandas_dtype()(value.as_py())


def _check_length(name: str, value: Any, place: str) -> None:
    """Refuses a list with too many messages, parts of messages, or answers."""
    if not value.is_valid or not _is_list(value.type):
        return
    limit, what = (MAX_MESSAGES, "messages") if types.is_struct(value.type.value_type) else (MAX_ANSWERS, "answers")
    longest = len(value)
    if what == "messages" and longest <= MAX_MESSAGES:
        lists = [array for array in value.values.flatten() if _is_list(array.type)]
        longest = max(longest, *(len(array.flatten()) for array in lists), 0)
    if longest > limit:
        raise InputError(f"{place}: {name!r} must have at most {limit} {what}, got {longest}. Split the record.")


def _is_scalar(kind: pyarrow.DataType) -> bool:
    """Whether a type is text or a number."""
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    tests = (types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_decimal)
    return _is_text(kind) or any(test(kind) for test in tests)


def _is_text(kind: pyarrow.DataType) -> bool:
    """Whether a type is text."""
    return types.is_string(kind) or types.is_large_string(kind)


def _is_list(kind: pyarrow.DataType) -> bool:
    """Whether a type is a list of variable length."""
    return types.is_list(kind) or types.is_large_list(kind)


def _is_messages(kind: pyarrow.DataType, *, parts: bool = True) -> bool:
    """Whether a type is a list of chat messages, whose contents may be lists of parts."""
    if not _is_list(kind) or not types.is_struct(kind.value_type):
        return False
    fields = [field.type for field in kind.value_type]
    return all(_is_scalar(field) or (parts and _is_messages(field, parts=False)) for field in fields)


def _row_bytes(column: Any) -> numpy.ndarray:
    """Bytes of each row of an arrow column; a repeated text counts each time."""
    kind = column.type
    if types.is_dictionary(kind):
        lengths = compute.binary_length(column.dictionary).take(column.indices)
    elif _is_text(kind):
        lengths = compute.binary_length(column)
    elif types.is_struct(kind):
        return sum(map(_row_bytes, column.flatten()), numpy.zeros(len(column), numpy.int64))
    elif _is_list(kind):
        ends = numpy.concatenate([[0], numpy.cumsum(_row_bytes(column.values))])
        return numpy.diff(ends[column.offsets.to_numpy()])
    else:
        return numpy.full(len(column), 8, numpy.int64)
    return compute.fill_null(lengths, 0).to_numpy(zero_copy_only=False).astype(numpy.int64)


def _num_leaves(kind: pyarrow.DataType) -> int:
    """The number of columns that parquet stores for a type."""
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _num_leaves(kind.storage_type)
    if types.is_map(kind):
        return _num_leaves(kind.key_type) + _num_leaves(kind.item_type)
    return sum(_num_leaves(kind.field(i).type) for i in range(kind.num_fields)) if kind.num_fields else 1


def _find_leaves(schema: pyarrow.Schema, columns: list[Column], leaves: list[Any], where: str) -> list[int]:
    """Indices of the stored columns that pyarrow reads for the wanted ones."""
    ranges, start = {}, 0
    for field in schema:
        end = start + _num_leaves(field.type)
        ranges[field.name] = range(start, end)
        start = end
    wanted: list[int] = []
    for column in columns:  # pyarrow reads every column whose path begins with the name and a dot
        named = [i for i, leaf in enumerate(leaves) if f"{leaf.path}.".startswith(f"{column.path}.")]
        # A nested field may have the same path as a column with a dot in its name; it is read and ignored.
        own = [
            i
            for i in named
            if i in ranges[column.name] or (leaves[i].path == column.path and not leaves[i].max_repetition_level)
        ]
        if start != len(leaves) or own != named or not named:
            names = " or ".join(column.path for column in columns)
            raise InputError(f"{where}: names of other columns must not begin with {names}. Rename them.")
        wanted += named
    return sorted(set(wanted))
