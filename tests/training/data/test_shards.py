"""Tar shards: samples by number from true webdataset layouts, their index, damage, chat records."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from encoder.errors import DataError, VideoError
from tests.encoder.video import video_files as vf
from training.data.datasets import DatasetConfig
from training.data.shards import Shards, expand

Files = list[tuple[str, bytes]]


def write_tar(path: Path, files: Files, form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return vf.write(path, vf.steady(50), size=(96, 64)).read_bytes()


def png(colour: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (20, 10), colour).save(content, "png")
    return content.getvalue()


@pytest.fixture
def folder(tmp_path: Path, clip: bytes) -> Path:
    """Two shards as video2dataset and img2dataset write them: five samples."""
    facts = {"caption": "Bars.", "start": 0.4, "end": 1.2}
    write_tar(
        tmp_path / "part-000.tar",
        [
            ("0000.json", json.dumps(facts).encode()),
            ("0000.mp4", clip),
            ("0001.mp4", clip),
            ("0001.txt", " Löwen count. ".encode()),
            ("0001.cls", b"2"),
            ("0002.png", png("red")),
            ("0002.txt", b"Red."),
        ],
    )
    long = "a-folder-with-a-long-name/" * 6 + "0000"
    write_tar(
        tmp_path / "part-001.tar",
        [
            (f"{long}.seg.jpg", png("blue")),
            (f"{long}.json", b'{"captions": ["Blue."]}'),
            ("z.txt", b"no media"),
        ],
        tarfile.PAX_FORMAT,
    )
    return tmp_path


def test_samples_become_examples(folder: Path) -> None:
    source = DatasetConfig(shards="part-{000..001}.tar", data_root=str(folder)).open()
    assert len(source) == 5
    examples = [source[number] for number in range(4)]
    assert [example.captions for example in examples] == [
        ("Bars.",),
        ("Löwen count.",),
        ("Red.",),
        ("Blue.",),
    ]
    assert [example.kind for example in examples] == ["video", "video", "image", "image"]
    assert [example.label for example in examples] == [None, 2, None, None]
    assert examples[1].id == "part-000.tar/0001"
    loaded = examples[0].media.load(4, 96)
    assert 0.4 <= loaded.times_s[0] <= loaded.times_s[-1] <= 1.2
    numbers = [vf.number_in(frame.numpy()) for frame in examples[1].media.load(5, 96).frames]
    assert numbers == [5, 15, 25, 35, 45]
    assert np.abs(examples[3].media.load(4, 20).frames[0].numpy().mean((0, 1)) - (0, 0, 255)).max() < 3
    assert len({example.media.key for example in examples}) == 4
    with pytest.raises(VideoError, match="holds no video or image"):
        source[4]
    with pytest.raises(IndexError):
        source[5]


def test_the_index_is_kept_and_renewed(folder: Path) -> None:
    pattern = str(folder / "part-*.tar")
    before = Shards.open(pattern)
    index = folder / "part-000.tar.index"
    written = index.stat().st_mtime_ns
    again = Shards.open(pattern)
    assert index.stat().st_mtime_ns == written
    assert [again.sample(i) for i in range(5)] == [before.sample(i) for i in range(5)]
    index.write_bytes(b"damaged")
    assert len(Shards.open(pattern)) == 5
    write_tar(folder / "part-000.tar", [("only.txt", b"x")])
    assert len(Shards.open(pattern)) == 3
    elsewhere = Shards.open(pattern, folder / "indices")
    assert len(elsewhere) == 3
    assert (folder / "indices" / "part-001.tar.index").exists()


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 1500), min_size=1, max_size=4), min_size=1, max_size=8),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    deep=st.booleans(),
)
def test_any_tar_reads_back(tmp_path_factory, sizes: list[list[int]], form: int, deep: bool) -> None:
    """Every sample has exactly its own files, wherever blocks and long names put them."""
    prefix = "d" * 90 + "/" + "e" * 60 + "/" if deep else ""
    files: Files = [
        (f"{prefix}{number:04d}.f{part}", bytes([number, part]) * (size // 2))
        for number, parts in enumerate(sizes)
        for part, size in enumerate(parts)
    ]
    shards = Shards.open(str(write_tar(tmp_path_factory.mktemp("any") / "x.tar", files, form)))
    assert len(shards) == len(sizes)
    for number in reversed(range(len(sizes))):
        sample = shards.sample(number)
        found = [(f"{sample.key}.{m.extension}", sample.read(m.extension)) for m in sample.members]
        assert found == [
            (name, content) for name, content in files if name.startswith(f"{prefix}{number:04d}")
        ]


def test_patterns() -> None:
    assert list(expand("a{08..11}.tar")) == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert list(expand("{x,y}-{0..1}")) == ["x-0", "x-1", "y-0", "y-1"]
    assert list(expand("plain.tar")) == ["plain.tar"]


def test_bad_shards_are_one_clear_error(folder: Path, clip: bytes) -> None:
    whole = (folder / "part-000.tar").read_bytes()
    cases = {
        "cut.tar": (whole[: len(clip) + 1500], "cut off"),
        "noise.tar": (b"no tar at all" * 100, "cannot be read"),
        "empty.tar": (b"\0" * 10240, "holds no files"),
        "packed.tar": (gzip.compress(whole), "compressed"),
    }
    for name, (content, message) in cases.items():
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            Shards.open(str(folder / name))
    for pattern in ("none-*.tar", "part-{000..002}.tar"):
        with pytest.raises(DataError, match="There is no shard"):
            DatasetConfig(shards=pattern, data_root=str(folder)).open()


def test_damage_after_the_index_was_made_is_named(folder: Path) -> None:
    source = DatasetConfig(shards="part-000.tar", data_root=str(folder)).open()
    example = source[1]
    content = (folder / "part-000.tar").read_bytes()
    (folder / "part-000.tar").write_bytes(content[:2000])
    with pytest.raises(VideoError, match="part-000"):
        example.media.load(4, 56)
    with pytest.raises(VideoError, match="part-000"):
        source[1]


def test_chat_records_from_shards(tmp_path: Path, clip: bytes) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Bars."}]
    write_tar(
        tmp_path / "chat.tar",
        [
            ("a.json", json.dumps({"conversations": talk, "video": "elsewhere.mp4"}).encode()),
            ("a.mp4", clip),
            ("b.png", png("red")),
            ("b.txt", b"Red."),
            ("c.png", png("red")),
            ("d.json", b"{broken"),
            ("e.json", b'{"caption": "x", "end": "late"}'),
            ("f.json", json.dumps({"conversations": talk}).encode()),
            ("g.txt", b"a caption of nothing"),
        ],
    )
    source = DatasetConfig(shards="chat.tar", data_root=str(tmp_path)).open("answer")
    assert [source[index].turns for index in range(2)] == [(("What?", "Bars."),), (("", "Red."),)]
    assert source[0].media.load(4, 56).frames.shape[0] == 4
    assert source[2].lacks("answer") == "It has neither a conversation nor a caption."
    for index in range(3, 7):
        with pytest.raises(VideoError, match=r"chat\.tar"):
            source[index]
    half = DatasetConfig(shards="chat.tar", data_root=str(tmp_path), sampling_strategy="first:30%").open()
    assert [half[index].id for index in range(len(half))] == ["chat.tar/a", "chat.tar/b"]
