"""Indexing and asking by Ray: the same rows as here, once each, whatever becomes of the workers."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app import cli
from app.chat import VideoChat
from app.library.answers import AnswerFile
from app.library.ask_all import LocalAsker, MapReport, ask_all
from app.library.clip_table import ClipRow
from app.library.indexing import IndexedVideo, LocalIndexer
from app.library.library import Library
from app.library.listening import HeardVideo, LocalHearer
from app.library.ray_work import RayAsker, RayHearer, RayIndexer
from app.library.video_files import FileIdentity, find_videos
from app.speech.listener import Listener
from app.speech.transcript import Line, Transcript
from encoder.errors import ConfigError
from encoder.video.sound import RATE
from tests.app.library.conftest import ColourEmbedder, film
from tests.app.speech.conftest import ToldModel, with_sound
from tests.llm_bridge.tiny_vlm import tiny_vlm

pytestmark = pytest.mark.skipif(find_spec("lancedb") is None, reason="the extra library is not installed")
FEW: dict[str, Any] = {"budget": 16, "max_new_tokens": 4}
SAID = [Line(1.0, 2.0, "Der Hund läuft über die Straße.")]


class PoolHere:
    """A pool in this process. deadly: paths at which a worker dies, with all of its batch."""

    def __init__(self, deadly: Sequence[str] = ()) -> None:
        self.deadly, self.batches = set(deadly), list[list[str]]()

    def call(self, function: Callable[[], Any]) -> Any:
        return function()

    def lines(self, make: Callable[[], Any], paths: Sequence[str], batch: int) -> Iterator[str]:
        work: Callable[[Sequence[str]], Iterable[str]] = make()
        for first in range(0, len(paths), batch):
            some = list(paths[first : first + batch])
            self.batches.append(some)
            if not self.deadly & set(some):
                yield from work(some)


def opened(llm: str, marks: str | None = None) -> VideoChat:
    """A tiny model, in a worker, which leaves its process number in a folder."""
    if marks is not None:
        Path(marks, str(os.getpid())).touch()
    return VideoChat(tiny_vlm(Path(llm)))


def test_a_video_that_kills_its_workers_is_a_row_and_takes_none_along(
    videos: Path, tmp_path: Path, llm_folder: Any
) -> None:
    deadly = str(videos / "red.mp4")
    pool: Any = PoolHere([deadly])
    asker = RayAsker(pool, partial(opened, str(llm_folder("qwen2"))), "What?", FEW, at_once=4)
    with AnswerFile(tmp_path / "a.jsonl") as answers:
        report = ask_all(asker, find_videos([videos]), answers)
        rows = list(answers.rows())
    assert report.answered == 3
    assert "worker died" in report.failed[deadly]
    assert Counter(row.file for row in rows) == Counter(find_videos([videos]))
    assert sorted(map(len, pool.batches)) == [1, 1, 1, 1, 4]  # tried again alone
    with opened(str(llm_folder("qwen2"))) as chat:
        here = LocalAsker(chat, "What?", FEW)
        assert here.asked == asker.asked  # a run may go on without Ray
        assert [here.row(row.file) for row in rows if row.error is None] == [
            row for row in rows if row.error is None
        ]


def test_indexing_by_workers_gives_the_same_rows(videos: Path, tmp_path: Path) -> None:
    (videos / "broken.mp4").touch()
    indexer = RayIndexer(PoolHere(), ColourEmbedder, 2)  # type: ignore[arg-type]
    paths = find_videos([videos])
    here = [IndexedVideo.of(video.line) for video in LocalIndexer(ColourEmbedder(), 2).videos(paths)]
    assert list(indexer.videos(paths)) == here
    assert sum(len(video.rows) for video in here) == 5
    dead: Any = PoolHere(paths[:1])
    library = Library(tmp_path / "index", embedder=ColourEmbedder(), seconds=2, pool=dead)
    report = library.index([videos])
    assert report.indexed == 3
    assert set(report.failed) == {paths[0], str(videos / "broken.mp4")}


def test_listening_by_workers_gives_the_same_lines(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    with_sound(folder / "talk.mp4", np.zeros(4 * RATE))
    with_sound(folder / "deadly.mp4", np.zeros(4 * RATE))
    film(folder / "silent.mp4", ["red"])
    (folder / "broken.mp4").touch()
    paths, listener = find_videos([folder]), Listener(model=ToldModel(SAID))
    here = list(LocalHearer(listener, "de").videos(paths))
    pool: Any = PoolHere()
    assert list(RayHearer(pool, listener.again, "de").videos(paths)) == here
    deadly: Any = PoolHere([str(folder / "deadly.mp4")])
    library = Library(tmp_path / "index", embedder=ColourEmbedder(), seconds=2, pool=deadly)
    report = library.listen([folder], listener, language="de")
    assert (report.heard, report.lines, report.languages) == (2, 1, {"de": 1})
    assert {Path(path).name for path in report.failed} == {"deadly.mp4", "broken.mp4"}
    (hit,) = library.search_said("straße").hits
    assert (hit.path, hit.language) == (str(folder / "talk.mp4"), "de")
    with pytest.raises(ConfigError, match="no language 'tlh'"):
        library.check_listener(listener, "tlh")


def test_a_video_travels_as_a_line() -> None:
    row = ClipRow("/ä/\udcff.mp4", 1, 2, "e", 0, 1, 0.0, 2.5, "m", b"\xff\x00", [0.25, -1.0])
    for video in (IndexedVideo(row.path, [row]), IndexedVideo("a", [], "No.")):
        assert IndexedVideo.of(video.line) == video
    said = Transcript((Line(0.5, 1.0, "\u4eca\u5929"),), "zh")
    for heard in (HeardVideo("/ä/\udcff.mp4", FileIdentity(1, 2, "e"), said), HeardVideo("a", error="No.")):
        assert HeardVideo.of(heard.line) == heard


def test_wrong_inputs_are_sentences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], videos: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLUXCHAT_LIBRARY", str(tmp_path / "index"))
    out = str(tmp_path / "a.jsonl")
    monkeypatch.setitem(sys.modules, "ray", None)
    for command, said in (
        (["map", "What?", str(videos), "--out", out, "--ray"], "pip install 'fluxchat[ray]'"),
        (["index", str(videos), "--ray"], "pip install 'fluxchat[ray]'"),
        (["index", str(videos), "--workers", "2"], "goes with --ray"),
        (["map", "What?", str(videos), "--out", out, "--ray", "--workers", "0"], "0 workers"),
    ):
        assert cli.main(command) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


@pytest.fixture(scope="module")
def pool() -> Iterator[Any]:
    """Two workers on this machine."""
    pytest.importorskip("ray.data", reason="the extra ray is not installed")
    from app.library.ray_pool import RayPool

    with RayPool(workers=2) as made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_row_per_video_after_a_worker_is_killed(pool: Any, tmp_path: Path, llm_folder: Any) -> None:
    folder, marks, out = tmp_path / "videos", tmp_path / "workers", tmp_path / "answers.jsonl"
    marks.mkdir()
    for number in range(60):
        film(folder / f"{number:03}.mp4", ["red", "green", "blue"][: 1 + number % 3])
    (folder / "broken.mp4").touch()
    paths = find_videos([folder])
    asker = RayAsker(pool, partial(opened, str(llm_folder("qwen2")), str(marks)), "What?", FEW, at_once=2)
    (marker,) = marks.iterdir()  # of the one that was asked what an answer depends on
    marker.unlink()
    killed: list[int] = []

    def kill() -> None:
        until = time.monotonic() + 300
        while time.monotonic() < until and not (out.exists() and out.read_bytes().count(b"\n") >= 5):
            time.sleep(0.02)
        pid = int(next(marks.iterdir()).name)
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    killer = threading.Thread(target=kill)
    with AnswerFile(out) as answers:
        killer.start()
        report = ask_all(asker, paths, answers)
        killer.join()
        rows = list(answers.rows())
    assert killed
    assert len(list(marks.iterdir())) >= 2
    assert report == MapReport(answered=60, failed=report.failed)
    assert list(report.failed) == [str(folder / "broken.mp4")]
    assert Counter(row.file for row in rows) == Counter(paths)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lines_of_every_video_after_a_listening_worker_died(pool: Any, tmp_path: Path) -> None:
    folder, mark = tmp_path / "videos", tmp_path / "died"
    folder.mkdir()
    for number in range(12):
        with_sound(folder / f"{number:02}.mp4", np.zeros(3 * RATE))
    library = Library(tmp_path / "index", embedder=ColourEmbedder(), seconds=2, pool=pool)
    report = library.listen([folder], Listener(model=DiesOnce(mark)), language="de")
    assert mark.exists()
    assert (report.heard, report.lines, report.failed) == (12, 12, {})
    hits = library.search_said("straße", top=100).hits
    assert Counter(hit.path for hit in hits) == Counter(find_videos([folder]))


class DiesOnce(ToldModel):
    """Ends its process at the fifth video, once in all."""

    def __init__(self, mark: Path) -> None:
        super().__init__(SAID)
        self.mark = mark

    def lines(self, *arguments: Any) -> Any:
        if len(self.heard) == 4 and not self.mark.exists():
            self.mark.touch()
            os._exit(1)
        return super().lines(*arguments)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_that_always_dies_is_said_and_others_go_on(pool: Any, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    for name, colour in (("a", "red"), ("deadly", "white"), ("z", "blue")):
        film(folder / f"{name}.mp4", [colour])
    library = Library(tmp_path / "index", embedder=Deadly(), seconds=2, pool=pool)
    report = library.index([folder])
    assert report.indexed == 2
    assert {Path(path).name: "worker died" in why for path, why in report.failed.items()} == {
        "deadly.mp4": True
    }


class Deadly(ColourEmbedder):
    """Ends its process at a white clip."""

    def embed_clips(self, clips: Any) -> Any:
        if any(clip.float().mean() > 230 for clip in clips):
            os._exit(1)
        return super().embed_clips(clips)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wrong_models_are_the_same_sentence(pool: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be"):
        RayAsker(pool, _refuse, "What?", FEW)


def _refuse() -> VideoChat:
    raise ConfigError("The model must be another one.")
