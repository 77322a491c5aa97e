"""Counters and histograms in Prometheus' text format, and nothing else."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
Labels = tuple[tuple[str, str], ...]


@dataclass
class _Histogram:
    counts: list[int] = field(default_factory=lambda: [0] * len(SECONDS))
    total: int = 0
    sum: float = 0.0


class Metrics:
    """Thread-safe. `gauges` are functions read when the text is made."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._help: dict[str, str] = {}
        self._counters: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._histograms: dict[str, _Histogram] = {}
        self._read: dict[str, tuple[str, Callable[[], Mapping[Labels, float] | float]]] = {}

    def counter(self, name: str, help: str) -> None:
        """Declare a counter; it shows once it has counted."""
        self._help[name] = help

    def histogram(self, name: str, help: str) -> None:
        """Declare a histogram of seconds."""
        self._help[name] = help
        self._histograms[name] = _Histogram()

    def read(
        self, name: str, help: str, value: Callable[[], Mapping[Labels, float] | float], kind: str = "gauge"
    ) -> None:
        """Declare a value, or several by labels, that is read when asked for."""
        self._help[name] = help
        self._read[name] = (kind, value)

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Count."""
        with self._lock:
            self._counters[name][tuple(sorted(labels.items()))] += amount

    def observe(self, name: str, seconds: float) -> None:
        """One more value of a histogram."""
        with self._lock:
            histogram = self._histograms[name]
            histogram.total += 1
            histogram.sum += seconds
            for index, bound in enumerate(SECONDS):
                histogram.counts[index] += seconds <= bound

    def text(self) -> str:
        """Everything, in Prometheus' text format 0.0.4."""
        lines: list[str] = []

        def head(name: str, kind: str) -> None:
            lines.extend((f"# HELP {name} {self._help[name]}", f"# TYPE {name} {kind}"))

        with self._lock:
            for name, values in self._counters.items():
                head(name, "counter")
                lines.extend(f"{name}{_labels(labels)} {value:g}" for labels, value in values.items())
            for name, histogram in self._histograms.items():
                head(name, "histogram")
                for bound, count in zip(SECONDS, histogram.counts, strict=True):
                    lines.append(f'{name}_bucket{{le="{bound:g}"}} {count}')
                lines.append(f'{name}_bucket{{le="+Inf"}} {histogram.total}')
                lines.extend((f"{name}_sum {histogram.sum:.6f}", f"{name}_count {histogram.total}"))
        for name, (kind, value) in self._read.items():
            head(name, kind)
            found = value()
            by_labels = found if isinstance(found, Mapping) else {(): found}
            lines.extend(f"{name}{_labels(labels)} {number:.12g}" for labels, number in by_labels.items())
        return "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = (
        (key, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for key, value in labels
    )
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped) + "}"
