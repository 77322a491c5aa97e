"""A VideoChat belongs to one process: forked children, pickles, threads and event loops."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import os
import pickle
import select
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from app.chat import VideoChat
from encoder.errors import FluxChatError, ModelError
from llm_bridge.model import VideoLanguageModel
from tests.patience import PATIENCE_S

GREY = torch.full((4, 32, 32, 3), 90, dtype=torch.uint8)


def in_child(function: Callable[[], Any]) -> str:
    """What a function gives, or raises, in a forked child; "hangs" after 60 s."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, str(function()).encode())
        except BaseException as error:  # noqa: BLE001 - it is told to the parent
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    ready = bool(select.select([reading], [], [], 60)[0])
    if not ready:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    told = os.read(reading, 10_000).decode() if ready else "hangs"
    os.close(reading)
    return told


def locks_of(thing: Any, visited: set[int] | None = None) -> list[Any]:
    """Every lock that an object of the project, or one that it holds, has."""
    kinds = (type(threading.Lock()), type(threading.RLock()))
    visited = set() if visited is None else visited
    visited.add(id(thing))
    values = list(getattr(thing, "__dict__", {}).values())
    locks = [value for value in values if isinstance(value, kinds)]
    for value in values:
        if (
            type(value).__module__.partition(".")[0] in ("app", "encoder", "llm_bridge")
            and id(value) not in visited
        ):
            locks += locks_of(value, visited)
    return locks


@pytest.mark.parametrize("held", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_forked_child_says_that_it_cannot(chat: VideoChat, held: bool) -> None:
    talk = chat.conversation(GREY, budget=16, max_new_tokens=4)
    talk.ask("What is it?")
    unread = chat.stream(GREY, "What?", budget=16, max_new_tokens=4)

    def stopped() -> str:
        chat.close()
        return "closed"

    calls: dict[str, Callable[[], Any]] = {
        "ask": lambda: chat.ask(GREY, "What is it?", budget=16, max_new_tokens=4),
        "follow-up": lambda: talk.ask("Why?"),
        "stream": lambda: list(unread),
        "estimate": lambda: chat.estimate(GREY, 16),
        "look": lambda: chat.look(GREY, 16),
        "preview": lambda: chat.preview(GREY, 16),
        "probe": lambda: chat.probe(GREY),
        "info": chat.info,
        "caches": lambda: chat.caches,
        "forget": chat.forget,
    }
    locks = locks_of(chat)
    assert len(locks) >= 4
    with ExitStack() as stack:
        if held:  # whatever another thread was doing
            for lock in locks:
                stack.enter_context(lock)
        told = {name: in_child(call) for name, call in calls.items()}
        told |= {"close": in_child(stopped)}
    assert told.pop("close") == "closed"
    assert {name for name, text in told.items() if not text.startswith("ModelError: This VideoChat")} == set()
    assert all("'spawn'" in text for text in told.values())
    assert chat.ask(GREY, "What is it?", budget=16, max_new_tokens=4).text is not None


def test_a_forked_child_makes_its_own(chat: VideoChat) -> None:
    expected = chat.ask(GREY, "What is it?", budget=16, max_new_tokens=8).text

    def answer() -> str:
        with VideoChat(chat.model) as own:
            return own.ask(GREY, "What is it?", budget=16, max_new_tokens=8).text

    assert in_child(answer) == expected


def test_multiprocessing_with_fork_ends(chat: VideoChat) -> None:
    chat.ask(GREY, "What is it?", budget=16, max_new_tokens=4)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def work() -> None:
        try:
            queue.put(chat.ask(GREY, "What is it?").text)
        except FluxChatError as error:
            queue.put(str(error))

    process = context.Process(target=work)
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    assert "make a new one in this process" in queue.get()


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_is_neither_pickled_nor_copied(chat: VideoChat, way: Callable[[Any], Any]) -> None:
    for thing in (chat, chat.conversation(GREY), chat.stream(GREY, "What?"), {"chat": chat}):
        if way is copy.copy and isinstance(thing, dict):
            continue
        with pytest.raises(ModelError, match="cannot be pickled or copied") as caught:
            way(thing)
        assert isinstance(caught.value, pickle.PicklingError)


def test_spawn_refuses_it_in_the_parent(chat: VideoChat) -> None:
    process = multiprocessing.get_context("spawn").Process(target=print, args=(chat,))
    with pytest.raises(FluxChatError, match="cannot be pickled"):
        process.start()


def test_threads_and_an_event_loop(tiny_model: VideoLanguageModel) -> None:
    questions = ["What?", "Why?", "Where?", "Who?"]
    with VideoChat(tiny_model) as alone:
        expected = [alone.ask(GREY, q, budget=16, max_new_tokens=6).text for q in questions]

    async def together(chat: VideoChat) -> list[str]:
        asked = [
            asyncio.to_thread(chat.ask, GREY, question, budget=16, max_new_tokens=6) for question in questions
        ]
        return [answer.text for answer in await asyncio.gather(*asked)]

    with VideoChat(tiny_model) as chat:
        assert asyncio.run(together(chat)) == expected
