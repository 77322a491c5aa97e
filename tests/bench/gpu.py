"""The proof on a GPU, in one command of a few minutes: right, then fast.

    python -m tests.bench.gpu                       every part, on the accelerator
    python -m tests.bench.gpu --only encoder decode
    python -m tests.bench.gpu --device cpu          the same paths with tiny models, to try the script itself

Needs torch, transformers, accelerate, safetensors, numpy and PyYAML (pytest for the part "tests"); no
network, no weights, no video: clips are random tensors, models are made on the card. Parts: tests (of the
encoder), golden (the official numbers in float32 and bfloat16), encoder (clips/s at each token count, as a
share of the card's own large matrix product: plain, compiled, and both replayed as CUDA graphs), first_token
(of one prompt, and of 8 at once), decode (tokens/s of 1, 8 and 32 answers at a time, also with prompts
prefilled in turn) and decode_static (the same, replayed as CUDA graphs), umt,
umt_compiled, umt_saving (64 clips, in less memory) and stage1 (training steps). A part that fails says so and
the others go on. Writes tests/bench/results/gpu.json, prints it as one JSON line; exit status 1 when a part
failed. With --only the file keeps what it held of the others; each part names its commit.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoder import layers
from encoder.compiling import compile_encoder
from encoder.config import BASE, MICRO, SMALL, FluxViTConfig
from encoder.cost import encoder_macs
from encoder.fluxvit import FluxViT
from encoder.graphs import EncoderGraphs
from encoder.tokens import VisionTokens
from llm_bridge.prefill import LONGEST_PIECE
from tests import ROOT
from tests.bench.common import environment, interleave, print_json, summary

RESULT = Path(__file__).parent / "results" / "gpu.json"
GOLDEN = ROOT / "tests" / "data" / "fluxvit_golden.safetensors"
LONGEST_S = 240  # that anything is waited for
ENCODER_TESTS = ("fluxvit", "selection", "positions", "merging", "checkpoint", "budget", "golden")


@dataclass(frozen=True)
class Scale:
    """How large everything is: `FULL` on a GPU, `TINY` to try the script on a CPU."""

    encoders: dict[str, FluxViTConfig]
    frames: int
    side: int
    keeps: tuple[int, ...]
    batch: int
    gemm: int
    n: int
    llm: dict[str, int]
    visual_tokens: tuple[int, ...]
    rows: tuple[int, ...]
    askers: int
    new_tokens: int
    teacher: dict[str, Any]
    teacher_tokens: int
    counts: tuple[int, ...]
    clips: int
    more_clips: int
    steps: int
    records: int


FULL = Scale(
    encoders={"small": SMALL.replace(gelu="tanh"), "base": BASE.replace(gelu="tanh")},  # as released weights
    frames=16,
    side=224,
    keeps=(3072, 2048, 1024, 512),
    batch=16,
    gemm=8192,
    n=10,
    # Qwen2.5-1.5B's shape
    llm={
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "vocab_size": 151936,
    },
    visual_tokens=(256, 1024),
    rows=(1, 8, 32),
    askers=8,
    new_tokens=64,
    teacher={},
    teacher_tokens=2048,
    counts=(2048, 1536, 1024),
    clips=16,
    more_clips=64,
    steps=30,
    records=16,
)
TINY = Scale(
    encoders={"micro": MICRO},
    frames=8,
    side=112,
    keeps=(512, 256, 128),
    batch=2,
    gemm=512,
    n=2,
    llm={"num_hidden_layers": 2, "max_position_embeddings": 2048},
    visual_tokens=(32, 128),
    rows=(1, 4),
    askers=4,
    new_tokens=8,
    teacher={
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 4,
        "pool_heads": 4,
        "pos_frames": 8,
        "pos_height": 8,
        "pos_width": 8,
        "clip_embed_dim": 32,
    },
    teacher_tokens=256,
    counts=(256, 192, 128),
    clips=2,
    more_clips=4,
    steps=2,
    records=2,
)


class Bench:
    """The parts, on one device at one scale."""

    def __init__(self, device: torch.device, scale: Scale) -> None:
        self.device, self.scale = device, scale
        torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32 where numbers are compared

    # -- right ----------------------------------------------------------------------------------------------

    def tests(self) -> dict[str, Any]:
        """The encoder's tests, as pytest runs them."""
        files = [f"tests/encoder/test_{name}.py" for name in ENCODER_TESTS]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=LONGEST_S)
        last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-300:]]
        counted = re.search(r"\d+ passed.*", done.stdout)
        if done.returncode:
            raise RuntimeError("\n".join(done.stdout.strip().splitlines()[-15:]) or last[0])
        return {"pytest": counted[0] if counted else last[0]}

    @torch.inference_mode()
    def golden(self) -> dict[str, Any]:
        """Largest difference from the official outputs in float32; in bfloat16 on the same tokens."""
        from safetensors import safe_open

        from encoder.golden import rule_model, rule_pixels

        with safe_open(str(GOLDEN), "pt") as file:
            cases = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            expected = {name: file.get_tensor(f"{name}/pooled") for name in cases}
        found: dict[str, Any] = {}
        models: dict[str, FluxViT] = {}
        for name, case in sorted(cases.items()):
            size = name.split("_")[0]
            if size not in models:
                models[size] = rule_model(size).to(self.device)
            model = models[size]
            pixels = rule_pixels(case["seed"], case["B"], case["T"], case["S"]).to(self.device)
            exact = model(pixels, case["keep"], compat_truncation=True)
            pooled = model.pool(exact, case["head"])
            difference = (pooled.cpu() - expected[name]).abs().max().item()
            half = copy.deepcopy(model).bfloat16()
            same = half.encode(half.embed(pixels.bfloat16()), exact.grids[0], torch.stack(exact.kept))
            rough = half.pool(same, case["head"]).float()
            cosine = torch.cosine_similarity(rough, pooled, dim=-1).min().item()
            found[name] = {"float32_difference": difference, "bfloat16_cosine": round(cosine, 5)}
            if difference > 1e-3 or cosine < 0.99:
                raise RuntimeError(f"{name} differs from the official outputs: {found[name]}")
        return found

    # -- fast: the encoder ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def encoder(self) -> dict[str, Any]:
        """bfloat16 clips/s at every token count, and the share of a product's rate: plain and compiled, each
        also replayed as CUDA graphs, which must give the same tokens."""
        scale, found = self.scale, dict[str, Any]()
        for size, config in scale.encoders.items():
            model = FluxViT(config).eval().requires_grad_(False).to(self.device, torch.bfloat16)
            pixels = torch.randn(scale.batch, 3, scale.frames, scale.side, scale.side)
            pixels = pixels.to(self.device, torch.bfloat16)
            seen = scale.frames * (scale.side // config.patch_size) ** 2
            found[size] = {"plain": self._rates(model, config, pixels, seen)}
            found[size]["replayed"] = self._rates(self._replayed(model, pixels), config, pixels, seen)
            found[size]["mixed"] = self._mixed(model, pixels)
            compile_encoder(model)
            found[size]["compiled"] = self._rates(model, config, pixels, seen)
            both = self._rates(self._replayed(model, pixels), config, pixels, seen)
            found[size]["compiled_replayed"] = both
            most, least = (str(keep) for keep in (max(scale.keeps), min(scale.keeps)))
            found[size]["speedup"] = round(both[least]["clips_per_s"] / both[most]["clips_per_s"], 2)
        return found

    def _mixed(self, model: FluxViT, pixels: Tensor) -> dict[str, Any]:
        """Clips that keep other counts in one batch, each its own or one in four: attention in one call, in
        one for each count, and as the model chooses.

        Raises RuntimeError where a clip's tokens are others than alone.
        """
        keeps, found = self.scale.keeps, dict[str, Any]()
        chooses = layers.attends_packed

        def attending(choice: Callable[..., bool], counts: list[int]) -> Callable[[], VisionTokens]:
            def run() -> VisionTokens:
                layers.attends_packed = choice
                try:
                    return model(pixels, counts)
                finally:
                    layers.attends_packed = chooses

            return run

        for name, step in (("each_its_own", 1), ("four_counts", 0)):
            counts = [keeps[clip % len(keeps)] - clip * step for clip in range(len(pixels))]
            cases: dict[str, Callable[[], object]] = {
                "in_one_call": attending(lambda q, _: q.device.type == "cuda", counts),
                "one_for_each": attending(lambda *_: False, counts),
                "chosen": attending(chooses, counts),
            }
            for clip, tokens in enumerate(attending(lambda q, _: q.device.type == "cuda", counts)().split()):
                alone = model(pixels[clip : clip + 1], counts[clip]).packed
                cosine = torch.cosine_similarity(tokens.float(), alone.float(), dim=-1).min()
                if cosine < 0.99:
                    raise RuntimeError(f"{counts[clip]} tokens among others: cosine {cosine:.4f} to alone")
            samples = interleave(
                {key: self._waited(case) for key, case in cases.items()}, self.scale.n, warmup=2
            )
            found[name] = {key: summary(seconds) for key, seconds in samples.items()}
        return found

    def _replayed(self, model: FluxViT, pixels: Tensor) -> EncoderGraphs:
        """The model in fixed buffers, on CUDA as graphs; raises RuntimeError where the tokens differ."""
        replayed = EncoderGraphs(model, devices=(self.device.type,))
        for keep in self.scale.keeps:
            expected = model(pixels, keep)
            for _ in range(3):  # plain, recorded, replayed
                tokens = replayed(pixels, keep)
                same = torch.equal(torch.stack(tokens.kept), torch.stack(expected.kept))
                cosine = torch.cosine_similarity(tokens.packed.float(), expected.packed.float(), dim=-1).min()
                if not same or cosine < 0.99:
                    raise RuntimeError(f"Replayed at {keep} tokens: same choice {same}, cosine {cosine:.4f}")
        if not replayed.recorded:
            raise RuntimeError("no pass was recorded")
        return replayed

    def _rates(
        self, model: Callable[[Tensor, int], object], config: FluxViTConfig, pixels: Tensor, seen: int
    ) -> dict[str, Any]:
        scale = self.scale
        matrix = torch.randn(scale.gemm, scale.gemm).to(self.device, torch.bfloat16)
        cases: dict[str, Callable[[], object]] = {"gemm": self._waited(lambda: matrix @ matrix)}
        for count in scale.keeps:
            cases[str(count)] = self._waited(lambda keep=count: model(pixels, keep))  # type: ignore[misc]
        samples = interleave(cases, scale.n, warmup=2)
        gemm = summary(samples.pop("gemm"))
        rate = scale.gemm**3 / gemm["median_ms"] * 1e3
        found: dict[str, Any] = {"gemm_tflops": round(2 * rate / 1e12, 2), "gemm_spread": gemm["spread"]}
        for keep, seconds in samples.items():
            row = summary(seconds)
            macs = encoder_macs(config, seen, int(keep)) * len(pixels)
            found[keep] = {
                "clips_per_s": round(len(pixels) / row["median_ms"] * 1e3, 1),
                "gemm_share": round(macs / row["median_ms"] * 1e3 / rate, 3),
                **row,
            }
        return found

    def _waited(self, run: Callable[[], object]) -> Callable[[], None]:
        def timed() -> None:
            run()
            self._wait()

        return timed

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    # -- fast: answers --------------------------------------------------------------------------------------

    def first_token(self) -> dict[str, Any]:
        """Milliseconds from a prompt with visual tokens to the first word, nothing cached: of one prompt, in
        pieces as long as the device's and as a CPU's, and of several at once, prefilled together and in turn,
        to the last one's."""
        from llm_bridge.compute_worker import ComputeWorker

        scale, llm, found = self.scale, self._llm(), dict[str, Any]()
        worker = ComputeWorker(llm, scale.askers, prefill_together=True)
        for count in scale.visual_tokens:

            def alone(count: int = count) -> None:
                _read(self._generation(llm, count, 1))

            def several(together: bool, count: int = count) -> None:
                worker._prefills_together = together
                _read_all([self._generation(llm, count, 1, worker) for _ in range(scale.askers)])

            cases: dict[str, Callable[[], object]] = {
                f"{count}": alone,
                f"{count}_pieces_of_{LONGEST_PIECE}": partial(_in_short_pieces, alone),
                f"{count}_of_{scale.askers}": partial(several, True),
                f"{count}_of_{scale.askers}_in_turn": partial(several, False),
            }
            waited = {name: self._waited(case) for name, case in cases.items()}
            samples = interleave(waited, scale.n, warmup=2)
            found |= {name: summary(seconds) for name, seconds in samples.items()}
        worker.close()
        return found

    def decode(self) -> dict[str, Any]:
        """Tokens per second of several answers decoded together, and each answer's own share."""
        return self._decode(static=False)

    def decode_static(self) -> dict[str, Any]:
        """The same in buffers of fixed shape, on CUDA as graphs; fails where the model fell back."""
        return self._decode(static=True)

    def _decode(self, *, static: bool) -> dict[str, Any]:
        from llm_bridge.compute_worker import ComputeWorker

        llm, found = self._llm(), dict[str, Any]()
        for rows in self.scale.rows:
            worker = ComputeWorker(llm, rows, static=static, prefill_together=True)
            self._answers(llm, worker, rows)  # warms up
            in_turn: dict[str, Any] = {}
            if rows > 1:
                worker._prefills_together = False
                in_turn = {"prefilled_in_turn": self._answers(llm, worker, rows)}
                worker._prefills_together = True
            found[str(rows)] = self._answers(llm, worker, rows) | in_turn
            worker.close()
            if (worker._static is not None) != static:
                raise RuntimeError(f"{rows} answers were not decoded in static buffers")
        return found

    def _answers(self, llm: Any, worker: Any, rows: int) -> dict[str, Any]:
        """The rates of answers that begin at once."""
        count, new = self.scale.visual_tokens[0], self.scale.new_tokens
        answers = [self._generation(llm, count, new, worker) for _ in range(rows)]
        steps, prefills, began = worker.steps, worker.prefills, time.perf_counter()
        _read_all(answers)
        self._wait()
        seconds = time.perf_counter() - began
        made = sum(answer.stats.completion_tokens for answer in answers)
        alone = [answer.stats.tokens_per_s for answer in answers]
        return {
            "tokens_per_s": round(made / seconds, 1),
            "tokens_per_s_of_an_answer": round(sum(alone) / rows, 1),
            "tokens": made,
            "steps": worker.steps - steps,
            "prefills": worker.prefills - prefills,
            "last_first_token_ms": round(1e3 * max(answer.stats.first_token_s for answer in answers), 1),
        }

    def _llm(self) -> Any:
        """A random language model of the scale's shape, made on the device."""
        from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

        from llm_bridge.llm import LanguageModel
        from tests import tiny_llms

        with tempfile.TemporaryDirectory() as folder:
            path = tiny_llms.make(Path(folder), "qwen2")
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            small = json.loads((path / "config.json").read_text())
        small = {key: value for key, value in small.items() if key not in ("layer_types", "model_type")}
        config = Qwen2Config(**{**small, **self.scale.llm, "eos_token_id": None, "initializer_range": 0.02})
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return LanguageModel(model.to(self.device).eval().requires_grad_(False), tokenizer, "random")

    def _generation(self, llm: Any, count: int, new_tokens: int, worker: Any = None) -> Any:
        from llm_bridge.generation import Generation
        from llm_bridge.prompt import Message, Visual, render
        from llm_bridge.sampling import SamplingParams

        visual = Visual(count, "clip", 8.0, tuple(float(t) for t in range(8)))
        prompt = render(llm.tokenizer, [Message.of("user", visual, "What happens in the video?")])
        embedding = torch.randn(count, llm.hidden_size, device=self.device).to(llm.dtype)
        return Generation(llm, prompt, [embedding], SamplingParams(max_new_tokens=new_tokens), worker=worker)

    # -- fast: training -------------------------------------------------------------------------------------

    def umt(self) -> dict[str, Any]:
        """Flux-UMT steps of the smallest encoder: clips/s and memory, bfloat16 autocast, float32 weights."""
        return self._umt(self.scale.clips, self.scale.steps)

    def umt_compiled(self) -> dict[str, Any]:
        """The same, student and teacher compiled; the steps that warm up hold the compiler's time."""
        return self._umt(self.scale.clips, self.scale.steps, compiled=True)

    def umt_saving(self) -> dict[str, Any]:
        """More clips, with what is cheap computed again and token counts one after the other."""
        steps = max(2, self.scale.steps // 3)
        return self._umt(self.scale.more_clips, steps, recompute_cheap=True, passes_in_turn=True)

    def _umt(self, clips: int, steps: int, *, compiled: bool = False, **settings: Any) -> dict[str, Any]:
        from training.data.video_batches import VideoBatch
        from training.distill.internvideo2 import (
            InternVideo2,
            InternVideo2Config,
            InternVideo2Source,
            InternVideo2Teacher,
            spaced_layers,
        )
        from training.trainer.recipe import LoopConfig, OptimConfig
        from training.umt import TeacherSource, UmtModel, UmtRecipe

        scale = self.scale
        config = next(iter(scale.encoders.values())).replace(num_classes=0)
        teacher_config = InternVideo2Config.from_dict(scale.teacher)
        count = min(6, teacher_config.depth, config.depth)
        torch.manual_seed(0)
        with self.device:
            encoder, big = FluxViT(config), InternVideo2(teacher_config)
        layers = spaced_layers(teacher_config.depth, count, 3.34 if teacher_config.depth >= 20 else 1)
        recipe = UmtRecipe(
            optim=OptimConfig(lr=1e-3, batch_size=clips, micro_batch=clips),
            loop=LoopConfig(out="-"),
            teacher=TeacherSource(internvideo2=InternVideo2Source(weights="-")),
            data=(),
            teacher_tokens=scale.teacher_tokens,
            num_tokens=scale.counts,
            **settings,
        )
        teacher = InternVideo2Teacher(big, layers, precision="bf16")
        if compiled:
            compile_encoder(encoder)
            teacher.compile()
        model = UmtModel(encoder, teacher, recipe).to(self.device).train()
        pixels = torch.randn(clips, 3, scale.frames, scale.side, scale.side, device=self.device)
        batch = VideoBatch(examples=(), pixels=pixels, index=0)
        return self._train(model, lambda: model(batch)[0], clips, "clips_per_s", steps)

    def stage1(self) -> dict[str, Any]:
        """Chat stage 1 steps: the projector learns, encoder and language model are frozen."""
        from llm_bridge.model import VideoLanguageModel, VLMConfig
        from llm_bridge.projector import Projector, ProjectorConfig
        from llm_bridge.prompt import Message, Visual, render_chat_training

        scale, llm = self.scale, self._llm()
        encoder_config = next(iter(scale.encoders.values())).replace(num_classes=0)
        projector = Projector(ProjectorConfig(encoder_config.embed_dim, llm.hidden_size, norm=True))
        config = VLMConfig(
            llm="random",
            projector=projector.config,
            encoder=encoder_config,
            default_tokens=scale.visual_tokens[0],
        )
        encoder = FluxViT(encoder_config).to(self.device, torch.bfloat16).eval().requires_grad_(False)
        model = VideoLanguageModel(config, encoder, projector.to(self.device), llm)
        clips = list(torch.randn(scale.records, 3, scale.frames, scale.side, scale.side, device=self.device))
        visual = Visual(scale.visual_tokens[0], "clip", 8.0, (0.0, 4.0))
        words = " ".join(["two birds fly away over the sea"] * 6)
        talk = [Message.of("user", visual, "What happens?"), Message.of("assistant", words)]
        prompts = [render_chat_training(llm.tokenizer, talk)] * scale.records

        def loss() -> Tensor:
            vision = model.encode(clips, [scale.visual_tokens[0]] * len(clips))
            return model.loss(prompts, vision)

        return self._train(projector, loss, scale.records, "samples_per_s", scale.steps)

    def _train(
        self, learns: torch.nn.Module, loss_of: Callable[[], Tensor], samples: int, name: str, steps: int
    ) -> dict[str, Any]:
        """Optimiser steps in bfloat16 autocast; the first third warms up."""
        optimizer = torch.optim.AdamW([p for p in learns.parameters() if p.requires_grad], lr=1e-4)
        losses: list[float] = []
        seconds: list[float] = []
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(steps):
            self._wait()
            began = time.perf_counter()
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self._wait()
            seconds.append(time.perf_counter() - began)
            losses.append(loss.item())
        row = summary(seconds[len(seconds) // 3 :])
        if not all(map(torch.isfinite, torch.tensor(losses))):
            raise RuntimeError(f"The loss is not finite: {losses}")
        found = {name: round(samples / row["median_ms"] * 1e3, 2), **row, "batch": samples}
        found |= {"loss_first": round(losses[0], 4), "loss_last": round(losses[-1], 4)}
        if self.device.type == "cuda":
            found["peak_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)
        return found


PARTS = (
    "tests",
    "golden",
    "encoder",
    "first_token",
    "decode",
    "decode_static",
    "umt",
    "umt_compiled",
    "umt_saving",
    "stage1",
)


def _read(pieces: Iterable[str]) -> None:
    for _ in pieces:
        continue


def _read_all(answers: Sequence[Iterable[str]]) -> None:
    """Each in a thread of its own."""
    threads = [threading.Thread(target=_read, args=(answer,), daemon=True) for answer in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=LONGEST_S)
        if thread.is_alive():
            raise RuntimeError(f"An answer was not there after {LONGEST_S} seconds.")


def _in_short_pieces(run: Callable[[], object]) -> None:
    """Prompts are cut as on a CPU meanwhile."""
    from llm_bridge.engines import local

    chooses = local.longest_piece
    local.longest_piece = lambda device: LONGEST_PIECE
    try:
        run()
    finally:
        local.longest_piece = chooses


@contextmanager
def _freed(device: torch.device) -> Iterator[None]:
    """What a part held is given back before the next one."""
    import gc

    try:
        yield
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run(
    parts: Sequence[str], device: torch.device, scale: Scale, keep: Callable[[str, dict[str, Any]], None]
) -> None:
    """Measure the parts; `keep` is told the figures of each, or its error."""
    bench = Bench(device, scale)
    for part in parts:
        began = time.perf_counter()
        print(f"{part} ...", file=sys.stderr, flush=True)
        with _freed(device):
            try:
                found = getattr(bench, part)()
            except Exception as error:  # noqa: BLE001 - the other parts go on
                found = {"error": f"{type(error).__name__}: {error}"[:2000]}
                traceback.print_exc()
        keep(part, {**found, "seconds": round(time.perf_counter() - began, 1)})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help="the others stay as they are",
    )
    parser.add_argument("--device", help="cpu runs everything tiny (default: the accelerator)")
    parser.add_argument("--out", type=Path, help="the JSON file (default: tests/bench/results/gpu.json)")
    args = parser.parse_args(argv)
    if args.device is None and not torch.accelerator.is_available():
        print("There is no accelerator here: --device cpu tries this with tiny models.", file=sys.stderr)
        return 2
    device = torch.device(args.device or torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    tiny = device.type == "cpu"
    out = args.out or (None if tiny else RESULT)
    where: dict[str, Any] = {"bench": "gpu", **environment("bfloat16"), "tiny": tiny}
    if device.type == "cuda":
        where["card"] = torch.cuda.get_device_name(device)
    before = json.loads(out.read_text()) if out is not None and out.exists() else {}
    parts = {name: before[name] for name in PARTS if name in before}
    measured: dict[str, dict[str, Any]] = {}

    def keep(part: str, figures: dict[str, Any]) -> None:
        measured[part] = parts[part] = {"commit": where["commit"], **figures}
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            ordered = {name: parts[name] for name in PARTS if name in parts}
            out.write_text(json.dumps({**where, **ordered}, indent=1) + "\n")

    run(args.only, device, TINY if tiny else FULL, keep)
    print_json({**where, **measured})
    return 1 if any("error" in figures for figures in measured.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
