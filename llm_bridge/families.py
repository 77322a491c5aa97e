"""Families of language models: what follow-up questions, batching and thinking cost or need in each.

The table is what is promised; tests hold each row against a tiny model of the family, and
docs/reference/language-models.md is written from it: `python -m llm_bridge.families > FILE`.
A family that is not listed is tried when it is loaded (see `check_embeddings`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from encoder.errors import ModelError

# What a model keeps of a prompt for the next question: keys and values of every position; states, which
# cannot be rewound, so that copies of them are kept where questions part; or nothing.
Memory = Literal["positions", "states", "whole"]


@dataclass(frozen=True)
class Family:
    """name: as people say it. model_types: of config.json. memory: what is kept for follow-up questions.

    windowed: some or all of its layers see only the last positions. in_turn: its answers are not decoded
    together although its memory would allow it. refused: why it cannot be used, "" if it
    can. note: what else people should know.
    """

    name: str
    model_types: tuple[str, ...]
    memory: Memory = "positions"
    windowed: bool = False
    in_turn: bool = False
    refused: str = ""
    note: str = ""

    @property
    def batches(self) -> bool:
        """Whether several answers are decoded in one pass; else they take turns, a token each."""
        return self.memory == "positions" and not self.refused and not self.in_turn


_STATES_WRONG = "transformers computes a prompt in several parts otherwise than in one"
FAMILIES: tuple[Family, ...] = (
    Family("Llama 2, 3", ("llama",)),
    Family(
        "Llama 4",
        ("llama4_text", "llama4"),
        windowed=True,
        in_turn=True,
        note="transformers scales its queries by the longest answer of a batch",
    ),
    Family("Qwen 2, 2.5", ("qwen2",), note="with or without a window"),
    Family("Qwen 3", ("qwen3", "qwen3_moe"), note="thinks on request"),
    Family("Qwen3-Next", ("qwen3_next",), "states", note="thinks on request"),
    Family("Qwen 3.5", ("qwen3_5_text", "qwen3_5"), "states", note="thinks on request"),
    Family("Mistral", ("mistral", "ministral3"), note="with or without a window"),
    Family("Mixtral", ("mixtral",)),
    Family("OLMo 2", ("olmo2",)),
    Family("OLMo 3", ("olmo3",), windowed=True),
    Family("SmolLM 3", ("smollm3",), note="thinks on request"),
    Family("Gemma 1", ("gemma",), note="a system prompt stands before the first question"),
    Family("Gemma 2", ("gemma2",), windowed=True, note="a system prompt stands before the first question"),
    Family("Gemma 3", ("gemma3_text", "gemma3"), windowed=True),
    Family("Gemma 3n", ("gemma3n_text", "gemma3n"), windowed=True),
    Family("Gemma 4", ("gemma4_text", "gemma4"), windowed=True),
    Family("gpt-oss", ("gpt_oss",), windowed=True, note="always thinks, shortly unless asked to"),
    Family("DeepSeek V2, V3", ("deepseek_v2", "deepseek_v3"), note="R1 and its distills always think"),
    Family("GLM 4", ("glm4",)),
    Family("StableLM", ("stablelm",)),
    Family("Nemotron", ("nemotron",)),
    Family("Nemotron-H", ("nemotron_h",), "states"),
    Family("Starcoder 2", ("starcoder2",)),
    Family("ERNIE 4.5", ("ernie4_5",)),
    Family("HunYuan", ("hunyuan_v1_dense",)),
    Family("EXAONE 4", ("exaone4",), windowed=True, note="thinks on request"),
    Family("Granite 3", ("granite",), note="thinks on request"),
    Family("Granite 4", ("granitemoehybrid",), "states"),
    Family("Cohere (Command R)", ("cohere",)),
    Family("Cohere 2 (Command A, R7B)", ("cohere2",), windowed=True),
    Family("MiniCPM 3", ("minicpm3",)),
    Family("Phi 1, 2", ("phi",)),
    Family("Phi 3, 4", ("phi3",), note="with or without a window"),
    Family("LFM 2", ("lfm2",), "states"),
    Family("Zamba 2", ("zamba2",), "states"),
    Family("GPT-NeoX, Pythia", ("gpt_neox",)),
    Family("GPT-2", ("gpt2",)),
    Family("OPT", ("opt",)),
    Family("Falcon", ("falcon",)),
    Family(
        "Falcon-H1",
        ("falcon_h1",),
        "whole",
        refused="it scales the embeddings of its own tokens only, so that it would misread a video",
    ),
    Family("Bamba", ("bamba",), "whole", refused=_STATES_WRONG),
    Family("Jamba", ("jamba",), "whole", refused=_STATES_WRONG),
    Family("RecurrentGemma", ("recurrent_gemma",), "whole", refused=_STATES_WRONG),
    Family(
        "Mamba, Falcon Mamba", ("mamba", "mamba2", "falcon_mamba"), "whole", refused="it keeps no positions"
    ),
    Family("Kimi-Linear", ("kimi_linear",), "whole", refused="its cache in transformers has no length"),
)
_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}
INSTEAD = "Llama, Qwen, Mistral, Gemma, Granite, OLMo, Phi and SmolLM work"


def family_of(config: Any) -> Family | None:
    """The family of a configuration of transformers; None for one that is not listed."""
    own = _BY_TYPE.get(config.model_type)
    return own or _BY_TYPE.get(config.get_text_config().model_type)


def check_family(config: Any, what: str) -> None:
    """Raises ModelError for a family that is known not to work behind a video; what: as errors call it."""
    family = family_of(config)
    if family is not None and family.refused:
        raise ModelError(f"Cannot use {what}: {family.refused}. {INSTEAD}.")


@torch.inference_mode()
def check_embeddings(model: Any, name: str) -> None:
    """Raises ModelError when a model does not read embeddings as it reads the tokens they stand for.

    It is run on four tokens; for families that are not listed.
    """
    table = model.get_input_embeddings()
    ids = torch.arange(4, device=table.weight.device)[None] % table.num_embeddings
    try:
        expected = model(input_ids=ids, use_cache=False).logits.float()
        found = model(inputs_embeds=table(ids), use_cache=False).logits.float()
    except Exception as error:
        raise ModelError(
            f"Cannot use the language model {name}: it takes no embeddings, which videos are. {INSTEAD}."
        ) from error
    if not (found - expected).abs().max() <= 0.05 * expected.abs().max():
        raise ModelError(
            f"Cannot use the language model {name}: it reads embeddings, which videos are, otherwise than "
            f"its own tokens. {INSTEAD}."
        )


def markdown() -> str:
    """The page of the documentation."""
    follow_up = {"positions": "its own words", "states": "its own words", "whole": "everything"}
    rows = [
        f"| {family.name} | {follow_up[family.memory]} | {'yes' if family.batches else 'in turn'} | "
        f"{_remarks(family)} |"
        for family in FAMILIES
        if not family.refused
    ]
    refusals = [f"- **{family.name}**: {family.refused}." for family in FAMILIES if family.refused]
    return _PAGE.format(rows="\n".join(rows), refusals="\n".join(refusals))


def _remarks(family: Family) -> str:
    remarks = [family.note] if family.note else []
    if family.windowed:
        remarks.insert(0, "windows; right beyond them, with all positions kept")
    if family.memory == "states":
        remarks.insert(0, "states are copied where questions part")
    return "; ".join(remarks)


_PAGE = """\
# Which language model?

Any causal language model that transformers knows, as a hub id, a folder or a GGUF file:

```console
fluxchat ask clip.mp4 "What moves?" --model my/model --llm Qwen/Qwen3-1.7B
```

A projector is trained for one language model, or for one of the same width that was tuned from it:
`python -m training.chat_stage1` makes one for yours ([how](../how-to/train.md)).

Each row is tested with a tiny random model of the family (`tests/llm_bridge/test_families.py`): cached
answers equal uncached ones, a prompt in parts equals the whole, a second turn equals a fresh one, an answer
decoded with others equals the one alone, and the training loss is the model's own. *Computed anew* is what a
second question about the same video computes; *together*, whether the answers to several people are decoded
in one pass.

| family | computed anew | together | remarks |
|---|---|---|---|
{rows}

A family that is not in the table is tried when it is loaded: it must read embeddings as it reads its own
tokens. Where it keeps more than keys and values, every question computes everything.

## Refused

With one sentence, when they are loaded:

{refusals}

## Models that think

A model that can think before it answers does not, unless it is asked to: `think=True` in Python, `--think`,
the page's check box, or `"chat_template_kwargs": {{"enable_thinking": true}}` in a request. Its thoughts are
`Answer.thinking`, and `reasoning_content` in the API; they never stand in the answer's text. They have an
allowance of their own, `max_thinking_tokens` (`thinking_token_budget` in a request), so that they do not use
up `max_new_tokens`; when it is spent, the model is made to answer. Some models always think; their thoughts
are kept apart all the same.
"""


if __name__ == "__main__":
    print(markdown(), end="")
