"""Reads and checks the header of a GGUF file before it is loaded: all that it lists must lie within the file.

The reader that transformers uses trusts it, and never ends with a list that claims too many entries.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type -> bytes
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_ENTRIES, MOST_TENSORS, LONGEST_LIST = 2**14, 2**18, 2**23
ALIGNMENT = 32


def check_gguf(path: Path) -> int:
    """Bytes of all tensors; raises OSError, or ValueError with a reason in a few words."""
    return _walked(path)[0]


def gguf_values(path: Path) -> dict[str, Any]:
    """Its entries but lists, by name; raises as `check_gguf` does."""
    return _walked(path)[1]


def with_head_width(config: Any, values: dict[str, Any]) -> Any:
    """A config of transformers that was read from a file of these entries, with the file's width of a head.

    Of some kinds, as Qwen3, transformers takes the width of its own default, whatever the file says.
    """
    kind = values.get("general.architecture")
    width = values.get(f"{kind}.attention.key_length")
    if width is None and (heads := values.get(f"{kind}.attention.head_count")):
        width = values.get(f"{kind}.embedding_length", 0) // heads  # llama.cpp's own default
    # Where layers have heads of several widths, or latent ones, this entry means another.
    alone = not any(hasattr(config, name) for name in ("global_head_dim", "kv_lora_rank"))
    if width and alone and isinstance(getattr(config, "head_dim", None), int):
        config.head_dim = int(width)
    return config


def _walked(path: Path) -> tuple[int, dict[str, Any]]:
    with open(path, "rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                walk = _Walk(data)
                return walk.run(), walk.values
        except (struct.error, IndexError):
            raise ValueError("its table ends in the middle") from None
        except ValueError as error:
            raise ValueError("it is empty" if "empty file" in str(error) else str(error)) from None


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0
        self.values: dict[str, Any] = {}

    def number(self, code: str) -> int:
        value = struct.unpack_from(f"<{code}", self.data, self.at)[0]
        self.at += struct.calcsize(code)
        return int(value)

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise IndexError

    def text(self) -> None:
        self.skip(self.number("Q"))

    def read_text(self) -> str:
        length = self.number("Q")
        self.skip(length)
        return self.data[self.at - length : self.at].decode(errors="replace")

    def value(self, kind: int) -> Any:
        """Skips a value and returns it; None for a list."""
        if kind == STRING:
            return self.read_text()
        if kind == ARRAY:
            item, count = self.number("I"), self.number("Q")
            if count > LONGEST_LIST:
                raise ValueError(f"its table has a list of {count} entries")
            if item == STRING:
                for _ in range(count):
                    self.text()
            elif item in SCALARS:
                self.skip(count * SCALARS[item])
            else:
                raise ValueError("its table has a list of unknown kind")
            return None
        if kind not in SCALARS:
            raise ValueError("its table has an entry of unknown kind")
        self.skip(SCALARS[kind])
        return struct.unpack_from(f"<{CODES[kind]}", self.data, self.at - SCALARS[kind])[0]

    def run(self) -> int:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if self.data[:4] != b"GGUF":
            raise ValueError("it is no GGUF file")
        self.at = 4
        if (version := self.number("I")) not in (2, 3):
            raise ValueError(f"it is of GGUF version {version}; 2 and 3 are known")
        tensors, entries = self.number("Q"), self.number("Q")
        if tensors > MOST_TENSORS or entries > MOST_ENTRIES:
            raise ValueError(f"its table lists {entries} entries and {tensors} tensors")
        for _ in range(entries):
            name = self.read_text()
            self.values[name] = self.value(self.number("I"))
        spans: list[tuple[int, int]] = []
        for _ in range(tensors):
            self.text()
            dimensions = self.number("I")
            if dimensions > 4:
                raise ValueError(f"it has a tensor of {dimensions} dimensions")
            count = math.prod(self.number("Q") for _ in range(dimensions))
            kind, offset = self.number("I"), self.number("Q")
            try:
                block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except (KeyError, ValueError):
                raise ValueError("it has a tensor of unknown kind") from None
            spans.append((offset, count // block * size))
        room = len(self.data) - self.at
        if any(offset + size > room for offset, size in spans):
            raise ValueError("it ends before its tensors do: it is cut off or damaged")
        total = sum(size for _, size in spans)
        if total > room + ALIGNMENT * len(spans):
            raise ValueError("its tensors overlap")
        return total
