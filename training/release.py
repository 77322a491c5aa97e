r"""Make the released model's folder: weights, example clips with the model's own answers, a card.

    python -m training.release --model runs/box/chat_lora_answers/model --figures runs/box/world.json \
        --alignment runs/box/clip/alignment.safetensors

The last step of `make model`. The clips come from the test split of the synthetic world; five whose questions
the model answers rightly and one that it gets wrong, each first of its kind from number 0 on. A plan table
that `training.optimize_tokens --install` wrote into the model goes along; so does that of the folder before,
when the encoder it was measured on is still the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from encoder.checkpoint import save_json
from encoder.errors import DataError
from encoder.json_files import read_object
from llm_bridge.familiarity import FAMILIARITY
from llm_bridge.model import ADAPTER, VideoLanguageModel, model_folder
from training.command_line import command_parser, run_command
from training.data.media import FileMedia
from training.data.synthetic_source import WorldSource
from training.evaluation.ability_metrics import chance_cell, share_cell
from training.evaluation.answer_scoring import agrees
from training.evaluation.chat_evaluator import ChatEvaluator, Query
from training.evaluation.chat_runs import input_of
from training.evaluation.cli_arguments import PRESETS
from training.synthetic.dataset import Sample, World
from training.synthetic.export import write_video
from training.synthetic.question_forms import Question

RIGHT, WRONG = 5, 1
TASKS = ("object", "moving_direction", "count", "appearance_order")
SIZE, FPS = 256, 12.0
SHORTEST_S, LONGEST_S = 2.5, 6.0
PARTS = ("config.json", "encoder.safetensors", "projector.safetensors")


@dataclass(frozen=True)
class Example:
    """A committed clip and what the model says about it."""

    file: str
    question: str
    expected: str
    answer: str
    right: bool


def suitable(sample: Sample, place: int, tasks: Sequence[str]) -> Question | None:
    """An open question of a clip that makes a good example, of these tasks in turn; None if there is none."""
    if not SHORTEST_S <= sample.scene.duration_s <= LONGEST_S:
        return None
    wanted = tasks[place % len(tasks)]
    return next((q for q in sample.questions if q.task == wanted and not q.options), None)


def make_examples(model: VideoLanguageModel, world: World, folder: Path) -> list[Example]:
    """Write clips into a folder until enough are answered rightly and wrongly. Raises DataError if not."""
    evaluator = ChatEvaluator(model, input_of(model, model.config.default_tokens))
    folder.mkdir(parents=True)
    tasks = TASKS if world.level.plots != ("solo",) else TASKS[:2]
    examples: list[Example] = []
    used: set[str] = set()
    for number in range(400):
        sample = world.sample(number)
        code = sample.scene.actors[0].code
        question = suitable(sample, len(examples), tasks)
        if question is None or code in used:
            continue
        name = f"{world.nouns[code].name.replace(' ', '-')}-{sample.scene.actors[0].motions[0]}.mp4"
        frames = round(sample.scene.duration_s * FPS)
        pixels = world.render(sample.scene, [i / FPS for i in range(frames)], SIZE, SIZE)
        write_video(folder / name, pixels, FPS, crf=26)
        answer = next(evaluator.answers(FileMedia((folder / name,)), number, [Query(question.question)]))
        right = agrees(question, answer)
        if sum(example.right == right for example in examples) >= (RIGHT if right else WRONG):
            (folder / name).unlink()
            continue
        used.add(code)
        examples.append(Example(name, question.question, question.answer, answer, right))
        if len(examples) == RIGHT + WRONG:
            return sorted(examples, key=lambda example: not example.right)
    raise DataError(f"Only {len(examples)} of {RIGHT + WRONG} example clips were found among 400.")


def copy_weights(source: Path, target: Path) -> Iterator[Path]:
    """The model's files, without what only training needs; yields the copies."""
    for name in PARTS:
        shutil.copy(source / name, target / name)
        yield target / name
    if (source / FAMILIARITY).exists():
        shutil.copy(source / FAMILIARITY, target / FAMILIARITY)
        yield target / FAMILIARITY
    if (source / ADAPTER).is_dir():
        (target / ADAPTER).mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(source / ADAPTER / name, target / ADAPTER / name)
            yield target / ADAPTER / name
        _forget_folders(target / ADAPTER / "adapter_config.json")


def _forget_folders(path: Path) -> None:
    """An adapter's configuration names the folder of its base; here the model's config names the base."""
    values = json.loads(path.read_text())
    values["base_model_name_or_path"] = None
    save_json(values, path)


def keep_plan_table(built: Path, before: Path) -> None:
    """Take over the plan table of the folder `before` when `built` has none and the same encoder."""
    if not _same_encoder(built, before):
        return
    new, old = (json.loads((folder / PARTS[0]).read_text()) for folder in (built, before))
    if not new.get("plan_table") and old.get("plan_table"):
        save_json({**new, "plan_table": old["plan_table"]}, built / PARTS[0])


def keep_familiarity(built: Path, before: Path) -> None:
    """Take over the judge of familiarity of `before` when `built` has none and the same encoder."""
    found = before / FAMILIARITY
    if found.exists() and not (built / FAMILIARITY).exists() and _same_encoder(built, before):
        shutil.copy(found, built / FAMILIARITY)


def _same_encoder(built: Path, before: Path) -> bool:
    configs, encoders = [[folder / name for folder in (built, before)] for name in PARTS[:2]]
    if not all(path.exists() for path in (*configs, *encoders)):
        return False
    new, old = (json.loads(path.read_text()) for path in configs)
    return encoders[0].read_bytes() == encoders[1].read_bytes() and new["encoder"] == old["encoder"]


def release(
    model: Path,
    figures: Path,
    out: Path,
    preset: Literal["simple", "solo", "full"],
    alignment: Path | None = None,
    judged: Path | None = None,
) -> None:
    """Write `out` anew; it is complete or as it was. judged: figures of `training.familiarity`, for the card.

    Raises DataError, ModelError or CheckpointError.
    """
    model = model_folder(model)
    measured = _figures(figures, "training.evaluate world --model")
    try:
        _ = measured["inputs"], next(iter(measured["runs"].values()))["tasks"]["caption: main object"]
    except (KeyError, TypeError, AttributeError, StopIteration):
        raise DataError(
            f"{figures} holds no figures of training.evaluate world --model: write them with its --out."
        ) from None
    familiarity = None if judged is None else _figures(judged, "training.familiarity")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".release-") as scratch:
        built = Path(scratch) / "built"
        built.mkdir()
        sizes = {path.name: path.stat().st_size for path in copy_weights(model, built)}
        if alignment is not None:
            shutil.copy(alignment, built / "alignment.safetensors")
            sizes["alignment.safetensors"] = alignment.stat().st_size
        keep_plan_table(built, out)
        keep_familiarity(built, out)
        loaded = VideoLanguageModel.from_pretrained(built, device="cpu")
        world = WorldSource("test", preset=preset).open()
        examples = make_examples(loaded, world, built / "examples")
        save_json([asdict(example) for example in examples], built / "examples" / "examples.json")
        text = card(loaded, world, sizes, measured, [asdict(e) for e in examples], familiarity)
        (built / "README.md").write_text(text)
        if out.exists():
            os.replace(out, Path(scratch) / "old")
        os.replace(built, out)


def _figures(path: Path, command: str) -> dict[str, Any]:
    try:
        return read_object(path)
    except ValueError as error:
        raise DataError(f"{path} holds no figures of {command}: {error}.") from error


# -- the model card ----------------------------------------------------------------------------------------

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
percent with 95 % intervals. {inputs}; "text-only" is the same language model without the video.

{table}
"""
FAMILIARITY_SECTION = """
## What it takes for its own

`familiarity.safetensors` says whether a video looks like what the model was trained on; of another, an answer
begins with a sentence that says it is a guess. It was fitted to drawn clips against photographs in motion,
screens, drawings and noise, and to no real video. Called foreign:

| clips | called foreign |
|---|---|
| drawn, other scenes, scaled and compressed (false alarms) | {world} |
| drawn, of things never trained on (false alarms) | {unseen} |
| made from other photographs, and generated | {foreign} |
| pieces of {files} real videos | {real} |

By file: {videos}.

Asked whether a made foreign clip shows one of the things it knows, it would begin with a yes to {before}
questions; a yes there gives up so much of its score that it does to {after}.{absurd}
"""
TAIL = """
## Examples

{examples}
{familiarity}
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
    familiarity: Mapping[str, Any] | None = None,
) -> str:
    """Markdown. measured: the result of `training.evaluate world`; examples: those of the folder;
    familiarity: the result of `training.familiarity`."""
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
            _input(run, values, config.patch_size) for run, values in measured["inputs"].items() if values
        ),
        table=figures_table(runs),
    )
    return head + TAIL.format(
        examples="\n".join(_example(example) for example in examples),
        familiarity="" if familiarity is None else familiarity_section(familiarity),
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


def familiarity_section(figures: Mapping[str, Any]) -> str:
    """Markdown of what `training.familiarity` measured."""

    def share(values: Mapping[str, Any]) -> str:
        return f"{100 * values['share']:.1f} % of {values['n']}"

    videos: Mapping[str, Mapping[str, Any]] = figures["videos"]
    n = sum(row["n"] for row in videos.values())
    found = sum(row["share"] * row["n"] for row in videos.values())
    yes = figures["yes"]
    absurd = yes.get("absurd, real videos")
    return FAMILIARITY_SECTION.format(
        world=share(figures["world"]),
        unseen=share(figures["world, unseen things"]),
        foreign=share(figures["foreign"]),
        real=f"{100 * found / n:.1f} % of {n}" if n else "none measured",
        files=len(videos),
        videos=", ".join(
            f"{name} {round(row['share'] * row['n'])}/{row['n']}" for name, row in videos.items()
        ),
        before=share(yes["before"]),
        after=share(yes["after"]),
        absurd=f" Asked whether real videos show what none of them does, {share(absurd)}." if absurd else "",
    )


def _input(run: str, values: Mapping[str, Any], patch_size: int) -> str:
    """The encoder input of a run, from a result file's "inputs"."""
    frames, side = values["frames"], values["resolution"]
    patches = frames * (side // patch_size) ** 2
    return f'"{run}" keeps {values["K"]} of the {patches} patches of {frames} frames at {side} x {side}'


def figures_table(runs: Mapping[str, Any]) -> str:
    """Abilities (bold), then tasks, down and runs across; the runs are named by selector and tokens kept."""
    names = list(runs)
    lines = [f"| task | {' | '.join(names)} | chance | n |", "|---" * (len(names) + 3) + "|"]
    for part, mark in (("goals", "**"), ("tasks", "")):
        for task, row in runs[names[0]].get(part, {}).items():
            cells = [share_cell(runs[name].get(part, {}).get(task)) or "" for name in names]
            shares, chance = " | ".join(cells), chance_cell(row)
            lines.append(f"| {mark}{task}{mark} | {shares} | {chance} | {row['n']} |")
    return "\n".join(lines)


def _example(example: Mapping[str, Any]) -> str:
    verdict = "right" if example["right"] else f"wrong, it was: {example['expected']}"
    return f'- `{example["file"]}` - "{example["question"]}" - "{example["answer"]}" ({verdict})'


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command_parser("training.release", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--figures", type=Path, required=True, help="JSON of training.evaluate world")
    parser.add_argument(
        "--alignment",
        type=Path,
        help="alignment.safetensors of its encoder, for `training.evaluate --encoder`",
    )
    parser.add_argument("--familiarity", type=Path, help="JSON of training.familiarity, for the card")
    parser.add_argument("--preset", choices=PRESETS, default="full", help="of its world")
    parser.add_argument("--out", type=Path, default=Path("app/pretrained"))

    def run(args: argparse.Namespace) -> None:
        try:
            release(args.model, args.figures, args.out, args.preset, args.alignment, args.familiarity)
        except OSError as error:
            raise DataError(f"Cannot read or write {error.filename}: {error.strerror}.") from error
        print(args.out)

    return run_command(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
