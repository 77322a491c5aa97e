"""Library: a row per clip whatever happens to the files and to the process, and no stale answer."""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.library import indexing
from app.library.clip_table import ClipTable
from app.library.library import Library
from app.library.video_files import find_videos
from encoder.errors import ConfigError, DataError, ModelError
from llm_bridge.assets.cache_dir import cache_dir
from llm_bridge.text_encoders.text_towers import MINILM
from tests import ROOT
from tests.app.library.conftest import ColourEmbedder, film
from tests.patience import until
from training.synthetic.assets import open_bank
from training.synthetic.dataset import World
from training.synthetic.export import write_video
from training.synthetic.world_config import WorldConfig


def rows(folder: Path, fingerprint: str = "c0") -> Counter[str]:
    """How many rows each file has, by name."""
    files = ClipTable(folder, fingerprint).files().values()
    assert all(file.rows == file.count for file in files)
    return Counter({Path(file.path).name: file.rows for file in files})


def opened(tmp_path: Path, fingerprint: str = "c0", seconds: float | None = 2) -> Library:
    return Library(tmp_path / "index", embedder=ColourEmbedder(fingerprint), seconds=seconds)


def test_clips_are_found_with_time_score_and_thumbnail(tmp_path: Path, videos: Path) -> None:
    library = opened(tmp_path)
    report = library.index([videos])
    assert (report.indexed, report.clips, report.failed) == (4, 5, {})
    assert rows(library.folder) == {"red.mp4": 1, "green.mp4": 1, "blue.mp4": 1, "it's two.mp4": 2}
    best = library.search("blue", top=2).hits[0]
    assert Path(best.path) == videos / "blue.mp4"
    assert best.score > 0.99
    white = library.search("white").hits
    assert len(white) == 5
    assert (Path(white[0].path).name, white[0].start_s, white[0].end_s) == ("it's two.mp4", 0.0, 2.0)
    assert white[0].thumbnail is not None
    red, green, blue = Image.open(white[0].thumbnail).getpixel((5, 5))  # type: ignore[misc]
    assert min(red, green, blue) > 200
    assert [hit.score for hit in white] == sorted((hit.score for hit in white), reverse=True)


def test_a_second_run_reads_only_what_is_new_or_changed(tmp_path: Path, videos: Path) -> None:
    opened(tmp_path).index([videos])
    os.utime(videos / "green.mp4", (1, 1))  # touched only
    film(videos / "red.mp4", ["white", "white", "blue"])
    film(videos / "new.mp4", ["green"])
    embedder = ColourEmbedder()
    library = Library(tmp_path / "index", embedder=embedder)
    report = library.index([videos])
    assert (report.indexed, report.unchanged, embedder.seen) == (2, 3, 4)
    assert rows(library.folder)["red.mp4"] == 3
    film(videos / "red.mp4", ["blue"])  # shorter: rows go
    library.index([videos])
    assert rows(library.folder)["red.mp4"] == 1
    assert library.check() == []


def test_what_cannot_be_read_is_a_row_of_the_report(tmp_path: Path, videos: Path) -> None:
    (videos / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "list.txt").write_text(f"# mine\n{videos / 'red.mp4'}\nvideos/gone.mp4\n")
    library = opened(tmp_path)
    report = library.index([videos, tmp_path / "list.txt"])
    assert report.indexed == 4
    assert sorted(Path(path).name for path in report.failed) == ["broken.mp4", "gone.mp4"]
    assert {(Path(row.path).name, row.what) for row in library.check()} == {
        ("broken.mp4", "unreadable"),
        ("gone.mp4", "unreadable"),
    }
    film(videos / "broken.mp4", ["white"])
    assert library.index([videos]).indexed == 1
    assert [Path(row.path).name for row in library.check()] == ["gone.mp4"]


def test_stale_files_are_no_answers_and_repair_mends_them(tmp_path: Path, videos: Path) -> None:
    library = opened(tmp_path)
    library.index([videos])
    (videos / "blue.mp4").unlink()
    film(videos / "green.mp4", ["blue"])
    found = library.search("blue", top=3)
    assert {Path(path).name for path in found.left_out} == {"blue.mp4", "green.mp4"}
    assert len(found.hits) == 3
    assert not {Path(hit.path).name for hit in found.hits} & {"blue.mp4", "green.mp4"}
    assert {Path(row.path).name: row.what for row in library.check()} == {
        "blue.mp4": "gone",
        "green.mp4": "changed",
    }
    report = library.repair()
    assert (report.indexed, report.removed) == (1, 1)
    assert library.check() == []
    assert Path(library.search("blue").hits[0].path).name == "green.mp4"


def test_what_a_repair_cannot_read_is_told_with_its_reason(tmp_path: Path, videos: Path) -> None:
    library = opened(tmp_path)
    library.index([videos])
    (videos / "blue.mp4").unlink()
    (videos / "blue.mp4").mkdir()
    (videos / "red.mp4").write_bytes(b"")
    assert {Path(row.path).name: row.what for row in library.check()} == {
        "blue.mp4": "gone",
        "red.mp4": "changed",
    }
    report = library.repair()
    assert (report.removed, len(report.failed)) == (1, 2)
    assert library.search("blue").left_out == (str(videos / "red.mp4"),)
    assert {Path(row.path).name: (row.what, "empty" in row.why) for row in library.check()} == {
        "blue.mp4": ("unreadable", False),
        "red.mp4": ("unreadable", True),
    }
    film(videos / "red.mp4", ["red"])
    (videos / "blue.mp4").rmdir()
    assert (library.repair().failed, library.check()) == ({}, [])


def test_what_may_not_be_entered_is_neither_gone_nor_dropped(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = opened(tmp_path)
    library.index([videos])
    hidden = str(videos / "red.mp4")

    def refusing(call: Any) -> Any:
        def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
            if str(path) == hidden:
                raise PermissionError(errno.EACCES, "Permission denied", hidden)
            return call(path, *arguments, **options)

        return refuse

    with monkeypatch.context() as patch:
        for name in ("stat", "open"):
            patch.setattr(os, name, refusing(getattr(os, name)))
        assert [row.what for row in library.check()] == ["unreadable"]
        report = library.repair()
        assert (report.removed, list(report.failed)) == (0, [hidden])
    assert library.repair().removed == 0
    assert library.check() == []
    assert "red.mp4" in rows(library.folder)


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_of_any_editor_names_its_files(tmp_path: Path, videos: Path, coding: str) -> None:
    names = ["red.mp4", "gr\u00fcn.mp4", "next\u0085line.mp4", "page\x0c.mp4"]
    text = "".join(f"videos/{name}\r\n" for name in [*names, "../videos/red.mp4"])
    (tmp_path / "list.txt").write_bytes(f"{text}# no file\r\n\r\n".encode(coding))
    assert find_videos([tmp_path / "list.txt"]) == sorted(str(videos / name) for name in names)


def test_another_model_is_refused_until_the_library_is_repaired(tmp_path: Path, videos: Path) -> None:
    opened(tmp_path).index([videos])
    newer = opened(tmp_path, "c1")
    for refused in (lambda: newer.search("red"), lambda: newer.index([videos])):
        with pytest.raises(ConfigError, match=r"another model or version .*--repair"):
            refused()
    assert {row.what for row in newer.check()} == {"other model"}
    assert newer.repair().indexed == 4
    assert newer.check() == []
    assert sum(rows(newer.folder, "c1").values()) == 5
    assert len(list(newer.folder.glob("clips-*"))) == 1


def test_a_repair_that_was_stopped_is_finished_by_the_next(tmp_path: Path, videos: Path) -> None:
    opened(tmp_path).index([videos])
    newer = opened(tmp_path, "c1")
    embedder = newer._given
    assert isinstance(embedder, ColourEmbedder)

    def stop(clips: object) -> None:
        raise KeyboardInterrupt

    embedder.embed_clips = stop  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        newer.repair()
    again = opened(tmp_path, "c1")
    assert {row.what for row in again.check()} == {"other model"}
    assert again.repair().indexed == 4
    assert again.check() == []


def test_two_indexers_at_once_end_in_a_sentence(tmp_path: Path, videos: Path) -> None:
    library = opened(tmp_path)
    library.index([videos])
    with library._alone(), pytest.raises(ConfigError, match="Another process is writing"):
        library.index([videos])
    assert library.index([videos]).unchanged == 4


def test_a_table_that_was_never_finished_is_none(tmp_path: Path, videos: Path) -> None:
    (tmp_path / "index" / "clips-c0.lance" / "data").mkdir(parents=True)
    assert opened(tmp_path).index([videos]).clips == 5


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes, and pipes")
def test_what_is_no_plain_file_with_a_plain_name_ends_nothing(tmp_path: Path, videos: Path) -> None:
    strange = Path(os.fsdecode(bytes(videos) + b"/\xff.mp4"))
    shutil.copy(videos / "red.mp4", strange)
    os.mkfifo(videos / "pipe.mp4")  # nobody writes into it
    (tmp_path / "list.txt").write_bytes(b"videos/re\0d.mp4\n")
    library = opened(tmp_path)
    report = library.index([videos, tmp_path / "list.txt"])
    assert report.indexed == 4
    said = " ".join(report.failed.values())
    assert len(report.failed) == 3
    assert "no UTF-8 text; rename it" in said
    assert "no regular file" in said
    assert "nul character" in said
    assert not library.holds(str(strange))
    assert str(strange) in [row.path for row in library.check()]
    strange.unlink()
    assert library.repair().removed == 2
    assert [row.path for row in library.check()] == [str(videos / "pipe.mp4")]


@pytest.mark.parametrize("part", ["_versions", "data"])
def test_a_table_that_is_damaged_is_one_sentence(tmp_path: Path, videos: Path, part: str) -> None:
    library = opened(tmp_path)
    library.index([videos])
    for file in (library.folder / "clips-c0.lance" / part).iterdir():
        file.write_bytes(b"nonsense")
    damaged = opened(tmp_path)
    red = str(videos / "red.mp4")
    for use in (lambda: damaged.search("red"), damaged.check, damaged.repair, lambda: damaged.holds(red)):
        with pytest.raises(DataError, match="is damaged: delete"):
            use()
    with pytest.raises(DataError, match="is damaged: delete"):
        damaged.index([videos])


def test_wrong_inputs_are_sentences(tmp_path: Path, videos: Path) -> None:
    library = opened(tmp_path)
    with pytest.raises(ConfigError, match=r"no library in .* yet"):
        library.search("red")
    with pytest.raises(ConfigError, match="no file or folder"):
        library.index([tmp_path / "nowhere"])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match="no video in"):
        library.index([tmp_path / "nothing"])
    library.index([videos])
    with pytest.raises(ConfigError, match="clips of 2 s, not 5"):
        opened(tmp_path, seconds=5).index([videos])
    with pytest.raises(ConfigError, match="Say what"):
        library.search("  ")
    for search in (library.search, library.search_said):
        with pytest.raises(ConfigError, match="not UTF-8"):
            search(os.fsdecode(b"\xff"))
    with pytest.raises(ConfigError, match="Cannot find 0"):
        library.search("red", top=0)
    with pytest.raises(ConfigError, match="cannot be"):
        Library(tmp_path / "other", seconds=0.01)
    (library.folder / "library.json").write_text("{}")
    with pytest.raises(DataError, match=r"library\.json is damaged"):
        opened(tmp_path).search("red")


def test_without_lancedb_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(ConfigError, match=r"pip install 'fluxchat\[library\]'"):
        Library(tmp_path)


def test_without_the_text_tower_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, videos: Path
) -> None:
    monkeypatch.setenv("FLUXCHAT_CACHE", str(tmp_path / "cache"))
    library = Library(tmp_path / "index", device="cpu")
    assert library.index([videos / "red.mp4"]).clips == 1
    with pytest.raises(ModelError, match="fluxchat fetch --text"):
        library.search("red")


def test_a_bar_goes_where_it_is_told(tmp_path: Path, videos: Path) -> None:
    out = io.StringIO()
    opened(tmp_path).index([videos], progress=out)
    assert "4/4" in out.getvalue()


def test_a_video_that_is_changed_or_deleted_while_it_is_read_is_no_row(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = indexing.read_clips

    def meanwhile(path: str, *how: Any) -> Any:
        for clips in read(path, *how):
            yield clips
            if path.endswith("red.mp4"):
                film(Path(path), ["blue", "blue"])
            elif path.endswith("green.mp4"):
                Path(path).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(indexing, "read_clips", meanwhile)
        library = opened(tmp_path)
        report = library.index([videos])
    assert {Path(path).name for path in report.failed} == {"red.mp4", "green.mp4"}
    assert all("was changed meanwhile" in why for why in report.failed.values())
    assert rows(library.folder) == {"blue.mp4": 1, "it's two.mp4": 2}
    assert {Path(row.path).name for row in library.check()} == {"red.mp4", "green.mp4"}
    assert (library.repair().indexed, library.check()) == (1, [])


def test_a_disk_that_is_full_is_one_sentence_and_what_was_there_stays(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = opened(tmp_path)
    library.index([videos / "red.mp4"])
    film(videos / "red.mp4", ["blue"])
    full = OSError(28, "No space left on device")

    class Full:
        """The table of LanceDB on a disk where nothing more can be written."""

        def __init__(self, table: Any) -> None:
            self._whole = table

        def __getattr__(self, name: str) -> Any:
            if name in ("add", "merge_insert", "update", "delete", "optimize"):
                return self._fail
            return getattr(self._whole, name)

        def _fail(self, *_: Any, **__: Any) -> Any:
            raise full

    made = ClipTable.__init__

    def filled(self: ClipTable, *arguments: Any) -> None:
        made(self, *arguments)
        self._table = Full(self._table)

    with monkeypatch.context() as patch:
        patch.setattr(ClipTable, "__init__", filled)
        for what in (lambda: library.index([videos]), library.repair):
            with pytest.raises(DataError, match=r"the disk is full; what was indexed before is kept\.$"):
                what()
    assert rows(library.folder) == {"red.mp4": 1}
    report = library.repair()
    assert (report.indexed, report.failed) == (1, {})
    assert library.index([videos]).indexed == 3

    def no_room(*_: Any) -> None:
        raise full

    monkeypatch.setattr("app.library.library.save_json", no_room)
    film(videos / "more.mp4", ["red"])
    for place in (tmp_path / "index", tmp_path / "another"):
        with pytest.raises(DataError, match="the disk is full"):
            Library(place, embedder=ColourEmbedder(), seconds=2).index([videos])
    assert rows(library.folder)["more.mp4"] == 1  # only the report of it was lost


FILL = """
import sys
from pathlib import Path
from app.library.library import Library
from encoder.errors import DataError
from tests.app.library.conftest import ColourEmbedder
from tests.app.library.test_library import rows
def library():
    return Library(sys.argv[1], embedder=ColourEmbedder(), seconds=2)
try:
    library().index([sys.argv[2]])
    sys.exit("the disk was never full")
except DataError as error:
    print(error)
before = rows(Path(sys.argv[1]))
for path in sorted(Path(sys.argv[1]).glob("ballast*")):
    path.unlink()
report = library().index([sys.argv[2]])
after = rows(Path(sys.argv[1]))
print(sum(before.values()), report.unchanged, sum(after.values()), set(after.values()), library().check())
"""


@pytest.mark.slow
def test_a_disk_that_runs_full_while_indexing_leaves_whole_videos(tmp_path: Path) -> None:
    index = tmp_path / "index"
    index.mkdir()
    for number in range(12):
        film(tmp_path / "videos" / f"{number:02}.mp4", ["red", "green"])
    mount = f"mount -t tmpfs -o size=2m tmpfs {index} && head -c 1930000 /dev/zero > {index}/ballast"
    script = f'{mount} && exec "{sys.executable}" -c "$1" {index} {tmp_path / "videos"}'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", FILL]
    if shutil.which("unshare") is None or subprocess.run([*command[:-3], mount], check=False).returncode:
        pytest.skip("no small disk can be made here")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sentence, counts = done.stdout.splitlines()
    assert "the disk is full; what was indexed before is kept." in sentence
    before, unchanged, after, clips, stale = counts.split(" ", 4)
    assert int(before) == 2 * int(unchanged)
    assert (after, clips, stale) == ("24", "{2}", "[]")


INDEX = """
import sys, time
from app.library.library import Library
from tests.app.library.conftest import ColourEmbedder
index, folder, most = sys.argv[1:]
class Stops(ColourEmbedder):
    def embed_clips(self, clips):
        while self.seen >= int(most):  # until it is killed
            time.sleep(1)
        return super().embed_clips(clips)
Library(index, embedder=Stops(), seconds=2).index([folder])
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_to_one_row_per_clip(tmp_path: Path) -> None:
    random.seed(0)
    folder, index = tmp_path / "videos", tmp_path / "index"
    names = ["red", "green", "blue", "white"]
    for number in range(200):
        film(folder / f"{number:03}.mp4", random.choices(names, k=1 + number % 3))
    command = [sys.executable, "-c", INDEX, str(index), str(folder)]
    grew = [0]

    def grows() -> bool:
        if not any((index / "clips-c0.lance" / "_versions").glob("*.manifest")):
            return False
        return sum(rows(index).values()) > grew[-1]

    for _ in range(5):  # of nearly 400 clips
        process = subprocess.Popen([*command, str(random.randint(10, 70))], cwd=ROOT)
        until(lambda process=process: process.poll() is not None or grows())  # type: ignore[misc]
        time.sleep(random.uniform(0.0, 0.5))
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        grew.append(sum(rows(index).values()))
    assert grew == sorted(grew)
    assert 0 < grew[-1] < 400  # it was killed at work
    subprocess.run([*command, "1000"], cwd=ROOT, check=True)
    assert rows(index) == {f"{number:03}.mp4": 1 + number % 3 for number in range(200)}
    library = Library(index, embedder=ColourEmbedder())
    assert library.check() == []
    assert library.index([folder]).unchanged == 200


@pytest.mark.slow
def test_described_clips_are_among_the_first_three(tmp_path: Path) -> None:
    try:
        open_bank()
    except DataError as error:
        pytest.skip(str(error))
    if not (cache_dir() / MINILM).exists():
        pytest.skip("the text tower is not here")
    world = World("test", 11, WorldConfig(duration_s=(2.0, 8.0)))
    captions = {}
    for number in range(200):
        sample = world.sample(number)
        times = [i / 8 for i in range(int(sample.scene.duration_s * 8))]
        path = tmp_path / "videos" / f"{number:03}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_video(path, world.render(sample.scene, times, 160, 160), 8)
        captions[str(path)] = sample.caption
    library = Library(tmp_path / "index", device="cpu", seconds=10)
    assert library.index([tmp_path / "videos"]).clips == 200
    asked = list(captions.items())[:20]
    hits = [path in {hit.path for hit in library.search(text, top=3).hits} for path, text in asked]
    assert sum(hits) >= 19
