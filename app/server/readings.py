"""What the server measures: the names of its metrics, and how an answer counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.server.metrics import Labels, Metrics

if TYPE_CHECKING:
    from app.answer import Answer
    from app.chat import VideoChat
    from app.server.media import MediaStore
    from app.server.scheduler import Scheduler


def declare(metrics: Metrics, chat: VideoChat, scheduler: Scheduler, store: MediaStore) -> None:
    """Say what there is to read."""
    metrics.counter("fluxchat_requests_total", "Requests by route and status.")
    metrics.counter("fluxchat_answers_total", "Answers by how they ended.")
    metrics.counter(
        "fluxchat_tokens_total", "Tokens: seen and kept by the encoder, prompt, cached, answered."
    )
    metrics.histogram("fluxchat_first_token_seconds", "From a request's arrival to its answer's first piece.")
    metrics.histogram("fluxchat_answer_seconds", "From a request's arrival to its answer's end.")
    metrics.read("fluxchat_running", "Answers being made.", lambda: scheduler.running)
    metrics.read("fluxchat_waiting", "Requests waiting for a turn.", lambda: scheduler.waiting)
    metrics.read("fluxchat_files", "Files that clients sent.", lambda: store.size[0])
    metrics.read("fluxchat_file_bytes", "Bytes of the files that clients sent.", lambda: store.size[1])
    metrics.read(
        "fluxchat_decode_steps_total", "Forward passes that made tokens.", lambda: chat.decoding[0], "counter"
    )
    metrics.read(
        "fluxchat_decoded_tokens_total",
        "Tokens made; over the steps: how many answers shared one.",
        lambda: chat.decoding[1],
        "counter",
    )

    def cache(name: str) -> dict[Labels, float]:
        return {(("cache", kind),): getattr(stats, name) for kind, stats in chat.caches.items()}

    metrics.read("fluxchat_cache_bytes", "Bytes kept for follow-up questions.", lambda: cache("bytes"))
    metrics.read("fluxchat_cache_entries", "What is kept.", lambda: cache("entries"))
    metrics.read("fluxchat_cache_hits_total", "Found in the cache.", lambda: cache("hits"), "counter")
    metrics.read("fluxchat_cache_misses_total", "Not found in it.", lambda: cache("misses"), "counter")


def record(metrics: Metrics, answer: Answer, seconds: float) -> None:
    """Count one answer, made `seconds` after its request arrived."""
    usage = answer.usage
    metrics.observe("fluxchat_answer_seconds", seconds)
    metrics.add("fluxchat_answers_total", finish=answer.finish)
    for kind in ("seen", "kept", "visual", "prompt", "cached", "completion"):
        metrics.add("fluxchat_tokens_total", getattr(usage, f"{kind}_tokens"), kind=kind)
