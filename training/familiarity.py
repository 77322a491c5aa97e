"""Fit the judge of familiarity of a model: whether a video looks like what the model was trained on.

    python -m training.familiarity --model app/pretrained --photos photos.zip --videos holiday.mp4 street.avi

Clips of the synthetic world (most of its train split, half of those over other backgrounds; some of the test
split, for its photographs) stand against clips that it would never draw, made from photographs and of
generated kinds; all are scaled and compressed as people do. A logistic regression and small networks on the
frozen encoder's statistics tell them apart. The threshold, and what a yes about a foreign clip must give up,
are chosen on further clips. It writes familiarity.safetensors into the model's folder, measures that on clips
of other seeds, of unseen things and of other photographs, and on real videos, of which nothing is learnt, and
prints the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoder.checkpoint import save_json, weights_hash
from encoder.errors import ConfigError
from encoder.video.reader import read_clip
from llm_bridge.engines import Request
from llm_bridge.engines.local import LocalAnswer
from llm_bridge.familiarity import FAMILIARITY, Familiarity, statistics
from llm_bridge.model import VideoLanguageModel, model_folder
from llm_bridge.prompt import Message, Visual, render
from training.command_line import at_least, command_parser, run_command
from training.data.foreign_clips import Photos, foreign_clip
from training.data.reencode import reencoded
from training.data.world_clips import world_clip
from training.models.familiarity_fit import fit_score
from training.synthetic.dataset import Split, World
from training.synthetic.world_config import WorldConfig

FRAMES = 4  # of a made clip
STILLS = 0.06  # share of clips that are one picture
TEST_SPLIT = 0.3  # of the world's clips; the judge should know all of the world's few photographs
SEEDS = {"fit": 1001, "threshold": 1002, "test": 1003}  # of worlds; training used others
SEGMENT = 12  # frames of a real video, of READ from its whole length, that are judged as a clip of their own
READ = 96
UNITS, NETWORKS = 32, 2
FALSE_ALARMS = 0.02  # of the clips that the threshold is chosen on
YES_SHARE = 0.03  # of the questions that the penalty is chosen on may be answered yes
YES_CLIPS, YES_QUESTIONS = 24, 4
ASKED = ("Is there a {} in the video?", "Is there a {}?", "Do you see a {}?", "Does the clip show a {}?")
ABSURD = (
    *("pink elephant", "dragon", "submarine", "piano", "pizza", "penguin", "flying saucer", "volcano"),
    *(
        "mermaid",
        "helicopter",
        "giraffe",
        "guitar",
        "snowman",
        "shark",
        "castle",
        "robot",
        "banana",
        "unicorn",
    ),
    *("rocket", "dinosaur", "violin", "octopus", "tractor", "crown", "cactus"),
)
ABSURD_QUESTIONS = 100  # about the real videos together, at least


@dataclass(frozen=True)
class Clips:
    """Makes clip number i of one kind, in any process. split: of the world; None: foreign ones.

    other_places: give half of the world's clips backgrounds from the photographs.
    """

    photos: Photos
    seed: int
    split: Split | None = None
    other_places: bool = False

    def __call__(self, index: int) -> np.ndarray:
        """uint8 (T, H, W, 3)."""
        rng = random.Random(f"{self.split}/{self.seed}/{index}")
        count = 1 if rng.random() < STILLS else FRAMES
        if self.split is None:
            return reencoded(foreign_clip(self.photos, rng, count), rng)
        level = rng.choices((WorldConfig, WorldConfig.solo, WorldConfig.simple), (6, 2, 1))[0]()
        world = _world(self.split, self.seed, level)
        photos = self.photos if self.other_places else None
        return reencoded(world_clip(world, index, rng, count, photos), rng)


_WORLDS: dict[Any, World] = {}  # of this process


def _world(split: Split, seed: int, level: WorldConfig) -> World:
    key = (split, seed, repr(level))
    if key not in _WORLDS:
        _WORLDS[key] = World(split, seed, level)
    return _WORLDS[key]


@dataclass(frozen=True)
class Judged:
    """A model, and how its clips are made: `pool` maps in other processes, None in this one."""

    model: VideoLanguageModel
    pool: ProcessPoolExecutor | None

    def statistics(self, make: Clips, count: int, name: str) -> Tensor:
        """(count, F) of clips 0 to count - 1."""
        from tqdm import tqdm

        numbers = range(count)
        clips = map(make, numbers) if self.pool is None else self.pool.map(make, numbers, chunksize=4)
        return torch.stack([self.of(frames) for frames in tqdm(clips, desc=name, total=count, unit="clip")])

    def of(self, frames: np.ndarray) -> Tensor:
        """(F,) of one clip."""
        pixels = torch.from_numpy(np.ascontiguousarray(frames))
        return statistics(self.model.encoder, pixels, self.model.config.fit).cpu()


def segments(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video as a whole and, of a longer one, piece by piece."""
    clip = read_clip(path, READ, max_side=448)
    _, places = np.unique(clip.times_s, return_index=True)  # a short video shows frames again
    frames = clip.frames.numpy()[places]
    yield frames
    if len(frames) >= 2 * SEGMENT:
        for start in range(0, len(frames) - SEGMENT // 2, SEGMENT):
            yield frames[start : start + SEGMENT]


def yes_margins(model: VideoLanguageModel, judge: Familiarity, make: Clips) -> Tensor:
    """By how much the model prefers a yes, (N,), when asked whether foreign clips show a thing it knows."""
    rng, margins = random.Random(make.seed), []
    things = [noun.name for noun in World("train").pool]
    for index in range(YES_CLIPS):
        frames = make(index)
        for _ in range(YES_QUESTIONS):
            margins.append(yes_margin(model, judge, frames, rng.choice(ASKED).format(rng.choice(things))))
    return torch.stack(margins)


def yes_margin(model: VideoLanguageModel, judge: Familiarity, frames: np.ndarray, question: str) -> Tensor:
    """By how much the model would rather begin with a yes, (), about frames, uint8 (T, H, W, 3)."""
    yes = sorted(judge.yes_bias(model.llm.tokenizer))
    scores = first_scores(model, torch.from_numpy(np.ascontiguousarray(frames)), question)
    rest = scores.clone()
    rest[yes] = -torch.inf
    return scores[yes].max() - rest.max()


def absurd_yes(judged: Judged, judge: Familiarity, videos: Sequence[Path]) -> Tensor:
    """Whether answers about real videos begin with a yes, (N,), to questions for what none of them shows."""
    rng, found = random.Random(SEEDS["test"]), []
    for number, path in enumerate(videos):
        frames = next(segments(path))
        frames = frames[[int((place + 0.5) * len(frames) / FRAMES) for place in range(FRAMES)]]
        penalty = judge.yes_penalty if judge.score(judged.of(frames)) > 0 else 0.0
        for place in range(-(-ABSURD_QUESTIONS // len(videos))):
            thing = ABSURD[(7 * number + place) % len(ABSURD)]
            found.append(yes_margin(judged.model, judge, frames, rng.choice(ASKED).format(thing)) > penalty)
    return torch.stack(found)


@torch.inference_mode()
def first_scores(model: VideoLanguageModel, frames: Tensor, question: str) -> Tensor:
    """Logits (V,) of an answer's first token, about frames, uint8 (T, H, W, 3), all of whose patches stay."""
    from encoder.preprocess import preprocess

    side = 8 * model.encoder.config.patch_size
    times = tuple(range(len(frames)))
    vision = model.encode([preprocess(frames, side, side, fit=model.config.fit)], [None], [times])
    embedding = model.project(vision)[0]
    visual = Visual(len(embedding), "", float(len(frames)), times)
    messages: list[Message[Visual]] = [Message.of("user", visual, question)]
    if model.config.system:
        messages.insert(0, Message.of("system", model.config.system))
    prompt = render(model.llm.tokenizer, messages, time_form=model.config.time_sentence)
    _, logits = LocalAnswer(model.llm, Request(prompt, [embedding])).prefill([len(prompt)])
    assert logits is not None
    return logits.float().cpu()


def fit(args: argparse.Namespace, judged: Judged) -> Familiarity:
    """The judge of a model."""
    learn, other = Photos.open(args.photos), Photos.open(args.photos, "test")
    model, look, clips = judged.model, judged.statistics, partial(Clips, learn, SEEDS["fit"])
    share = max(1, round(TEST_SPLIT * args.clips))
    known = torch.cat(
        [
            look(clips("train", other_places=True), args.clips - share, "world"),
            look(clips("test"), share, "world, photographs of the test split"),
        ]
    )
    strange = look(clips(), args.clips, "foreign")
    labels = torch.cat([torch.zeros(len(known)), torch.ones(len(strange))])
    weight, bias, network = fit_score(
        torch.cat([known, strange]), labels, strength=args.strength, units=args.units, networks=NETWORKS
    )
    things, encoder = len(World("train").pool), weights_hash(model.encoder)
    judge = Familiarity(weight, bias, things, 0.0, encoder, network)

    held = look(Clips(other, SEEDS["threshold"], "test"), args.held_out, "world, for the threshold")
    judge = replace(judge, bias=bias - float(judge.score(held).quantile(1 - args.false_alarms)))
    margins = yes_margins(model, judge, Clips(learn, SEEDS["threshold"]))
    return replace(judge, yes_penalty=max(0.0, float(margins.quantile(1 - YES_SHARE))))


def measure(args: argparse.Namespace, judged: Judged, judge: Familiarity) -> dict[str, Any]:
    """Figures of a judge on clips that it was not fitted to: shares that it calls foreign."""
    make = partial(Clips, Photos.open(args.photos, "test"), SEEDS["test"])

    def called_foreign(clips: Clips, name: str) -> dict[str, float | int]:
        return _share(judge.score(judged.statistics(clips, args.held_out, name)) > 0)

    margins = yes_margins(judged.model, judge, make())
    figures: dict[str, Any] = {
        "things": judge.things,
        "world": called_foreign(make("test"), "world, other scenes"),
        "world, unseen things": called_foreign(make("unseen"), "world, unseen things"),
        "foreign": called_foreign(make(), "foreign, other photographs"),
        "yes": {
            "penalty": round(judge.yes_penalty, 3),
            "before": _share(margins > 0),
            "after": _share(margins > judge.yes_penalty),
        },
        "videos": {},
    }
    for path in args.videos:
        scores = torch.stack([judge.score(judged.of(frames)) for frames in segments(path)])
        figures["videos"][path.name] = _share(scores > 0)
    if args.videos:
        figures["yes"]["absurd, real videos"] = _share(absurd_yes(judged, judge, args.videos))
    return figures


def _share(hits: Tensor) -> dict[str, float | int]:
    return {"share": round(float(hits.float().mean()), 4), "n": len(hits)}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command_parser("training.familiarity", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--photos", type=Path, required=True, help="folder or zip file of photographs")
    parser.add_argument("--videos", type=Path, nargs="+", default=[], help="real videos to measure it on")
    parser.add_argument("--out", type=Path, help=f"file to write (default: {FAMILIARITY} of the model)")
    parser.add_argument("--figures", type=Path, help="JSON file for the figures, beside printing them")
    parser.add_argument("--measure", action="store_true", help="measure the one that is there; fit none")
    parser.add_argument(
        "--clips", type=at_least(8), default=6000, help="clips of each side to learn from (6000)"
    )
    parser.add_argument("--held-out", type=at_least(8), default=800, help="clips of each further kind (800)")
    parser.add_argument("--strength", type=float, default=0.01, help="of the fit: C (0.01)")
    parser.add_argument(
        "--units", type=at_least(0), default=UNITS, help=f"of each of {NETWORKS} networks, 0: none ({UNITS})"
    )
    parser.add_argument(
        "--false-alarms", type=float, default=FALSE_ALARMS, help=f"share accepted ({FALSE_ALARMS})"
    )
    parser.add_argument(
        "--workers", type=at_least(0), default=1, help="processes that make clips, 0: none (1)"
    )

    def run(args: argparse.Namespace) -> None:
        if not 0 < args.false_alarms < 1 or args.strength <= 0:
            raise ConfigError("--false-alarms must lie between 0 and 1, and --strength above 0.")
        folder = model_folder(args.model)
        model = VideoLanguageModel.from_pretrained(folder)
        if args.measure and model.familiarity is None:
            raise ConfigError(
                f"{folder} has no {FAMILIARITY} of its encoder: leave out --measure to fit one."
            )
        pool = ProcessPoolExecutor(args.workers, get_context("spawn")) if args.workers > 0 else None
        try:
            judged = Judged(model, pool)
            judge = model.familiarity if args.measure else fit(args, judged)
            assert judge is not None
            if not args.measure:
                judge.save(args.out or folder / FAMILIARITY)
            figures = measure(args, judged, judge)
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        if args.figures:
            save_json(figures, args.figures)
        print(json.dumps(figures))

    return run_command(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
