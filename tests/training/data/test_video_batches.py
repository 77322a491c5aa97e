"""Micro-batches by number: pure, resumable, parallel, and untroubled by broken files."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from encoder.errors import ConfigError, DataError, VideoError
from encoder.preprocess import IMAGENET_MEAN, IMAGENET_STD
from encoder.video import reader
from encoder.video.reader import Clip, VideoInfo
from tests.encoder.video import video_files as vf
from tests.training.data.test_shards import write_tar
from training.data import video_batches
from training.data.augment import AugmentConfig
from training.data.datasets import DatasetConfig, read_mixture
from training.data.examples import Example, ListExamples
from training.data.flexible_grids import FlexibleGrid
from training.data.loader import MissingMedia, epoch_order
from training.data.video_batches import VideoBatches, spread
from training.trainer.recipe import build

GRID = FlexibleGrid((4, 10, 2), (56, 98, 14), (64, 300))


@dataclass(frozen=True)
class GreyMedia:
    """A video whose frames have the grey level `number`, or one that cannot be read."""

    number: int
    broken: bool = False
    frames: int | None = None
    seconds: float = 0.0

    @property
    def key(self) -> str:
        return str(self.number)

    def load(self, frames: int, resolution: int, *, moments=None) -> Clip:
        time.sleep(self.seconds)
        if self.broken:
            raise VideoError(f"Cannot read {self.number}: it is broken.")
        count = self.frames or frames
        pixels = torch.full((count, 20, 30, 3), self.number % 256, dtype=torch.uint8)
        info = VideoInfo("video", 30, 20, 1.0, count, "raw", "memory", 0, self.key)
        return Clip(pixels, tuple(moments or range(count)), info)


def grey(count: int, broken: set[int] = frozenset(), **settings) -> ListExamples:  # type: ignore[assignment]
    return ListExamples(
        [Example(f"id{i}", GreyMedia(i, i in broken, **settings), label=i) for i in range(count)]
    )


def make(source, out: Path, size: int = 4, **settings) -> VideoBatches:
    settings = {"grid": GRID, "augment": AugmentConfig(), "seed": 0, **settings}
    return VideoBatches(
        source, settings.pop("grid"), settings.pop("augment"), size, settings.pop("seed"), out=out, **settings
    )


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    lines = []
    for number in range(6):
        vf.write(folder / f"{number}.mp4", vf.steady(40), size=(96, 64))
        lines.append(f"{number}.mp4 {number}")
    vf.truncated(folder / "0.mp4", folder / "cut.mp4", 0.4)
    lines += ["cut.mp4 0", "lost.mp4 0"]
    (folder / "list.csv").write_text("\n".join(lines))
    return folder


def test_each_data_set_has_its_own_mirror_images(videos: Path, tmp_path: Path) -> None:
    """K-Mash holds Something-Something, whose labels name sides, in the list of all."""
    rows = [f"{name} {number}" for number, name in enumerate(("k400/0.mp4", "ssv2/1.mp4"))]
    for row in rows:
        (tmp_path / row.split("/")[0]).mkdir()
        path = tmp_path / row.split()[0]
        path.write_bytes((videos / path.name).read_bytes())
    (tmp_path / "list.csv").write_text("\n".join(rows))

    def seen(always: float, **settings) -> dict[str, torch.Tensor]:
        data = DatasetConfig(csv=str(tmp_path / "list.csv"), data_root=str(tmp_path), **settings)
        batch = make(data.open(), tmp_path / "o", 2, augment=AugmentConfig(flip=always)).get(0)
        return {e.id.split("/")[0]: p for e, p in zip(batch.examples, batch.pixels, strict=True)}

    plain = seen(0.0)
    assert not torch.equal(plain["ssv2"], plain["ssv2"].flip(-1))
    mixed = seen(1.0, no_flip=["ssv2"])
    assert torch.equal(mixed["ssv2"], plain["ssv2"])
    torch.testing.assert_close(mixed["k400"], plain["k400"].flip(-1))
    assert all(torch.equal(seen(1.0, flip=0.0)[name], plain[name]) for name in plain)
    assert torch.equal(seen(0.0, flip=1.0)["ssv2"], plain["ssv2"].flip(-1))
    with pytest.raises(ConfigError, match="flip must be a chance"):
        DatasetConfig(csv="x", flip=2.0)


def test_folders_of_pictures_are_refused(tmp_path: Path) -> None:
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("datasets: [{json_path: x, video_read_type: decord}, {json_path: y}]")
    assert [dataset.name for dataset in read_mixture(mixture)] == ["x", "y"]
    mixture.write_text("datasets: [{json_path: x, video_read_type: img}]")
    with pytest.raises(ConfigError, match="dataset 0: video_read_type 'img' is not known"):
        read_mixture(mixture)


def test_what_is_missing_is_not_written_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr("training.data.loader.save_json", lambda values, _: written.append(len(values)))
    missing = MissingMedia(tmp_path, 1.0)
    for number in range(1000):
        missing.count()
        missing.report(number, str(number), "gone")
    assert len(written) < 70
    missing.flush()
    missing.flush()
    assert written[-2:-1] != [1000]
    assert written[-1] == 1000


def test_real_files_batches_are_pure_and_name_what_is_broken(videos: Path, tmp_path: Path) -> None:
    data = DatasetConfig(csv=str(videos / "list.csv"), data_root=str(videos))
    augment = AugmentConfig(crop="multiscale", flip=0.5, rand_augment=(9, 0.5))
    one = make(data.open(), tmp_path / "one", augment=augment, threads=1)
    several = make(data.open(), tmp_path / "several", augment=augment, threads=2)
    for index in (0, 1, 3):
        first, second = one.get(index), several.get(index)
        assert torch.equal(first.pixels, second.pixels)
        assert first.examples == second.examples
        frames, resolution = GRID.draw(0, index)
        assert first.pixels.shape == (4, 3, frames, resolution, resolution)
        assert {example.id for example in first.examples} <= {f"{n}.mp4" for n in range(6)}
        assert first.labels.tolist() == [int(example.id[0]) for example in first.examples]
    assert torch.equal(make(data.open(), tmp_path / "late", augment=augment).get(3).pixels, one.get(3).pixels)
    for name in ("one", "several"):
        missing = json.loads((tmp_path / name / "missing.json").read_text())
        assert set(missing) == {"cut.mp4", "lost.mp4"}
        assert "no such file" in missing["lost.mp4"]


def test_every_example_once_per_epoch_in_another_order(tmp_path: Path) -> None:
    batches = make(grey(20), tmp_path)
    assert batches.micro_batches == 5
    epochs = [
        [int(label) for index in range(5) for label in batches.get(epoch * 5 + index).labels]
        for epoch in range(2)
    ]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert make(grey(20), tmp_path, seed=1).get(0).labels.tolist() != epochs[0][:4]
    pixels = batches.get(0).pixels
    for row, example in zip(pixels, batches.get(0).examples, strict=True):
        expected = (example.label / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
        assert torch.allclose(row.mean((1, 2, 3)), expected, atol=1e-4)


def test_broken_ones_are_replaced_without_doubles_in_a_batch(tmp_path: Path) -> None:
    batches = make(grey(24, broken={3, 8, 17}), tmp_path)
    seen = Counter()
    for index in range(6):
        labels = batches.get(index).labels.tolist()
        assert len(set(labels)) == 4
        seen.update(labels)
    assert not {3, 8, 17} & set(seen)
    assert set(seen) == set(range(24)) - {3, 8, 17}
    assert 24 + 3 <= batches.loader.missing.tried <= 24 + 6  # some replacements are broken, too
    assert set(json.loads((tmp_path / "missing.json").read_text())) == {"id3", "id8", "id17"}


def test_too_many_broken_stop_the_run(tmp_path: Path) -> None:
    batches = make(grey(400, broken=set(range(0, 400, 2))), tmp_path, max_missing=0.1)
    with pytest.raises(DataError, match=r"more than the allowed share of 0\.1: see .*missing\.json"):
        list(map(batches.get, range(100)))
    assert batches.loader.missing.tried < 60
    tolerant = make(grey(400, broken=set(range(0, 400, 2))), tmp_path / "b", max_missing=0.6)
    for index in range(30):
        tolerant.get(index)
    with pytest.raises(DataError, match="None of the 6"):
        make(grey(6, broken=set(range(6))), tmp_path / "c").get(0)


def test_a_resumed_run_keeps_the_names_and_ranks_write_their_own(tmp_path: Path, monkeypatch) -> None:
    make(grey(8, broken={1}), tmp_path, size=8).get(0)
    make(grey(8, broken={2}), tmp_path, size=8).get(0)
    assert set(json.loads((tmp_path / "missing.json").read_text())) == {"id1", "id2"}
    monkeypatch.setenv("RANK", "3")
    make(grey(8, broken={5}), tmp_path, size=8).get(0)
    assert set(json.loads((tmp_path / "missing.rank3.json").read_text())) == {"id5"}


def test_waiting_for_several_files_at_once(tmp_path: Path) -> None:
    """Clips that wait (for a disk, a child process) are waited for together."""
    source = grey(8, seconds=0.1)
    for threads, most in ((1, 10.0), (8, 0.5)):
        batches = make(source, tmp_path, size=8, threads=threads, grid=FlexibleGrid.fixed(2, 14))
        started = time.perf_counter()
        labels = batches.get(0).labels.tolist()
        took = time.perf_counter() - started
        assert took < most
        assert threads > 1 or took > 0.8
        assert sorted(labels) == list(range(8))


def test_shards_are_shared_by_ranks_and_read_one_after_the_other(videos: Path, tmp_path: Path) -> None:
    video = (videos / "1.mp4").read_bytes()
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", [(f"{shard}-{n}.mp4", video) for n in range(4)])
    grid = FlexibleGrid.fixed(2, 28)
    for order, shards_per_batch in (("shards", {1}), ("all", {1, 2, 3})):
        data = build(
            DatasetConfig, {"shards": "{0..2}.tar", "data_root": str(tmp_path), "order": order}, "data"
        )
        # two ranks, each with its own object, that take micro-batches in turn
        ranks = [make(data.open(), tmp_path / order, size=2, grid=grid) for _ in range(2)]
        batches = [ranks[index % 2].get(index) for index in range(6)]
        ids = [[example.id for example in batch.examples] for batch in batches]
        read = sorted(name for batch in ids for name in batch)
        assert read == [f"{shard}.tar/{shard}-{n}" for shard in range(3) for n in range(4)]
        assert {len({name[:5] for name in batch}) for batch in ids} <= shards_per_batch
        resumed = make(data.open(), tmp_path / order, size=2, grid=grid)
        assert torch.equal(resumed.get(5).pixels, batches[5].pixels)


def test_repeated_augmentation(tmp_path: Path) -> None:
    batches = make(grey(12), tmp_path, size=8, repeats=2)
    assert batches.micro_batches == 3
    labels = batches.get(0).labels.tolist()
    assert labels[:4] == labels[4:]
    assert len(set(labels)) == 4
    all_labels = [label for index in range(3) for label in batches.get(index).labels.tolist()]
    assert Counter(all_labels) == dict.fromkeys(range(12), 2)
    with pytest.raises(ConfigError, match="does not hold 3 clips"):
        make(grey(12), tmp_path, size=8, repeats=3)


def test_sampling_and_shorter_media(tmp_path: Path) -> None:
    grid = FlexibleGrid.fixed(6, 28)
    random_moments = make(grey(4), tmp_path, grid=grid)
    seen: list[list[float]] = []

    @dataclass(frozen=True)
    class Spy(GreyMedia):
        def load(self, frames, resolution, *, moments=None):
            seen.append(moments)
            return super().load(frames, resolution, moments=moments)

    spied = ListExamples([Example(str(i), Spy(i)) for i in range(4)])
    make(spied, tmp_path, grid=grid, threads=1).get(0)
    assert all(len(moments) == 6 for moments in seen)
    assert len({tuple(moments) for moments in seen}) == 4
    make(spied, tmp_path, grid=grid, threads=1, sampling="middle").get(0)
    assert seen[-1] is None
    assert random_moments.get(0).pixels.shape == (4, 3, 6, 28, 28)
    # an image becomes equal frames
    assert make(grey(4, frames=1), tmp_path, grid=grid).get(0).pixels.shape == (4, 3, 6, 28, 28)
    with pytest.raises(DataError, match="has no label"):
        make(spied, tmp_path, grid=grid).get(0).labels  # noqa: B018
    half = ListExamples([Example(str(i), Spy(i), captions=("x",) * (i % 2)) for i in range(8)])
    captioned = make(half, tmp_path / "half", grid=grid, need="caption").get(0)
    assert {int(example.id) % 2 for example in captioned.examples} == {1}
    assert "has no caption" in (tmp_path / "half" / "missing.json").read_text()
    with pytest.raises(DataError, match="no examples"):
        make(grey(0), tmp_path)


@given(count=st.integers(1, 300), seed=st.integers(0, 50), window=st.one_of(st.none(), st.integers(1, 400)))
def test_orders_are_permutations_that_stay_in_their_windows(
    count: int, seed: int, window: int | None
) -> None:
    order = epoch_order(count, seed, 0, window)
    assert sorted(order.tolist()) == list(range(count))
    assert torch.equal(order, epoch_order(count, seed, 0, window))
    if window is not None:
        blocks = [number // window for number in order.tolist()]
        assert sum(a != b for a, b in pairwise(blocks)) == (count - 1) // window


@given(have=st.integers(1, 40), want=st.integers(1, 40))
def test_spread(have: int, want: int) -> None:
    chosen = spread(have, want)
    assert len(chosen) == want
    assert list(chosen) == sorted(chosen)
    assert 0 <= chosen[0] <= chosen[-1] < have
    if want >= have:
        assert set(chosen) == set(range(have))


def test_clips_that_are_read_side_by_side_are_decoded_in_one_thread_each(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    decode = reader._decode

    def spy(request: Any, file: int, name: str) -> Any:
        asked.append(request.rules.threads)
        return decode(request, file, name)

    monkeypatch.setattr(reader, "_decode", spy)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    source = DatasetConfig(csv=str(videos / "list.csv"), data_root=str(videos)).open()
    for threads in (1, 2):
        make(source, tmp_path, threads=threads).get(0)
    assert set(asked) == {1}
    asked.clear()
    source[0].media.load(4, 56)
    assert asked == [4]


@pytest.mark.parametrize(("processes", "cores"), [(None, 8), ("2", 4), ("100", 1), ("many", 8)])
def test_processes_of_one_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, processes: str | None, cores: int
) -> None:
    monkeypatch.setattr(video_batches, "usable_cores", lambda: 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert video_batches.own_cores() == cores
