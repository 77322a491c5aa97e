"""What is said in a library's videos is found by its words, and is never stale."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.cli import main
from app.library.library import Library
from app.library.said_table import SaidTable
from app.library.video_files import FileIdentity
from app.speech import listener as listener_module
from app.speech.listener import Listener
from app.speech.transcript import Line, Transcript
from encoder.errors import ConfigError, DataError
from encoder.video.sound import RATE
from tests.app.library.conftest import ColourEmbedder, film
from tests.app.speech.conftest import ToldModel, with_sound

pytestmark = pytest.mark.skipif(find_spec("lancedb") is None, reason="the extra library is not installed")
LINES = [Line(0.5, 1.5, "It's a rainy day"), Line(2.0, 3.0, "rain falls in 100% of the city")]


def test_lines_are_found_by_their_words(tmp_path: Path) -> None:
    talk = with_sound(tmp_path / "it's a talk.mp4", np.zeros(4 * RATE))
    film(tmp_path / "silent.mp4", ["red"])
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    if sys.platform == "linux":  # a name that no table can hold
        Path(os.fsdecode(bytes(tmp_path) + b"/\xff.mp4")).write_bytes(talk.read_bytes())
    model = ToldModel(LINES)
    library = Library(tmp_path / "index", embedder=ColourEmbedder(), seconds=2)
    with pytest.raises(ConfigError, match="index FOLDER --speech"):
        library.search_said("rain")
    report = library.listen([tmp_path], Listener(model=model))
    assert (report.heard, report.lines, report.unchanged) == (2, 2, 0)
    assert [Path(path).name for path in report.failed if path.isascii()] == ["broken.mp4"]
    (hit,) = library.search_said("Rain, city!").hits  # whole words: "rainy" is another
    assert (hit.path, hit.start_s, hit.end_s, hit.score) == (str(talk), 2.0, 3.0, 1.0)
    assert hit.said == LINES[1].text
    assert [hit.score for hit in library.search_said("rain snow").hits] == [0.5]
    assert library.search_said("snow").hits == ()
    assert library.search_said("it s a' OR 1=1").hits[0].said == LINES[0].text
    heard = len(model.heard)
    assert library.listen([tmp_path], Listener(model=model)).unchanged == 2
    os.utime(talk, (1, 1))  # touched only
    assert library.search_said("snow rain").left_out == ()
    assert library.listen([tmp_path], Listener(model=model)).unchanged == 2
    assert library.listen([tmp_path], Listener(model=model)).unchanged == 2
    assert len(model.heard) == heard
    assert SaidTable(library.folder).files()[str(talk)].unchanged(str(talk))
    model.told = [Line(0.0, 1.0, "now it snows")]
    with_sound(talk, np.zeros(3 * RATE))
    found = library.search_said("rain")
    assert (found.hits, found.left_out) == ((), (str(talk),))
    assert library.listen([tmp_path], Listener(model=model)).heard == 1
    assert [hit.said for hit in library.search_said("snows").hits] == ["now it snows"]
    assert library.search_said("rain").hits == ()
    library.index([tmp_path])
    talk.unlink()
    library.repair()
    assert library.search_said("snows") == library.search_said("rain")


def test_words_of_all_writings_are_found(tmp_path: Path) -> None:
    said = {
        "de": "Der Hund läuft über die Straße.",
        "es": "Mañana vamos a la ciudad",
        "fr": "Nous irons à l'école",
        "zh": "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u30023\u70b9\u53bb\u5b66\u6821",
        "hi": "\u092e\u0941\u091d\u0947 \u0939\u093f\u0928\u094d\u0926\u0940 \u0906\u0924\u0940 \u0939\u0948",
        "ru": "\u0421\u043e\u0431\u0430\u043a\u0430 \u0431\u0435\u0436\u0438\u0442",
        "en": "A sunny day",
    }
    table = SaidTable(tmp_path)
    for language, text in said.items():
        transcript = Transcript((Line(0.0, 1.0, text),), language)
        table.put(f"/{language}.mp4", FileIdentity(1, 1, "e"), transcript)
    for query, language in (
        ("STRASSE straße", "de"),
        ("la\u0308uft", "de"),  # typed with a mark of its own
        ("mañana", "es"),
        ("école", "fr"),
        ("\u5929\u6c14", "zh"),  # within a sentence that has no spaces
        ("\u5b66\u6821", "zh"),
        ("\u597d", "zh"),
        ("\u0939\u093f\u0928\u094d\u0926\u0940", "hi"),
        ("\u0441\u043e\u0431\u0430\u043a\u0430", "ru"),
    ):
        [(row, _)] = table.find(query, 10)
        assert (row.language, row.text) == (language, said[language]), query
    assert table.find("\u5929\u597d", 10) == []  # both are there, not together
    assert table.find("\u0939", 10) == []  # a letter is no word
    assert [row.language for row, _ in table.find("y", 10)] == []


def test_a_language_that_is_not_known_is_said_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    film(tmp_path / "silent.mp4", ["red"])
    monkeypatch.setattr(listener_module, "WhisperModel", lambda source: ToldModel(LINES))
    place = tmp_path / "index"
    command = ["index", str(tmp_path), "--library", str(place), "--speech", "--language", "tlh"]
    assert main(command) == 2
    assert capsys.readouterr().err == "fluxchat: The speech model knows no language 'tlh'.\n"
    assert not place.exists()


def test_damaged_lines_are_one_sentence(tmp_path: Path) -> None:
    with_sound(tmp_path / "talk.mp4", np.zeros(4 * RATE))
    listener = Listener(model=ToldModel(LINES))
    library = Library(tmp_path / "index", embedder=ColourEmbedder(), seconds=2)
    library.listen([tmp_path], listener)
    for file in (library.folder / "said.lance" / "data").iterdir():
        file.write_bytes(b"nonsense")
    for use in (lambda: library.search_said("rain"), lambda: library.listen([tmp_path], listener)):
        with pytest.raises(DataError, match=r"is damaged: delete said\.lance"):
            use()


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lancedb.table import LanceTable

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("lance error: No space left on device (os error 28)")

    with_sound(tmp_path / "talk.mp4", np.zeros(4 * RATE))
    listener = Listener(model=ToldModel(LINES))
    library = Library(tmp_path / "index", embedder=ColourEmbedder(), seconds=2)
    library.listen([tmp_path], listener)
    with_sound(tmp_path / "other.mp4", np.zeros(4 * RATE))
    monkeypatch.setattr(LanceTable, "add", full)
    with pytest.raises(DataError, match="the disk is full; what was heard before is kept"):
        library.listen([tmp_path], listener)
