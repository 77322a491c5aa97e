"""Encoder speed: ms per clip at every token count, against one large matrix product of the same dtype.

    python -m tests.bench.encoder [--size small] [--n 5] [--smallest]

Input 16 x 224^2. `gemm_fraction` is the achieved multiply-accumulate rate divided by that of `torch.mm` on
3072 x 3072 matrices, measured in turn with the model in the same run. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch

from encoder.config import SIZES
from encoder.cost import encoder_macs
from encoder.fluxvit import FluxViT
from tests.bench.common import arguments, environment, interleave, print_json, summary

FRAMES, SIDE = 16, 224


@torch.inference_mode()
def measure(size: str, dtype: torch.dtype, batch: int, n: int, side: int, keeps: list[int]) -> dict[str, Any]:
    """Timings of one dtype and batch size. side: of the large matrices. keeps: token counts, descending."""
    device = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    )
    assert device is not None
    model = FluxViT(SIZES[size]).eval().to(device, dtype)
    pixels = torch.randn(batch, 3, FRAMES, SIDE, SIDE).to(device, dtype)
    matrix = torch.randn(side, side).to(device, dtype)

    def waited(run: Callable[[], object]) -> Callable[[], None]:
        def timed() -> None:
            run()
            if device.type != "cpu":
                torch.accelerator.synchronize()

        return timed

    cases: dict[str, Callable[[], object]] = {"gemm": waited(lambda: torch.mm(matrix, matrix))}
    for count in keeps:
        cases[str(count)] = waited(lambda keep=count: model(pixels, keep))  # type: ignore[misc]
    samples = interleave(cases, n)
    gemm = summary(samples.pop("gemm"))
    gemm_rate = side**3 / gemm["min_ms"] / 1e6
    seen = FRAMES * (SIDE // 14) ** 2
    result: dict[str, Any] = {"gemm_gmacs_per_s": round(gemm_rate, 1)}
    for keep, seconds in samples.items():
        giga = encoder_macs(model.config, seen, int(keep)) / 1e9
        row = summary([second / batch for second in seconds])
        fraction = giga / row["min_ms"] * 1e3 / gemm_rate
        result[keep] = {
            "ms_per_clip": row["min_ms"],
            **row,
            "gmacs": round(giga, 2),
            "gemm_fraction": round(fraction, 3),
        }
    most, least = str(keeps[0]), str(keeps[-1])
    result[f"speedup_{most}_to_{least}"] = round(result[most]["min_ms"] / result[least]["min_ms"], 2)
    return result


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", default="small", choices=sorted(SIZES))
    parser.add_argument("--n", type=int, default=5, help="repeats of every case, run in turn")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--gemm", type=int, default=3072, help="side of the large matrices")
    about = "token counts, two or more, descending; the second is compared"
    parser.add_argument("--keeps", type=int, nargs="+", default=[3072, 2048, 1024, 512], help=about)
    args = arguments(parser, argv, size="micro", n=1, batches=[1], gemm=512, keeps=[256, 64])
    torch.set_num_threads(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    result: dict[str, Any] = {
        "bench": "encoder",
        **environment("float32, bfloat16"),
        "input": [FRAMES, SIDE, SIDE],
    }
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        result[name] = {
            f"batch{batch}": measure(args.size, dtype, batch, args.n, args.gemm, args.keeps)
            for batch in args.batches
        }
    first = f"batch{args.batches[0]}"
    exact, half = (result[name][first][str(args.keeps[1])] for name in ("float32", "bfloat16"))
    result["gemm_fraction"] = exact["gemm_fraction"]
    result["bf16_over_fp32"] = round(half["min_ms"] / exact["min_ms"], 3)
    print_json(result, smallest=args.smallest)


if __name__ == "__main__":
    main()
