"""Zero-shot video-text retrieval (supplement Table 3): T2V and V2T R@1/5/10, plain and by dual softmax."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from encoder.errors import DataError, ModelError
from llm_bridge.text_encoders.text_towers import TextTower
from training.data.examples import Example
from training.evaluation.alignment import Alignment
from training.evaluation.encoder_input import Setting
from training.evaluation.metrics import Duplicates, retrieval
from training.evaluation.results import Row, table
from training.evaluation.run import Run, describe_setting, pack, split_missing, unpack


def plain_text(text: str) -> str:
    """A caption as the released evaluation writes it: lower case, without ,.'!?"()*#:;~ and with spaces for
    - and /, single spaces."""
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
    return " ".join(re.sub(r"[-/]", " ", text).split())


def check_widths(alignment: Alignment, tower: TextTower) -> None:
    """Raises ModelError when the two cannot be compared."""
    if alignment.dim != tower.dim:
        raise ModelError(
            f"The alignment leads to {alignment.dim} dimensions, but the text tower has {tower.dim}: name "
            "the tower that it was trained with (--text-tower)."
        )


def evaluate_retrieval(
    run: Run,
    alignment: Alignment,
    tower: TextTower,
    examples: Sequence[Example],
    setting: Setting,
    *,
    duplicates: Duplicates = "strict",
    scale: float = 1.0,
    raw_text: bool = False,
) -> dict[str, Any]:
    """Recalls at one setting, over the videos that could be read; the others are listed.

    Each caption is a query of T2V; in V2T the best-placed of a video's captions counts. raw_text: captions go
    to the tower as they are (sentence encoders), not as `plain_text`.
    """
    check_widths(alignment, tower)

    def describe(_: Example, features: Any) -> Row:
        return {"vector": pack(features.mean(dim=0))}

    def features(pixels: Any, seed: int) -> Any:
        return alignment.unit(run.viewer.pooled(pixels, setting, run.pool, seed))

    rows = run.rows(examples, setting, features, describe)
    present, gone = split_missing(examples, rows)
    if not present:
        raise DataError(
            f"None of the {len(examples)} videos can be read; the first: {next(iter(gone.values()))}"
        )
    texts, owner = [], []
    for place, number in enumerate(present):
        for caption in examples[number].captions:
            texts.append(caption if raw_text else plain_text(caption))
            owner.append(place)
    video, text = unpack([rows[number]["vector"] for number in present]), tower.embed(texts).cpu()
    found = {
        name: retrieval(video, text, owner, texts, dsl=dsl, scale=scale, duplicates=duplicates)
        for name, dsl in (("plain", False), ("dual softmax", True))
    }
    return {
        **describe_setting(setting),
        "videos": len(present),
        "texts": len(texts),
        "missing": gone,
        "scores": {
            name: {way: {k: share.to_dict() for k, share in by_k.items()} for way, by_k in ways.items()}
            for name, ways in found.items()
        },
    }


def retrieval_table(settings: Sequence[Setting], results: Sequence[dict[str, Any]]) -> str:
    """One line per setting and kind of score, in percent."""
    columns = ["tokens", "score", *(f"{way} R@{k}" for way in ("T2V", "V2T") for k in (1, 5, 10)), "videos"]
    lines = []
    for setting, result in zip(settings, results, strict=True):
        for name, ways in result["scores"].items():
            shares = [100 * ways[way][f"R@{k}"]["value"] for way in ("T2V", "V2T") for k in (1, 5, 10)]
            lines.append([setting.label, name, *shares, result["videos"]])
    return table(columns, lines)
