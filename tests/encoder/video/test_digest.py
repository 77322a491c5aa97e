"""Digests: two different files or clips never share one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from encoder.video.digest import BLOCK_BYTES, BLOCKS, WHOLE_BYTES, file_digest, file_state, pixel_digest
from encoder.video.reader import probe, read_clip
from tests.encoder.video import video_files as vf


def test_digest_follows_content_not_name_or_time(tmp_path):
    first = vf.write(tmp_path / "a.mp4", vf.steady(5))
    other = vf.write(tmp_path / "b.mp4", vf.steady(6))
    before = probe(first).digest
    assert probe(other).digest != before
    other.write_bytes(first.read_bytes())
    assert probe(other).digest == before


def test_digest_of_a_large_file_sees_its_size_and_both_ends(tmp_path):
    path = tmp_path / "large.bin"
    digests = set()
    for size, at in ((WHOLE_BYTES + 9, 0), (WHOLE_BYTES + 9, WHOLE_BYTES + 8), (WHOLE_BYTES + 10, 0)):
        with open(path, "wb") as file:
            file.truncate(size)
            file.seek(at)
            file.write(b"x")
        digests.add(file_digest(path))
        path.unlink()
    assert len(digests) == 3


def sparse(path: Path, size: int, at: int) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
        file.seek(at)
        file.write(b"x")
    return path


def test_no_byte_of_a_large_file_escapes_the_digest(tmp_path):
    size = WHOLE_BYTES + 10
    between = BLOCK_BYTES + (size - BLOCK_BYTES) // (BLOCKS - 1) // 2  # where samples do not look
    places = (0, between, size - 1)
    assert len({file_digest(sparse(tmp_path / str(at), size, at)) for at in places}) == 3


def test_the_callers_own_large_files_never_share_a_digest(tmp_path):
    """Not even with equal samples, sizes and times: another file, or the same one written again."""
    size = WHOLE_BYTES + 10
    between = BLOCK_BYTES + (size - BLOCK_BYTES) // (BLOCKS - 1) // 2
    first, second = (sparse(tmp_path / name, size, between) for name in "ab")
    for path in (first, second):
        os.utime(path, ns=(10**18, 10**18))
    digests = [file_digest(path, whole=False) for path in (first, second)]
    assert digests[0] == file_digest(first, whole=False)
    with open(first, "r+b") as file:
        file.seek(between)
        file.write(b"y")
    os.utime(first, ns=(10**18, 10**18))
    digests.append(file_digest(first, whole=False))
    digests.append(file_digest(first))
    assert len(set(digests)) == 4


def test_a_file_rewritten_in_place_at_once_has_another_digest(tmp_path):
    path = tmp_path / "f"
    digests = set()
    for byte in (b"a", b"b"):
        with open(path, "r+b" if path.exists() else "wb") as file:
            file.write(byte)
        os.utime(path, ns=(10**18, 10**18))
        digests.add(file_digest(path))
    assert len(digests) == 2


def test_pixel_digests_tell_everything_apart():
    frames = torch.arange(48, dtype=torch.uint8).view(2, 2, 4, 3)
    clips = [
        (frames, (0.0, 1.0), "frames", 2.0),
        (frames, (0.0, 1.5), "frames", 2.0),
        (frames, (0.0, 1.0), "image", 2.0),
        (frames, (0.0, 1.0), "frames", 3.0),
        (frames.view(2, 4, 2, 3), (0.0, 1.0), "frames", 2.0),
        (frames.view(torch.int8), (0.0, 1.0), "frames", 2.0),
        (frames.view(1, 4, 4, 3), (0.0,), "frames", 2.0),
    ]
    assert len({pixel_digest(*arguments) for arguments in clips}) == len(clips)


def test_one_image_and_a_list_of_one_have_other_digests():
    picture = np.zeros((8, 8, 3), np.uint8)
    digests = {
        read_clip(picture, 1).info.digest,
        read_clip([picture], 1).info.digest,
        read_clip([picture], 1, fps=2.0).info.digest,
    }
    assert len(digests) == 3


def test_file_state_changes_with_the_content(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"a")
    assert file_state(path) is None  # written a moment ago
    assert file_state(tmp_path) is file_state(tmp_path / "missing") is file_state("a\0b") is None
    monkeypatch.setattr("encoder.video.digest.SETTLED_S", -60.0)
    before = file_state(path)
    assert before == file_state(path)
    path.write_bytes(b"b")
    os.utime(path, ns=(10**18, 10**18))
    assert before != file_state(path)
    os.link(path, tmp_path / "same")
    assert file_state(path) == file_state(tmp_path / "same")
