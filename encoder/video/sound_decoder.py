"""The sound of a video as 16 kHz mono samples, in step with its pictures: t = 0 is the first frame.

Runs inside the decoding child process (worker.py); imports neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from encoder.errors import VideoError
from encoder.video.containers import Header, codec_name, open_container
from encoder.video.limits import Rules

RATE = 16_000  # samples per second
SAMPLE_BYTES = 2
SLACK_S = 0.05  # how far sound may drift from its times before silence is put in, or some left out
SEEK_BACK_S = 1.0


def decode_sound(path: str, header: Header, start_s: float, end_s: float, rules: Rules) -> Iterator[bytes]:
    """Pieces of signed 16-bit samples from start_s to end_s; none where there is no sound that can be read.

    Silence stands where the file has none, also before its sound begins. Raises VideoError for a codec that
    is not allowed.
    """
    if header.kind == "image" or header.pillow:
        return
    import av

    with open_container(path, rules) as container:
        stream = container.streams.best("audio")
        if stream is None or stream.codec_context is None:
            return
        rules.check_sound(codec_name(stream))
        stream.codec_context.thread_count = rules.threads
        if start_s > SEEK_BACK_S:
            target = start_s - SEEK_BACK_S + header.start_s
            try:
                container.seek(round(target / stream.time_base), stream=stream)
            except av.error.FFmpegError:
                raise VideoError("it has no index to find a part by; copy it into an mp4 first") from None
        resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
        yield from _placed(
            _resampled(container, stream, resampler), header.start_s + start_s, end_s - start_s
        )


def _resampled(container: Any, stream: Any, resampler: Any) -> Iterator[tuple[float | None, bytes]]:
    """(time, samples) of what can be decoded, up to the end or to where the file is damaged."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
            frames = packet.decode()
        except (StopIteration, av.error.EOFError):
            return
        except av.error.InvalidDataError:  # one packet is damaged: its place stays silent
            continue
        except av.error.FFmpegError:
            return
        for frame in frames:
            time_s = None if frame.pts is None else float(frame.pts * frame.time_base)
            data = b"".join(
                bytes(out.planes[0])[: out.samples * SAMPLE_BYTES] for out in resampler.resample(frame)
            )
            yield time_s, data


def _placed(pieces: Iterator[tuple[float | None, bytes]], start_s: float, length_s: float) -> Iterator[bytes]:
    """The samples of a span, each at its time. start_s: a time stamp."""
    at, end = 0, round(length_s * RATE)
    for time_s, data in pieces:
        wanted = at if time_s is None else round((time_s - start_s) * RATE)
        if wanted > at + SLACK_S * RATE:
            wanted = min(wanted, end)
            while at < wanted:  # in pieces, however long it is silent
                count = min(wanted - at, RATE)
                yield bytes(count * SAMPLE_BYTES)
                at += count
        elif wanted < at - SLACK_S * RATE:
            data = data[(at - wanted) * SAMPLE_BYTES :]
        if at >= end:
            return
        data = data[: (end - at) * SAMPLE_BYTES]
        at += len(data) // SAMPLE_BYTES
        if data:
            yield data
