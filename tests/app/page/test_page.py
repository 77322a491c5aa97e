"""The page's behaviour as plain functions, its sessions, and its API for programs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.chat import VideoChat
from app.model_slot import ModelSlot
from app.page.events import build, page_options
from app.page.handlers import Handlers, conversation_messages, way_out
from app.page.layout import header
from app.page.sessions import MAX_MEDIA, Media, Session, Sessions
from app.page.settings import CHOOSE, Range, Settings
from app.server.media.store import MediaStore
from app.vision import Vision
from encoder.budget import Budget
from encoder.errors import BudgetError, ConfigError
from encoder.selection import Selector
from llm_bridge.engines.local import LocalAnswer
from llm_bridge.generation import Generation
from llm_bridge.model import VideoLanguageModel
from tests.app.conftest import SHORT, WORLD
from tests.patience import until

PLAIN = Settings(48, False, 2.0, "flux", CHOOSE, CHOOSE, max_new_tokens=12)


@pytest.fixture
def session(handlers: Handlers) -> Session:
    session = handlers.sessions.get("one")
    assert handlers.add(session, [str(SHORT)]) == ""
    return session


def ask(handlers: Handlers, session: Session, question: str, settings: Settings = PLAIN) -> list[Any]:
    assert handlers.begin(session, question)
    return list(handlers.run(session, settings))[-1]


# -- settings -------------------------------------------------------------------------------------------


def test_settings_become_a_budget() -> None:
    assert PLAIN.budget == Budget(48)
    assert Settings(48, True, 1.5, "flux", "8", "112").budget == Budget(None, 1.5, 8, 112)


def test_overrides_reach_the_plan(chat: VideoChat) -> None:
    plan = chat.plan(SHORT, Settings(48, False, 2.0, "flux", "6", "70").budget)
    assert (plan.frames, plan.height, plan.width, plan.keep) == (6, 70, 70, 48)
    assert chat.plan(SHORT, Budget(None, None, 6, 70)).keep == 6 * 25
    assert chat.plan(SHORT, Budget(10**6, None, 6, 70)).keep == 6 * 25
    assert chat.plan(Image.new("RGB", (64, 64)), Budget(16, None, 6)).frames == 1
    with pytest.raises(BudgetError, match="multiple of 14"):
        chat.plan(SHORT, Budget(16, None, None, 71))


def test_slider_ends_at_the_context_length(tiny_model: VideoLanguageModel) -> None:
    budgets = Range.of(tiny_model)
    context = tiny_model.llm.context_length
    assert context is not None
    assert budgets.largest % budgets.step == 0
    assert 16 * 8 * 8 // budgets.step >= 30  # steps to the full grid
    assert budgets.largest + 128 < context < budgets.largest + budgets.step + 48 + 128 + budgets.step
    assert budgets.near(1) == budgets.step
    assert budgets.near(10**6) == budgets.largest


# -- asking ---------------------------------------------------------------------------------------------


def test_answers_stream_and_follow_ups_include_the_history(handlers: Handlers, session: Session) -> None:
    handlers.begin(session, "What is there?")
    shown = list(handlers.run(session, PLAIN))
    assert len(shown) >= 2
    assert [message["role"] for message in shown[-1]] == ["user", "assistant"]
    first = session.turns[0]
    direct = handlers.chat.ask(str(SHORT), "What is there?", budget=48, max_new_tokens=12)
    assert first.text == direct.text
    ask(handlers, session, "And then?")
    answer = session.turns[1].answer
    assert answer is not None
    again = handlers.chat.ask(
        str(SHORT), "And then?", budget=48, max_new_tokens=12, history=[("What is there?", first.text)]
    )
    assert answer.text == again.text
    assert answer.usage.cached_tokens > 48


def test_strip_under_the_answer_shows_what_was_kept(handlers: Handlers, session: Session) -> None:
    messages = ask(handlers, session, "What?")
    answer = session.turns[0].answer
    assert answer is not None
    details = messages[1]["content"][1].value
    assert details.count("data-seek") == answer.kept[0].grid.frames
    assert f"{answer.usage.kept_tokens} of {answer.usage.seen_tokens} tokens kept" in details


def test_progress_is_shown(handlers: Handlers, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Vision.encode

    def slower(self: Vision, *args: Any, progress: Callable[[str], None], **options: Any) -> Any:
        def report(part: str) -> None:
            progress(part)
            time.sleep(0.12)

        return encode(self, *args, progress=report, **options)

    monkeypatch.setattr(Vision, "encode", slower)
    handlers.begin(session, "What?")
    texts = [messages[1]["content"][0] for messages in handlers.run(session, PLAIN)]
    assert "*Reading the frames …*" in texts
    assert "*Looking …*" in texts
    assert not texts[-1].endswith("…*")


def test_stop_ends_within_one_token_and_keeps_the_text(
    handlers: Handlers, session: Session, steps: list[float]
) -> None:
    handlers.begin(session, "What?")
    done = 0
    for _ in handlers.run(session, replace(PLAIN, max_new_tokens=400)):
        if not done and session.turns[0].text:
            handlers.stop(session)
            done = len(steps)
    answer = session.turns[0].answer
    assert answer is not None
    assert answer.finish == "cancelled"
    assert session.turns[0].text.startswith(answer.text)
    assert answer.text
    assert len(steps) <= done + 1


def test_stop_while_queued_answers_nothing(handlers: Handlers, session: Session) -> None:
    handlers.begin(session, "What?")
    handlers.stop(session)
    list(handlers.run(session, PLAIN))
    answer = session.turns[0].answer
    assert answer is not None
    assert (answer.text, answer.finish) == ("", "cancelled")


@pytest.mark.usefixtures("steps")
def test_a_closed_tab_stops_generation(handlers: Handlers, session: Session) -> None:
    handlers.begin(session, "What?")
    run = handlers.run(session, PLAIN)
    next(run)
    handlers.sessions.close("one")
    run.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "fluxchat-answer"]
    assert handlers.chat.caches["prefixes"].entries == 0
    assert handlers.chat.caches["videos"].entries == 0
    assert handlers.chat.caches["clips"].entries == 0


def test_asking_again_replaces_what_followed(handlers: Handlers, session: Session) -> None:
    for question in ("One?", "Two?", "Three?"):
        ask(handlers, session, question)
    handlers.begin(session, "Else?", at=1)
    list(handlers.run(session, PLAIN))
    assert [turn.question for turn in session.turns] == ["One?", "Else?"]
    handlers.clear(session)
    assert handlers.messages(session) == []


def test_a_later_video_is_placed_in_its_question(handlers: Handlers, session: Session) -> None:
    """What was computed for the turns before it stays valid, as in a `Conversation`."""
    ask(handlers, session, "What is there?")
    first = session.turns[0].answer
    assert first is not None
    handlers.add(session, [str(WORLD)])
    ask(handlers, session, "And in this one?")
    second = session.turns[1].answer
    assert second is not None
    assert second.usage.cached_tokens >= first.usage.prompt_tokens
    talk = handlers.chat.conversation(str(SHORT), budget=48, max_new_tokens=12)
    assert talk.ask("What is there?").text == first.text
    talk.add(str(WORLD))
    assert talk.ask("And in this one?").text == second.text


def test_a_removed_video_is_left_out_of_earlier_turns(handlers: Handlers, session: Session) -> None:
    handlers.add(session, [str(WORLD)])
    ask(handlers, session, "What is in both?")
    handlers.sessions.remove(session, session.media[0].path)
    ask(handlers, session, "And now?", replace(PLAIN, system="Answer briefly."))
    asked = conversation_messages(session.media, session.history, "What else?")
    assert [[part if isinstance(part, str) else part.name for part in m.content] for m in asked[::2]] == [
        [WORLD.name, "What is in both?"],
        ["And now?"],
        ["What else?"],
    ]
    answer = session.turns[1].answer
    assert answer is not None
    assert len(answer.kept) == 1


@pytest.mark.parametrize("question", ["", "  \n "])
def test_empty_question_asks_nothing(handlers: Handlers, session: Session, question: str) -> None:
    assert not handlers.begin(session, question)
    assert session.turns == []


def test_errors_are_a_sentence_in_the_conversation(handlers: Handlers, session: Session) -> None:
    messages = ask(handlers, session, "What?", Settings(48, False, 2.0, "flux", CHOOSE, "71"))
    assert "A resolution must be a multiple of 14 pixels" in messages[-1]["content"][0]
    assert ask(handlers, session, "What?")[-1]["content"][0]
    assert session.history == [session.turns[-1]]


def test_an_unexpected_exception_is_logged_but_not_shown(
    handlers: Handlers, session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(LocalAnswer, "inputs", broken)
    messages = ask(handlers, session, "What?")
    assert "Something went wrong" in messages[-1]["content"][0]
    assert "secret detail" not in str(messages)
    assert "secret detail" in caplog.text


def test_compare_gives_each_side_its_answer(handlers: Handlers, session: Session) -> None:
    sides: list[tuple[int, Selector]] = [(32, "flux"), (96, "uniform")]
    first, second = list(handlers.compare(session, "What?", PLAIN, sides))[-1]
    assert "<h3>32 tokens · flux</h3>" in first
    assert "<h3>96 tokens · uniform</h3>" in second
    assert "32 of" in first
    assert "96 of" in second
    for panel in (first, second):
        assert "data-seek" in panel
        assert "stopped" not in panel
        assert "fc-phase" not in panel
    assert session.turns == []
    errors = list(handlers.compare(handlers.sessions.get("two"), "What?", PLAIN, sides))[-1]
    assert all("There is no video yet" in error for error in errors)


@pytest.mark.usefixtures("steps")
def test_both_sides_of_a_comparison_stream_together(handlers: Handlers, session: Session) -> None:
    seen = list(handlers.compare(session, "What?", PLAIN, [(32, "flux"), (32, "uniform")]))
    both = [index for index, panels in enumerate(seen) if not any("Waiting" in panel for panel in panels)]
    done = [index for index, panels in enumerate(seen) if any("fc-details" in panel for panel in panels)]
    assert both[0] < done[0]


@pytest.mark.usefixtures("steps")
def test_a_comparison_can_be_stopped(handlers: Handlers, session: Session) -> None:
    shown = []
    for panels in handlers.compare(session, "What?", PLAIN, [(32, "flux"), (96, "flux")]):
        shown.append(panels)
        handlers.stop(session)
    assert all("stopped" in panel for panel in shown[-1])
    closing = handlers.compare(session, "What?", PLAIN, [(32, "flux"), (96, "flux")])
    next(closing)
    closing.close()  # type: ignore[attr-defined]
    assert session.busy == 0
    assert "fluxchat-compare" not in [thread.name for thread in threading.enumerate()]


def test_a_side_that_fails_leaves_the_other(handlers: Handlers, session: Session) -> None:
    sides: list[tuple[int, Selector]] = [(32, "flux"), (96, "nothing")]  # type: ignore[list-item]
    first, second = list(handlers.compare(session, "What?", PLAIN, sides))[-1]
    assert "fc-problem" not in first
    assert "fc-details" in first
    assert "fc-problem" in second


# -- videos and sessions --------------------------------------------------------------------------------


def test_bad_files_show_one_sentence(handlers: Handlers, tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"<script>alert(1)</script>" * 40)
    session = handlers.sessions.get("bad")
    assert "Cannot read &#x27;bad.mp4&#x27;" in handlers.add(session, [str(bad)])
    assert session.media == []
    assert "Add a video" in handlers.cost(session, PLAIN)[1]
    assert handlers.strip(session, PLAIN) == ""


def test_a_medium_that_is_there_already_is_shown(handlers: Handlers, session: Session) -> None:
    handlers.add(session, [str(WORLD)])
    assert [medium.name for medium in session.media] == ["b.mp4", "world.mp4"]
    assert session.shown == 1
    handlers.add(session, [str(SHORT)])
    assert (session.shown, len(session.media)) == (0, 2)


def test_a_problem_stays_until_it_is_solved_or_dismissed(handlers: Handlers, tmp_path: Path) -> None:
    bad = tmp_path / "it's.avi"
    bad.write_bytes(b"nothing" * 100)
    session = handlers.sessions.get("bad")
    handlers.add(session, [str(bad)])
    assert "Cannot read" in session.problem
    assert not handlers.begin(session, " ")
    assert "Cannot read" in session.problem
    handlers.add(session, [str(SHORT)])
    assert session.problem == ""
    handlers.refuse(session, "It is too large.")
    handlers.dismiss(session)
    assert session.problem == ""


def test_a_refused_codec_comes_with_the_command_that_converts_it() -> None:
    sentence = "Cannot read 'my tree.avi': the codec 'cinepak' is not allowed here; convert the file."
    command = way_out(sentence, "my tree.avi")
    assert command.startswith("ffmpeg -i 'my tree.avi' -c:v libx264")
    assert command.endswith("'my tree-h264.mp4'")
    assert way_out("Cannot read 'a.mp4': it is cut off.", "a.mp4") == ""


@pytest.mark.usefixtures("steps")
def test_a_question_during_an_answer_waits_behind_it(handlers: Handlers, session: Session) -> None:
    handlers.begin(session, "One?")
    run = handlers.run(session, PLAIN)
    next(run)
    next(run)
    handlers.begin(session, "Two?")
    handlers.begin(session, "Three?")
    second = list(handlers.run(session, PLAIN))  # the first run answers them
    assert len(second) == 1
    assert "Waits" in second[0][3]["content"][0]
    list(run)
    assert [turn.question for turn in session.turns] == ["One?", "Two?", "Three?"]
    assert all(turn.answer is not None and turn.text for turn in session.turns)
    assert not session.answering


@pytest.mark.usefixtures("steps")
def test_asking_a_turn_again_keeps_what_waits(handlers: Handlers, session: Session) -> None:
    handlers.begin(session, "One?")
    run = handlers.run(session, PLAIN)
    next(run)
    handlers.begin(session, "Two?")
    handlers.begin(session, "2?", at=1)  # waits still
    handlers.begin(session, "1?", at=0)  # is under way
    list(run)
    assert [turn.question for turn in session.turns] == ["1?", "2?"]
    assert all(turn.answer is not None and turn.text for turn in session.turns)


def test_a_follow_up_costs_what_is_new(handlers: Handlers, session: Session) -> None:
    def price() -> float:
        return sum(e.first_token_s for e in handlers._estimates(handlers.chat, session, PLAIN))

    handlers.chat.calibration  # noqa: B018 - measured here
    before = price()
    ask(handlers, session, "What is there?")
    after, decode = price(), handlers._estimates(handlers.chat, session, PLAIN)[0]
    assert (decode.decode_s, decode.encode_s) == (0, 0)
    assert after < before
    assert session.turns[0].predicted_s == pytest.approx(before)
    assert "foretold" in session.turns[0].details
    other = handlers._estimates(handlers.chat, session, replace(PLAIN, tokens=32))[0]
    assert other.encode_s > 0


def test_every_video_counts_in_the_cost(handlers: Handlers, session: Session) -> None:
    one = handlers.cost(session, PLAIN)[1]
    handlers.add(session, [str(WORLD)])
    both = handlers.cost(session, PLAIN)[1]
    assert "<b>48</b> of" in one
    assert "<b>96</b> of" in both


def test_a_conversation_has_limits(handlers: Handlers, session: Session) -> None:
    info = session.media[0].info
    for number in range(MAX_MEDIA - 1):
        handlers.sessions.add(session, Media(f"{number}.mp4", f"{number}.mp4", info))
    with pytest.raises(ConfigError, match="remove one first"):
        handlers.sessions.add(session, Media("more.mp4", "more.mp4", info))


def test_uploads_are_deleted_with_their_last_session(handlers: Handlers, tmp_path: Path) -> None:
    upload = tmp_path / "clip.mp4"
    upload.write_bytes(SHORT.read_bytes())
    first, second = handlers.sessions.get("first"), handlers.sessions.get("second")
    for session in (first, second):
        handlers.add(session, [str(upload), str(SHORT)])
    handlers.sessions.close("first")
    assert upload.exists()
    handlers.sessions.remove(second, second.media[0].path)
    assert not upload.exists()
    handlers.sessions.close("second")
    assert SHORT.exists()  # not an upload


def test_an_example_belongs_to_its_client(chat: VideoChat, tmp_path: Path) -> None:
    """Else the player of who logged in could not read it."""
    with contextlib.closing(MediaStore()) as store:
        sessions = Sessions(chat.forget, uploads=tmp_path, store=store)
        session = sessions.get("one")
        assert Handlers(chat, sessions).add_copy(session, str(SHORT), "ann") == ""
        assert session.current is not None
        assert store.touch(session.current.path, "ann")
        assert not store.touch(session.current.path, "bob")
        sessions.close_all()


def test_log_out_is_shown_after_a_login(chat: VideoChat) -> None:
    assert 'href="/logout"' in header(ModelSlot(chat), login=True)
    assert "logout" not in header(ModelSlot(chat))


def test_caches_do_not_cross_sessions(handlers: Handlers, session: Session) -> None:
    ask(handlers, session, "What is there to see?")
    other = handlers.sessions.get("other")
    handlers.add(other, [str(SHORT)])
    ask(handlers, other, "What is there to see?")
    first, second = session.turns[0].answer, other.turns[0].answer
    assert first is not None
    assert second is not None
    assert second.text == first.text
    assert second.usage.cached_tokens == 0
    assert second.timings.encode_s > 0
    handlers.sessions.close("other")
    ask(handlers, session, "What is there to see?")
    again = session.turns[1].answer
    assert again is not None
    assert again.timings.encode_s == 0  # only the other's was freed


def test_idle_sessions_are_freed(chat: VideoChat) -> None:
    forgotten: list[str] = []
    sessions = Sessions(forgotten.append, idle_s=0.2)
    idle, busy = sessions.get("idle"), sessions.get("busy")
    busy.busy = 1
    until(lambda: len(sessions) == 1)
    assert forgotten == [idle.scope]
    assert not busy.closed
    sessions.close_all()
    assert forgotten == [idle.scope, busy.scope]


# -- the page -------------------------------------------------------------------------------------------


@pytest.mark.slow  # the same, mounted in the server: tests/app/server/test_launch.py
def test_programs_ask_and_estimate(chat: VideoChat, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    page = build(chat, [])
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **page_options())
    try:
        client = Client(url, verbose=False)
        names = set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])
        assert names == {"/ask", "/estimate"}
        text, facts = client.predict(handle_file(str(SHORT)), "What?", "32", api_name="/ask")
        assert text == chat.ask(str(SHORT), "What?", budget=32).text
        assert facts["usage"]["kept_tokens"] == 32
        price = client.predict(handle_file(str(SHORT)), "32", api_name="/estimate")
        assert price["kept_tokens"] == 32
        bad = tmp_path / "bad.mp4"
        bad.write_bytes(b"nothing" * 100)
        with pytest.raises(Exception, match="Cannot read"):
            client.predict(handle_file(str(bad)), "", api_name="/estimate")
    finally:
        page.close()


def test_theme_and_css_are_local_files() -> None:
    options = page_options()
    assert ".fc-frame" in options["head"]
    assert "http" not in options["head"]
    assert Path(options["favicon_path"]).is_file()
    assert not [font for font in options["theme"]._font if type(font).__name__ == "GoogleFont"]


@pytest.mark.slow
def test_building_loads_nothing(chat: VideoChat, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model ran")

    monkeypatch.setattr(Generation, "__iter__", never)
    monkeypatch.setattr(VideoChat, "look", never)
    build(chat, [(str(SHORT), "What?")])
