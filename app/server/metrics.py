"""The metrics at /metrics, by prometheus_client: what is counted, and what is read when they are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from app.answer import Answer
    from app.model_slot import ModelSlot
    from app.server.media.store import MediaStore
    from app.server.scheduler import Scheduler

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_KINDS = ("seen", "kept", "visual", "prompt", "cached", "completion")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Values = float | Mapping[str, float]  # one value, or one for each value of a label


class Metrics:
    """The metrics of one server, in a registry of its own. Thread-safe."""

    def __init__(self, slot: ModelSlot, scheduler: Scheduler, store: MediaStore) -> None:
        self._registry = own = CollectorRegistry()
        self.requests = Counter(
            "fluxchat_requests_total", "Requests by route and status.", ["route", "status"], registry=own
        )
        self._answers = Counter(
            "fluxchat_answers_total", "Answers by how they ended.", ["finish"], registry=own
        )
        self._tokens = Counter(
            "fluxchat_tokens_total",
            "Tokens: seen and kept by the encoder, prompt, cached, answered.",
            ["kind"],
            registry=own,
        )
        self.first_token = Histogram(
            "fluxchat_first_token_seconds",
            "From a request's arrival to its answer's first piece.",
            buckets=SECONDS,
            registry=own,
        )
        self._answer = Histogram(
            "fluxchat_answer_seconds",
            "From a request's arrival to its answer's end.",
            buckets=SECONDS,
            registry=own,
        )
        self.gauge("fluxchat_running", "Answers being made.", lambda: scheduler.running)
        self.gauge("fluxchat_waiting", "Requests waiting for a turn.", lambda: scheduler.waiting)
        self.gauge("fluxchat_files", "Files that clients sent.", lambda: store.size[0])
        self.gauge("fluxchat_file_bytes", "Bytes of the files that clients sent.", lambda: store.size[1])
        self.counter(
            "fluxchat_decode_steps_total", "Forward passes that made tokens.", lambda: slot.chat.decoding[0]
        )
        self.counter(
            "fluxchat_decoded_tokens_total",
            "Tokens made; over the steps: how many answers shared one.",
            lambda: slot.chat.decoding[1],
        )

        def by_cache(name: str) -> Callable[[], Mapping[str, float]]:
            return lambda: {cache: getattr(stats, name) for cache, stats in slot.chat.caches.items()}

        self.gauge("fluxchat_cache_bytes", "Bytes kept for follow-up questions.", by_cache("bytes"), "cache")
        self.gauge("fluxchat_cache_entries", "Entries kept.", by_cache("entries"), "cache")
        self.counter("fluxchat_cache_hits_total", "Look-ups that found it.", by_cache("hits"), "cache")
        self.counter("fluxchat_cache_misses_total", "Look-ups that did not.", by_cache("misses"), "cache")

    def record(self, answer: Answer, seconds: float) -> None:
        """Count one answer, complete `seconds` after its request arrived."""
        self._answer.observe(seconds)
        self._answers.labels(finish=answer.finish).inc()
        for kind in TOKEN_KINDS:
            self._tokens.labels(kind=kind).inc(getattr(answer.usage, f"{kind}_tokens"))

    def gauge(self, name: str, help: str, read: Callable[[], Values], label: str | None = None) -> None:
        """Add a gauge that is read at each scrape; with a label, one value for each of its values."""
        self._registry.register(_Read(GaugeMetricFamily, name, help, read, label))

    def counter(self, name: str, help: str, read: Callable[[], Values], label: str | None = None) -> None:
        """The same for a count that is kept elsewhere."""
        self._registry.register(_Read(CounterMetricFamily, name, help, read, label))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format 0.0.4."""
        return generate_latest(_WithoutCreated(self._registry))


class _Read(Collector):
    """A metric whose values come from a function."""

    def __init__(
        self,
        family: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        help: str,
        read: Callable[[], Values],
        label: str | None,
    ) -> None:
        self._family, self._name, self._help, self._read, self._label = family, name, help, read, label

    def describe(self) -> list[Metric]:
        """Its name alone: registering must not read anything."""
        return [self._family(self._name, self._help)]

    def collect(self) -> Iterator[Metric]:
        """The values now."""
        metric = self._family(self._name, self._help, labels=[self._label] if self._label else [])
        values = self._read()
        if isinstance(values, Mapping):
            for label, value in values.items():
                metric.add_metric([label], value)
        else:
            metric.add_metric([], values)
        yield metric


class _WithoutCreated(Collector):
    """A registry without the `_created` series, a timestamp beside every counter and histogram."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """The metrics as Prometheus' text format has always had them."""
        for metric in self._registry.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric
