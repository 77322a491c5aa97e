"""One descriptor is checked, hashed and decoded; and the digests of what is read so never collide."""

from __future__ import annotations

import gzip
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from encoder.errors import VideoError
from encoder.video import reader
from encoder.video.descriptors import DescriptorReader, descriptor_name, open_file
from encoder.video.digest import BLOCK_BYTES, BLOCKS, WHOLE_BYTES, file_digest, pixel_digest
from encoder.video.reader import probe, read_clip
from tests.encoder.video import video_files as vf


@pytest.fixture
def clip(tmp_path) -> Path:
    return vf.write(tmp_path / "v.mp4", vf.steady(5))


@pytest.fixture
def other(tmp_path) -> Path:
    return vf.write(tmp_path / "other.mp4", vf.steady(50))


@pytest.mark.parametrize("trusted", [True, False])
def test_a_path_that_changes_after_the_check_is_not_followed(clip, other, monkeypatch, trusted):
    check = reader._check_file

    def then_swap(*arguments):
        check(*arguments)
        clip.unlink()
        clip.symlink_to(other)

    monkeypatch.setattr(reader, "_check_file", then_swap)
    assert probe(clip, trusted=trusted).duration_s == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("mode", ["rb", "r+b"])
@pytest.mark.parametrize("buffering", [0, -1])
def test_an_open_file_is_read_in_place_and_stays_where_it_is(clip, other, monkeypatch, mode, buffering):
    monkeypatch.setattr(reader, "_copy", None)
    with open(clip, mode, buffering=buffering) as file:
        os.replace(other, clip)
        for trusted in (True, False):
            assert probe(file, trusted=trusted).duration_s == pytest.approx(0.2, abs=0.01)
            assert file.tell() == 0


def test_what_was_written_to_an_open_file_is_read(clip, tmp_path):
    with open(tmp_path / "new.mp4", "w+b") as file:
        file.write(clip.read_bytes())
        file.seek(0)
        assert probe(file) == probe(clip)


def test_a_file_object_that_changes_its_bytes_is_read_through_it(clip, tmp_path):
    """Its descriptor is that of the compressed file."""
    with gzip.open(tmp_path / "v.gz", "wb") as packed:
        packed.write(clip.read_bytes())
    with gzip.open(tmp_path / "v.gz") as packed:
        assert probe(packed).digest == probe(clip).digest
    with gzip.open(tmp_path / "v.gz") as packed:
        assert probe(io.BufferedReader(packed)).digest == probe(clip).digest


def test_any_view_of_bytes_is_their_content(clip):
    data = clip.read_bytes()
    doubled = bytes(byte for one in data for byte in (one, 0))
    for view in (memoryview(data), memoryview(doubled)[::2], memoryview(bytearray(data)).toreadonly()):
        assert probe(view).digest == probe(data).digest


def test_a_class_is_no_source():
    with pytest.raises(VideoError, match="cannot be a type"):
        probe(io.BytesIO)


def test_the_rest_of_an_open_file_is_what_counts(clip, tmp_path):
    (tmp_path / "shifted").write_bytes(b"head" + clip.read_bytes())
    with open(tmp_path / "shifted", "rb") as file:
        file.seek(4)
        assert probe(file).digest == probe(clip).digest


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "pipe", "socket/x", "a\0b", "x" * 5000])
@pytest.mark.parametrize("trusted", [True, False])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path, name, trusted):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VideoError, match=r"no such file|not a readable file"):
        probe(str(tmp_path / name) if not name.startswith("/") else name, trusted=trusted)


def test_a_file_that_a_stranger_changes_meanwhile_is_refused(clip, monkeypatch):
    decode = reader._decode

    def then_write(*arguments):
        decoded = decode(*arguments)
        with open(clip, "r+b") as file:
            file.write(b"\0\0\0\x01")
        return decoded

    monkeypatch.setattr(reader, "_decode", then_write)
    with pytest.raises(VideoError, match="changed while it was read"):
        probe(clip, trusted=False)


def test_a_file_that_is_moved_or_removed_meanwhile_is_read(clip, monkeypatch):
    decode = reader._decode

    def then_remove(*arguments):
        decoded = decode(*arguments)
        clip.unlink()
        return decoded

    monkeypatch.setattr(reader, "_decode", then_remove)
    assert probe(clip, trusted=False).codec == "h264"


def test_readers_of_one_descriptor_do_not_disturb_each_other(tmp_path):
    (tmp_path / "f").write_bytes(bytes(range(100)))
    with open(tmp_path / "f", "rb") as file:
        name = descriptor_name(file.fileno(), "x.MP4")
        assert name.endswith(".mp4")
        first, second = open_file(name), open_file(name)
        assert first.read(3) == b"\0\1\2"
        assert second.read(2) == b"\0\1"
        assert second.seek(-2, os.SEEK_END) == 98
        assert second.read() == bytes((98, 99))
        assert first.read(1) == b"\3"
        raw = DescriptorReader(file.fileno(), name)
        assert raw.seek(5) == 5
        assert raw.seek(-1) == raw.seek(1 << 64) == -1
        assert raw.tell() == 5
        assert raw.seek(1 << 62) == 1 << 62
        assert raw.read(4) == b""
    assert descriptor_name(3, "/srv/x.a/b").count("/") == 0
    assert descriptor_name(3, "x.mp4/../../etc") == "fd:3"


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
    given = [
        (frames, (0.0, 1.0), "frames", 2.0),
        (frames, (0.0, 1.5), "frames", 2.0),
        (frames, (0.0, 1.0), "image", 2.0),
        (frames, (0.0, 1.0), "frames", 3.0),
        (frames.view(2, 4, 2, 3), (0.0, 1.0), "frames", 2.0),
        (frames.view(torch.int8), (0.0, 1.0), "frames", 2.0),
        (frames.view(1, 4, 4, 3), (0.0,), "frames", 2.0),
    ]
    assert len({pixel_digest(*arguments) for arguments in given}) == len(given)


def test_one_image_and_a_list_of_one_are_two_things():
    picture = np.zeros((8, 8, 3), np.uint8)
    digests = {
        read_clip(picture, 1).info.digest,
        read_clip([picture], 1).info.digest,
        read_clip([picture], 1, fps=2.0).info.digest,
    }
    assert len(digests) == 3
