"""The cost of a question before it is computed: formulas, and one calibration of speeds per machine."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.vision import Known
from encoder.budget import Budget, Plan, PlanTable
from encoder.cost import MIB, Speed, time_ms
from encoder.video.reader import VideoInfo, read_clip
from llm_bridge.assets.cache_dir import read_cached, write_cached
from llm_bridge.chat_model import ChatModel
from llm_bridge.compute_worker import ComputeWorker

QUESTION_TOKENS = 48  # template, time sentence and a short question around the visual embeddings
PREFILL_SIZES = (64, 256, 512)
# A cached calibration holds while a prefill takes at most this many times more, or less, than it predicts.
DRIFT = 1.6
# Share of an answer's own timing in what is predicted next, and how far one timing can move it.
LEARNING, MOST = 0.3, 8.0
SHORTEST_S = 2e-3  # timings below say more about the clock than about the machine
FEATURES = {"decode": 3, "encode": 4, "prefill": 3}  # number of features that a part's speed is fitted to
LONGEST_MS = 1e7  # per feature: hours, which no machine takes
# Decoders seek between samples: at most about this many frames are decoded for each.
FRAMES_PER_SAMPLE = 130


NOTHING = Known()


@dataclass(frozen=True)
class Estimate:
    """Frames x resolution, tokens, giga multiply-accumulates, seconds to the first word, MiB it adds."""

    frames: int
    height: int
    width: int
    seen_tokens: int
    kept_tokens: int
    llm_tokens: int
    encoder_gmacs: float
    llm_gmacs: float
    share_of_full: float
    decode_s: float
    encode_s: float
    prefill_s: float
    first_token_s: float
    peak_mib: float

    def __str__(self) -> str:
        return (
            f"{self.frames} frames x {self.height}x{self.width}: {self.kept_tokens} of {self.seen_tokens} "
            f"tokens kept, {self.llm_tokens} into the language model, "
            f"{self.encoder_gmacs + self.llm_gmacs:.1f} GMACs ({100 * self.share_of_full:.0f} % of full), "
            f"about {self.first_token_s:.2f} s to the first word, {self.peak_mib:.0f} MiB"
        )


def add(estimates: Sequence[Estimate]) -> Estimate:
    """What several cost together: all is summed, but for the picture's size and the share of the full plan,
    which are the first one's."""
    summed = {
        field.name: sum(getattr(one, field.name) for one in estimates)
        for field in fields(Estimate)
        if field.name not in ("height", "width", "share_of_full")
    }
    return replace(estimates[0], **summed)


def llm_macs(model: ChatModel, tokens: int) -> int:
    """Multiply-accumulates of a prefill: each weight outside the embedding once per token, and attention."""
    config = model.llm.model.config.get_text_config()
    embedding = model.llm.model.get_input_embeddings().weight.numel()
    weights = model.llm.parameters - embedding
    attention = config.num_hidden_layers * tokens * tokens * config.hidden_size
    return weights * tokens + attention


class PriceEstimator:
    """Plans and prices for one model; its speed on this machine is measured when first needed.

    worker: measures in its thread, so that nothing else of the model is computed meanwhile.
    table: in place of the model's own plan table.
    """

    def __init__(self, model: ChatModel, worker: ComputeWorker, table: PlanTable | None = None) -> None:
        self._model, self._worker = model, worker
        self._tower = model.tower
        self._table = table or self._tower.plan_table
        self._calibration: Calibration | None = None
        # May be taken again in the same thread: an answer that garbage is collected of learns too.
        self._lock = threading.RLock()
        self._factors = dict.fromkeys(FEATURES, 1.0)  # measured by answers over calibrated

    @property
    def calibrated(self) -> bool:
        """Whether the speed is known, so that estimates take no time."""
        return self._calibration is not None

    @property
    def calibration(self) -> Calibration:
        """Speed of this model on this machine, measured once (some seconds) and cached on disk."""
        with self._lock:
            if self._calibration is None:
                self._calibration = self._worker.run(Calibration.load_or_measure, self._model)
            return self._calibration

    def plan(self, info: VideoInfo, budget: Budget) -> Plan:
        """Frames, resolution and kept tokens that a budget buys; one in seconds needs the calibration."""
        space, table = self._tower.space, self._table
        if budget.seconds is None:
            return budget.plan(info, space, table=table)
        calibration = self.calibration

        def first_token_s(plan: Plan) -> float:
            return sum(self._part_seconds(info, plan, calibration))

        return budget.plan(info, space, table=table, predict_s=first_token_s)

    def estimate(
        self, info: VideoInfo, plan: Plan, known: Known = NOTHING, new_tokens: int | None = None
    ) -> Estimate:
        """Cost of a plan on one video, beside that of the full plan.

        known: what is in the caches already, and costs no time. new_tokens: positions that the language model
        must read where it has read the rest before; None: all.
        """
        model, tower, calibration = self._model, self._tower, self.calibration
        full = Budget.full().plan(info, tower.space)
        encoder_part, llm_part = tower.macs(plan), llm_macs(model, _prompt_tokens(model, plan))
        full_macs = tower.macs(full) + llm_macs(model, _prompt_tokens(model, full))
        decode_s, encode_s, prefill_s = self._part_seconds(info, plan, calibration, known, new_tokens)
        return Estimate(
            frames=plan.frames,
            height=plan.height,
            width=plan.width,
            seen_tokens=plan.grid.size,
            kept_tokens=plan.keep,
            llm_tokens=tower.prompt_tokens(plan),
            encoder_gmacs=encoder_part / 1e9,
            llm_gmacs=llm_part / 1e9,
            share_of_full=(encoder_part + llm_part) / full_macs,
            decode_s=decode_s,
            encode_s=encode_s,
            prefill_s=prefill_s,
            first_token_s=decode_s + encode_s + prefill_s,
            peak_mib=_peak_mib(model, info, plan),
        )

    def learn(self, part: str, predicted_s: float, took_s: float) -> None:
        """Correct the prediction of a part ("decode", "encode", "prefill") by what it really took.

        predicted_s: as predicted with what had been learnt until then.
        """
        if predicted_s < SHORTEST_S or took_s < SHORTEST_S:
            return
        with self._lock:
            wanted = min(MOST, max(1 / MOST, took_s / predicted_s))
            self._factors[part] *= wanted**LEARNING

    def learn_question(
        self,
        videos: Sequence[tuple[VideoInfo, Plan, float, float]],
        prompt_tokens: int,
        cached_tokens: int,
        prefill_s: float,
    ) -> None:
        """Learn from a question's own timings: of each video its seconds of decoding and encoding, 0 where
        nothing was computed; positions of the prompt, how many of them were not computed, and the seconds of
        the rest. Does nothing before the machine was measured."""
        if (calibration := self._calibration) is None:
            return
        for info, plan, decode_s, encode_s in videos:
            decode, encode, _ = self._part_seconds(info, plan, calibration)
            self.learn("decode", decode, decode_s)
            self.learn("encode", encode, encode_s)
        self.learn("prefill", self._prefill_s(calibration, prompt_tokens, cached_tokens), prefill_s)

    def _part_seconds(
        self,
        info: VideoInfo,
        plan: Plan,
        calibration: Calibration,
        known: Known = NOTHING,
        new_tokens: int | None = None,
    ) -> tuple[float, float, float]:
        """Seconds of decoding, encoding and prefill."""
        decode = calibration.decode.milliseconds(decode_features(info, plan.frames)) / 1e3
        encode = calibration.encode.milliseconds(self._tower.features(plan)) / 1e3
        total = _prompt_tokens(self._model, plan)
        before = 0 if new_tokens is None else max(0, total - new_tokens)
        return (
            0.0 if known.decoded else decode * self._factors["decode"],
            0.0 if known.encoded else encode * self._factors["encode"],
            self._prefill_s(calibration, total, before),
        )

    def _prefill_s(self, calibration: Calibration, tokens: int, before: int) -> float:
        """Seconds of a prefill of so many positions, of which those before are in the KV cache."""
        features = [1.0, float(tokens - before), float(tokens) ** 2 - float(before) ** 2]
        return calibration.prefill.milliseconds(features) / 1e3 * self._factors["prefill"]


def _prompt_tokens(model: ChatModel, plan: Plan) -> int:
    return model.tower.prompt_tokens(plan) + QUESTION_TOKENS


def _peak_mib(model: ChatModel, info: VideoInfo, plan: Plan) -> float:
    """Memory that a question adds: decoded frames, and the larger of the encoder's activations and the KV."""
    frames = plan.frames * min(info.width * info.height, (4 * plan.width) ** 2) * 3 / MIB
    encoder = model.tower.mib(plan)
    per_token = model.llm.kv_bytes_per_token + 24 * model.llm.hidden_size
    return frames + max(encoder, _prompt_tokens(model, plan) * per_token / MIB)


def decode_features(info: VideoInfo, frames: int) -> list[float]:
    """Constant, megapixels decoded, megapixels converted."""
    pixels = info.pixels / 1e6
    total = 1 if info.kind == "image" else info.frames or int(info.duration_s * 30)
    decoded = 0 if info.kind == "frames" else min(total, frames * FRAMES_PER_SAMPLE)
    return [1.0, decoded * pixels, frames * pixels]


def _prefill_features(tokens: int) -> list[float]:
    return [1.0, float(tokens), float(tokens) ** 2]


@dataclass(frozen=True)
class Calibration:
    """Fitted speeds of reading video, encoding and prefilling, in ms per feature."""

    decode: Speed
    encode: Speed
    prefill: Speed

    @staticmethod
    def load_or_measure(model: ChatModel) -> Calibration:
        """From the cache of this machine, or measured now (some seconds) and cached.

        One that no longer holds is replaced: what was measured on a busy machine would stay wrong.
        """
        name = f"calibration/{_fingerprint(model)}.json"
        calibration = read_cached(name, Calibration.of)
        if calibration is None or not calibration.holds(model):
            calibration = Calibration.measure(model)
            write_cached(name, asdict(calibration))
        return calibration

    @staticmethod
    def of(values: dict[str, Any]) -> Calibration:
        """From plain values; raises ValueError, KeyError or TypeError for what no measurement gives."""
        if values.keys() != FEATURES.keys():
            raise ValueError("not the parts of a calibration")
        return Calibration(**{name: _speed(values[name]["weights"], FEATURES[name]) for name in FEATURES})

    def holds(self, model: ChatModel) -> bool:
        """Whether a short prefill takes about as long now as predicted; takes some tenths of a second."""
        tokens = PREFILL_SIZES[0]
        predicted = self.prefill.milliseconds(_prefill_features(tokens))
        return predicted / DRIFT < prefill_ms(model, tokens) < predicted * DRIFT

    @staticmethod
    @torch.inference_mode()
    def measure(model: ChatModel) -> Calibration:
        """Time the parts on this machine; with a bar in a terminal."""
        from tqdm import tqdm

        label = "Measuring how fast this machine is, once"
        with tqdm(total=len(PREFILL_SIZES) + 2, desc=label, disable=None, leave=False) as bar:
            encoded = model.tower.measure()
            bar.update()
            times = []
            for tokens in PREFILL_SIZES:
                times.append(prefill_ms(model, tokens))
                bar.update()
            prefilled = Speed.fit([_prefill_features(n) for n in PREFILL_SIZES], times)
            return Calibration(measure_decode(), encoded, prefilled)


def _speed(weights: list[Any], features: int) -> Speed:
    """Raises ValueError for anything but `features` plausible times that are not all 0."""
    if not isinstance(weights, list) or len(weights) != features:
        raise ValueError("not the features of this version")
    if not all(type(w) in (int, float) and 0 <= w <= LONGEST_MS for w in weights) or not any(weights):
        raise ValueError("not times")
    return Speed(tuple(map(float, weights)))


@torch.inference_mode()
def prefill_ms(model: ChatModel, tokens: int) -> float:
    """Milliseconds of a prefill of so many tokens, measured now."""
    return time_ms(lambda: model.llm.prefill_once(tokens), model.llm.device)


def measure_decode() -> Speed:
    """Read clips made for the purpose, of two sizes and two numbers of samples."""
    rows, times = [], []
    for width, height in ((320, 180), (960, 540)):
        video = _test_video(width, height)
        info = read_clip(video, 1).info
        for frames in (1, 16):
            rows.append(decode_features(info, frames))
            times.append(time_ms(lambda v=video, n=frames: read_clip(v, n), torch.device("cpu"), repeats=2))  # type: ignore[misc]
    return Speed.fit(rows, times)


def _test_video(width: int, height: int, frames: int = 90) -> bytes:
    """A drifting pattern as mp4 (h264 where this build has it)."""
    import av

    buffer = io.BytesIO()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    pattern = np.random.default_rng(0).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    picture = pattern.repeat(8, 0).repeat(8, 1)[:height, :width]
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 3 * index, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def _fingerprint(model: ChatModel) -> str:
    """What the speeds depend on: machine, device, threads, library, parts and their precision."""
    import platform

    device = model.tower.device
    name = (
        torch.get_device_module(device).get_device_name(device)
        if device.type == "cuda"
        else platform.processor()
    )
    parts: list[Any] = [
        name,
        platform.node(),
        str(device),
        torch.get_num_threads(),
        torch.__version__,
        *model.tower.fingerprint(),
        Path(model.llm.name).name,
        str(model.llm.dtype),
        model.llm.quantize or model.llm.stored_as,
        3,  # version of the features
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
