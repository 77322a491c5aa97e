"""The names of an engine, and that an answer is the same whatever stands behind them."""

from collections.abc import Callable, Iterator

import pytest
import torch

from encoder.errors import ModelError
from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.engines import Engine, LocalEngine, Request, TokenStream
from llm_bridge.generation import Generation
from llm_bridge.kv_cache import PrefixCache
from llm_bridge.llm import LanguageModel
from llm_bridge.prompt import Message, Prompt, Visual, render
from llm_bridge.sampling import FinishReason, SamplingParams
from llm_bridge.text_decoder import StreamingDecoder


def asked(llm: LanguageModel) -> tuple[Prompt, torch.Tensor]:
    embedding = torch.randn(20, llm.hidden_size, generator=torch.Generator().manual_seed(0))
    return render(llm.tokenizer, [Message.of("user", Visual(20, "clip"), "What is it?")]), embedding


def test_an_engine_makes_tokens(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen2")
    prompt, embedding = asked(llm)
    worker = ComputeWorker(llm)
    engine: Engine = LocalEngine(llm, worker, PrefixCache(2**26, llm.kv_bytes_per_token))
    request = Request(prompt, [embedding], SamplingParams(max_new_tokens=12))
    first: TokenStream = engine.start(request)
    ids = list(first)
    assert first.finish in ("length", "stop")
    assert (first.cached_tokens, len(ids) > 0, first.prefill_s > 0) == (0, True, True)
    again = engine.start(request)
    assert list(again) == ids
    assert again.cached_tokens >= 20
    text = "".join(Generation(llm, prompt, [embedding], request.sampling, engine=engine))
    decoder = StreamingDecoder(llm.tokenizer)
    assert text == "".join(map(decoder.push, ids)) + decoder.flush()
    engine.close()
    with pytest.raises(ModelError, match="closed"):
        list(engine.start(request))


def test_text_and_figures_are_made_of_any_engines_tokens(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen2")

    class Spoken:
        cached_tokens, prefill_s = 3, 0.5
        finish: FinishReason = "cancelled"

        def __init__(self, ids: list[int]) -> None:
            self.ids = ids

        def __iter__(self) -> Iterator[int]:
            yield from self.ids
            self.finish = "stop"

    class Parrot:
        name = "parrot"

        def start(self, request: Request) -> Spoken:
            return Spoken(llm.tokenizer("A red car.", add_special_tokens=False).input_ids)

        def close(self) -> None:
            pass

    engine: Engine = Parrot()
    prompt, embedding = asked(llm)
    running = Generation(llm, prompt, [embedding], engine=engine)
    assert "".join(running) == "A red car."
    stats = running.stats
    assert (stats.finish, stats.cached_tokens, stats.prefill_s) == ("stop", 3, 0.5)
    assert stats.completion_tokens == len(llm.tokenizer("A red car.", add_special_tokens=False).input_ids)
