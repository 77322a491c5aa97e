"""Inline media: every form of base64 that programs and browsers write means the same bytes."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.server.media import data_urls
from app.server.media.data_urls import DataError, TooLarge, decode_data, is_data_url

CONTENT = bytes(range(256)) * 3 + b"?>~"
STANDARD = base64.b64encode(CONTENT).decode()
URL_SAFE = base64.urlsafe_b64encode(CONTENT).decode()


@pytest.mark.parametrize(
    "text",
    [
        f"data:video/mp4;base64,{STANDARD}",
        f"data:video/mp4;base64,{URL_SAFE}",
        f"data:video/mp4;base64,{STANDARD.rstrip('=')}",
        f"data:video/mp4;base64,{URL_SAFE.rstrip('=')}",
        "data:video/mp4;base64," + "\r\n".join(textwrap.wrap(STANDARD, 76)),
        "data:video/mp4;base64, " + "\n".join(textwrap.wrap(URL_SAFE, 64)) + " \n",
        f"data:video/mp4;base64,{quote(STANDARD, safe='')}",
        f"data:video/mp4;base64,{quote('%0A'.join(textwrap.wrap(STANDARD, 76)), safe='%')}",
        f"data:;base64,{STANDARD}",
        f"DATA:VIDEO/MP4;BASE64,{STANDARD}",
        f" \n data:video/mp4; charset=utf-8 ; base64,{STANDARD}",
        f'data:video/mp4;codecs="avc1.4d002a,mp4a.40.2";base64,{STANDARD}',
        f"data:video/mp4;name=a.mp4;base64,{STANDARD}",
        f"data:application/octet-stream;base64,{STANDARD}",
        f"data:text/plain;base64,{STANDARD}",
        "data:video/mp4," + "".join(f"%{byte:02X}" for byte in CONTENT),
        "data:," + "".join(f"%{byte:02x}" for byte in CONTENT),
        f"data:,{quote(CONTENT)}",
        STANDARD,
        URL_SAFE.rstrip("="),
        "\n".join(textwrap.wrap(STANDARD, 60)) + "\n",
    ],
    ids=lambda text: repr(text[:48]),
)
def test_all_forms_are_the_same_bytes(text: str) -> None:
    content, _ = decode_data(text, 10_000)
    assert content == CONTENT


@given(
    content=st.binary(min_size=1, max_size=70),
    safe=st.booleans(),
    padded=st.booleans(),
    escaped=st.booleans(),
    width=st.integers(1, 80),
    block=st.integers(3, 40),
)
def test_any_bytes_round_trip(
    content: bytes, safe: bool, padded: bool, escaped: bool, width: int, block: int
) -> None:
    text = (base64.urlsafe_b64encode if safe else base64.b64encode)(content).decode()
    text = "\r\n".join(textwrap.wrap(text if padded else text.rstrip("="), width))
    text = quote(text, safe="") if escaped else text
    usual, data_urls.BLOCK = data_urls.BLOCK, block
    try:
        assert decode_data(f"data:video/mp4;base64,{text}", 1024)[0] == content
        plain = "".join(f"%{byte:02x}" for byte in content)
        assert decode_data(f"data:,{plain}", len(content))[0] == content
    finally:
        data_urls.BLOCK = usual


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ("video/mp4;name=cat.mp4", "cat.mp4"),
        ('video/mp4;NAME="my cat, sleeping.mp4"', "my cat, sleeping.mp4"),
        ("video/mp4;filename=my%20cat.mp4;charset=x", "my cat.mp4"),
        ("video/mp4", ""),
    ],
)
def test_the_name_among_the_parameters(parameters: str, name: str) -> None:
    assert decode_data(f"data:{parameters};base64,QUJD", 10) == (b"ABC", name)


@pytest.mark.parametrize(
    "text",
    [
        "data:",
        "data:video/mp4",
        "data:video/mp4;base64",
        "data:video/mp4;base64,",
        "data:video/mp4;base64,====",
        "data:,",
        "data:video/mp4;base64,A",
        "data:video/mp4;base64,AAAAA",
        "data:video/mp4;base64,AA=A",
        "data:video/mp4;base64,AA===",
        "data:video/mp4;base64,AA*A",
        "data:video/mp4;base64,AAÄA",
        "data:video/mp4;base64,AA\0A",
        "data:" + "x" * 5000 + ";base64,AAAA",
        "not base64!",
        "=",
    ],
    ids=lambda text: repr(text[:40]),
)
def test_invalid_data_urls(text: str) -> None:
    with pytest.raises(DataError):
        decode_data(text, 10_000)


@pytest.mark.parametrize(
    "make",
    [
        lambda size: "data:video/mp4;base64," + base64.b64encode(bytes(size)).decode(),
        lambda size: base64.b64encode(bytes(size)).decode().rstrip("="),
        lambda size: "data:," + "%00" * size,
        lambda size: "data:," + "a" * size,
    ],
)
def test_the_bound_is_exact(make: Callable[[int], str]) -> None:
    assert len(decode_data(make(3000), 3000)[0]) == 3000
    with pytest.raises(TooLarge):
        decode_data(make(3001), 3000)


def test_far_too_large_data_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base64, "b64decode", lambda *_, **__: pytest.fail("it was decoded"))
    monkeypatch.setattr(data_urls, "unquote_to_bytes", lambda _: pytest.fail("it was decoded"))
    for text in ("A" * 8_000, "data:;base64," + "A" * 8_000, "data:," + "%41" * 8_000):
        with pytest.raises(TooLarge):
            decode_data(text, 1_000)


def test_is_data_url() -> None:
    assert is_data_url(" DaTa:x")
    assert not is_data_url("date:x")
    assert not is_data_url("file-0")
