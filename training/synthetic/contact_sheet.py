"""A contact sheet of the world: one sample per row, frames from left to right, the caption below."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from training.synthetic.dataset import World

FRAMES, SIDE, GAP, TEXT = 8, 128, 4, 34


def contact_sheet(world: World, rows: int = 12, first: int = 0) -> Image.Image:
    """Samples `first`, `first + 1`, ... as an RGB image, each with its caption and one question."""
    width = FRAMES * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, rows * (SIDE + TEXT) + GAP), (250, 250, 248))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for row in range(rows):
        sample = world.sample(first + row)
        duration_s = sample.scene.duration_s
        times = [(k + 0.5) / FRAMES * duration_s for k in range(FRAMES)]
        top = GAP + row * (SIDE + TEXT)
        for column, frame in enumerate(world.render(sample.scene, times, SIDE, SIDE)):
            sheet.paste(Image.fromarray(frame), (GAP + column * (SIDE + GAP), top))
        question = next((q for q in reversed(sample.questions) if not q.options), None)
        asked = f"{question.question}  {question.answer}" if question else ""
        for line, text in enumerate((f"{duration_s:.1f} s  {sample.caption}", asked)):
            draw.text(
                (GAP, top + SIDE + 1 + 15 * line),
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
