"""The vLLM engine against a server of its protocol: equal answers, errors, breaks, stops, several servers."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from encoder.errors import ConfigError, ModelError
from llm_bridge.engines import LocalEngine, Request
from llm_bridge.engines.vllm import VllmEngine
from llm_bridge.llm import LanguageModel
from llm_bridge.prompt import Message, Visual, render
from llm_bridge.sampling import SamplingParams
from llm_bridge.thinking import AnswerLength
from tests.llm_bridge.engines.vllm_protocol import Behaviour, serving
from tests.patience import PATIENCE_S


@pytest.fixture
def llm(tiny_llm: Callable[[str], LanguageModel]) -> LanguageModel:
    return tiny_llm("qwen2")


@pytest.fixture
def server(llm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Behaviour]]:
    monkeypatch.setattr("llm_bridge.engines.vllm.USAGE_S", PATIENCE_S)
    with serving(llm) as started:
        yield started


@pytest.fixture
def engine(llm: LanguageModel, server: tuple[str, Behaviour]) -> Iterator[VllmEngine]:
    made = VllmEngine(llm, [server[0]], patience_s=0.0)
    yield made
    made.close()


def asked(llm: LanguageModel, clip: int = 0, question: str = "What is it?", **sampling: object) -> Request:
    embedding = torch.randn(20, llm.hidden_size, generator=torch.Generator().manual_seed(clip))
    prompt = render(llm.tokenizer, [Message.of("user", Visual(20, f"clip {clip}"), question)])
    return Request(prompt, [embedding], SamplingParams(**{"max_new_tokens": 12, **sampling}))  # type: ignore[arg-type]


def local(llm: LanguageModel, request: Request) -> tuple[list[int], str]:
    tokens = LocalEngine(llm).start(request)
    return list(tokens), tokens.finish


@pytest.mark.parametrize("clip", range(4))
@pytest.mark.quick(2)
def test_answers_are_those_of_the_local_engine(llm: LanguageModel, engine: VllmEngine, clip: int) -> None:
    request = asked(llm, clip, max_new_tokens=40)
    tokens = engine.start(request)
    assert (list(tokens), tokens.finish) == local(llm, request)
    assert tokens.cached_tokens == 16
    assert tokens.prefill_s > 0


def test_the_request_says_all_that_a_server_would_else_choose(
    llm: LanguageModel, engine: VllmEngine, server: tuple[str, Behaviour]
) -> None:
    request = asked(
        llm,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=3,
        min_tokens=2,
        stop_token_ids=(5,),
        logit_bias={7: -3.0},
    )
    list(engine.start(replace(request, scope="one")))
    list(engine.start(replace(request, scope="other")))
    first, second = server[1].requests
    expected = {
        "model": "tiny", "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3,
        "max_tokens": 12, "min_tokens": 2, "stop_token_ids": sorted({5, *llm.eos_ids}),
        "logit_bias": {"7": -3.0}, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "stream": True, "return_token_ids": True,
    }  # fmt: skip
    assert expected.items() <= first.items()
    assert first["cache_salt"] != second["cache_salt"]


def test_a_first_bias_is_for_the_first_token_alone(llm: LanguageModel, engine: VllmEngine) -> None:
    request = asked(llm)
    plain, _ = local(llm, request)
    request = replace(request, first_bias={plain[0]: -100.0})
    changed = list(engine.start(request))
    assert changed[0] != plain[0]
    assert changed == local(llm, request)[0]


def test_tokens_that_must_come_are_put_into_the_answer(llm: LanguageModel, engine: VllmEngine) -> None:
    class Forcing(AnswerLength):
        """Two tokens after the third."""

        made = 0

        def forced(self) -> int | None:
            return {3: 11, 4: 12}.get(self.made)

        def count(self, token: int) -> None:
            self.made += 1
            super().count(token)

    request = asked(llm)
    tokens = list(engine.start(replace(request, length=Forcing(9))))
    assert tokens[3:5] == [11, 12]
    assert tokens == local(llm, replace(request, length=Forcing(9)))[0]


@pytest.mark.parametrize("breaks", [[0], [1], [5], [3, 0, 2]])
@pytest.mark.quick(2)
def test_what_breaks_off_goes_on(
    llm: LanguageModel, server: tuple[str, Behaviour], breaks: list[int]
) -> None:
    engine = VllmEngine(llm, [server[0]])
    request = asked(llm)
    server[1].breaks.extend(breaks)
    tokens = engine.start(request)
    assert (list(tokens), tokens.finish) == local(llm, request)
    assert len(server[1].requests) == len(breaks) + 1
    engine.close()


def test_a_question_that_breaks_every_server_ends_in_a_sentence(
    llm: LanguageModel, server: tuple[str, Behaviour]
) -> None:
    engine = VllmEngine(llm, [server[0]], patience_s=0.6)
    server[1].breaks.extend([2, *[0] * 100])
    with pytest.raises(ModelError, match="see in its log why it broke off"):
        list(engine.start(asked(llm)))
    engine.close()


def test_a_server_that_comes_back_is_asked_again(llm: LanguageModel) -> None:
    with serving(llm) as (address, _):
        engine = VllmEngine(llm, [address])
        request = asked(llm)
        tokens = iter(engine.start(request))
        begun = [next(tokens)]
    came = threading.Thread(target=lambda: begun.extend(tokens))
    came.start()  # what the first server had sent is read, then nobody answers
    with serving(llm, int(address.rsplit(":", 1)[1])):
        came.join()
    assert begun == local(llm, request)[0]
    engine.close()


def test_without_a_server_it_is_one_sentence(llm: LanguageModel) -> None:
    with serving(llm) as (address, _):
        pass
    engine = VllmEngine(llm, [address], patience_s=0.0)
    with pytest.raises(ModelError, match=f"No vLLM server answers at {address}"):
        list(engine.start(asked(llm)))
    engine.close()


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        ((400, '{"error": {"message": "too long:\\n 9 tokens"}}'), r"says: too long: 9 tokens \(HTTP 400\)$"),
        ((400, '{"message": "set `--enable-prompt-embeds` to"}'), "start it with --enable-prompt-embeds"),
        ((401, "{}"), "FLUXCHAT_ENGINE_KEY"),
        ((500, "<html>"), "says: <html>"),
        ((200, "data: <html>\n\n"), "no vLLM server"),
        ((200, 'data: {"error": {"message": "out of blocks"}}\n\n'), "says: out of blocks"),
        ((200, 'data: {"choices": [{"token_ids": ["x"]}]}\n\n'), "no vLLM server"),
    ],
)
def test_what_a_server_says_is_one_sentence(
    llm: LanguageModel,
    engine: VllmEngine,
    server: tuple[str, Behaviour],
    refusal: tuple[int, str],
    sentence: str,
) -> None:
    server[1].refusal = refusal
    with pytest.raises(ModelError, match=sentence) as raised:
        list(engine.start(asked(llm)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("leaves", [False, True])
def test_a_stop_ends_the_request(
    llm: LanguageModel, engine: VllmEngine, server: tuple[str, Behaviour], leaves: bool
) -> None:
    server[1].pass_s = 0.02
    request = asked(llm, max_new_tokens=100, min_tokens=100)
    request = replace(request, first_bias={})
    tokens = engine.start(request)
    made = iter(tokens)
    begun = list(itertools.islice(made, 2))
    if leaves:
        made.close()  # type: ignore[attr-defined]
    else:
        request.stop.set()
        assert list(made) == []
    assert tokens.finish == "cancelled"
    assert begun == local(llm, asked(llm, max_new_tokens=2))[0]
    assert server[1].aborted.wait(PATIENCE_S)


def test_closing_ends_answers_in_a_sentence(
    llm: LanguageModel, engine: VllmEngine, server: tuple[str, Behaviour]
) -> None:
    server[1].pass_s = 0.02
    tokens = iter(engine.start(asked(llm, max_new_tokens=100)))
    next(tokens)
    engine.close()
    with pytest.raises(ModelError, match="closed"):
        list(tokens)
    with pytest.raises(ModelError, match="closed"):
        list(engine.start(asked(llm)))


def test_many_answers_at_once_are_those_alone(llm: LanguageModel, engine: VllmEngine) -> None:
    requests = [asked(llm, clip) for clip in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda request: list(engine.start(request)), requests))
    assert answers == [local(llm, request)[0] for request in requests]


def test_a_conversation_stays_with_its_server_and_goes_on_without_it(llm: LanguageModel) -> None:
    with ExitStack() as stack:
        started = [stack.enter_context(serving(llm)) for _ in range(3)]
        engine = VllmEngine(llm, [address for address, _ in started], patience_s=0.0)
        stack.callback(engine.close)
        for clip in range(12):
            first = asked(llm, clip)
            words = llm.tokenizer("And now?", add_special_tokens=False).input_ids
            later = replace(first, prompt=first.prompt.followed_by(words * 5))
            assert engine.ranked(first) == engine.ranked(later)
            list(engine.start(first))
        counts = [len(behaviour.requests) for _, behaviour in started]
        assert sum(counts) == 12
        assert min(counts) > 0  # nor do all go to one
        fewer = VllmEngine(llm, engine.addresses[1:])
        stack.callback(fewer.close)
        for clip in range(12):
            ranked = engine.ranked(asked(llm, clip))
            ranked.remove(engine.addresses[0])
            assert fewer.ranked(asked(llm, clip)) == ranked
    with serving(llm) as (address, _):
        engine = VllmEngine(llm, [started[0][0], address, started[1][0]])
        assert list(engine.start(asked(llm))) == local(llm, asked(llm))[0]
        engine.close()


def test_a_schema_is_the_servers_to_hold_to(
    llm: LanguageModel, engine: VllmEngine, server: tuple[str, Behaviour]
) -> None:
    pytest.importorskip("llguidance", reason="the extra json is not installed")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    list(engine.start(asked(llm, schema=schema)))
    list(engine.start(asked(llm)))
    sent = server[1].requests[0]["structured_outputs"]["json"]
    assert sent.pop("x-guidance")["whitespace_flexible"] is False
    assert sent == schema
    assert "structured_outputs" not in server[1].requests[1]
    server[1].breaks += [2]  # JSON that was begun cannot go on on a server
    with pytest.raises(ModelError, match=r"broke off in the middle .* ask again"):
        list(engine.start(asked(llm, schema=schema)))
    assert len(server[1].requests) == 3

    class Thinks:
        thinking = True

    length = AnswerLength(9, Thinks(), 4)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="always thinks"):
        engine.start(replace(asked(llm, schema=schema), length=length))


def test_what_a_server_cannot_be_told_is_refused(llm: LanguageModel, engine: VllmEngine) -> None:
    with pytest.raises(ConfigError, match="repetition_penalty"):
        engine.start(asked(llm, repetition_penalty=1.1))
    request = asked(llm)
    turned = replace(request.prompt, positions=(tuple(range(len(request.prompt))),) * 3)
    with pytest.raises(ConfigError, match="M-RoPE"):
        engine.start(replace(request, prompt=turned))
    wide = torch.cat([request.visuals[0]] * 2, dim=1)
    with pytest.raises(ConfigError, match="rows"):
        engine.start(replace(request, visuals=[wide]))


@pytest.mark.parametrize("address", ["", "here", "ftp://a", "http://", "http://a/?b", "http://a\n"])
def test_an_address_is_checked(llm: LanguageModel, address: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        VllmEngine(llm, [address])
