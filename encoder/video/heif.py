"""HEIC still images: finds the items of the file, has FFmpeg decode the tiles and assembles them.

A photo from a phone is a grid of tiles, each an image of its own; FFmpeg gives every tile as a stream and
leaves the rest to its caller. Only whole images and grids are read: overlays, depth and alpha are not.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from encoder.errors import VideoError
from encoder.video.containers import codec_name, open_container
from encoder.video.descriptors import open_file
from encoder.video.limits import Rules

BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"mif1"))
MAX_META = 1 << 22  # bytes of the box that describes all items: kilobytes in any photo


@dataclass(frozen=True)
class Heif:
    """The primary image: `columns` x `rows` tiles (item numbers, row by row) that cover width x height.

    transposes: Pillow transpositions that make it upright, in order.
    """

    width: int
    height: int
    columns: int
    rows: int
    tiles: tuple[int, ...]
    transposes: tuple[int, ...]

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height after the transposes."""
        turned = sum(transpose in (2, 4) for transpose in self.transposes) % 2  # ROTATE_90, ROTATE_270
        return (self.height, self.width) if turned else (self.width, self.height)


def read_item(path: str) -> Heif:
    """What the file's boxes say of its primary image. Raises VideoError where they make no sense."""
    try:
        with open_file(path) as file:
            return _primary_item(file)
    except (struct.error, IndexError, KeyError) as error:
        raise VideoError("its description of the picture is damaged; export it again") from error


def decode(path: str, heif: Heif, rules: Rules) -> Any:
    """The whole image, upright, as a Pillow RGB image. Raises VideoError for a tile that is missing."""
    from PIL import Image

    tiles: dict[int, Any] = {}
    with open_container(path, rules) as container:
        streams = {s.id: s for s in container.streams.video if s.id in heif.tiles}
        for stream in streams.values():
            rules.check_codec(codec_name(stream))
            rules.check_pixels(stream.codec_context.width, stream.codec_context.height)
        for packet in container.demux(list(streams.values())):
            for frame in packet.decode():
                rgb = frame.reformat(format="rgb24")
                plane = rgb.planes[0]
                size = (rgb.width, rgb.height)
                tile = Image.frombytes("RGB", size, bytes(plane), "raw", "RGB", plane.line_size, 1)
                tiles.setdefault(packet.stream.id, tile)
    if any(item not in tiles for item in heif.tiles):
        raise VideoError("not all of its tiles can be decoded; it is damaged or cut off, export it again")
    whole = Image.new("RGB", (heif.width, heif.height))
    wide, high = tiles[heif.tiles[0]].size
    for place, item in enumerate(heif.tiles):
        whole.paste(tiles[item], (place % heif.columns * wide, place // heif.columns * high))
    for transpose in heif.transposes:
        whole = whole.transpose(Image.Transpose(transpose))
    return whole


def _primary_item(file: Any) -> Heif:
    meta = _meta(file)
    boxes = dict(_boxes(meta[4:]))
    primary = _number(boxes[b"pitm"], 4, 2 if boxes[b"pitm"][0] == 0 else 4)
    kind = _kinds(boxes[b"iinf"])[primary]
    sizes, transposes = _properties(boxes[b"iprp"], primary)
    if kind in (b"hvc1", b"av01"):
        return Heif(*sizes, 1, 1, (primary,), transposes)
    if kind != b"grid":
        raise VideoError(f"its picture is of the kind {kind.decode(errors='replace')!r}; save it as JPEG")
    grid = _payload(file, boxes, primary)
    rows, columns, wide = grid[2] + 1, grid[3] + 1, 4 if grid[1] & 1 else 2
    width, height = _number(grid, 4, wide), _number(grid, 4 + wide, wide)
    tiles = _tiles(boxes[b"iref"], primary)
    if len(tiles) != rows * columns or not width or not height:
        raise VideoError("its number of tiles is wrong; export it again")
    return Heif(width, height, columns, rows, tiles, transposes)


def _meta(file: Any) -> bytes:
    """Content of the top-level box "meta"."""
    while len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        size = struct.unpack(">Q", file.read(8))[0] - 8 if size == 1 else size
        if kind == b"meta":
            if not 12 <= size <= MAX_META:
                break
            return bytes(file.read(size - 8))
        if size < 8:
            break
        file.seek(size - 8, 1)
    raise VideoError("it does not say which of its pictures to show; export it again")


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, content) of the boxes in a row."""
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if size < 8:
            return
        yield kind, data[at + 8 : at + size]
        at += size


def _number(data: bytes, at: int, width: int) -> int:
    if at + width > len(data):
        raise IndexError(at)
    return int.from_bytes(data[at : at + width], "big")


def _kinds(iinf: bytes) -> dict[int, bytes]:
    """Kind of each item."""
    kinds = {}
    for kind, entry in _boxes(iinf[6 if iinf[0] == 0 else 8 :]):
        if kind == b"infe" and entry[0] in (2, 3):
            wide = 2 if entry[0] == 2 else 4
            kinds[_number(entry, 4, wide)] = entry[6 + wide : 10 + wide]
    return kinds


def _tiles(iref: bytes, item: int) -> tuple[int, ...]:
    """The items of which an item is derived."""
    wide = 2 if iref[0] == 0 else 4
    for kind, entry in _boxes(iref[4:]):
        if kind == b"dimg" and _number(entry, 0, wide) == item:
            count = _number(entry, wide, 2)
            return tuple(_number(entry, wide + 2 + i * wide, wide) for i in range(count))
    return ()


def _properties(iprp: bytes, item: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Size of an item and the transposes that make it upright, in the order in which they are named."""
    parts = dict(_boxes(iprp))
    known = list(_boxes(parts[b"ipco"]))
    size, transposes = (0, 0), []
    for index in _associations(parts[b"ipma"], item):
        kind, value = known[index - 1] if index else (b"", b"")
        if kind == b"ispe":
            size = (_number(value, 4, 4), _number(value, 8, 4))
        elif kind == b"irot" and value[0] & 3:
            transposes.append(
                (0, 2, 3, 4)[value[0] & 3]
            )  # Pillow's ROTATE_90, 180, 270, counter-clockwise too
        elif kind == b"imir":
            transposes.append(0 if value[0] & 1 else 1)  # left and right change places, or top and bottom
    return size, tuple(transposes)


def _associations(ipma: bytes, item: int) -> list[int]:
    """Numbers, from 1, of the properties of an item."""
    wide_item, wide = 2 if ipma[0] == 0 else 4, 2 if ipma[3] & 1 else 1
    at = 8
    for _ in range(_number(ipma, 4, 4)):
        number, count = _number(ipma, at, wide_item), _number(ipma, at + wide_item, 1)
        at += wide_item + 1
        if number == item:
            mask = 0x7FFF if wide == 2 else 0x7F
            return [_number(ipma, at + i * wide, wide) & mask for i in range(count)]
        at += count * wide
    return []


def _payload(file: Any, boxes: dict[bytes, bytes], item: int) -> bytes:
    """The bytes of a small item, from the file or from the box "idat"."""
    iloc = boxes[b"iloc"]
    version, widths = iloc[0], (iloc[4] >> 4, iloc[4] & 15, iloc[5] >> 4, iloc[5] & 15 if iloc[0] else 0)
    wide_item = 2 if version < 2 else 4
    offset_wide, length_wide, base_wide, index_wide = widths
    count, at = _number(iloc, 6, wide_item), 6 + wide_item
    for _ in range(count):
        number = _number(iloc, at, wide_item)
        at += wide_item
        method = _number(iloc, at, 2) & 15 if version else 0
        at += (2 if version else 0) + 2
        base, at = _number(iloc, at, base_wide), at + base_wide
        extents, at = _number(iloc, at, 2), at + 2
        offset = _number(iloc, at + index_wide, offset_wide)
        length = _number(iloc, at + index_wide + offset_wide, length_wide)
        if number == item:
            if method == 1:
                return boxes[b"idat"][base + offset :][: min(length, 64)]
            file.seek(base + offset)
            return bytes(file.read(min(length, 64)))
        at += extents * (index_wide + offset_wide + length_wide)
    raise KeyError(item)
