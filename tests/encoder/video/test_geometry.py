"""Display geometry: every orientation, crop, pixel aspect ratio and colour, by either decoder."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from encoder.errors import VideoError
from encoder.video.geometry import fit_within, nearest_rotation
from encoder.video.reader import Decoder, read_clip

COLOURS = {"R": (200, 40, 40), "G": (40, 200, 40), "B": (40, 40, 200), "Y": (200, 200, 40)}
ORIENTATIONS = [(turns, mirror) for turns in range(4) for mirror in (False, True)]
ONE = 1 << 16
BOTH: tuple[Decoder, ...] = ("auto", "pyav")


def corners(width: int = 64, height: int = 48) -> np.ndarray:
    """RGB uint8 (height, width, 3): red and green above, blue and yellow below."""
    picture = np.zeros((height, width, 3), np.uint8)
    for name, (y, x) in zip("RGBY", ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        part = picture[y * height // 2 : (y + 1) * height // 2, x * width // 2 : (x + 1) * width // 2]
        part[:] = COLOURS[name]
    return picture


def corner_colours(frame) -> str:
    """The names of a frame's four corners, row by row."""
    pixels = np.asarray(frame).astype(int)
    height, width = pixels.shape[:2]
    places = [(height * y // 4, width * x // 4) for y in (1, 3) for x in (1, 3)]
    return "".join(min(COLOURS, key=lambda k: np.abs(pixels[place] - COLOURS[k]).sum()) for place in places)


def oriented(turns: int, mirror: bool, picture: np.ndarray) -> np.ndarray:
    """Brute force: quarter turns counter-clockwise, then a mirror from left to right."""
    turned = np.rot90(picture, turns)
    return turned[:, ::-1] if mirror else turned


def video(path: Path, picture: np.ndarray, *, pose=None, aspect=None, encoder="libx264", live=False) -> Path:
    """Three frames of one picture; pose: quarter turns counter-clockwise and a mirror after them."""
    with av.open(str(path), "w", options={"live": "1"} if live else {}) as container:
        stream = container.add_stream(encoder, rate=12)
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = "yuv420p"
        if pose:
            stream.set_display_rotation(90 * pose[0], hflip=pose[1])
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
def test_all_eight_orientations_of_a_display_matrix(tmp_path, name):
    for turns, mirror in ORIENTATIONS:
        path = video(tmp_path / name, corners(), pose=(turns, mirror))
        want = oriented(turns, mirror, corners())
        for decoder in BOTH:
            clip = read_clip(path, 1, decoder=decoder)
            assert (turns, mirror, corner_colours(clip.frames[0])) == (turns, mirror, corner_colours(want))
            assert clip.frames.shape[1:] == want.shape
            assert (clip.info.height, clip.info.width) == want.shape[:2]
        small = read_clip(path, 1, max_side=32, decoder="pyav").frames[0]
        assert corner_colours(small) == corner_colours(want)
        assert max(small.shape[:2]) == 32
    assert torch.equal(read_clip(path, 1, trusted=False).frames, clip.frames)


def with_matrix(source: Path, target: Path, matrix: tuple[int, ...]) -> Path:
    data = bytearray(source.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", *matrix)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize(
    ("numbers", "want"),
    [
        ((0.98, 0.17, -0.17, 0.98), "RGBY"),  # ten degrees
        ((0.17, 0.98, -0.98, 0.17), "BRYG"),  # eighty, clockwise
        ((0.7071, 0.7071, -0.7071, 0.7071), "RGBY"),  # 45 stays
        ((1.0, 0.0, 0.5, 1.0), "RGBY"),  # shear
        ((-0.9, 0.2, 0.1, 1.1), "GRYB"),  # a crooked mirror
        ((0.0, 0.0, 0.0, 0.0), "RGBY"),  # no matrix at all
    ],
)
def test_any_matrix_is_rounded_to_the_nearest_orientation(tmp_path, numbers, want):
    a, b, c, d = (round(n * ONE) for n in numbers)
    plain = video(tmp_path / "plain.mp4", corners())
    path = with_matrix(plain, tmp_path / "a.mp4", (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    for decoder in BOTH:
        assert corner_colours(read_clip(path, 1, decoder=decoder).frames[0]) == want


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.sampled_from(ORIENTATIONS), st.floats(-0.7, 0.7))
def test_scale_and_a_small_angle_never_change_the_orientation(wide, high, pose, angle):
    turns, mirror = pose
    right, below = np.array([-1.0 if mirror else 1.0, 0.0]), np.array([0.0, 1.0])
    turn = turns * np.pi / 2 + angle
    quarter = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])  # y points down
    (a, b), (c, d) = quarter @ right * wide, quarter @ below * high
    assert nearest_rotation((a, b, 0, c, d, 0, 0, 0, 1))[:2] == pose


def test_the_rotate_tag_of_older_files(tmp_path):
    path = tmp_path / "a.mkv"
    for tag, want in (("90", "BRYG"), ("270", "GYRB"), ("upside down", "RGBY")):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=12)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.metadata["ROTATE"] = tag
            for _ in range(2):
                frame = av.VideoFrame.from_ndarray(corners(), format="rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv420p")))
            container.mux(stream.encode())
        for decoder in BOTH:
            assert corner_colours(read_clip(path, 1, decoder=decoder).frames[0]) == want


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
@pytest.mark.parametrize("aspect", [Fraction(16, 11), Fraction(8, 9), Fraction(2)])
def test_pixels_that_are_not_square(tmp_path, name, aspect):
    encoder = "mpeg4" if name == "a.avi" else "libx264"
    path = video(tmp_path / name, corners(), aspect=aspect, encoder=encoder)
    width = round(64 * aspect)
    for decoder in BOTH:
        clip = read_clip(path, 1, decoder=decoder)
        assert abs(clip.info.width - width) <= 1
        assert clip.frames.shape == (1, 48, clip.info.width, 3)
        assert corner_colours(clip.frames[0]) == "RGBY"
    turned = video(tmp_path / "b.mp4", corners(), aspect=aspect, pose=(1, False))
    info = read_clip(turned, 1).info
    assert info.width == 48
    assert abs(info.height - width) <= 1


def test_an_impossible_aspect_is_ignored(tmp_path):
    path = video(tmp_path / "a.mp4", corners(), aspect=Fraction(5000))
    assert read_clip(path, 1).frames.shape == (1, 48, 64, 3)


def with_clap(source: Path, target: Path, box: bytes) -> Path:
    """An mp4 with one more box at the end of its sample description; its index must be at the end."""
    data = bytearray(source.read_bytes())
    start, end, inside = 0, len(data), {b"stsd": 16, b"avc1": 86}
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        while data[start + 4 : start + 8] != name:
            start += struct.unpack_from(">I", data, start)[0]
        size = struct.unpack_from(">I", data, start)[0]
        struct.pack_into(">I", data, start, size + len(box))
        start, end = start + inside.get(name, 8), start + size
    data[end:end] = box
    target.write_bytes(data)
    return target


def test_the_clean_aperture_of_mp4(tmp_path):
    """48 x 24 pixels whose centre is 8 to the left of and 6 above the middle: only red and green remain."""
    box = struct.pack(">I4s8i", 40, b"clap", 48, 1, 24, 1, -8, 1, -12, 1)
    plain = video(tmp_path / "plain.mp4", corners())
    path = with_clap(plain, tmp_path / "a.mp4", box)
    for decoder in BOTH:
        clip = read_clip(path, 2, decoder=decoder)
        assert clip.frames.shape == (2, 24, 48, 3)
        assert (clip.info.width, clip.info.height) == (48, 24)
        assert corner_colours(clip.frames[0]) == "RGRG"
        for x, name in ((29, "R"), (34, "G")):  # the border is 32 pixels from the left
            assert np.abs(clip.frames[0, 12, x].numpy().astype(int) - COLOURS[name]).max() < 40


def with_video_element(source: Path, target: Path, element: bytes) -> Path:
    """A live Matroska file (one without positions and sizes) with one more element in its only Video."""
    data = bytearray(source.read_bytes())
    at = data.rindex(b"\x16\x54\xae\x6b")
    for name in (b"\x16\x54\xae\x6b", b"\xae", b"\xe0"):  # Tracks, TrackEntry, Video
        at = data.index(name, at) + len(name)
        width = 9 - data[at].bit_length()  # an EBML number: leading zeros tell its length
        value = int.from_bytes(data[at : at + width], "big") + len(element)
        data[at : at + width] = value.to_bytes(width, "big")
        at += width
    data[at:at] = element
    target.write_bytes(data)
    return target


def test_the_pixel_crop_of_matroska(tmp_path):
    plain = video(tmp_path / "plain.mkv", corners(), live=True)
    path = with_video_element(plain, tmp_path / "a.mkv", b"\x54\xbb\x81\x18")  # PixelCropTop 24
    for decoder in BOTH:
        clip = read_clip(path, 1, decoder=decoder)
        assert clip.frames.shape == (1, 24, 64, 3)
        assert corner_colours(clip.frames[0]) == "BYBY"


@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt2020"])
@pytest.mark.parametrize("full", [False, True])
def test_colours_by_matrix_range_and_depth(tmp_path, matrix, full):
    want = np.array([200, 30, 60])
    red, blue = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}[matrix]
    r, g, b = want / 255
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = [(b - luma) / 2 / (1 - blue), (r - luma) / 2 / (1 - red)]
    values = [16 + 219 * luma, *(128 + 224 * c for c in chroma)]
    if full:
        values = [255 * luma, *(128 + 255 * c for c in chroma)]
    for encoder, fmt, scale in (
        ("libx264", "yuv420p", 1),
        ("libx264", "yuv420p10le", 4),
        ("ffv1", "yuv420p12le", 16),
    ):
        path = tmp_path / f"{fmt}.mkv"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(encoder, rate=12)
            stream.width, stream.height, stream.pix_fmt = 64, 48, fmt
            context = stream.codec_context
            context.colorspace = {"bt601": 6, "bt709": 1, "bt2020": 9}[matrix]
            context.color_range = 2 if full else 1
            for i in range(2):
                frame = av.VideoFrame(64, 48, fmt)
                frame.pts = i
                frame.colorspace, frame.color_range = context.colorspace, context.color_range
                for plane, value in zip(frame.planes, values, strict=True):
                    kind = np.uint16 if scale > 1 else np.uint8
                    count = plane.buffer_size // kind().itemsize
                    plane.update(np.full(count, round(value * scale), kind).tobytes())
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        for decoder in BOTH:
            mean = read_clip(path, 1, decoder=decoder).frames[0].float().mean((0, 1)).numpy()
            assert np.abs(mean - want).max() < 4


@pytest.mark.parametrize(
    ("name", "encoder", "fmt"),
    [
        ("a.webm", "libvpx", "yuva420p"),
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mov", "png", "rgba"),
        ("a.mov", "qtrle", "argb"),
    ],
)
def test_transparent_video_is_composed_on_white(tmp_path, name, encoder, fmt):
    picture = np.zeros((48, 64, 4), np.uint8)
    picture[..., 0], picture[:, :32, 3] = 200, 255
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(encoder, rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, fmt
        stream.options = {"auto-alt-ref": "0"} if encoder.startswith("libvpx") else {}
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba")
            container.mux(stream.encode(frame.reformat(format=fmt)))
        container.mux(stream.encode())
    trusted = (True, False) if name == "a.webm" or encoder == "png" else (True,)
    for safe in trusted:
        clip = read_clip(tmp_path / name, 3, trusted=safe, max_side=48)
        assert clip.frames.shape == (3, 36, 48, 3)
        assert clip.frames[:, :, 30:].min() > 250
        assert np.abs(clip.frames[2, 18, 10].numpy().astype(int) - (200, 0, 0)).max() < 6


def test_decord_refuses_mirrored_video(tmp_path):
    pytest.importorskip("decord")
    path = video(tmp_path / "a.mp4", corners(), pose=(0, True))
    with pytest.raises(VideoError, match="use decoder='auto'"):
        read_clip(path, 1, decoder="decord")


EXIF = [(0, False), (0, True), (2, False), (2, True), (3, True), (3, False), (1, True), (1, False)]  # 1 to 8
STILLS = {"PNG": 0, "JPEG": 30, "WEBP": 30, "TIFF": 0, "AVIF": 30, "MPO": 30}


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(STILLS)), st.integers(1, 8), st.tuples(st.integers(8, 70), st.integers(8, 70)))
def test_still_images_are_upright_in_every_format_orientation_and_size(
    tmp_path_factory, kind, orientation, size
):
    picture = Image.fromarray(corners(*size))
    exif = picture.getexif()
    exif[0x0112] = orientation
    path = tmp_path_factory.mktemp("stills") / "still"
    picture.save(path, kind, exif=exif)
    want = oriented(*EXIF[orientation - 1], corners(*size))
    clip = read_clip(path, 4)
    assert clip.frames.shape == (1, *want.shape)
    assert (clip.info.kind, clip.info.height, clip.info.width) == ("image", *want.shape[:2])
    assert corner_colours(clip.frames[0]) == corner_colours(want)
    in_memory = read_clip(Image.open(path)).frames
    assert np.abs(in_memory.numpy().astype(int) - clip.frames.numpy()).max() <= STILLS[kind]


@given(st.integers(1, 9000), st.integers(1, 9000), st.none() | st.integers(1, 9000))
def test_fit_within_keeps_aspect_and_limit(width, height, side):
    small = fit_within(width, height, side)
    assert min(small) >= 1
    if side is None or max(width, height) <= side:
        assert small == (width, height)
    else:
        assert max(small) == side
