"""Read text files of other tools as UTF-8, and explain what is wrong with files that are not."""

from __future__ import annotations

from pathlib import Path

from medalign.data.samples.git_lfs import describe_pointer
from medalign.data.samples.sample import BadSample
from medalign.errors import DataError, format_os_error

HEAD_BYTES = 32  # of a file, passed to `encoding_problem`
CONVERT = "convert a file from Windows with iconv -f WINDOWS-1252 -t UTF-8"
_UTF32 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: Path) -> str:
    """Read a UTF-8 file. Raises DataError with the name of the file if it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{format_os_error(error)}; the file cannot be read") from error
    try:
        return decode_text(data)
    except BadSample as error:
        raise DataError(f"{path} {error}") from error


def encoding_problem(head: bytes) -> str:
    """Return what is wrong with the encoding of a file that begins with `head`, and the remedy, or ""."""
    if description := describe_pointer(head):
        return f"is {description}"
    if head.startswith(b"\x1f\x8b"):
        return "is gzipped; unpack it with gunzip"
    if head.startswith(_UTF16 + _UTF32) or b"\0" in head[:4]:
        name = "UTF-32" if head.startswith(_UTF32) else "UTF-16"
        return f"is {name}; convert it to UTF-8, for example with iconv -f {name} -t UTF-8"
    return ""


def decode_utf8(data: bytes) -> str:
    """Decode UTF-8, without a byte order mark. Raises BadSample with the position of the error and the remedy."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"byte 0x{data[error.start]:02x} at position {error.start}"
        raise BadSample(f"not UTF-8 ({place}); {CONVERT}") from error


def decode_text(data: bytes) -> str:
    """Decode a file of UTF-8 text.

    Raises:
        BadSample: it has another encoding. The message follows the name of the file.
    """
    if problem := encoding_problem(data[:HEAD_BYTES]):
        raise BadSample(problem)
    try:
        return decode_utf8(data)
    except BadSample as error:
        raise BadSample(f"is {error}") from error
