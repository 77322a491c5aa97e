"""Limits of one read: what it may cost, and the rules that a file must keep."""

from __future__ import annotations

from dataclasses import dataclass

from encoder.errors import VideoError

UNTRUSTED_CODECS = (
    *("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg"),
    *("gif", "png", "jpeg", "webp", "bmp"),
    "rawvideo",  # y4m
)
UNTRUSTED_SOUND = (
    *("aac", "mp3", "mp2", "opus", "vorbis", "flac", "ac3", "eac3", "alac"),
    *("pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_u8", "pcm_f32le"),
)


@dataclass(frozen=True)
class Rules:
    """Limits that a file must keep; None means no limit. Plain values, because they travel as JSON."""

    trusted: bool
    codecs: tuple[str, ...] | None
    max_pixels: int
    max_duration_s: float | None
    threads: int

    def check_codec(self, codec: str) -> None:
        """Raises VideoError, naming the codec, when it is not allowed."""
        if self.codecs is not None and codec not in self.codecs:
            allowed = ", ".join(self.codecs)
            raise VideoError(f"the codec {codec!r} is not allowed here; convert the file to one of {allowed}")

    def check_sound(self, codec: str) -> None:
        """Raises VideoError, naming the codec of a stranger's sound, when it is not allowed."""
        if not self.trusted and codec not in UNTRUSTED_SOUND:
            raise VideoError(f"its sound's codec {codec!r} is not allowed here; convert the sound to aac")

    def check_pixels(self, width: int, height: int) -> None:
        """Raises VideoError, naming size and limit, when frames are too large."""
        if width * height > self.max_pixels:
            raise VideoError(
                f"its frames of {width} x {height} pixels exceed the limit of {self.max_pixels} pixels; "
                "scale the video down first"
            )

    def check_duration(self, duration_s: float) -> None:
        """Raises VideoError when a video lasts longer than allowed."""
        if self.max_duration_s is not None and duration_s > self.max_duration_s:
            raise VideoError(
                f"it lasts {duration_s:.1f} s, more than the allowed {self.max_duration_s:g} s; cut it first"
            )


@dataclass(frozen=True)
class Limits:
    """What one read may cost; a VideoError says which limit a file breaks.

    seconds: wall clock. memory_mib: address space of the decoding child, and size of the frames returned.
    max_pixels: width x height of one frame. max_duration_s: None is any. max_bytes: size of the file.
    codecs: allowed codecs; None is UNTRUSTED_CODECS for untrusted sources and any codec for trusted ones.
    contained: refuse untrusted sources on a machine that cannot confine their decoder (`confine.report`); by
    default they are read there as well, with a child process, its limits and an empty environment only.
    """

    seconds: float = 20.0
    memory_mib: int = 3072
    max_pixels: int = 8192 * 8192
    max_duration_s: float | None = None
    max_bytes: int = 16 * 2**30
    codecs: tuple[str, ...] | None = None
    contained: bool = False

    def rules(self, trusted: bool, threads: int) -> Rules:
        """The part of the limits that the decoding child checks."""
        codecs = self.codecs if self.codecs is not None or trusted else UNTRUSTED_CODECS
        return Rules(trusted, codecs, self.max_pixels, self.max_duration_s, threads)


DEFAULT_LIMITS = Limits()
