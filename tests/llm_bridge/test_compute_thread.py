"""The thread that computes: what waits is called, and nothing blocks who gives an answer up."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from encoder.errors import ModelError
from llm_bridge.compute_thread import ComputeThread
from tests.patience import PATIENCE_S

# Between any two lines an answer is given up, as a garbage collector may do it.
COLLECTING = """
import sys
from llm_bridge.compute_thread import ComputeThread

thread, calls = ComputeThread(), []
thread.run(int)

def collect(frame, event, value):
    thread.post(int)
    return collect

sys.settrace(collect)
for number in range(20):
    thread.submit(calls.append, number)
sys.settrace(None)
thread.run(int)
assert calls == list(range(20))
"""


def test_an_answer_is_given_up_wherever_garbage_is_collected() -> None:
    subprocess.run([sys.executable, "-c", COLLECTING], check=True, timeout=PATIENCE_S)


def test_what_waits_is_called_before_the_end() -> None:
    thread, calls = ComputeThread(), []
    waiting = [thread.submit(calls.append, number) for number in range(50)]
    thread.close()
    thread.close()
    thread.post(calls.append, 50)
    with pytest.raises(ModelError, match="closed"):
        thread.run(calls.append, 51)
    assert [future.result(20) for future in waiting] == [None] * 50
    assert calls == list(range(50))


def test_what_is_brought_forward_is_called_next_in_the_order_of_its_coming() -> None:
    thread, go, calls, seen = ComputeThread(), threading.Event(), list[str](), list[object]()

    def first() -> None:
        go.wait(PATIENCE_S)
        letters = thread.waiting(str)
        seen.append(letters)
        thread.bring_forward([letters[4], letters[2]])
        thread.submit(calls.append, "f")
        seen.append(thread.waiting(str))

    thread.submit(first)
    waiting = [thread.submit(calls.append, letter) for letter in "abc"]
    waiting += [thread.submit(int), thread.submit(calls.append, "d"), thread.submit(calls.append, "e")]
    thread.submit(thread.close)
    go.set()
    for future in waiting:
        future.result(PATIENCE_S)
    assert calls[:5] == ["c", "e", "a", "b", "d"]
    assert seen == [["a", "b", "c", "d", "e"], ["c", "e", "a", "b", "d", "f"]]


def test_an_error_is_its_callers_and_the_thread_goes_on() -> None:
    thread = ComputeThread()
    with pytest.raises(KeyError, match="missing"):
        thread.run({}.__getitem__, "missing")
    assert thread.run(int) == 0
    thread.close()


def test_a_process_ends_whose_threads_were_not_closed() -> None:
    code = "from llm_bridge.compute_thread import ComputeThread as C; kept = C(); kept.run(int); C().run(int)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)
