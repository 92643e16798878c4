"""Checks the sizes in page headers of parquet files before any page is decompressed."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from mgrpo.errors import InputError
from mgrpo.inputs import Budget, too_large

# A row group's nested values are decoded at once, at up to 20 bytes each.
MAX_NESTED_VALUES = 1 << 25
MAX_FOOTER_BYTES = 16 << 20
MAX_PAGE_BYTES = 256 << 20  # a page is decompressed as a whole, and its texts are copied up to three times


class HeaderError(Exception):
    """The footer or a page header of a parquet file is invalid."""


def check_sizes(path: Path, wanted: dict[int, bool], budget: Budget) -> None:
    """Refuses a file whose page headers claim too much; `wanted` maps each stored column to whether it is nested."""
    total = 0
    with path.open("rb") as file:
        for number, chunks in enumerate(_read_footer(file, path), 1):
            nested_values = 0
            for leaf, is_nested in wanted.items():
                size, values = _count_pages(file, chunks[leaf])
                total += size
                nested_values += values if is_nested else 0
            if nested_values > MAX_NESTED_VALUES:
                raise InputError(
                    f"{path}: row group {number} must have at most {MAX_NESTED_VALUES} values in its messages, "
                    f"got {nested_values}. Write the file with smaller row groups."
                )
            budget.expect(total, str(path))


def _read_footer(file: BinaryIO, path: Path) -> list[list[dict[int, Any]]]:
    """Metadata of the stored columns of each row group; pyarrow may abort the process on a damaged footer."""
    file.seek(-8, os.SEEK_END)
    (size,) = struct.unpack("<I", file.read(4))
    if size > MAX_FOOTER_BYTES:
        raise too_large(f"{path}: footer", MAX_FOOTER_BYTES, "Split the file.")
    file.seek(-8 - size, os.SEEK_END)
    groups = _read_struct(io.BytesIO(file.read(size)))[4]
    return [[chunk[3] for chunk in group[1]] for group in groups]


def _count_pages(file: BinaryIO, chunk: dict[int, Any]) -> tuple[int, int]:
    """Bytes and values of a stored column by its page headers, because readers do not obey those in the footer."""
    num_values, stored, position, dictionary = chunk[5], chunk[7], chunk[9], chunk.get(11, 0)
    position = min(position, dictionary) if dictionary > 0 else position
    end = position + stored
    size = values = 0
    while position < end and values < num_values:
        file.seek(position)
        header = _read_struct(file)
        data = header.get(5) or header.get(8) or {1: 0}  # a data page of version 1 or 2, else another page
        if min(header[2], header[3], data[1]) < 0:
            raise HeaderError("a page header claims a negative size")
        if header[2] > MAX_PAGE_BYTES:
            raise InputError(
                f"{file.name}: each page must have at most {MAX_PAGE_BYTES >> 20} MiB, got one of {header[2] >> 20}. "
                "Write the file with smaller pages."
            )
        size, values, position = size + header[2], values + data[1], file.tell() + header[3]
    return max(size, stored), values


def _read_struct(file: BinaryIO) -> dict[int, Any]:
    """Numbers and structs of a Thrift struct (compact protocol) by field number; text is skipped."""
    fields: dict[int, Any] = {}
    number = 0
    while head := _read_byte(file):
        number = number + (head >> 4) if head >> 4 else _read_integer(file)
        fields[number] = _read_value(file, head & 15)
    return fields


def _read_value(file: BinaryIO, kind: int) -> Any:
    """One value of the given type in the compact protocol."""
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
            raise HeaderError(f"a header has a field of type {kind}")


def _read_integer(file: BinaryIO) -> int:
    """A signed integer in zigzag encoding."""
    number = _read_varint(file)
    return (number >> 1) ^ -(number & 1)


def _read_varint(file: BinaryIO) -> int:
    """An unsigned integer with seven bits in each byte, of at most 64 bits."""
    number = 0
    for shift in range(0, 70, 7):
        byte = _read_byte(file)
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise HeaderError("a header has a number of more than 64 bits")


def _read_byte(file: BinaryIO) -> int:
    """One byte."""
    byte = file.read(1)
    if not byte:
        raise HeaderError("a header is cut off")
    return byte[0]
