"""Zero-shot video-text retrieval (supplement Table 3): T2V and V2T R@1/5/10, plain and by dual softmax."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from llm_bridge.clip_head import ClipHead
from llm_bridge.text_encoders.text_towers import TextTower
from training.command_line import table
from training.data.examples import Example
from training.evaluation.encoder_input import EncoderInput
from training.evaluation.encoder_run import EncoderRun
from training.evaluation.metrics import Duplicates, retrieval


def plain_text(text: str) -> str:
    """A caption as the released evaluation writes it: lower case, without ,.'!?"()*#:;~ and with spaces for
    - and /, single spaces."""
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
    return " ".join(re.sub(r"[-/]", " ", text).split())


def recall_scores(
    video: Tensor,
    text: Tensor,
    owner: Sequence[int],
    texts: Sequence[str],
    *,
    scale: float = 1.0,
    duplicates: Duplicates = "strict",
) -> dict[str, Any]:
    """Recalls by kind of score ("plain", "dual softmax"), way and k, for result files. See
    `metrics.retrieval`."""
    scores: dict[str, Any] = {}
    for name, dsl in (("plain", False), ("dual softmax", True)):
        ways = retrieval(video, text, owner, texts, dsl=dsl, scale=scale, duplicates=duplicates)
        scores[name] = {way: {k: share.to_dict() for k, share in by_k.items()} for way, by_k in ways.items()}
    return scores


def evaluate_retrieval(
    run: EncoderRun,
    clip_head: ClipHead,
    tower: TextTower,
    examples: Sequence[Example],
    encoder_input: EncoderInput,
    *,
    duplicates: Duplicates = "strict",
    scale: float = 1.0,
    raw_text: bool = False,
) -> dict[str, Any]:
    """Recalls at one input, over the videos that could be read; the others are listed.

    Each caption is a query of T2V; in V2T the best-placed of a video's captions counts. raw_text: captions go
    to the tower as they are (sentence encoders), not as `plain_text`.
    """
    clip_head.check(tower)

    def features(pixels: Sequence[Tensor], seed: int) -> Tensor:
        return clip_head.embed(run.pooled(pixels, encoder_input, seed))

    readable, video, missing = run.vectors(examples, encoder_input, features)
    texts, owner = [], []
    for place, number in enumerate(readable):
        for caption in examples[number].captions:
            texts.append(caption if raw_text else plain_text(caption))
            owner.append(place)
    text = tower.embed(texts).cpu()
    return {
        **encoder_input.to_dict(),
        "videos": len(readable),
        "texts": len(texts),
        "missing": missing,
        "scores": recall_scores(video, text, owner, texts, scale=scale, duplicates=duplicates),
    }


def retrieval_table(results: Sequence[dict[str, Any]]) -> str:
    """One line per input and kind of score, in percent."""
    columns = ["tokens", "score", *(f"{way} R@{k}" for way in ("T2V", "V2T") for k in (1, 5, 10)), "videos"]
    lines = []
    for result in results:
        for name, ways in result["scores"].items():
            shares = [100 * ways[way][f"R@{k}"]["value"] for way in ("T2V", "V2T") for k in (1, 5, 10)]
            lines.append([EncoderInput.from_dict(result).label, name, *shares, result["videos"]])
    return table(columns, lines)
