"""The model card: what the shipped model is, what it was measured to do, and what it cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_bridge.model import VideoLanguageModel
from training.evaluation.ability_metrics import chance_percent, percent
from training.synthetic.dataset import World

HEAD = """\
---
license: apache-2.0
library_name: fluxchat
pipeline_tag: video-text-to-text
base_model: {llm}
---
# The model in the box

A {width}-wide, {depth}-block FluxViT ({millions:.1f} M parameters), a {layers}-layer projector and
{llm}{tuned}, trained on two CPU cores with this project's own commands (`make model`) on videos that it draws
itself. It knows {nouns} things and {motions} ways to move; shown anything else, **it guesses**.

## What it gets right

{clips} clips of the test split (scenes, backgrounds and wordings that training never showed), greedy answers,
percent with 95 % intervals. {inputs}; "blind" is the same language model without the video.

{table}
"""
TAIL = """
## Examples

{examples}

## How it was made

| file | MB |
|---|---|
{files}

Recipes in `training/recipes/`, in this order: `cpu/umt.yaml` (Flux-UMT from nothing), `box/clip.yaml`
(Flux-CLIP; what clips and patches show are further targets), `box/projector_warmup.yaml` (the projector
learns words; not of the paper), `box/chat_stage1.yaml` (projector; encoder and language model frozen){lora}.
Figures: commit `{commit}`, weights `{weights}`.

## Data and licences

Fluent Emoji by Microsoft (MIT) move over photographs from scikit-image that are free of known restrictions
and over painted backgrounds: see `training/synthetic/LICENCES.md`. The text targets of Flux-CLIP come from
all-MiniLM-L6-v2 (Apache-2.0). The language model is not in this folder: `fluxchat fetch` gets it. Weights:
Apache-2.0.

## Limits

Trained on {objects}, square frames, {shortest:.0f} to {longest:.0f} seconds. On other videos it names one of
the things it knows. It cannot read, recognise people or hear.
"""


def card(
    model: VideoLanguageModel,
    world: World,
    sizes: Mapping[str, int],
    measured: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
) -> str:
    """Markdown. measured: the result of `training.evaluate world`; examples: those of the folder."""
    config = model.config.encoder
    runs: Mapping[str, Any] = measured["runs"]
    first = next(iter(runs.values()))
    most = world.level.max_objects
    head = HEAD.format(
        llm=model.config.llm,
        width=config.embed_dim,
        depth=config.depth,
        millions=sum(p.numel() for p in model.encoder.parameters()) / 1e6,
        layers=model.config.projector.layers,
        tuned=" with a LoRA adapter" if model.llm.adapters else "",
        nouns=len(world.pool),
        motions=len(world.level.motions),
        clips=first["tasks"]["caption: main object"]["n"],
        inputs="; ".join(
            _input(run, shown, config.patch_size) for run, shown in measured["inputs"].items() if shown
        ),
        table=figures_table(runs),
    )
    return head + TAIL.format(
        examples="\n".join(_example(example) for example in examples),
        files="\n".join(f"| {name} | {size / 1e6:.1f} |" for name, size in sizes.items()),
        lora=", `box/chat_lora.yaml` and `box/chat_lora_answers.yaml` (adapter)"
        if model.llm.adapters
        else "",
        commit=measured.get("commit"),
        weights=measured.get("weights"),
        objects="one object per clip" if most == 1 else f"up to {most} objects per clip",
        shortest=world.level.duration_s[0],
        longest=world.level.duration_s[1],
    )


def _input(run: str, shown: Mapping[str, Any], patch_size: int) -> str:
    """What a run was shown, from a result file's "inputs"."""
    frames, side = shown["frames"], shown["resolution"]
    patches = frames * (side // patch_size) ** 2
    return f'"{run}" keeps {shown["K"]} of the {patches} patches of {frames} frames at {side} x {side}'


def figures_table(runs: Mapping[str, Any]) -> str:
    """Goals (bold), then tasks, down and runs across; the runs are named by selector and tokens kept."""
    names = list(runs)
    lines = [f"| task | {' | '.join(names)} | chance | n |", "|---" * (len(names) + 3) + "|"]
    for part, mark in (("goals", "**"), ("tasks", "")):
        for task, row in runs[names[0]].get(part, {}).items():
            cells = [percent(runs[name].get(part, {}).get(task)) or "" for name in names]
            shares, chance = " | ".join(cells), chance_percent(row)
            lines.append(f"| {mark}{task}{mark} | {shares} | {chance} | {row['n']} |")
    return "\n".join(lines)


def _example(example: Mapping[str, Any]) -> str:
    verdict = "right" if example["right"] else f"wrong, it was: {example['expected']}"
    return f'- `{example["file"]}` - "{example["question"]}" - "{example["answer"]}" ({verdict})'
