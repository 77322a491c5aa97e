"""Predicted seconds learn from the timings of answers."""

from __future__ import annotations

import pytest

from app.chat import VideoChat
from tests.app.conftest import SHORT


def test_predictions_learn_from_answers(chat: VideoChat) -> None:
    chat.calibration  # noqa: B018 - known here
    prices, info = chat._prices, chat.probe(SHORT)
    plan = chat.plan(SHORT, 48)
    first = chat.estimate(SHORT, 48)
    for _ in range(30):  # the machine takes three times what it took when it was measured
        prices.learn_question([(info, plan, 3 * first.decode_s, 3 * first.encode_s)], 96, 0, 0.0)
    later = chat.estimate(SHORT, 48)
    assert later.decode_s == pytest.approx(3 * first.decode_s, rel=0.05)
    assert later.prefill_s == first.prefill_s  # nothing was told of it


def test_what_is_kept_costs_no_time(chat: VideoChat) -> None:
    chat.ask(SHORT, "What?", budget=48, scope="one", max_new_tokens=2)
    kept = chat.estimate(SHORT, 48, "flux", scope="one", new_tokens=20)
    whole = chat.estimate(SHORT, 48)
    assert (kept.decode_s, kept.encode_s) == (0, 0)
    assert kept.prefill_s <= whole.prefill_s
    assert chat.estimate(SHORT, 48, "flux", scope="two").encode_s == whole.encode_s
