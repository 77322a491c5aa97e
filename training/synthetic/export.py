"""Writes the world as files: h264 videos with a LLaVA-style annotation list, and a picture to look at.

    python -m training.synthetic export --split train --count 1000 --out DIR
    python -m training.synthetic preview --out sheet.png

Every record is {"id", "video", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt",
"value": ...}]}: first the caption, then questions about the same video.
"""

from __future__ import annotations

import json
import os
import random
import textwrap
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from encoder.errors import ConfigError
from training.synthetic.dataset import Sample, World
from training.synthetic.phrases import Wording
from training.synthetic.question_templates import QUESTIONS

QUESTIONS_PER_VIDEO = 4
SHEET_FRAMES, SHEET_SIDE, GAP, TEXT_HEIGHT = 8, 128, 4, 34  # of a contact sheet, in pixels


def write_video(path: Path, frames: np.ndarray, fps: float, *, codec: str = "libx264", crf: int = 23) -> None:
    """uint8 (T, H, W, 3) RGB, even H and W -> a video file, complete or not there at all."""
    import av

    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with av.open(str(temporary), "w", format=path.suffix[1:], options=_container_options(path)) as file:
            stream: Any = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
            stream.options = {"crf": str(crf)}
            for picture in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _container_options(path: Path) -> dict[str, str]:
    # The index first, so that a browser can start to play before the file has arrived.
    return {"movflags": "+faststart"} if path.suffix == ".mp4" else {}


def record(
    sample: Sample, name: str, wording: Wording, questions: int = QUESTIONS_PER_VIDEO
) -> dict[str, Any]:
    """One annotation: the caption and up to `questions` questions of different tasks."""
    rng = random.Random(name)
    shuffled = rng.sample(sample.questions, len(sample.questions))
    by_task = {question.task: question for question in shuffled}
    turns = [(rng.choice(QUESTIONS["caption"][wording]), sample.caption)]
    chosen = rng.sample(list(by_task.values()), min(questions, len(by_task)))
    turns += [(question.question, question.answer) for question in chosen]
    conversations = []
    for number, (request, answer) in enumerate(turns):
        conversations.append({"from": "human", "value": f"<image>\n{request}" if number == 0 else request})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": name, "video": f"videos/{name}.mp4", "conversations": conversations}


def export(world: World, count: int, out: Path, *, size: int = 256, fps: float = 12.0) -> Path:
    """Writes `count` videos and annotations.json into a folder; returns the list's path.

    Videos that are already there are kept, so an interrupted export goes on where it stopped. Raises
    ConfigError for an odd or tiny size, a frame rate out of range, or a folder that holds another export.
    """
    if size < 32 or size % 2:
        raise ConfigError(f"Size {size} does not suit h264: use an even number of at least 32 pixels.")
    if not 1 <= fps <= 60:
        raise ConfigError(f"{fps} frames per second is out of range: use 1 to 60.")
    if count < 1:
        raise ConfigError(f"Nothing to export: count is {count}.")
    _claim(world, out, size, fps)
    records = list(_export_each(world, count, out, size, fps))
    annotations = out / "annotations.json"
    temporary = out / f".{os.getpid()}-annotations.json"
    temporary.write_text(json.dumps(records, indent=1), encoding="utf-8")
    os.replace(temporary, annotations)
    return annotations


def _claim(world: World, out: Path, size: int, fps: float) -> None:
    """Notes in the folder what it holds; another world in it would mix two sets of videos."""
    (out / "videos").mkdir(parents=True, exist_ok=True)
    settings = {
        "split": world.split,
        "seed": world.seed,
        "level": repr(world.level),
        "size": size,
        "fps": fps,
    }
    note = out / "world.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != settings:
        raise ConfigError(f"{out} holds an export with other settings: choose another folder or delete it.")
    note.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _export_each(world: World, count: int, out: Path, size: int, fps: float) -> Iterator[dict[str, Any]]:
    from tqdm import tqdm

    wording: Wording = "train" if world.split == "train" else "test"
    for index in tqdm(range(count), desc=f"{world.split} videos", unit="video"):
        sample = world.sample(index)
        name = f"{world.split}-{world.seed}-{index:06d}"
        path = out / "videos" / f"{name}.mp4"
        if not path.exists():
            frames = max(2, round(sample.scene.duration_s * fps))
            write_video(path, world.render(sample.scene, [i / fps for i in range(frames)], size, size), fps)
        yield record(sample, name, wording)


def contact_sheet(world: World, rows: int = 12, first: int = 0) -> Image.Image:
    """Samples `first`, `first + 1`, ... as an RGB image: one per row, frames from left to right, the caption
    and one question below."""
    width = SHEET_FRAMES * (SHEET_SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, rows * (SHEET_SIDE + TEXT_HEIGHT) + GAP), (250, 250, 248))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for row in range(rows):
        sample = world.sample(first + row)
        duration_s = sample.scene.duration_s
        times = [(k + 0.5) / SHEET_FRAMES * duration_s for k in range(SHEET_FRAMES)]
        top = GAP + row * (SHEET_SIDE + TEXT_HEIGHT)
        for column, frame in enumerate(world.render(sample.scene, times, SHEET_SIDE, SHEET_SIDE)):
            sheet.paste(Image.fromarray(frame), (GAP + column * (SHEET_SIDE + GAP), top))
        question = next((q for q in reversed(sample.questions) if not q.options), None)
        exchange = f"{question.question}  {question.answer}" if question else ""
        for line, text in enumerate((f"{duration_s:.1f} s  {sample.caption}", exchange)):
            draw.text(
                (GAP, top + SHEET_SIDE + 1 + 15 * line),
                textwrap.shorten(text, 165, placeholder=" ..."),
                fill=(40, 40, 40) if line == 0 else (110, 110, 110),
                font=font,
            )
    return sheet


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Writes the sheet as PNG, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    sheet.save(temporary, "PNG")
    os.replace(temporary, path)
