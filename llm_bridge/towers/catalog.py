"""Stock video models by name: what `fluxchat models` lists.

Parameters are counted from the shapes in the models' published configurations, those of the vision tower and
its projector, which stay in 16 bit, apart; licences and the precision of the files as the hub shows them.
Memory is that of the weights, to which a question adds what `fluxchat estimate` says. Other models of a
supported kind work by their names too.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of a parameter in memory; 4 bit: with the scales of its groups, and embeddings in 16 bit.
PER_PARAMETER = {"bf16": 2.0, "8bit": 1.1, "4bit": 0.65}
GIB = 2**30


@dataclass(frozen=True)
class StockEntry:
    """A model on the hub. parameters: in millions; vision: the tower's. licence: SPDX name, or its own.

    published: bytes of a parameter in its files; loaded, it has two.
    """

    name: str
    kind: str
    parameters: int
    vision: int
    licence: str
    published: int = 2

    def memory_gib(self, precision: str) -> float:
        """Of its weights at a precision of PER_PARAMETER."""
        language = (self.parameters - self.vision) * PER_PARAMETER[precision]
        return 1e6 * (language + self.vision * PER_PARAMETER["bf16"]) / GIB

    @property
    def download_gb(self) -> float:
        """Of its weights as they are published."""
        return self.parameters * self.published / 1e3

    def fits(self, memory_gib: float) -> str | None:
        """The best precision whose weights take at most 80 % of the memory; None: no one does."""
        return next((name for name in PER_PARAMETER if self.memory_gib(name) <= 0.8 * memory_gib), None)


CATALOG = (
    StockEntry("HuggingFaceTB/SmolVLM2-256M-Video-Instruct", "smolvlm", 256, 94, "Apache-2.0", 4),
    StockEntry("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "smolvlm", 507, 98, "Apache-2.0", 4),
    StockEntry("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "smolvlm", 2247, 434, "Apache-2.0", 4),
    StockEntry("Qwen/Qwen3-VL-2B-Instruct", "qwen3_vl", 2128, 407, "Apache-2.0"),
    StockEntry("Qwen/Qwen3-VL-4B-Instruct", "qwen3_vl", 4438, 415, "Apache-2.0"),
    StockEntry("Qwen/Qwen3-VL-8B-Instruct", "qwen3_vl", 8767, 576, "Apache-2.0"),
    StockEntry("Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl", 3755, 669, "Qwen research"),
    StockEntry("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", 8292, 677, "Apache-2.0"),
    StockEntry("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "llava_onevision", 894, 400, "Apache-2.0"),
    StockEntry("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava_onevision", 8031, 415, "Apache-2.0"),
)


def table(memory_gib: float) -> list[dict[str, str]]:
    """One row per model of a kind that is supported, for people; memory_gib: of this machine's device."""
    from llm_bridge.towers.stock import kinds

    rows = []
    for entry in CATALOG:
        if entry.kind not in kinds():
            continue
        best = entry.fits(memory_gib)
        rows.append(
            {
                "model": entry.name,
                "parameters": f"{entry.parameters / 1e3:.1f} B",
                "download": f"{entry.download_gb:.1f} GB",
                **{name: f"{entry.memory_gib(name):.1f}" for name in PER_PARAMETER},
                "fits here": {None: "no", "bf16": "yes"}.get(best, f"--quantize {best}"),
                "licence": entry.licence,
            }
        )
    return rows
