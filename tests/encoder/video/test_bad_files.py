"""Bad files end in one clear VideoError, within the time limit, with nothing left running."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import textwrap
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from encoder.errors import VideoError
from encoder.video.reader import Limits, close_idle_workers, probe, read_clip
from tests import ROOT
from tests.encoder.video import video_files as vf
from tests.patience import ended, until


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.fixture(scope="module", autouse=True)
def others() -> set[psutil.Process]:
    """Children that were there before, of other tests in this process."""
    close_idle_workers()
    return set(children())


def left_running(others: set[psutil.Process]) -> list[psutil.Process]:
    """Children that are not idle ones, which wait for the next file."""
    close_idle_workers()
    return [child for child in children() if child not in others]


def png_header(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> dict[str, Path]:
    """Files by what is wrong with them."""
    folder = tmp_path_factory.mktemp("bad")
    times = vf.steady(100)
    good = {
        "mp4": vf.write(folder / "good.mp4", times, container_options={"movflags": "faststart"}),
        "mkv": vf.write(folder / "good.mkv", times, sound_s=4.0),
        "avi": vf.write(folder / "good.avi", times, encoder="mpeg4"),
    }
    files = {f"cut {k}": vf.truncated(p, folder / f"cut.{k}", 0.6) for k, p in good.items()}
    late_index = vf.write(folder / "late.mp4", times)
    files["cut index"] = vf.truncated(late_index, folder / "cut_index.mp4", 0.8)
    files["lie"] = vf.lying_matroska(good["mkv"], folder / "lie.mkv", 36_000)
    files["sound"] = vf.audio_only(folder / "sound.mp4")
    files["cinepak"] = vf.write(folder / "c.avi", vf.steady(3), encoder="cinepak", pix_fmt="rgb24")
    files["huge frame"] = vf.huge(folder / "huge.avi")
    hurt = bytearray(good["mp4"].read_bytes())
    middle = len(hurt) // 2
    hurt[middle : middle + 3000] = np.random.default_rng(0).bytes(3000)
    contents = {
        "empty": b"",
        "text": b"this is not a video\n" * 50,
        "noise": np.random.default_rng(1).bytes(50_000),
        "hurt": bytes(hurt),
        "huge image": png_header(20_000),
        "hollow image": png_header(200),
        "playlist": f"#EXTM3U\n#EXTINF:4,\n{good['mp4']}\n#EXT-X-ENDLIST\n".encode(),
        "list": f"ffconcat version 1.0\nfile {good['mp4']}\n".encode(),
    }
    for name, data in contents.items():
        files[name] = folder / f"{name.replace(' ', '_')}.mp4"
        files[name].write_bytes(data)
    files["missing"] = folder / "missing.mp4"
    files["directory"] = folder
    return files


WORDS = {
    "cut mp4": "4.0 s but it can be read only up to",
    "cut mkv": "4.0 s but it can be read only up to",
    "cut avi": "4.0 s but it can be read only up to",
    "cut index": "cut off before its index",
    "lie": "36000.0 s but it can be read only up to 4.0",
    "sound": "only sound",
    "huge frame": "no usable size",
    "empty": "0 bytes",
    "text": "not a video",
    "noise": "not a video",
    "hurt": "damaged or cut off at",
    "huge image": "20000 x 20000",
    "hollow image": "cut off",
    "playlist": "not a video|not allowed",
    "list": "not allowed",
    "missing": "no such file",
    "directory": "is a directory",
}


@pytest.mark.parametrize("trusted", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("kind", sorted(WORDS))
@pytest.mark.quick(5)
def test_bad_files_end_in_one_sentence(bad, kind, trusted, others):
    with pytest.raises(VideoError, match=WORDS[kind]) as caught:  # not that the time limit was reached
        read_clip(bad[kind], 8, trusted=trusted)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert not left_running(others)


def test_the_codec_is_named(bad):
    with pytest.raises(VideoError, match="'cinepak'"):
        read_clip(bad["cinepak"], trusted=False)


def test_the_readable_part_of_a_truncated_file_can_be_read(bad):
    for kind in ("cut mp4", "cut mkv", "cut avi"):
        end = probe(bad[kind]).duration_s
        assert 1.0 < end < 3.5
        clip = read_clip(bad[kind], 4, end_s=end)
        assert vf.numbers_in(clip) == [int((i + 0.5) * end / 4 / 0.04 + 1e-6) for i in range(4)]


def test_out_of_memory_is_an_error(tmp_path, others):
    path = vf.write(tmp_path / "v.mp4", vf.steady(4), size=(1280, 720))
    for mib in (20, 60, 100):
        with pytest.raises(VideoError, match=r"more memory than allowed|more than .* MiB"):
            read_clip(path, trusted=False, limits=Limits(memory_mib=mib))
    with pytest.raises(VideoError, match="set max_side"):
        read_clip(path, 2000, limits=Limits(memory_mib=1000))
    assert not left_running(others)


@pytest.mark.parametrize("trusted", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_hung_decoder_is_ended_at_the_time_limit(tmp_path, trusted, others):
    """The child is suspended while it works and never goes on: only its parent's clock can end it."""
    path = vf.write(tmp_path / "v.mp4", vf.steady(200), size=(640, 360), gop=200)
    read_clip(path, 1)  # warm: an idle child exists
    stop = threading.Event()

    def freeze() -> None:
        while not stop.wait(0.001):
            for child in children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if any(
                        "encoder.video.worker" in word for word in child.cmdline()
                    ):  # it runs its own program
                        child.suspend()

    thread = threading.Thread(target=freeze)
    thread.start()
    try:
        with pytest.raises(VideoError, match="longer than 1 s"):
            read_clip(path, 200, trusted=trusted, limits=Limits(seconds=1.0))
    finally:
        stop.set()
        thread.join()
    assert not left_running(others)


@pytest.mark.parametrize(
    "arguments",
    [
        {"frames": 0},
        {"at_s": []},
        {"at_s": [1.0], "start_s": 0.0},
        {"start_s": -1.0},
        {"at_s": [float("nan")]},
        {"start_s": 0.9, "end_s": 0.1},
        {"start_s": 50.0},
        {"at_s": [50.0]},
        {"max_side": 0},
        {"decoder": "other"},
        {"decoder": "decord", "trusted": False},
    ],
)
def test_wrong_arguments(tmp_path, arguments):
    path = vf.write(tmp_path / "v.mp4", vf.steady(25))
    with pytest.raises(VideoError):
        read_clip(path, **arguments)


@pytest.mark.parametrize(
    "source",
    [
        None,
        7,
        [],
        [np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)],
        np.zeros((4, 4, 3), np.float32),
        np.zeros((2, 3, 4, 4), np.uint8),
        ["a.mp4"],
        b"",
        "",
    ],
)
def test_wrong_sources(source):
    with pytest.raises(VideoError):
        read_clip(source)


def test_threads_get_the_same_frames_as_alone(tmp_path):
    paths = [vf.write(tmp_path / f"{i}.mp4", vf.uneven(40, seed=i)) for i in range(4)]
    alone = [read_clip(path, 5).frames for path in paths]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: read_clip(paths[i % 4], 5, trusted=i < 12).frames, range(16)))
    for i, frames in enumerate(together):
        assert torch.equal(frames, alone[i % 4])


class _Clips(torch.utils.data.Dataset):
    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        clip = read_clip(self.path, at_s=[0.04 * index])
        return vf.number_in(clip.frames[0].numpy())


def test_inside_data_loader_workers(tmp_path):
    path = vf.write(tmp_path / "v.mp4", vf.steady(10))
    read_clip(path)  # an idle child of this process exists when the workers fork
    loader = torch.utils.data.DataLoader(_Clips(path), batch_size=2, num_workers=2)
    assert torch.cat(list(loader)).tolist() == [0, 1, 2, 3, 4, 5]
    assert len(read_clip(path, 2).times_s) == 2


@pytest.mark.slow
def test_memory_does_not_grow_with_calls_or_length(tmp_path):
    short = vf.write(tmp_path / "short.mp4", vf.steady(50), size=(640, 360))
    long = vf.write(tmp_path / "long.mp4", vf.steady(600), size=(640, 360), gop=50)

    def used() -> int:
        return sum(p.memory_info().rss for p in (psutil.Process(), *children())) >> 20

    for path in (short, long):
        read_clip(path, 4)
    before = used()
    for _ in range(10):
        read_clip(long, 4)
        read_clip(short, 4)
    assert used() - before < 60


@pytest.mark.slow
def test_the_child_ends_with_its_parent_and_never_imports_torch(tmp_path):
    path = vf.write(tmp_path / "v.mp4", vf.steady(10))
    code = f"""
        import os, psutil
        from encoder.video.reader import read_clip
        read_clip({str(path)!r}, 2)
        child, = psutil.Process().children()
        loaded = " ".join(m.path for m in child.memory_maps())
        print(child.pid, "libtorch" in loaded, flush=True)
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    pid, torch_loaded = done.stdout.split()
    assert torch_loaded == "False", done.stderr
    until(lambda: ended(int(pid)))


def test_no_temporary_files_stay(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    os.mkdir(tmp_path / "tmp")
    data = vf.write(tmp_path / "v.mp4", vf.steady(5)).read_bytes()
    read_clip(data, 2)
    with pytest.raises(VideoError):
        read_clip(data[:100], 2)
    assert not os.listdir(tmp_path / "tmp")


def test_truncated_files_are_called_cut_off(tmp_path):
    """Whatever FFmpeg finds missing first; never by the name that the decoding child has for the file."""
    whole = vf.write(tmp_path / "whole.mp4", vf.steady(40))
    errors = []
    for share in (0.8, 0.85, 0.9, 0.95, 0.98):
        with pytest.raises(VideoError) as caught:
            read_clip(vf.truncated(whole, tmp_path / "cut.mp4", share), 4)
        errors.append(str(caught.value))
    assert any("cut off; export or download it again" in text for text in errors)
    assert not [text for text in errors if "fd:" in text or "EOFError" in text]
