"""Thoughts are kept apart from answers; templates that think, refuse a system prompt or rewrite turns."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.generation import Generation
from llm_bridge.llm import LanguageModel, load_llm
from llm_bridge.packing import without_branches
from llm_bridge.prompt import (
    IGNORE,
    Message,
    Visual,
    count_text,
    render,
    render_chat_training,
    render_chat_turns,
)
from llm_bridge.sampling import SamplingParams
from llm_bridge.thinking import AnswerReader, ThinkingMarks
from tests import tiny_families, tiny_llms
from tests.llm_bridge.tiny_vlm import tiny_vlm, vision_of

# Qwen3's way: thoughts of earlier turns go, an empty one stands for none.
QWEN3 = """\
{%- set ns = namespace(last=0) %}{%- for m in messages %}
{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}
{%- endif %}{%- endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{{- m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
# The R1 distills': the prompt begins the thoughts.
R1 = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{{- m.content.split('</think>')[-1] + '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""
# gpt-oss's: the last answer ends otherwise than earlier ones.
HARMONY = """\
{%- for m in messages %}{%- if m.role == 'assistant' %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
GEMMA = """\
{%- for m in messages %}{%- if m.role == 'system' %}{{- raise_exception('No system role') }}{%- endif %}
{{- '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>model\\n' }}{%- endif %}"""

VIDEO = Visual(5, "clip")
TALK = [
    Message.of("user", VIDEO, "What is it?"),
    Message.of("assistant", "A dog."),
    Message.of("user", "Where?"),
    Message.of("assistant", "Left."),
]


def tokenizer_with(template: str, *tokens: str, special: bool = False) -> Any:
    tokenizer = tiny_llms.byte_level()
    tokenizer.chat_template = template
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    return tokenizer


def qwen3() -> Any:
    return tokenizer_with(QWEN3, "<think>", "</think>")


def harmony() -> Any:
    return tokenizer_with(
        HARMONY, "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", special=True
    )


def read(tokenizer: Any, text: str, prompt: str = "") -> tuple[str, str]:
    """(thoughts, answer) of what a model says."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids if prompt else []
    reader = AnswerReader(tokenizer, ThinkingMarks.of(tokenizer), ids)
    said = tokenizer(text, add_special_tokens=False).input_ids
    texts = [one for token in said for one in reader.push(token)] + reader.flush()
    return tuple("".join(t for kind, t in texts if kind == want) for want in ("thinking", "answer"))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("prompt", "text", "thoughts", "answer"),
    [
        ("", "<think>\nA dog?\n</think>\n\nYes.", "\nA dog?\n", "\n\nYes."),
        ("<|im_start|>assistant\n<think>\n", "A dog?</think>Yes.", "A dog?", "Yes."),
        ("<think>\n\n</think>\n\n", "Yes.", "", "Yes."),
        ("", "Yes, a < b <thin", "", "Yes, a < b <thin"),
        ("", "<think>never ends", "never ends", ""),
        ("", "Yes.</think> No.", "", "Yes. No."),
    ],
)
def test_think_marks_part_thoughts_from_the_answer(
    prompt: str, text: str, thoughts: str, answer: str
) -> None:
    assert read(qwen3(), text, prompt) == (thoughts, answer)
    # Marks that are spelt by several tokens, and by special ones.
    assert read(tokenizer_with(QWEN3), text, prompt) == (thoughts, answer)
    assert read(tokenizer_with(QWEN3, "<think>", "</think>", special=True), text, prompt) == (
        thoughts,
        answer,
    )


@pytest.mark.parametrize(
    ("text", "thoughts", "answer"),
    [
        (
            "<|channel|>analysis<|message|>A dog?<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
            "A dog?",
            "Yes.",
        ),
        ("<|channel|>final<|message|>Yes.<|return|>", "", "Yes.<|return|>"),
        ("<|channel|>analysis<|message|>never ends", "never ends", ""),
    ],
)
def test_channels_part_thoughts_from_the_answer(text: str, thoughts: str, answer: str) -> None:
    found = read(harmony(), text)
    assert found == (thoughts, answer.replace("<|return|>", ""))


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="<|/think>a \n", max_size=40), st.booleans())
def test_no_text_is_lost_and_no_mark_is_shown(text: str, special: bool) -> None:
    tokenizer = tokenizer_with(QWEN3, "<think>", "</think>", special=special)
    thoughts, answer = read(tokenizer, text)
    assert "<think>" not in answer
    assert "</think>" not in thoughts
    rest = re.split(r"<think>|</think>", text)
    if len(rest) < 3:  # no mark can be made of what is around another
        assert "".join(rest) == (thoughts + answer if "<think>" not in text else answer + thoughts)


def test_a_model_without_marks_does_not_think() -> None:
    assert ThinkingMarks.of(tiny_llms.byte_level()) is None


def test_templates_are_told_whether_to_think() -> None:
    tokenizer = qwen3()
    off, on = (render(tokenizer, TALK[:1], think=think) for think in (False, True))
    assert tokenizer.decode(off.ids[len(on) :]) == "<think>\n\n</think>\n\n"
    assert [count_text(tokenizer, TALK[:1], think=think) for think in (False, True)] == [
        len(off) - 5,
        len(on) - 5,
    ]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A model with the template and marks of Qwen3."""
    folder = tiny_families.make(tmp_path_factory.mktemp("thinker"), "qwen3", tokenizer=qwen3())
    return load_llm(folder, device="cpu", dtype=torch.float32)


class Script:
    """A hook on a model's passes that makes it say one text after its prompt, then what it would."""

    def __init__(self, llm: LanguageModel, text: str) -> None:
        self.ids = llm.tokenizer(text, add_special_tokens=False).input_ids
        self.place = 0

    def __call__(self, _: Any, __: Any, options: dict[str, Any], output: Any) -> Any:
        self.place = 0 if "inputs_embeds" in options else self.place + 1
        if self.place < len(self.ids):
            output.logits = torch.full_like(output.logits, -9.0)
            output.logits[..., self.ids[self.place]] = 9.0
        return output


def say(
    llm: LanguageModel, text: str, worker: ComputeWorker | None = None, **sampling: Any
) -> tuple[str, str, Any]:
    """(thoughts, answer, stats) of a generation in which the model wants to say `text`, then its end."""
    prompt = render(llm.tokenizer, [Message.of("user", VIDEO, "What is it?")], think=True)
    thoughts: list[str] = []
    running = Generation(
        llm,
        prompt,
        [torch.zeros(5, llm.hidden_size)],
        SamplingParams(**sampling),
        worker=worker,
        on_thinking=thoughts.append,
    )
    llm.__dict__["lean"] = None  # whose forward passes no hook sees
    handle = llm.model.register_forward_hook(Script(llm, text + "<|im_end|>"), with_kwargs=True)
    try:
        answer = "".join(running)
    finally:
        handle.remove()
    return "".join(thoughts), answer, running.stats


@pytest.mark.parametrize("together", [False, True])
def test_thoughts_do_not_use_up_the_answers_tokens(thinker: LanguageModel, together: bool) -> None:
    worker = ComputeWorker(thinker) if together else None
    words = "How many birds are there? " * 5
    thoughts, answer, stats = say(thinker, f"<think>{words}</think>A dog.", worker, max_new_tokens=8)
    assert (thoughts, answer, stats.finish) == (words, "A dog.", "stop")
    assert stats.completion_tokens - stats.thinking_tokens <= 8 < stats.thinking_tokens
    _, answer, stats = say(thinker, f"<think>{words}</think>{words}", worker, max_new_tokens=8)
    assert stats.finish == "length"
    assert words.startswith(answer)
    assert stats.completion_tokens - stats.thinking_tokens == 8
    if worker is not None:
        worker.close()


def test_thoughts_beyond_their_allowance_are_ended(thinker: LanguageModel) -> None:
    words = "How many birds are there? " * 20
    thoughts, answer, stats = say(
        thinker, f"<think>{words}", max_new_tokens=8, max_thinking_tokens=10, min_tokens=0
    )
    assert words.startswith(thoughts.rstrip("\n"))
    assert 0 < len(thoughts) < len(words)
    assert stats.completion_tokens - stats.thinking_tokens <= 8
    assert answer.strip()


def test_a_stop_ends_thoughts_too(thinker: LanguageModel) -> None:
    stop = threading.Event()
    prompt = render(thinker.tokenizer, [Message.of("user", VIDEO, "What is it?")], think=True)
    running = Generation(
        thinker, prompt, [torch.zeros(5, thinker.hidden_size)], stop=stop, on_thinking=lambda _: stop.set()
    )
    handle = thinker.model.register_forward_hook(
        Script(thinker, "<think>" + "A dog. " * 50), with_kwargs=True
    )
    try:
        assert "".join(running) == ""
    finally:
        handle.remove()
    assert running.stats.finish == "cancelled"
    assert running.stats.completion_tokens <= 4


def test_a_refused_system_prompt_stands_before_the_first_question() -> None:
    tokenizer = tokenizer_with(GEMMA)
    system = Message.of("system", "Be brief.")
    prompt = render(tokenizer, [system, Message.of("user", VIDEO, "What?")])
    text = tokenizer.decode([token for token in prompt.ids if token >= 0])
    assert text.startswith("<|im_start|>user\nBe brief.\n\n")
    assert "system" not in text
    assert prompt.spans[0][1] == 5
    assert render_chat_training(tokenizer, [system, *TALK]).labels


# -- training ----------------------------------------------------------------------------------------------


def learned(tokenizer: Any, labels: Sequence[int]) -> str:
    return tokenizer.decode([label for label in labels if label != IGNORE])


@pytest.mark.parametrize(
    ("tokenizer", "answers"),
    [
        (qwen3, ["A dog.<|im_end|>", "Left.<|im_end|>"]),
        (harmony, [f"<|channel|>final<|message|>{text}<|return|>" for text in ("A dog.", "Left.")]),
        (
            lambda: tokenizer_with(R1, "<think>", "</think>"),
            [f"\n</think>\n\n{text}<|im_end|>" for text in ("A dog.", "Left.")],
        ),
    ],
)
def test_each_turn_is_learnt_as_it_is_asked_for(tokenizer: Callable[[], Any], answers: list[str]) -> None:
    own = tokenizer()
    prompts = render_chat_turns(own, TALK)
    assert [learned(own, prompt.labels) for prompt in prompts] == answers
    for prompt, index in zip(prompts, (1, 3), strict=True):
        asked = render(own, TALK[:index])
        assert prompt.ids[: len(asked)] == asked.ids  # what generation starts from
        assert all(label == IGNORE for label in prompt.labels[: len(asked)])
    row = render_chat_training(own, TALK)
    assert [(p.ids, p.labels) for p in without_branches(row)] == [(p.ids, p.labels) for p in prompts]


@pytest.mark.parametrize(
    "name",
    [
        "qwen3",
        pytest.param("lfm2", marks=pytest.mark.slow),
        pytest.param("gemma3_text", marks=pytest.mark.slow),
    ],
)
def test_branches_cost_what_separate_conversations_cost(name: str, tmp_path: Path) -> None:
    model = tiny_vlm(tiny_families.make(tmp_path, name, tokenizer=qwen3()))
    row = render_chat_training(model.llm.tokenizer, TALK)
    assert row.branches
    vision = vision_of(model, [5])
    alone = [
        (model.loss([p], vision), sum(label != IGNORE for label in p.labels)) for p in without_branches(row)
    ]
    expected = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    torch.testing.assert_close(model.loss([row], vision), expected, atol=1e-4, rtol=1e-4)


def test_a_later_video_in_a_rewritten_conversation_is_one_sentence() -> None:
    from encoder.errors import ModelError

    later = [*TALK[:2], Message.of("user", replace(VIDEO, key="other"), "And this?"), TALK[3]]
    with pytest.raises(ModelError, match="rewrites earlier turns"):
        render_chat_training(qwen3(), later)
    assert len(render_chat_turns(qwen3(), later)) == 2
