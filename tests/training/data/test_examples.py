"""Examples from csv, caption JSONL and the synthetic world; media at chosen moments."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encoder.errors import ConfigError, DataError, VideoError
from tests.encoder.video import video_files as vf
from training.data import synthetic_source as world_data
from training.data.annotations import Lines
from training.data.datasets import DatasetConfig, open_datasets
from training.data.examples import Joined, ListExamples
from training.data.media import FileMedia
from training.synthetic.dataset import World
from training.synthetic.sprites import procedural_bank
from training.trainer.recipe import build


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with two videos of 100 numbered frames at 25 per second, and an image."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "a b").mkdir()
    for name in ("one.mp4", "a b/two.mp4"):
        vf.write(folder / name, vf.steady(100), size=(96, 64))
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    return folder


def open_csv(folder: Path, text: str, **settings):
    (folder / "list.csv").write_text(text)
    return DatasetConfig(csv=str(folder / "list.csv"), data_root=str(folder), **settings).open()


@pytest.mark.parametrize(
    "text", ["one.mp4 3\na b/two.mp4 0\n", "one.mp4,3\n\na b/two.mp4,0", '"one.mp4",3\na b/two.mp4,0']
)
def test_kinetics_style(videos: Path, text: str) -> None:
    source = open_csv(videos, text)
    assert [(example.id, example.label) for example in (source[0], source[1])] == [
        ("one.mp4", 3),
        ("a b/two.mp4", 0),
    ]
    assert source.classes == ()
    assert source[1].media.load(4, 56).frames.shape[0] == 4


def test_names_as_labels(videos: Path, tmp_path: Path) -> None:
    source = open_csv(videos, "one.mp4,surfing\na b/two.mp4,baking, cookies\n")
    assert source.classes == ("cookies", "surfing")
    (tmp_path / "names.txt").write_text("swimming\nsurfing\n")
    named = open_csv(videos, "one.mp4,surfing\none.mp4,0\n", classes=str(tmp_path / "names.txt"))
    assert [named[0].label, named[1].label] == [1, 0]
    for wrong in ("one.mp4,running\n", "one.mp4,2\n"):
        with pytest.raises(DataError, match=r"list\.csv, line 1"):
            open_csv(videos, wrong, classes=str(tmp_path / "names.txt"))
    with pytest.raises(DataError, match="label -1"):
        open_csv(videos, "one.mp4 -1\n")


def test_without_labels(videos: Path) -> None:
    source = open_csv(videos, "one.mp4\nred.png\n")
    assert [source[i].label for i in range(2)] == [None, None]
    assert [source[i].kind for i in range(2)] == ["video", "image"]


def test_official_kinetics_files(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "riding a bike").mkdir()
    for target in (tmp_path / "abc_000010_000020.mp4", tmp_path / "riding a bike" / "xyz_000003_000013.mp4"):
        target.write_bytes((videos / "one.mp4").read_bytes())
    source = open_csv(
        tmp_path,
        "label,youtube_id,time_start,time_end,split\n"
        '"petting animal (not cat)",abc,10,20,train\nriding a bike,xyz,3,13,train\n',
    )
    assert source.classes == ("petting animal (not cat)", "riding a bike")
    assert [source[i].label for i in range(2)] == [0, 1]
    for index in range(2):
        assert source[index].media.load(2, 56).frames.shape[0] == 2
    with pytest.raises(DataError, match="line 2 is not an official"):
        open_csv(tmp_path, "label,youtube_id,time_start,time_end,split\na,b,soon,3,train\n")


def test_parts_and_joined_sources(videos: Path, tmp_path: Path) -> None:
    text = "".join(f"{number}.mp4 {number}\n" for number in range(10))
    part = open_csv(videos, text, sampling_strategy="end:3")
    assert [part[i].label for i in range(len(part))] == [7, 8, 9]
    with pytest.raises(ConfigError, match="sampling_strategy"):
        open_csv(videos, text, sampling_strategy="some")
    data = DatasetConfig(csv=str(videos / "list.csv"), sampling_strategy="first:2")
    both = open_datasets([data, DatasetConfig(csv=str(videos / "list.csv"), sampling_strategy="random:40%")])
    assert len(both) == 6
    assert [both[i].label for i in range(2)] == [0, 1]
    with pytest.raises(IndexError):
        both[6]
    with pytest.raises(DataError, match="different classes"):
        Joined((ListExamples([], ("a",)), ListExamples([], ("b",))))
    with pytest.raises(DataError, match="No dataset"):
        open_datasets([])


def test_caption_rows(videos: Path) -> None:
    rows = [
        {"video": "one.mp4", "caption": "Bars.", "start": 1.0, "end": 2.0, "id": 7},
        {"image": "red.png", "captions": ["Red.", "A red picture."], "label": 4},
        {"path": "red.png"},
    ]
    path = videos / "captions.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    source = DatasetConfig(jsonl=str(path), data_root=str(videos)).open()
    assert len(source) == 3
    first, second, third = source[0], source[1], source[2]
    assert (first.id, first.captions, first.kind) == ("7", ("Bars.",), "video")
    assert (second.captions, second.label, second.kind) == (("Red.", "A red picture."), 4, "image")
    assert (third.captions, third.kind) == ((), "image")
    times = first.media.load(4, 56).times_s
    assert times[0] >= 1.0
    assert times[-1] <= 2.0


def test_a_late_malformed_row_is_skipped_not_fatal(tmp_path: Path) -> None:
    good = json.dumps({"video": "x.mp4", "caption": "é\u2028."}, ensure_ascii=False)  # no line end in JSON
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join([good] * 150 + ["{broken", '{"video": "x.mp4", "caption": 3}', good]))
    source = DatasetConfig(jsonl=str(path)).open()
    assert isinstance(source.rows, Lines)  # found by position, not held
    assert len(source) == 153
    assert source[152].captions == ("é\u2028.",)
    for number in (150, 151):
        with pytest.raises(VideoError, match=f"row {number + 1} "):
            source[number]


@pytest.mark.parametrize(
    "row",
    [
        "{broken",
        "[]",
        '{"caption": "x"}',
        '{"video": "a", "label": "run"}',
        '{"video": "a", "start": "soon"}',
    ],
)
def test_malformed_files_are_named(tmp_path: Path, row: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(row)
    with pytest.raises(DataError, match=r"bad\.jsonl"):
        DatasetConfig(jsonl=str(path)).open()


def test_missing_and_empty_files_and_wrong_settings(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("\n")
    for data, message in (
        ({"csv": str(tmp_path / "no.csv")}, "No such file"),
        ({"jsonl": str(tmp_path / "no.jsonl")}, "No such file"),
        ({"csv": str(tmp_path / "empty.csv")}, "holds no examples"),
        ({"csv": "x", "classes": str(tmp_path / "no.txt")}, "Cannot read"),
    ):
        with pytest.raises(DataError, match=message):
            build(DatasetConfig, data, "data").open()
    for values in ({}, {"csv": "a", "jsonl": "b"}):
        with pytest.raises(ConfigError, match="exactly one"):
            build(DatasetConfig, values, "data")


def test_moments_choose_the_frames(videos: Path) -> None:
    media = FileMedia((videos / "one.mp4",))
    clip = media.load(4, 224, moments=[0.9, 0.1, 0.5, 0.999])
    assert [vf.number_in(frame.numpy()) for frame in clip.frames] == [10, 50, 90, 99]
    part = FileMedia((videos / "one.mp4",), start_s=1.0, end_s=3.0)
    clip = part.load(2, 224, moments=[0.0, 1.0])
    assert [vf.number_in(frame.numpy()) for frame in clip.frames] == [25, 75]
    for wrong in ([], [1.1], [-0.1], [float("nan")]):
        with pytest.raises(VideoError, match="moments"):
            media.load(2, 224, moments=wrong)


def test_images_of_different_sizes_are_one_clip(videos: Path, tmp_path: Path) -> None:
    Image.new("RGB", (90, 20), "blue").save(tmp_path / "blue.png")
    clip = FileMedia((videos / "red.png", tmp_path / "blue.png")).load(8, 56)
    assert clip.frames.shape == (2, 30, 40, 3)
    assert np.abs(clip.frames[1].numpy().mean((0, 1)) - (0, 0, 255)).max() < 3
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    with pytest.raises(VideoError, match=r"broken\.png"):
        FileMedia((videos / "red.png", tmp_path / "broken.png")).load(8, 56)


def test_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = procedural_bank()
    monkeypatch.setattr(world_data, "World", lambda split, seed, level: World(split, seed, level, bank))
    for label in ("noun", "motion"):
        values = {"world": {"preset": "simple", "count": 30, "first": 5}, "world_label": label}
        source = build(DatasetConfig, values, "data").open()
        assert len(source) == 30
        for index in range(30):
            example = source[index]
            assert example.label is not None
            name = source.classes[example.label]
            actor = World("train", 0, source.world.level, bank).sample(index + 5).scene.actors[0]
            assert name == (actor.code if label == "noun" else actor.motions[0])
            assert example.captions[0]
    clip = source[0].media.load(3, 56, moments=[0.1, 0.2, 0.9])
    assert clip.times_s == tuple(m * clip.duration_s for m in (0.1, 0.2, 0.9))
    assert clip.frames.shape == (3, 56, 56, 3)
    with pytest.raises(IndexError):
        source[30]
