"""Decoding of data: URLs and base64, in every form that RFC 4648 and browsers produce.

    content, name = decode_data("data:video/mp4;name=cat.mp4;base64,AAAA...", max_bytes)

Standard and URL-safe alphabet, with and without padding, line breaks anywhere, percent-encoded or not. The
declared media type is ignored: the decoder detects the format.
"""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote, unquote_to_bytes

HEAD = 4096  # characters in which a data: URL must come to its comma
BLOCK = 1 << 20
BLANKS = b" \t\r\n\v\f"
# Quoted parameters may hold commas and semicolons.
_HEAD = re.compile(r'data:((?:[^,"]|"[^"]*")*),', re.IGNORECASE)
_PARAMETER = re.compile(r'((?:[^;"]|"[^"]*")+)')
_ALPHABET = bytes.maketrans(b"-_", b"+/")


class DataError(ValueError):
    """What is wrong with inline data, one sentence."""


class TooLarge(DataError):
    """More than the bound."""


def is_data_url(text: str) -> bool:
    """Whether a text means to be a data: URL."""
    return text[:64].lstrip().lower().startswith("data:")


def decode_data(text: str, max_bytes: int) -> tuple[bytes, str]:
    """(content, name or "") of a data: URL or of base64 alone; raises DataError, TooLarge before decoding."""
    text = text[:64].lstrip() + text[64:]
    if not is_data_url(text):
        return _base64(_ascii(text), max_bytes), ""
    head = _HEAD.match(text[:HEAD])
    if head is None:
        raise DataError("A data: URL must look like data:video/mp4;base64,...")
    parameters = [parameter.strip() for parameter in _PARAMETER.findall(head[1])]
    data = _ascii(text[head.end() :])
    if "base64" in {parameter.lower() for parameter in parameters}:
        content = _base64(data, max_bytes)
    else:
        content = _unescaped(data, max_bytes)
    if not content:
        raise DataError("The data: URL is empty.")
    return content, _name(parameters)


def _ascii(text: str) -> bytes:
    try:
        return text.encode("ascii")
    except UnicodeEncodeError:
        raise DataError("Inline data must be ASCII: base64, or percent-encoded.") from None


def _base64(data: bytes, max_bytes: int) -> bytes:
    if len(data) > 5 * (max_bytes + 3):  # more than percent-encoding and line breaks explain
        raise TooLarge
    if b"%" in data:
        data = _unescaped(data, 2 * (max_bytes + 3))
    digits = data.translate(_ALPHABET, BLANKS)
    digits, padding = digits.rstrip(b"="), len(digits) - len(digits.rstrip(b"="))
    if len(digits) * 3 // 4 > max_bytes:
        raise TooLarge
    if padding > 2 or len(digits) % 4 == 1:
        raise DataError("The data is not valid base64: it has been cut off, or its padding is wrong.")
    try:
        content = base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise DataError("The data is not valid base64: it holds other characters.") from None
    if not content:
        raise DataError("The inline data is empty.")
    return content


def _unescaped(data: bytes, max_bytes: int) -> bytes:
    """Percent-encoding undone, in blocks, since `unquote_to_bytes` makes an object per escape."""
    if len(data) > 3 * max_bytes:
        raise TooLarge
    made = bytearray()
    start = 0
    while start < len(data):
        end = start + BLOCK
        if (cut := data.rfind(b"%", end - 2, end)) >= 0 and end < len(data):  # not inside of %41
            end = cut
        made += unquote_to_bytes(data[start:end])
        if len(made) > max_bytes:
            raise TooLarge
        start = end
    return bytes(made)


def _name(parameters: list[str]) -> str:
    """The file's name, as some programs put it among the parameters."""
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip().lower() in ("name", "filename"):
            return unquote(value.strip().strip('"'))
    return ""
