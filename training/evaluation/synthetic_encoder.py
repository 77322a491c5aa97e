"""The synthetic world's held-out clips: what an encoder tells of them by itself.

It names object and motion by the heads that Flux-CLIP trained, and finds clips by caption and captions by
clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from encoder.errors import DataError
from llm_bridge.clip_head import ClipHead
from llm_bridge.text_encoders.text_towers import TextTower
from training.command_line import table
from training.data.examples import Example
from training.data.media import WorldMedia
from training.data.synthetic_examples import WorldExamples
from training.data.synthetic_source import WorldSource
from training.evaluation.classification import accuracies
from training.evaluation.encoder_input import EncoderInput
from training.evaluation.encoder_run import EncoderRun
from training.evaluation.metrics import top_k
from training.evaluation.retrieval import recall_scores


@dataclass(frozen=True)
class WorldClips:
    """Test clips. labels: (N,) class numbers by attribute ("noun", "motion"); classes: how many there are."""

    examples: Sequence[Example]
    labels: dict[str, Tensor]
    classes: dict[str, int]

    @staticmethod
    def of(source: WorldSource) -> WorldClips:
        """All clips of a source; raises DataError when its sprites were never fetched."""
        by_attribute = {"noun": WorldExamples(source, "noun"), "motion": WorldExamples(source, "motion")}
        world = by_attribute["noun"].world
        examples, numbers = [], {name: list[int]() for name in by_attribute}
        classes = {name: part.classes for name, part in by_attribute.items()}
        for number in range(source.first, source.first + source.count):
            sample = world.sample(number)
            actor = sample.scene.actors[0]
            media = WorldMedia(world, sample, number)
            examples.append(Example(f"world-{source.split}-{number}", media, captions=(sample.caption,)))
            numbers["noun"].append(classes["noun"].index(actor.code))
            numbers["motion"].append(classes["motion"].index(str(actor.motions[0])))
        labels = {name: torch.tensor(values) for name, values in numbers.items()}
        return WorldClips(examples, labels, {name: len(part) for name, part in classes.items()})


def pooled_features(run: EncoderRun, clips: WorldClips, encoder_input: EncoderInput) -> Tensor:
    """(N, clip_embed_dim) of all clips, on the CPU."""

    def features(pixels: Sequence[Tensor], seed: int) -> Tensor:
        return run.pooled(pixels, encoder_input, seed)

    return run.vectors(clips.examples, encoder_input, features)[1]


def attribute_scores(clip_head: ClipHead, clips: WorldClips, pooled: Tensor) -> dict[str, Tensor]:
    """Class scores (N, classes) of noun and motion; raises DataError when a head is for another world."""
    clip_head = clip_head.to(pooled.device)
    by_attribute = {name: clip_head.scores(name, pooled) for name in clip_head.heads if name in clips.classes}
    for name, scores in by_attribute.items():
        if scores.shape[1] != clips.classes[name]:
            raise DataError(
                f"The head for {name} tells {scores.shape[1]} classes apart, but this world has "
                f"{clips.classes[name]}: choose the --preset it was trained on."
            )
    return by_attribute


def attribute_hits(
    run: EncoderRun, clip_head: ClipHead, clips: WorldClips, encoder_input: EncoderInput
) -> dict[str, Tensor]:
    """Whether each clip's noun and motion are classified rightly: (N,) bool each."""
    by_attribute = attribute_scores(clip_head, clips, pooled_features(run, clips, encoder_input))
    return {name: top_k(scores, clips.labels[name], 1) for name, scores in by_attribute.items()}


def evaluate_encoder(
    run: EncoderRun,
    clip_head: ClipHead,
    tower: TextTower | None,
    clips: WorldClips,
    encoder_input: EncoderInput,
) -> dict[str, Any]:
    """Accuracy of every attribute head, and retrieval by caption (left out without a tower), at one input.

    Equal captions count as equally right.
    """
    pooled = pooled_features(run, clips, encoder_input)
    result: dict[str, Any] = {**encoder_input.to_dict(), "n": len(pooled)}
    result["ms_per_clip"] = round(run.encoder.ms(encoder_input), 2)
    for name, scores in attribute_scores(clip_head, clips, pooled).items():
        result[name] = {**accuracies(scores, clips.labels[name]), "chance": 1 / clips.classes[name]}
    if tower is not None:
        clip_head.check(tower)
        texts = [example.captions[0] for example in clips.examples]
        video, text = clip_head.embed(pooled), tower.embed(texts).cpu()
        result["retrieval"] = recall_scores(video, text, range(len(texts)), texts, duplicates="equal")
    return result


def encoder_table(results: Sequence[dict[str, Any]]) -> str:
    """One line per input, in percent."""
    heads = [name for name in results[0] if isinstance(results[0][name], dict) and "top1" in results[0][name]]
    columns = ["tokens", *heads, "T2V R@1", "R@5", "V2T R@1", "R@5", "T2V R@1, DSL", "ms", "n"]
    shown_recalls = (
        ("plain", "T2V", "R@1"),
        ("plain", "T2V", "R@5"),
        ("plain", "V2T", "R@1"),
        ("plain", "V2T", "R@5"),
        ("dual softmax", "T2V", "R@1"),
    )
    lines = []
    for result in results:
        recalls = result.get("retrieval")
        line: list[object] = [EncoderInput.from_dict(result).label]
        line += [100 * result[name]["top1"]["value"] for name in heads]
        for score, way, k in shown_recalls:
            line.append(None if recalls is None else 100 * recalls[score][way][k]["value"])
        lines.append([*line, result.get("ms_per_clip"), result["n"]])
    return table(columns, lines)
