"""Make the folder that ships: weights, example clips with the model's own answers, a card with figures.

    python -m training.release --model runs/box/chat_lora_answers/model --figures runs/box/world.json \
        --alignment runs/box/clip/alignment.safetensors

The last step of `make model`. The clips come from the test split of the demo world; five whose questions the
model answers rightly and one that it gets wrong, each first of its kind from number 0 on. A plan table that
`training.optimize_tokens --install` wrote into the model goes along; so does that of the folder before, when
the encoder it was measured on is still the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from encoder.checkpoint import save_json
from encoder.errors import DataError, FluxChatError
from llm_bridge.model import ADAPTER, VideoLanguageModel
from training.data.media import FileMedia
from training.data.synthetic_source import WorldSource
from training.evaluation.answer_scoring import agrees
from training.evaluation.chat_evaluator import Asked, Watcher
from training.evaluation.chat_runs import input_of
from training.model_card import card
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
    watcher = Watcher(model, input_of(model, model.config.default_tokens))
    folder.mkdir(parents=True)
    tasks = TASKS if world.level.plots != ("solo",) else TASKS[:2]
    found: list[Example] = []
    shown: set[str] = set()
    for number in range(400):
        sample = world.sample(number)
        code = sample.scene.actors[0].code
        question = suitable(sample, len(found), tasks)
        if question is None or code in shown:
            continue
        name = f"{world.nouns[code].name.replace(' ', '-')}-{sample.scene.actors[0].motions[0]}.mp4"
        frames = round(sample.scene.duration_s * FPS)
        pixels = world.render(sample.scene, [i / FPS for i in range(frames)], SIZE, SIZE)
        write_video(folder / name, pixels, FPS, crf=26)
        answer = next(watcher.answers(FileMedia((folder / name,)), number, [Asked(question.question)]))
        right = agrees(question, answer)
        if sum(example.right == right for example in found) >= (RIGHT if right else WRONG):
            (folder / name).unlink()
            continue
        shown.add(code)
        found.append(Example(name, question.question, question.answer, answer, right))
        if len(found) == RIGHT + WRONG:
            return sorted(found, key=lambda example: not example.right)
    raise DataError(f"Only {len(found)} of {RIGHT + WRONG} example clips were found among 400.")


def copy_weights(source: Path, target: Path) -> Iterator[Path]:
    """The model's files, without what only training needs; yields the copies."""
    for name in PARTS:
        shutil.copy(source / name, target / name)
        yield target / name
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
    configs, encoders = [[folder / name for folder in (built, before)] for name in PARTS[:2]]
    if not all(path.exists() for path in (*configs, *encoders)):
        return
    new, old = (json.loads(path.read_text()) for path in configs)
    same = encoders[0].read_bytes() == encoders[1].read_bytes() and new["encoder"] == old["encoder"]
    if same and not new.get("plan_table") and old.get("plan_table"):
        save_json({**new, "plan_table": old["plan_table"]}, configs[0])


def ship(
    model: Path,
    figures: Path,
    out: Path,
    preset: Literal["simple", "solo", "full"],
    alignment: Path | None = None,
) -> None:
    """Write `out` anew; it is complete or as it was. Raises DataError, ModelError or CheckpointError."""
    measured: dict[str, Any] = json.loads(figures.read_text())
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".ship-") as scratch:
        built = Path(scratch) / "built"
        built.mkdir()
        sizes = {path.name: path.stat().st_size for path in copy_weights(model, built)}
        if alignment is not None:
            shutil.copy(alignment, built / "alignment.safetensors")
            sizes["alignment.safetensors"] = alignment.stat().st_size
        keep_plan_table(built, out)
        loaded = VideoLanguageModel.from_pretrained(built, device="cpu")
        world = WorldSource("test", preset=preset).open()
        examples = make_examples(loaded, world, built / "examples")
        save_json([asdict(example) for example in examples], built / "examples" / "examples.json")
        (built / "README.md").write_text(card(loaded, world, sizes, measured, [asdict(e) for e in examples]))
        if out.exists():
            os.replace(out, Path(scratch) / "old")
        os.replace(built, out)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.release",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--figures", type=Path, required=True, help="JSON of training.evaluate world")
    parser.add_argument(
        "--alignment",
        type=Path,
        help="alignment.safetensors of its encoder, for `training.evaluate --encoder`",
    )
    parser.add_argument("--preset", choices=["simple", "solo", "full"], default="full", help="of its world")
    parser.add_argument("--out", type=Path, default=Path("app/pretrained"))
    args = parser.parse_args(argv)
    try:
        ship(args.model, args.figures, args.out, args.preset, args.alignment)
    except OSError as error:
        print(f"Cannot read or write {error.filename}: {error.strerror}.", file=sys.stderr)
        return 2
    except FluxChatError as error:
        print(error, file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
