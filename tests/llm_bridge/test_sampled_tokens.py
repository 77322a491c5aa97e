"""The tokens of an answer: read as they are made, until its end token, its limit, a stop or an error."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from encoder.errors import ModelError
from llm_bridge.sampled_tokens import SampledTokens
from llm_bridge.sampling import Sampler, SamplingParams

END, SIZE = 9, 10


def made(most: int = 5) -> tuple[SampledTokens, threading.Event]:
    stop = threading.Event()
    sampler = Sampler(SamplingParams(max_new_tokens=most), end_ids={END})
    return SampledTokens(sampler, {END}, stop), stop


def scores(token: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(token), SIZE).float()


def test_it_asks_for_tokens_until_the_end_token() -> None:
    tokens, _ = made()
    script, counts = [3, 4, END], list[int]()

    def more(count: int) -> None:
        counts.append(count)
        tokens.append(scores(script[count]))

    assert list(tokens.read(more)) == [3, 4]
    assert (counts, tokens.finish, tokens.ended) == ([0, 1, 2], "stop", True)


def test_it_ends_with_its_limit() -> None:
    tokens, _ = made(most=2)
    assert list(tokens.read(lambda _: tokens.append(scores(3)))) == [3, 3]
    assert tokens.finish == "length"


def test_tokens_made_ahead_are_not_read_after_a_stop() -> None:
    tokens, stop = made()
    for token in (3, 4, END):
        tokens.append(scores(token))
    reader = tokens.read(lambda _: pytest.fail("nothing is asked for"))
    assert next(reader) == 3
    stop.set()
    assert list(reader) == []
    assert tokens.finish == "cancelled"


def test_a_stop_after_the_last_token_changes_nothing() -> None:
    tokens, stop = made()
    for token in (3, END):
        tokens.append(scores(token))
    reader = tokens.read(lambda _: pytest.fail("nothing is asked for"))
    assert next(reader) == 3
    stop.set()
    assert list(reader) == []
    assert tokens.finish == "stop"


def test_an_error_is_raised_after_the_tokens_before_it() -> None:
    tokens, _ = made()
    tokens.append(scores(3))
    tokens.append(torch.full((SIZE,), float("nan")))
    reader = tokens.read(lambda _: pytest.fail("nothing is asked for"))
    assert next(reader) == 3
    with pytest.raises(ModelError, match="not finite"):
        next(reader)
    assert tokens.finish is None
