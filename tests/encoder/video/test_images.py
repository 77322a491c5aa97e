"""Images in files and in memory: still images have one frame, animations their times."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from encoder.errors import VideoError
from encoder.video.reader import Limits, probe, read_clip
from tests.encoder.video import video_files as vf

RED = (200, 0, 0)


def half_transparent(width: int = 32, height: int = 24) -> np.ndarray:
    """RGBA uint8: opaque red on the left, transparent black on the right."""
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[:, : width // 2] = (*RED, 255)
    return pixels


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_right_half_white(frame, tolerance: int = 6) -> None:
    pixels = np.asarray(frame).astype(int)
    middle = pixels.shape[1] // 2
    assert np.abs(pixels[:, : middle - 4] - RED).max() <= tolerance
    assert pixels[:, middle + 4 :].min() >= 255 - tolerance


TRUSTED_ONLY = ("TIFF", "ICO", "JPEG2000")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "AVIF", "GIF", *TRUSTED_ONLY])
@pytest.mark.quick(3)
def test_a_still_image_of_any_format_is_one_frame(kind):
    picture = vf.numbered(1234)
    data = saved(Image.fromarray(picture), kind, **({"sizes": [(192, 128)]} if kind == "ICO" else {}))
    clip = read_clip(data, 8)
    assert (clip.info.kind, clip.times_s, clip.duration_s) == ("image", (0.0,), 0.0)
    assert (clip.info.width, clip.info.height) == (192, 128)
    assert vf.number_in(clip.frames[0].numpy()) == 1234
    assert read_clip(data, at_s=[7.0]).times_s == (0.0,)
    if kind in TRUSTED_ONLY:
        with pytest.raises(VideoError, match="is not allowed here"):
            read_clip(data, trusted=False)
    else:
        assert torch.equal(read_clip(data, trusted=False).frames, clip.frames)


def test_image_files(tmp_path):
    picture = vf.numbered(5)
    for suffix, tolerance in (("png", 0), ("bmp", 0), ("webp", 12), ("jpg", 12)):
        path = tmp_path / f"v.{suffix}"
        Image.fromarray(picture).save(path)
        for trusted in (True, False):
            clip = read_clip(path, 8, trusted=trusted)
            assert clip.info.kind == "image"
            assert clip.times_s == (0.0,)
            assert clip.duration_s == 0.0
            assert np.abs(clip.frames[0].numpy().astype(int) - picture).mean() <= tolerance
    turned = Image.fromarray(picture)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    clip = read_clip(tmp_path / "turned.jpg")
    assert (clip.info.width, clip.info.height) == (128, 192) == clip.frames.shape[2:0:-1]


def test_animated_webp_is_a_video(tmp_path):
    path = tmp_path / "v.webp"
    images = [Image.fromarray(vf.numbered(i)) for i in range(6)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=[100, 100, 700, 100, 100, 100])
    clip = read_clip(path, 6)
    assert clip.info.kind == "video"
    assert clip.duration_s == pytest.approx(1.2)
    assert vf.numbers_in(clip) == [1, 2, 2, 2, 3, 5]


def test_images_in_memory():
    arrays = [vf.numbered(i) for i in range(4)]
    sources = [
        arrays,
        [Image.fromarray(a) for a in arrays],
        [torch.from_numpy(a) for a in arrays],
        np.stack(arrays),
        torch.from_numpy(np.stack(arrays)),
    ]
    clips = [read_clip(source, 4, fps=2.0) for source in sources]
    for clip in clips:
        assert vf.numbers_in(clip) == [0, 1, 2, 3]
        assert clip.times_s == (0.0, 0.5, 1.0, 1.5)
        assert clip.duration_s == 2.0
        assert clip.info == clips[0].info
    assert clips[0].info.kind == "frames"
    assert probe(arrays, fps=2.0).digest == clips[0].info.digest != probe(arrays[::-1], fps=2.0).digest
    assert vf.numbers_in(read_clip(arrays, 2)) == [1, 3]
    one = read_clip(Image.fromarray(arrays[3]).convert("RGBA"), 16)
    assert vf.numbers_in(one) == [3]
    assert one.info.kind == "image"


def test_a_clip_owns_its_frames():
    array = np.zeros((2, 8, 8, 3), np.uint8)
    clip = read_clip(array, 2)
    array[:] = 255
    assert clip.frames.max() == 0


@pytest.mark.parametrize("kind", ["TIFF", "MPO", "ICO"])
def test_of_several_pages_or_sizes_the_first_counts(tmp_path, kind):
    pages = [Image.fromarray(vf.numbered(i)) for i in (5, 6)]
    options = {"sizes": [(192, 128)]} if kind == "ICO" else {"save_all": True}
    pages[0].save(tmp_path / "pages", kind, append_images=pages[1:], **options)
    for source in (tmp_path / "pages", Image.open(tmp_path / "pages")):
        clip = read_clip(source, 4)
        assert clip.info.kind == "image"
        assert vf.number_in(clip.frames[0].numpy()) == 5


@pytest.mark.parametrize("name", ["jxl", "jxl code stream"])
def test_a_format_without_a_decoder_is_named(name):
    start = b"\xff\x0a" if "code" in name else b"\0\0\0\x0cJXL \r\n\x87\n"
    for trusted in (True, False):
        with pytest.raises(VideoError, match="no decoder for JPEG XL is installed; save it as PNG or JPEG"):
            read_clip(start + bytes(100), trusted=trusted)


TIMES_MS = [100, 300, 100, 500]


def animation(kind: str) -> bytes:
    images = [Image.fromarray(vf.numbered(i)) for i in range(4)]
    lossless = {"quality": 100} if kind == "AVIF" else {"lossless": True} if kind == "WEBP" else {}
    return saved(images[0], kind, save_all=True, append_images=images[1:], duration=TIMES_MS, **lossless)


@pytest.mark.parametrize("clear", [None, 0, bytes([255] * 200 + [0] * 56)])
def test_an_animation_with_a_palette_keeps_its_colours(clear):
    """Pillow forgets the palette of a PNG when it goes back to the first frame."""
    pictures = [vf.numbered(i) for i in range(4)]
    images = [Image.fromarray(p).quantize(8) for p in pictures]
    palette = images[3]
    images = [Image.fromarray(p).quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]
    extra = {} if clear is None else {"transparency": clear}
    data = saved(images[0], "PNG", save_all=True, append_images=images[1:], duration=TIMES_MS, **extra)
    with Image.open(io.BytesIO(data)) as right:
        assert right.mode == "P"
        expected = []
        for index in range(4):
            right.seek(index)
            picture = right.convert("RGBA")
            page = Image.new("RGBA", picture.size, "white")
            expected.append(np.asarray(Image.alpha_composite(page, picture).convert("RGB")).astype(int))
    opened = Image.open(io.BytesIO(data))
    opened.seek(2)
    for source in (data, opened, opened):
        clip = read_clip(source, at_s=[0.0, sum(TIMES_MS) / 1000 - 0.01])
        for frame, picture in zip(clip.frames, (expected[0], expected[3]), strict=True):
            assert np.abs(frame.numpy() - picture).max() <= 1
    assert opened.tell() == 2
    assert np.asarray(opened.convert("RGB")).max() > 150


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF"])
def test_an_animation_is_a_video_from_any_source(tmp_path, kind):
    data = animation(kind)
    path = tmp_path / "moving"
    path.write_bytes(data)
    opened = Image.open(io.BytesIO(data))
    opened.seek(2)
    for source in (path, data, io.BytesIO(data), opened):
        for trusted in (True, False) if source is data else (True,):
            clip = read_clip(source, 5, trusted=trusted)
            assert (clip.info.kind, clip.info.frames) == ("video", 4)
            assert clip.duration_s == pytest.approx(1.0)
            assert vf.numbers_in(clip) == [1, 1, 3, 3, 3]
            assert clip.times_s == pytest.approx([0.1, 0.1, 0.5, 0.5, 0.5])
    assert opened.tell() == 2
    assert probe(opened).duration_s == pytest.approx(1.0)


def test_a_png_whose_first_picture_is_not_part_of_its_animation():
    images = [Image.fromarray(vf.numbered(i)) for i in (9, 1, 2)]
    data = saved(
        images[0], "PNG", save_all=True, append_images=images[1:], default_image=True, duration=[200, 200]
    )
    for source in (data, Image.open(io.BytesIO(data))):
        clip = read_clip(source, 2)
        assert clip.duration_s == pytest.approx(0.4)
        assert vf.numbers_in(clip) == [1, 2]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_disposed_frames_of_an_animation_leave_white(kind):
    """Frame 0 is red on the left; frame 1, after frame 0 is disposed of, red on the right."""
    left = half_transparent()
    images = [Image.fromarray(left), Image.fromarray(np.ascontiguousarray(left[:, ::-1]))]
    disposal = {"GIF": {"disposal": 2}, "PNG": {"disposal": 1}, "WEBP": {"lossless": True}}[kind]
    data = saved(images[0], kind, save_all=True, append_images=images[1:], duration=100, **disposal)
    for source in (data, Image.open(io.BytesIO(data))):
        clip = read_clip(source, 2)
        assert_right_half_white(clip.frames[0])
        assert_right_half_white(clip.frames[1].flip(1))


def transparent_images() -> dict[str, bytes | Image.Image | np.ndarray | torch.Tensor]:
    """One picture, half of it transparent, in many forms."""
    rgba = half_transparent()
    image = Image.fromarray(rgba)
    palette = Image.fromarray((rgba[..., 3] > 0).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, *RED])
    red_key = Image.fromarray(rgba[..., :3].copy())
    return {
        "png": saved(image, "PNG"),
        "webp": saved(image, "WEBP", lossless=True),
        "avif": saved(image, "AVIF", quality=95),
        "tiff": saved(image, "TIFF"),
        "gif": saved(image, "GIF"),
        "ico": saved(image, "ICO", sizes=[(32, 24)]),
        "jpeg 2000": saved(image, "JPEG2000"),
        "palette": saved(palette, "PNG", transparency=0),
        "palette in memory": Image.open(io.BytesIO(saved(palette, "PNG", transparency=0))),
        "one colour": saved(red_key, "PNG", transparency=(0, 0, 0)),
        "image": image,
        "premultiplied": image.convert("RGBa"),
        "array": rgba,
        "16 bits": rgba.astype(np.uint16) * 257,
        "tensor": torch.from_numpy(rgba),
        "many": np.stack([rgba, rgba]),
        "list": [image, rgba],
    }


def test_transparency_is_composed_on_white_from_any_source():
    for name, source in transparent_images().items():
        try:
            for frame in read_clip(source, 2).frames:
                assert_right_half_white(frame, 12 if name == "avif" else 6)
        except AssertionError as error:
            raise AssertionError(name) from error


def test_half_transparent_is_half_white_and_grey_keeps_its_alpha():
    assert read_clip(Image.new("RGBA", (8, 8), (0, 0, 0, 128))).frames.float().mean() == pytest.approx(
        127, abs=1
    )
    assert read_clip(Image.new("LA", (8, 8), (0, 0))).frames.min() == 255
    assert read_clip(saved(Image.new("LA", (8, 8), (0, 0)), "PNG")).frames.min() == 255


@pytest.mark.parametrize("level", [0, 257, 20_000, 40_000, 65_535])
def test_sixteen_bits_are_scaled(level):
    grey = Image.fromarray(np.full((8, 8), level, np.uint16))
    wide = Image.fromarray(np.full((8, 8), level, np.int32))
    colour = np.full((1, 8, 8, 3), level, np.uint16)
    sources = [grey, saved(grey, "PNG"), saved(grey, "TIFF"), wide, colour, colour[0], colour[0, ..., 0]]
    for source in (*sources, torch.from_numpy(colour)):
        assert (read_clip(source).frames.int() - level / 257).abs().max() <= 1


def test_a_sixteen_bit_png_in_colour():

    rows = b"".join(b"\0" + struct.pack(">4H", 40_000, 0, 65_535, 65_535) * 4 for _ in range(4))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 6, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert read_clip(data).frames[0, 0, 0].tolist() == pytest.approx([155, 0, 255], abs=1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_colour_mode_becomes_rgb(mode):
    white = Image.new("RGB", (16, 16), "white")
    if mode == "LAB":
        profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
        image = ImageCms.profileToProfile(white, *profiles, outputMode="LAB")
    else:
        image = white.convert(mode)
    assert read_clip(image).frames.min() >= 250
    red = Image.new("RGB", (16, 16), RED)
    if mode == "CMYK":  # Adobe's inverted CMYK
        for source in (red.convert(mode), saved(red.convert(mode), "JPEG", quality=95)):
            assert read_clip(source).frames[0, 8, 8].tolist() == pytest.approx(RED, abs=8)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.full((8, 8, 3), 0.5), "multiply floats from 0 to 1 by 255"),
        (torch.full((2, 8, 8, 3), 0.5), "multiply floats"),
        (np.zeros((8, 8, 3), np.int64), "not int64"),
        (np.zeros((3, 8, 8), np.uint8), "reorder its axes"),
        (np.zeros((8, 8, 2), np.uint8), "reorder its axes"),
        (np.zeros((2, 3, 8, 4), np.uint8), "reorder its axes"),
        (Image.new("F", (8, 8), 0.5), "of unknown range"),
        (Image.fromarray(np.full((8, 8), 70_000, np.int32)), "exceed 16 bits"),
        (Image.fromarray(np.full((8, 8), -1, np.int32)), "exceed 16 bits"),
        (saved(Image.new("F", (8, 8), 0.5), "TIFF"), "of unknown range"),
    ],
)
def test_values_without_a_known_range_are_refused_in_one_sentence(source, words):
    with pytest.raises(VideoError, match=words) as caught:
        read_clip(source)
    assert str(caught.value).count("\n") == 0
    assert str(caught.value).endswith(".")


def test_a_damaged_image_object_is_one_sentence(tmp_path):
    data = saved(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "PNG")
    with pytest.raises(VideoError, match="damaged, cut off or closed"):
        read_clip(Image.open(io.BytesIO(data[: len(data) // 2])))
    path = Path(tmp_path / "a.gif")
    path.write_bytes(animation("GIF"))
    closed = Image.open(path)
    closed.close()
    with pytest.raises(VideoError):
        read_clip(closed)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "JPEG2000", "GIF"])
def test_a_truncated_still_image_is_an_error(kind):
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    data = saved(Image.fromarray(noise), kind)
    with pytest.raises(VideoError, match="cut off"):
        read_clip(data[: len(data) * 9 // 10])


def test_limits_hold_for_images_in_memory():
    moving = Image.open(io.BytesIO(animation("GIF")))
    for source in (moving, Image.new("RGB", (64, 64)), np.zeros((64, 64, 4), np.uint8)):
        with pytest.raises(VideoError, match="exceed the limit of 1000 pixels"):
            read_clip(source, limits=Limits(max_pixels=1000))
    with pytest.raises(VideoError, match="need more than 0 MiB; give the animation as a file"):
        read_clip(moving, limits=Limits(memory_mib=0))


def box(kind: bytes, *parts: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, parts)), kind) + b"".join(parts)


def full(kind: bytes, version: int, flags: int, *parts: bytes) -> bytes:
    return box(kind, bytes([version]) + flags.to_bytes(3, "big"), *parts)


def hevc_tile(picture: np.ndarray, path: Path) -> tuple[bytes, bytes]:
    """(hvcC, sample) of one HEVC key frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx265", rate=1)
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
        stream.options = {"x265-params": "log-level=none:pools=1", "crf": "10"}
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = frame.reformat(format="yuv420p")
        frame.pts = 0
        for packet in (*stream.encode(frame), *stream.encode()):
            packet.pts = packet.dts = 0  # x265 leaves the decoding time of a lone frame to chance
            container.mux(packet)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return bytes(stream.codec_context.extradata), bytes(next(container.demux(stream)))


def heic(picture: np.ndarray, folder: Path, *, columns: int, rows: int, tile: int, moves: bytes) -> bytes:
    """A HEIC photo of columns x rows tiles; `picture` may be smaller than they are. moves: irot, imir."""
    height, width = picture.shape[:2]
    room = np.zeros((rows * tile, columns * tile, 3), np.uint8)
    room[:height, :width] = picture
    parts = [
        hevc_tile(room[y * tile : (y + 1) * tile, x * tile : (x + 1) * tile], folder / "tile.mkv")
        for y in range(rows)
        for x in range(columns)
    ]
    samples, count = [sample for _, sample in parts], len(parts)
    grid = bytes([0, 0, rows - 1, columns - 1]) + struct.pack(">HH", width, height)
    entries = [full(b"infe", 2, 0, struct.pack(">HH", 1, 0), b"grid", b"\0")]
    entries += [full(b"infe", 2, 1, struct.pack(">HH", i + 2, 0), b"hvc1", b"\0") for i in range(count)]
    tiles = struct.pack(f">HH{count}H", 1, count, *range(2, count + 2))
    known = [
        full(b"ispe", 0, 0, struct.pack(">II", tile, tile)),
        box(b"hvcC", parts[0][0]),
        full(b"ispe", 0, 0, struct.pack(">II", width, height)),
    ]
    turns = [box(kind, bytes([value])) for kind, value in zip((b"irot", b"imir"), moves, strict=False)]
    own = [3, *(4 + i for i in range(len(turns)))]
    links = struct.pack(">HB", 1, len(own)) + bytes(own)
    links += b"".join(struct.pack(">HB", i + 2, 2) + bytes([1, 0x82]) for i in range(count))

    def meta(start: int) -> bytes:
        places = struct.pack(">HHHHII", 1, 1, 0, 1, 0, len(grid))  # in idat
        at = start
        for i, sample in enumerate(samples):
            places += struct.pack(">HHHHII", i + 2, 0, 0, 1, at, len(sample))
            at += len(sample)
        return full(
            b"meta",
            *(0, 0),
            full(b"hdlr", 0, 0, b"\0" * 4, b"pict", b"\0" * 13),
            full(b"pitm", 0, 0, struct.pack(">H", 1)),
            full(b"iloc", 1, 0, bytes([0x44, 0]), struct.pack(">H", count + 1), places),
            full(b"iinf", 0, 0, struct.pack(">H", count + 1), *entries),
            full(b"iref", 0, 0, box(b"dimg", tiles)),
            box(
                b"iprp",
                box(b"ipco", *known, *turns),
                full(b"ipma", 0, 0, struct.pack(">I", count + 1), links),
            ),
            box(b"idat", grid),
        )

    head = box(b"ftyp", b"heic", b"\0" * 4, b"mif1heic")
    return head + meta(len(head) + len(meta(0)) + 8) + box(b"mdat", *samples)


@pytest.mark.parametrize(
    ("moves", "turns", "mirror"), [(b"", 0, False), (b"\1", 1, False), (b"\3\1", 3, True)]
)
@pytest.mark.quick(1)
def test_a_tiled_heic_photo_is_assembled_upright(tmp_path, moves, turns, mirror):
    vf.need_encoder("libx265")
    picture = vf.numbered(2730, 120, 72)
    data = heic(picture, tmp_path, columns=2, rows=2, tile=64, moves=moves)
    want = np.rot90(picture, turns)
    want = want[:, ::-1] if mirror else want
    for trusted in (True, False):
        clip = read_clip(data, 4, trusted=trusted)
        assert (clip.info.kind, clip.info.codec, clip.frames.shape) == ("image", "hevc", (1, *want.shape))
        assert (clip.info.height, clip.info.width) == want.shape[:2]
        assert np.abs(clip.frames[0].numpy().astype(int) - want).mean() < 12
    with pytest.raises(VideoError, match="'hevc' is not allowed"):
        probe(data, limits=Limits(codecs=("h264",)))


def test_a_heic_photo_without_its_tiles_is_refused(tmp_path):
    vf.need_encoder("libx265")
    data = heic(vf.numbered(1, 128, 64), tmp_path, columns=2, rows=1, tile=64, moves=b"")
    for bad in (data[:-200], data.replace(b"dimg", b"none"), data.replace(b"pitm", b"none"), data[:200]):
        with pytest.raises(VideoError):
            read_clip(bad, trusted=False)
