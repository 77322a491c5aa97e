"""Image files, still or animated, by Pillow (HEIC by heif.py); orientation, transparency and 16-bit values.

PNG, WebP and AVIF may be animated: then they are videos. Of a file with several pages (TIFF, MPO) the first
counts, of one with several sizes (ICO) the largest. Transparency is composed on BACKGROUND; colour profiles
are not applied. Runs in the decoding child, and on images that are already in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from encoder.errors import VideoError
from encoder.video import heif
from encoder.video.containers import Header
from encoder.video.descriptors import open_file
from encoder.video.frame_times import shown_at
from encoder.video.limits import Rules

BACKGROUND = "white"
_HEAD_BYTES = 64  # enough of a file to know its format
_ANIMATED = ("PNG", "WEBP", "AVIF", "GIF")
_CODECS = {
    **{"PNG": "png", "JPEG": "jpeg", "WEBP": "webp", "BMP": "bmp", "AVIF": "av1"},
    **{"TIFF": "tiff", "ICO": "ico", "JPEG2000": "jpeg2000", "PSD": "psd"},  # for trusted files only
}
_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"BM", "BMP"),
    *((start, "TIFF") for start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    (b"\0\0\1\0", "ICO"),
    *((start, "JPEG2000") for start in (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")),
    (b"8BPS", "PSD"),
    *((start, "JPEG XL") for start in (b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a")),
)
_ORIENTATION = 0x0112  # EXIF tag
_MIN_MS, _DEFAULT_MS = 10, 100  # browsers show a frame of at most 10 ms for 100 ms


def is_image_file(path: str) -> bool:
    """Whether a file has an image format that is handled here (not GIF)."""
    return bool(_format_of(path))


def _format_of(path: str) -> str | None:
    with open_file(path) as file:
        return _format(file.read(_HEAD_BYTES))


def _format(head: bytes) -> str | None:
    if head[:4] == b"RIFF":
        return "WEBP" if head[8:12] == b"WEBP" else None
    if head[4:8] == b"ftyp":
        size = min(int.from_bytes(head[:4], "big"), len(head))
        brands = {head[8:12], *(head[at : at + 4] for at in range(16, size - 3, 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        return "HEIC" if head[8:12] in heif.BRANDS else None  # its sequences are videos for FFmpeg
    return next((name for start, name in _SIGNATURES if head.startswith(start)), None)


def _open(path: str, rules: Rules) -> Any:
    from PIL import Image

    name = _format_of(path)
    if name not in _CODECS:
        raise VideoError(f"no decoder for {name or 'its format'} is installed; save it as PNG or JPEG")
    rules.check_codec(_CODECS[name])
    Image.MAX_IMAGE_PIXELS = None  # check_pixels below raises instead of warning
    image = Image.open(open_file(path), formats=(name,))
    rules.check_pixels(image.width, image.height)
    return image


def inspect_image(path: str, rules: Rules) -> Header:
    """Header of an image file; an animated one is a video. Raises VideoError when a rule is broken."""
    if _format_of(path) == "HEIC":
        rules.check_codec("hevc")
        photo = heif.read_item(path)
        rules.check_pixels(photo.width, photo.height)
        return Header(*photo.upright, frames=1, codec="hevc", container="heic", kind="image", pillow=True)
    with _damage_as_video_error(), _open(path, rules) as image:
        moving = animation_frames(image)
        duration = end_times(image)[-1] if moving else 0.0
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        if turned and image.format != "TIFF":  # whose size Pillow gives upright
            width, height = height, width
        codec = _CODECS.get(image.format, "jpeg")  # MPO is JPEG with more images behind the first
        rules.check_duration(duration)
        return Header(
            width,
            height,
            duration_s=duration,
            claimed_s=duration,
            frames=len(moving) or 1,
            codec=codec,
            container=(image.format or codec).lower().replace("mpo", "jpeg"),
            kind="video" if moving else "image",
            pillow=True,
        )


def decode_image(
    path: str, header: Header, times_s: Sequence[float], size: tuple[int, int], rules: Rules
) -> Iterator[tuple[float, bytes]]:
    """Frames of an image file: the still image, or those of an animation shown at `times_s`."""
    from PIL import Image

    if header.container == "heic":
        whole = heif.decode(path, heif.read_item(path), rules)
        pixels = whole.resize(size, Image.Resampling.BICUBIC, _pixel_box(whole, header)).tobytes()
        yield from ((0.0, pixels) for _ in times_s)
        return
    with _damage_as_video_error(), _open(path, rules) as image, restoring_frame(image):
        moving = animation_frames(image)
        starts = [0.0, *end_times(image)[:-1]] if moving else [0.0]
        shown, pixels = -1, b""
        for index in shown_at(starts, times_s):
            if index != shown:
                if moving:
                    seek_frame(image, moving[index])
                frame = upright_rgb(image)
                box = _pixel_box(frame, header)
                if frame.size != size or box is not None:
                    frame = frame.resize(size, Image.Resampling.BICUBIC, box)
                shown, pixels = index, frame.tobytes()
            yield starts[index], pixels


def _pixel_box(image: Any, header: Header) -> tuple[float, float, float, float] | None:
    """The part of an upright picture that is shown, in pixels; None for all of it."""
    if header.crop is None:
        return None
    left, top, right, bottom = header.crop
    return left * image.width, top * image.height, right * image.width, bottom * image.height


def animation_frames(image: Any) -> range:
    """Which frames of a Pillow image make up its animation; empty for a still."""
    if image.format not in _ANIMATED:  # pages and sizes are no animation
        return range(0)
    first = (
        1 if image.info.get("default_image") else 0
    )  # a PNG's fallback image for readers that cannot animate
    count = getattr(image, "n_frames", 1)
    return range(first, count) if count - first > 1 else range(0)


@contextmanager
def _damage_as_video_error() -> Iterator[None]:
    """Any error of Pillow in a file of a known format means that the file is damaged."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError) as error:
        raise VideoError("it is damaged or cut off; export or download it again") from error


@contextmanager
def restoring_frame(image: Any) -> Iterator[None]:
    """Lets an animated Pillow image be read frame by frame and returns it to its current frame afterwards."""
    current = image.tell()
    needs_alpha = image.format == "WEBP" and getattr(image, "rawmode", None) == "RGBX"
    if needs_alpha:  # Pillow drops the alpha where no frame has any, but smaller frames leave a clear border
        image.rawmode = image._mode = "RGBA"
    try:
        yield
    finally:
        with suppress(Exception):  # a damaged file
            if needs_alpha:
                image.rawmode, image._mode = "RGBX", "RGB"
                image.seek(0 if current else 1)
                image.load()
            seek_frame(image, current)


def seek_frame(image: Any, index: int) -> None:
    """Make a frame the current one of an animated Pillow image."""
    if image.format == "PNG" and image.mode == "P" and image.palette is not None:
        image.palette.dirty = 1  # else Pillow loses it on the way back to the first frame
    image.seek(index)


def end_times(image: Any) -> list[float]:
    """Time at which each frame of an animation ends, seconds."""
    ends, total = [], 0.0
    for index in animation_frames(image):
        seek_frame(image, index)
        image.load()
        shown_ms = image.info.get("duration") or 0
        total += (shown_ms if shown_ms > _MIN_MS else _DEFAULT_MS) / 1000
        ends.append(total)
    return ends


def upright_rgb(image: Any) -> Any:
    """The current frame of a Pillow image as an upright RGB image: EXIF orientation applied."""
    from PIL import ImageOps

    return opaque_rgb(ImageOps.exif_transpose(image))


def opaque_rgb(image: Any) -> Any:
    """A Pillow image as RGB; transparency is composed on BACKGROUND, 16-bit values are scaled to 8 bits.

    Mode "I" counts as 16-bit, 0..65535, as Pillow uses it. Raises VideoError, a clause without a name, for
    values outside and for mode "F", whose range is unknown.
    """
    from PIL import Image

    if image.mode.startswith("I"):
        image = _eight_bit_grey(image)
    elif image.mode == "F":
        raise VideoError("its pixels are floating point, of unknown range; convert them to 0..255 (mode L)")
    elif image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image.convert("RGB")


def to_eight_bits(values: Any) -> Any:
    """uint8 numpy array from values of 0..65535, rounded: 65535 becomes 255."""
    import numpy as np

    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _eight_bit_grey(image: Any) -> Any:
    """Mode L, or LA where one grey value is transparent, from a Pillow image of wider integers."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise VideoError("its pixels exceed 16 bits (0 to 65535); convert them to 0..255 (mode L)")
    grey = Image.fromarray(to_eight_bits(values))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey
