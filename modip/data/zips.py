"""Members of a zip archive, read where they lie: the archive may have millions, or lie inside another.

Python's zipfile keeps an object of some 700 bytes for every member, and opens an archive in a
millisecond: too much where an archive is one time step, and another holds a million of those.
"""

from __future__ import annotations

import functools
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Read = Callable[[int, int], bytes]
"""(offset, length) to the bytes there; fewer where the file ends."""

# Layouts from PKWARE's APPNOTE.TXT 6.3, sections 4.3.7 (local header), 4.3.12 (entry), 4.3.14 to 4.3.16 (ends).
_LOCAL = struct.Struct("<4s5H3L2H")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_TAIL = 1024
_LONGEST_TAIL = _END.size + 0xFFFF  # the archive's comment may have 65,535 bytes
_WINDOW = 1 << 20
_UNKNOWN = 0xFFFFFFFF  # the number is in the 64-bit extension


class Member(NamedTuple):
    """One file of an archive."""

    name: bytes
    header: int  # offset of its local header
    stored: int  # bytes in the archive
    size: int  # bytes of the file
    method: int  # zipfile.ZIP_STORED or ZIP_DEFLATED
    crc: int


def within(descriptor: int, start: int = 0) -> Read:
    """Reads an open file from `start` on, as if it began there."""
    return lambda offset, length: os.pread(descriptor, length, start + offset)


def members(read: Read, size: int) -> Iterator[Member]:
    """The members of an archive of `size` bytes. Raises zipfile.BadZipFile."""
    position, end = _directory(read, size)
    while position < end:
        window = read(position, min(_WINDOW, end - position))
        at = 0
        while at + _ENTRY.size <= len(window):
            entry = _ENTRY.unpack_from(window, at)
            method, crc, stored, length, header = entry[4], *entry[7:10], entry[16]
            name_at = at + _ENTRY.size
            extra_at = name_at + entry[10]
            following = extra_at + entry[11] + entry[12]
            if entry[0] != b"PK\1\2":
                raise zipfile.BadZipFile("its list of files is damaged")
            if following > len(window):
                break
            if _UNKNOWN in (stored, length, header):
                extra = window[extra_at : extra_at + entry[11]]
                length, stored, header = _extended(extra, length, stored, header)
            yield Member(window[name_at:extra_at], header, stored, length, method, crc)
            at = following
        if at == 0:
            raise zipfile.BadZipFile("its list of files is cut short")
        position += at


def start_of(read: Read, member: Member) -> int:
    """Offset of a member's bytes. Raises zipfile.BadZipFile."""
    header = read(member.header, _LOCAL.size)
    if len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
        raise zipfile.BadZipFile(
            f"{member.name.decode(errors='replace')} is not where it should be"
        )
    name, extra = _LOCAL.unpack(header)[9:]
    return member.header + _LOCAL.size + int(name) + int(extra)


def content(read: Read, member: Member) -> bytes:
    """A member's content, its checksum compared. Raises zipfile.BadZipFile."""
    data = read(start_of(read, member), member.stored)
    if member.method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-15).decompress(data, member.size)
        except zlib.error as problem:
            raise zipfile.BadZipFile(
                f"{member.name.decode(errors='replace')}: {problem}"
            ) from problem
    elif member.method != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"compression method {member.method} is not supported")
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise zipfile.BadZipFile(f"{member.name.decode(errors='replace')} has a wrong checksum")
    return data


def array(npy: bytes) -> NDArray[Any]:
    """The array of a .npy file. Raises ValueError for one that is damaged, or holds Python objects."""
    length = 10 + int.from_bytes(npy[8:10], "little")
    dtype, shape = _header(npy[:length])
    return np.frombuffer(npy, dtype, int(np.prod(shape)), length).reshape(shape)


@functools.lru_cache(maxsize=64)
def _header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """What a .npy file begins with. The same for each of many steps: not worth parsing again."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not a .npy file of version 1.0")
    shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if columns_first and len(shape) > 1:
        raise ValueError("it is in Fortran order")
    return dtype, shape


def _directory(read: Read, size: int) -> tuple[int, int]:
    """Where the list of files begins and ends."""
    for longest in (_TAIL, _LONGEST_TAIL):
        start = max(0, size - longest)
        tail = read(start, size - start)
        at = tail.rfind(b"PK\5\6")
        if at >= 0 and at + _END.size <= len(tail):
            break
    else:
        raise zipfile.BadZipFile("not a complete zip archive")
    length, begin = _END.unpack_from(tail, at)[5:7]
    if begin == _UNKNOWN or length == _UNKNOWN:
        locator = read(start + at - _LOCATOR64.size, _LOCATOR64.size)
        if locator[:4] != b"PK\6\7":
            raise zipfile.BadZipFile("its 64-bit directory is missing")
        record = read(_LOCATOR64.unpack(locator)[2], _END64.size)
        if len(record) < _END64.size or record[:4] != b"PK\6\6":
            raise zipfile.BadZipFile("its 64-bit directory is damaged")
        length, begin = _END64.unpack(record)[8:10]
    if begin + length > size:
        raise zipfile.BadZipFile("its list of files is cut short")
    return begin, begin + length


def _extended(extra: bytes, *numbers: int) -> list[int]:
    """The numbers, those that are unknown taken from the 64-bit extension, where they stand in this order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return [next(wide, _UNKNOWN) if n == _UNKNOWN else n for n in numbers]
        at += 4 + length
    raise zipfile.BadZipFile("a 64-bit size is missing")
