"""Speech to text by faster-whisper (extra `speech`), a stretch of sound at a time.

    listener = Listener()                      # the model that `fluxchat fetch --speech` gets
    transcript = listener.listen("talk.mp4")

Where nobody speaks (silence, noise, music) a voice detector and the model's own doubt leave no lines.
"""

from __future__ import annotations

import os
import threading
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from app.speech.transcript import Line, Transcript
from app.speech.weights import MODELS, local_speech_model
from encoder.errors import ConfigError, ModelError
from encoder.video.limits import DEFAULT_LIMITS, Limits
from encoder.video.reader import probe
from encoder.video.sound import Sound, read_sound
from llm_bridge.model_files.checks import first_line

STRETCH_S = 600.0  # seconds of sound that are held at once: 19 MB
SILENT, DOUBTED = 0.6, -1.0  # more likely no speech than this, and less sure of the words than that
MODEL = "FLUXCHAT_SPEECH_MODEL"

Progress = Callable[[float], object]  # told how much of a video has been heard, 0 to 1


class SpeechModel(Protocol):
    """Turns sound into lines."""

    def lines(self, sound: Sound, language: str | None, heard: Progress) -> tuple[list[Line], str]:
        """The lines, with times of the video, and the language they are in ("" without lines).

        heard: told how much of the sound has been heard, 0 to 1.
        """
        ...

    def check(self, language: str | None) -> None:
        """Raises ConfigError for a language that it does not know; None is any."""
        ...


class WhisperModel:
    """A Whisper model of faster-whisper. source: a folder, or one of its names; default: the one fetched.

    Raises ConfigError without the extra, ModelError for a model that cannot be loaded.
    """

    def __init__(self, source: str | Path | None = None, device: str = "cpu") -> None:
        try:
            import faster_whisper
        except ImportError:
            raise ConfigError("Speech needs faster-whisper: pip install 'fluxchat[speech]'.") from None
        fetched = source is None or (source in MODELS and MODELS[str(source)].folder.exists())
        folder = local_speech_model(None if source is None else str(source)) if fetched else Path(str(source))
        name = str(folder.expanduser())
        try:
            self._model: Any = faster_whisper.WhisperModel(
                name, device=device, compute_type="int8" if device == "cpu" else "default"
            )
        except Exception as error:
            raise ModelError(f"Cannot load the speech model {name}: {first_line(error)}.") from error

    def check(self, language: str | None) -> None:
        """As a SpeechModel."""
        known = self._model.supported_languages
        if language is not None and language not in known:
            raise ConfigError(
                f"The speech model knows no language {language!r} (it knows {', '.join(known[:5])}"
                f"{' ...' if len(known) > 5 else ''}): `fluxchat fetch --speech base` gets one of "
                f"99, or name another with {MODEL} or --speech-model."
            )

    def lines(self, sound: Sound, language: str | None, heard: Progress) -> tuple[list[Line], str]:
        """As a SpeechModel."""
        self.check(language)
        segments, info = self._model.transcribe(
            sound.samples.to(torch.float32).div_(32768).numpy(),
            language=language,
            beam_size=1,
            vad_filter=True,
            word_timestamps=True,  # else a line after silence may begin where the words before it end
            condition_on_previous_text=False,  # else one wrong line is said again and again
        )
        lines = []
        for segment in segments:
            heard(min(1.0, segment.end / sound.seconds))
            unsure = segment.no_speech_prob > SILENT and segment.avg_logprob < DOUBTED
            text = unicodedata.normalize("NFC", " ".join(segment.text.split()))
            if text and not unsure:
                start_s = sound.start_s + min(max(0.0, float(segment.start)), sound.seconds)
                end_s = sound.start_s + min(float(segment.end), sound.seconds)
                lines.append(Line(round(start_s, 2), round(max(start_s, end_s), 2), text))
        return lines, info.language if lines else ""


class Listener:
    """Transcribes videos, one at a time. model: made when it is first needed; source: of a WhisperModel.

    Safe to use from many threads.
    """

    def __init__(self, source: str | Path | None = None, *, model: SpeechModel | None = None) -> None:
        self._source = source or os.environ.get(MODEL) or None
        self._model, self._given, self._lock = model, model, threading.Lock()

    @property
    def again(self) -> Callable[[], Listener]:
        """Makes such a Listener in another process, of another machine perhaps."""
        return partial(Listener, self._source, model=self._given)

    def ready(self, language: str | None = None) -> SpeechModel:
        """The model; raises ConfigError or ModelError where it is not there or lacks the language."""
        with self._lock:
            if self._model is None:
                self._model = WhisperModel(self._source)
            self._model.check(language)
            return self._model

    def listen(
        self,
        source: Any,
        start_s: float = 0.0,
        end_s: float | None = None,
        *,
        language: str | None = None,
        trusted: bool = True,
        limits: Limits = DEFAULT_LIMITS,
        name: str | None = None,
        progress: Progress = lambda _: None,
    ) -> Transcript:
        """What is said in a video from start_s to end_s (default: all of it).

        language: a code as "de"; None recognises it, at each stretch. progress: told how much
        has been heard, 0 to 1. source, trusted, limits, name: as in `read_clip`.
        Raises VideoError, ConfigError and ModelError: one sentence.
        """
        model = self.ready(language)
        info = probe(source, trusted=trusted, limits=limits, name=name)
        end_s = info.duration_s if end_s is None else min(end_s, info.duration_s)
        lines: list[Line] = []
        languages: list[str] = []
        sounding = False
        for begin, end in _stretches(start_s, end_s):
            sound = read_sound(source, begin, end, trusted=trusted, limits=limits, name=name)
            if sound is None:
                break
            sounding = True

            def heard(share: float, begin: float = begin, end: float = end) -> None:
                progress((begin + share * (end - begin) - start_s) / (end_s - start_s))

            with self._lock:
                said, spoken = model.lines(sound, language, heard)
            lines += said
            languages += [spoken] * len(said)
            heard(1.0)
        return Transcript(tuple(lines), max(languages, key=languages.count, default=""), sounding)


def _stretches(start_s: float, end_s: float) -> Iterator[tuple[float, float]]:
    while start_s < end_s:
        # No short rest, in which little is understood.
        end = end_s if end_s - start_s < 1.5 * STRETCH_S else start_s + STRETCH_S
        yield start_s, end
        start_s = end
