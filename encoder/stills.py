"""Image files (PNG, JPEG, WebP, BMP), still or animated, through Pillow. Runs in the decoding child."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from encoder.containers import Header, Rules
from encoder.errors import VideoError
from encoder.handed import open_file
from encoder.sampling import shown_at

_CODECS = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg", "WEBP": "webp", "BMP": "bmp"}
_ORIENTATION = 0x0112  # EXIF tag


def is_image(head: bytes) -> bool:
    """Whether the first 16 bytes of a file are those of an image format handled here (not GIF)."""
    return head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM")) or (
        head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    )


def _open(path: str, rules: Rules) -> Any:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the limit below is ours, and an error rather than a warning
    image = Image.open(open_file(path), formats=("PNG", "JPEG", "WEBP", "BMP"))
    rules.check_codec(_CODECS[image.format or ""])
    rules.check_pixels(image.width, image.height)
    return image


def inspect_image(path: str, rules: Rules) -> Header:
    """Header of an image file; an animated one is a video. Raises VideoError when a rule is broken."""
    with _open(path, rules) as image:
        count = getattr(image, "n_frames", 1)
        duration = _ends_s(image, count)[-1] if count > 1 else 0.0
        width, height = image.size
        if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):
            width, height = height, width
        codec = _CODECS[image.format or ""]
        rules.check_duration(duration)
        kind = "video" if count > 1 else "image"
        return Header(width, height, 0, duration, duration, count, codec, codec, 0.0, kind)


def decode_image(
    path: str, header: Header, times_s: Sequence[float], size: tuple[int, int], rules: Rules
) -> Iterator[tuple[float, bytes]]:
    """Frames of an image file: the one picture, or those on screen at the given times."""
    from PIL import Image, ImageOps

    with _open(path, rules) as image:
        starts = [0.0]
        if header.kind == "video":
            starts += _ends_s(image, header.frames or 1)[:-1]
        for index in shown_at(starts, times_s):
            if header.kind == "video":
                image.seek(index)
            picture = flat_rgb(ImageOps.exif_transpose(image))
            if picture.size != size:
                picture = picture.resize(size, Image.Resampling.BICUBIC)
            yield starts[index], picture.tobytes()


def flat_rgb(image: Any) -> Any:
    """A Pillow image as RGB; what is transparent becomes white, as on a page."""
    from PIL import Image

    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image)
    elif image.mode.startswith("I;16"):
        image = image.point(lambda v: v / 256).convert("L")
    return image.convert("RGB")


def _ends_s(image: Any, count: int) -> list[float]:
    """Time at which each frame of an animation ends, seconds."""
    ends, total = [], 0.0
    for index in range(count):
        image.seek(index)
        image.load()
        total += max(image.info.get("duration", 100), 10) / 1000
        ends.append(total)
    if not ends:
        raise VideoError("it holds no pictures; give another file")
    return ends
