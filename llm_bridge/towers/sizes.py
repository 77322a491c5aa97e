"""Work and memory of plain vision transformers, by their shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VitShape:
    """Shape of a vision transformer and of the projector behind it.

    patch_values: numbers of a patch. patches_per_cell: patches that become one embedding. projector: weights
    that each cell passes. windowed: blocks in which a patch sees at most `window` patches of its frame.
    """

    dim: int
    depth: int
    mlp_dim: int
    patch_values: int
    patches_per_cell: int
    projector: int
    windowed: int = 0
    window: int = 0

    def features(self, frames: int, embedded: int, computed: int, projected: int) -> list[float]:
        """Constant, embedding, linear and attention work in giga-MACs.

        embedded, computed: patches that are embedded, and that pass the blocks, of all frames, each of which
        sees its own only. projected: cells that pass the projector.
        """
        embed = embedded * self.patch_values * self.dim
        linear = self.depth * computed * (4 * self.dim**2 + 2 * self.dim * self.mlp_dim)
        seen = computed / max(1, frames)
        whole = self.depth - self.windowed
        attention = 2 * computed * self.dim * (whole * seen + self.windowed * min(seen, self.window))
        return [1.0, embed / 1e9, (linear + projected * self.projector) / 1e9, attention / 1e9]

    def mib(self, embedded: int, computed: int, itemsize: int) -> float:
        """Peak working memory, pixels included, in MiB."""
        entry = embedded * (2 * self.patch_values * 4 + self.dim * itemsize)
        block = computed * (2 * self.dim + max(6 * self.dim, 2 * self.mlp_dim)) * itemsize
        return max(entry, block) / 2**20
