"""Read the header of a JPEG, JPEG-LS or JPEG 2000 code stream, which the tags of a DICOM file may contradict."""

from __future__ import annotations

import struct
from typing import NamedTuple

JPEG, JPEG_2000 = b"\xff\xd8", b"\xff\x4f\xff\x51"  # first bytes
_JP2 = b"\x00\x00\x00\x0cjP  "  # first bytes of a file that contains a JPEG 2000 code stream
_SIZE = {*range(0xFFC0, 0xFFD0), 0xFFF7} - {0xFFC4, 0xFFC8, 0xFFCC}  # frame headers; the last is of JPEG-LS


class CodeStream(NamedTuple):
    """The header of one image."""

    width: int
    height: int
    precision: int  # bits per value of the first component
    components: bytes  # the ids of a JPEG's components
    defines_colors: bool  # whether a JPEG has a JFIF or Adobe marker, which defines its components


def read_code_stream(data: bytes) -> CodeStream | None:
    """Return the header, or None for other formats. Raises struct.error or IndexError if it is truncated."""
    if data.startswith(JPEG):
        return _jpeg(data)
    start = data.find(JPEG_2000) if data.startswith(_JP2) else 0
    if start < 0 or not data.startswith(JPEG_2000, start):
        return None
    right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
    return CodeStream(right - left, bottom - top, (data[start + 42] & 0x7F) + 1, b"", False)


def _jpeg(data: bytes) -> CodeStream:
    position, defined = len(JPEG), False
    while True:
        marker, length = struct.unpack_from(">HH", data, position)
        if marker == 0xFFFF:  # the first byte is padding
            position += 1
            continue
        content = position + 4
        if marker in _SIZE:
            precision, height, width, count = struct.unpack_from(">BHHB", data, content)
            return CodeStream(width, height, precision, data[content + 6 :: 3][:count], defined)
        defined |= data.startswith((b"JFIF\0", b"Adobe"), content)
        position += 2 + length
