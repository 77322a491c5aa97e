"""A model that can tell what it knows: the note before an answer, once, never in the model's history."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image

from app.chat import Media, Message, VideoChat, Videos
from app.cli import main
from app.long_video import LongVideo
from app.note import Note, guess_of, no_such_time, note_for, without_guess, without_note
from app.page.handlers import Handlers
from app.page.layout import banner
from app.page.sessions import Sessions
from app.page.settings import CHOOSE, Settings
from app.terminal import Terminal
from llm_bridge.familiarity import Familiarity, num_statistics, statistics
from llm_bridge.model import VideoLanguageModel
from llm_bridge.prompt import render
from tests.app.server.serving import answer, ask, data_url, question, running
from training.synthetic.export import write_video

THINGS = 236
NOTE = note_for(THINGS)
SAYS = str(NOTE).strip()
SHORT_ANSWER: dict[str, Any] = {"budget": 16, "max_new_tokens": 6}
SETTINGS = Settings(48, False, 2.0, "flux", CHOOSE, CHOOSE, max_new_tokens=6)


def noise(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures of one colour, which the judge below knows, and of noise, which it does not."""
    folder = tmp_path_factory.mktemp("pictures")
    made = {"known": Image.new("RGB", (64, 64), (40, 90, 160)), "known2": Image.new("RGB", (64, 64), "red")}
    made |= {"noise": noise(1), "noise2": noise(2)}
    for name, image in made.items():
        image.save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in made}


@pytest.fixture
def judge(
    tiny_model: VideoLanguageModel, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Familiarity:
    """The tiny model's judge: it goes by how much the patch embeddings differ."""
    width = tiny_model.encoder.config.embed_dim
    weight = torch.zeros(num_statistics(tiny_model.encoder))
    weight[width : 2 * width] = 1
    found = Familiarity(weight, 0.0, THINGS, 5.0, "00" * 12)
    scores = {}
    for name, path in files.items():
        pixels = torch.tensor(list(Image.open(path).convert("RGB").tobytes()), dtype=torch.uint8)
        scores[name] = float(found.score(statistics(tiny_model.encoder, pixels.view(1, 64, 64, 3), "squash")))
    assert max(scores["known"], scores["known2"]) < min(scores["noise"], scores["noise2"])
    middle = (max(scores["known"], scores["known2"]) + min(scores["noise"], scores["noise2"])) / 2
    found = Familiarity(weight, -middle, THINGS, 5.0, "00" * 12)
    monkeypatch.setattr(tiny_model, "familiarity", found)
    return found


@pytest.fixture
def chat(tiny_model: VideoLanguageModel, judge: Familiarity) -> Iterator[VideoChat]:
    with VideoChat(tiny_model) as made:
        yield made


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text of every message that a language model is shown, by prompt."""
    seen: list[str] = []

    def noted(tokenizer: Any, messages: Any, **options: Any) -> Any:
        seen.append("\n".join(message.text for message in messages))
        return render(tokenizer, messages, **options)

    monkeypatch.setattr("app.chat.render", noted)
    return seen


# -- the note -------------------------------------------------------------------------------------------


def test_the_note_comes_first_and_only_about_what_is_not_known(
    chat: VideoChat, files: dict[str, Path]
) -> None:
    pieces = list(chat.stream(files["noise"], "What is it?", **SHORT_ANSWER))
    assert isinstance(pieces[0], Note)
    assert pieces[0] == NOTE
    assert "236" in NOTE
    assert not any(isinstance(piece, Note) for piece in pieces[1:])
    strange = chat.ask(files["noise"], "What is it?", **SHORT_ANSWER)
    assert strange.text == "".join(pieces).strip()
    assert (strange.familiar, strange.note) == (False, SAYS)
    known = chat.ask(files["known"], "What is it?", **SHORT_ANSWER)
    assert (known.familiar, known.note) == (True, "")
    assert SAYS not in known.text
    mixed = chat.ask(Videos([files["known"], files["noise"]]), "Which?", **SHORT_ANSWER)
    assert (mixed.familiar, mixed.note) == (False, SAYS)
    assert chat.ask(None, "Hello?", **SHORT_ANSWER).familiar is None


@pytest.fixture
def noisy(tmp_path: Path) -> Path:
    film = tmp_path / "noise.mp4"
    write_video(film, np.stack([np.asarray(noise(seed)) for seed in range(20)]), 1)
    return film


def test_chapters_say_it_once_and_not_in_their_texts(
    chat: VideoChat, noisy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = LongVideo(chat, noisy).chapters(2, 16, max_new_tokens=6)
    assert [first.note, second.note] == [SAYS, ""]
    assert [first.familiar, second.familiar] == [False, False]
    assert SAYS not in first.text + second.text
    monkeypatch.setattr("app.cli.open_chat", lambda args: nullcontext(chat))
    assert main(["chapters", str(noisy), "--count", "2", "--budget", "16"]) == 0
    told = capsys.readouterr()
    assert [line[:5] for line in told.out.splitlines()] == ["0:00-", told.out.splitlines()[1][:5]]
    assert told.err == f"{SAYS}\n"


def test_many_answers_say_it_once_together(
    chat: VideoChat,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("app.cli.open_chat", lambda args, **options: nullcontext(chat))
    paths, few = [str(files[name]) for name in ("known", "noise", "noise2")], ["--budget", "16"]
    few += ["--max-new-tokens", "6"]
    (tmp_path / "one.json").write_text('{"const": 1}')
    for schema in ([], ["--schema", str(tmp_path / "one.json")]):
        out = tmp_path / f"{len(schema)}.jsonl"
        if schema:
            pytest.importorskip("llguidance", reason="the extra json is not installed")
        assert main(["map", "What is it?", *paths, "--out", str(out), *few, *schema]) == 0
        rows = {row["file"]: row for row in map(json.loads, out.read_text().splitlines())}
        assert [rows[path]["familiar"] for path in paths] == [True, False, False]
        assert "drawn things" not in out.read_text()
        err = capsys.readouterr().err
        assert "2 of 3 videos look like nothing that this small model knows" in err
        assert err.count("\n") == 1
    assert main(["ask", *paths, "What is it?", "--each", "--json", *few]) == 0
    told = capsys.readouterr()
    each = [json.loads(line) for line in told.out.splitlines()]
    assert [row["familiar"] for row in each] == [True, False, False]
    assert "drawn things" not in told.out
    assert "2 of 3 videos" in told.err


def test_a_time_that_is_not_there_is_kept_where_the_guess_is_not() -> None:
    absent = no_such_time(750, 0, 20)
    both = NOTE + absent + "It moves."
    assert without_guess(both) == f"{absent}It moves."
    assert guess_of((NOTE + absent).strip()) == SAYS
    assert guess_of(absent.strip()) == ""


def test_the_note_costs_no_tokens(chat: VideoChat, files: dict[str, Path]) -> None:
    plain = chat.ask(files["noise"], "What is it?", hedge=False, **SHORT_ANSWER)
    noted = chat.ask(files["noise"], "What is it?", **SHORT_ANSWER)
    assert (plain.familiar, plain.note) == (False, "")
    assert noted.usage.completion_tokens == plain.usage.completion_tokens
    assert noted.usage.prompt_tokens == plain.usage.prompt_tokens


def test_a_model_without_a_judge_says_nothing_of_it(
    tiny_model: VideoLanguageModel, files: dict[str, Path]
) -> None:
    with VideoChat(tiny_model) as chat:
        answered = chat.ask(files["noise"], "What is it?", **SHORT_ANSWER)
        assert (answered.familiar, answered.note) == (None, "")
        assert "cannot tell" in chat.info()["familiarity"]


def test_once_in_a_conversation_until_another_strange_video_comes(
    chat: VideoChat, files: dict[str, Path], prompts: list[str]
) -> None:
    talk = chat.conversation(files["noise"], **SHORT_ANSWER)
    assert talk.ask("What is it?").note
    follow_up = talk.ask("And why?")
    assert (follow_up.familiar, follow_up.note) == (False, "")
    talk.add(files["known"])
    assert not talk.ask("And this?").note
    talk.add(files["noise2"])
    assert talk.ask("And that?").note
    assert not any("drawn things" in prompt for prompt in prompts)


def test_once_about_a_video_and_its_parts(chat: VideoChat, files: dict[str, Path], tmp_path: Path) -> None:
    film = tmp_path / "noise.mp4"
    write_video(film, np.stack([np.asarray(noise(seed)) for seed in range(4)]), 1)
    talk = chat.conversation(film, **SHORT_ANSWER)
    assert talk.ask("What is it?").note
    assert not talk.ask("And here?", start=1, end=3).note
    assert not talk.ask("And there?", region="0,0,0.5,1").note
    assert not talk.ask("All of it?").note
    talk.add(files["noise"])
    assert talk.ask("And that?").note


def test_an_unfamiliar_part_of_a_familiar_video_is_told(
    chat: VideoChat, files: dict[str, Path], tmp_path: Path
) -> None:
    film = tmp_path / "both.mp4"
    plain, strange = np.asarray(Image.open(files["known"])), np.asarray(noise(1))
    write_video(film, np.stack([plain] * 4 + [strange] * 4), 1)
    talk = chat.conversation(film, **SHORT_ANSWER)
    assert not talk.ask("What is it?", start=0, end=4).note
    assert talk.ask("And there?", start=4.5, end=8).note


def test_it_is_taken_out_of_what_clients_send_back(
    chat: VideoChat, files: dict[str, Path], prompts: list[str]
) -> None:
    first = chat.ask(files["noise"], "What is it?", **SHORT_ANSWER)
    for sent in (first.text, f"\n{first.text}  ", first.text.replace("236", "60")):
        again = chat.ask(files["noise"], "Why?", history=[("What is it?", sent)], **SHORT_ANSWER)
        assert "drawn things" not in prompts[-1]
        assert not again.note  # the video came with the first turn
    shown: Message[Media] = Message.of("user", Media(files["noise"]), "What is it?")
    repeated = [shown, Message.of("assistant", first.text), shown]
    stream = chat.stream_messages(repeated, **SHORT_ANSWER)
    assert not any(isinstance(piece, Note) for piece in stream)


def test_a_stop_and_a_full_stop_leave_it_whole(chat: VideoChat, files: dict[str, Path]) -> None:
    stop = threading.Event()
    stop.set()
    stream = chat.stream(files["noise"], "What is it?", stop=stop, **SHORT_ANSWER)
    assert list(stream) == []
    assert (stream.answer.text, stream.answer.note) == ("", "")
    stream = chat.stream(files["noise"], "What is it?", budget=16, max_new_tokens=40)
    reading = iter(stream)
    assert next(reading) == NOTE
    next(reading)
    reading.close()  # type: ignore[attr-defined]
    assert stream.answer.text.startswith(SAYS)


def test_text_that_only_resembles_it_stays() -> None:
    assert without_note(f"{NOTE}A dog.") == "A dog."
    assert without_note(SAYS) == ""
    for text in ("A dog.", f"A dog. {SAYS}", "This small model knows only 9 dogs.", ""):
        assert without_note(text) == text


# -- a yes ----------------------------------------------------------------------------------------------


def test_how_an_answer_begins_is_doubted_about_strange_videos_alone(
    tiny_model: VideoLanguageModel,
    judge: Familiarity,
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = tiny_model.llm.tokenizer
    size = tiny_model.language_model.config.vocab_size
    left = next(token for token in range(20, size) if tokenizer.decode([token]).strip().isalnum())
    with VideoChat(tiny_model) as chat:

        def words(name: str, **options: Any) -> str:
            return without_note(chat.ask(files[name], "Is it?", **SHORT_ANSWER, **options).text)

        known, strange = words("known"), words("noise")
        monkeypatch.setattr(
            Familiarity, "yes_bias", lambda *_: {token: -1e4 for token in range(size) if token != left}
        )
        assert words("known") == known
        assert words("noise", hedge=False) == strange
        assert words("noise").startswith(tokenizer.decode([left]).strip())
        assert len(words("noise")) > len(tokenizer.decode([left]).strip())  # only its beginning


def test_which_tokens_are_a_yes(tiny_model: VideoLanguageModel, judge: Familiarity) -> None:
    class Tokenizer:
        words = ("No", "Yes", " Yes", "Ye", "yes", " yes")

        def __call__(self, text: str, **_: Any) -> Any:
            from types import SimpleNamespace

            whole = [self.words.index(text)] if text in self.words else [3, 0]
            return SimpleNamespace(input_ids=whole)

        def decode(self, ids: list[int]) -> str:
            return "".join(self.words[token] for token in ids)

    assert judge.yes_bias(Tokenizer()) == {1: -5.0, 2: -5.0, 4: -5.0, 5: -5.0}


# -- where people meet it -------------------------------------------------------------------------------


def test_the_api(chat: VideoChat, files: dict[str, Path], prompts: list[str]) -> None:
    url = data_url(files["noise"], "image/png")
    with running(chat) as (address, _):
        response = ask(address, "What is it?", url, max_tokens=6)
        text = answer(response)
        assert text.startswith(SAYS)
        usage = response.json()["usage"]
        assert usage["familiar"] is False
        assert usage["completion_tokens"] <= 6
        known = ask(address, "What is it?", data_url(files["known"], "image/png"), max_tokens=6)
        assert known.json()["usage"]["familiar"] is True
        assert not answer(known).startswith(SAYS)
        # A stop text is looked for in the model's words: this one stands in the note.
        assert answer(ask(address, "What is it?", url, max_tokens=6, stop=["guess"])) == text
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        body = question("What is it?", url, max_tokens=6)
        streamed = client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
        chunks = list(streamed)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said == text
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.model_dump()["familiar"] is False
        messages = [*body["messages"], {"role": "assistant", "content": text}]
        messages.append({"role": "user", "content": "Why?"})
        later = client.chat.completions.create(model="fluxchat", messages=messages, max_tokens=6)
        assert not str(later.choices[0].message.content).startswith(SAYS)
        assert "drawn things" not in prompts[-1]


def test_the_terminal(chat: VideoChat, files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(chat, str(files["noise"]), {"budget": "16", "max_new_tokens": 6})
    terminal.ask("What is it?")
    assert capsys.readouterr().out.startswith(SAYS)
    terminal.ask("Why?")
    assert SAYS not in capsys.readouterr().out


def test_the_commands(
    tiny_model: VideoLanguageModel,
    judge: Familiarity,
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a saved model, whose judge comes along."""
    from encoder.checkpoint import weights_hash

    fitted = Familiarity(judge.weight, judge.bias, THINGS, 5.0, weights_hash(tiny_model.encoder))
    monkeypatch.setattr(tiny_model, "familiarity", fitted)
    tiny_model.save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--budget", "16", "--max-new-tokens", "6"]
    assert main(["ask", str(files["noise"]), "What is it?", *options]) == 0
    assert capsys.readouterr().out.startswith(SAYS)
    assert main(["ask", str(files["known"]), "What is it?", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["familiar"] is True
    assert main(["info", "--model", str(tmp_path)]) == 0
    assert f"knows {THINGS} drawn things" in capsys.readouterr().out


def test_the_page(chat: VideoChat, files: dict[str, Path], tmp_path: Path, prompts: list[str]) -> None:
    sessions = Sessions(chat.forget, uploads=tmp_path)
    handlers = Handlers(chat, sessions)
    session = sessions.get("one")
    assert handlers.add(session, [str(files["noise"])]) == ""
    for words, noted in (("What is it?", True), ("Why?", False)):
        assert handlers.begin(session, words)
        shown = list(handlers.run(session, SETTINGS))[-1]
        assert shown[-1]["content"][0].startswith(SAYS) == noted
    assert "drawn things" not in prompts[-1]
    panels = list(handlers.compare(session, "What is it?", SETTINGS, [(16, "flux"), (32, "flux")]))[-1]
    assert all("drawn things" in panel for panel in panels)
    sessions.close_all()
    assert "236" in banner(THINGS)
