"""Planted errors that the tests must notice: `python -m tests.mutants [WORD]`, or `make mutants`.

Each is a replacement in one source file of a copy of the repository, with the tests that should fail then.
WORD: only those whose file or replacement holds it. Prints each that survives, and a count at the end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

ENCODER = "tests/encoder/"
BRIDGE = "tests/llm_bridge/"
TRAINING = "tests/training/"
FAILED = 1  # pytest's exit status when tests ran and some failed


@dataclass(frozen=True)
class Mutant:
    """`old`, which stands in the file exactly once, becomes `new`. tests: files or single tests."""

    file: str
    old: str
    new: str
    tests: str

    @property
    def name(self) -> str:
        """For the report."""
        return f"{self.file}: {self.old.strip()!r} -> {self.new.strip()!r}"


MUTANTS = (
    # -- encoder
    Mutant("encoder/layers.py", "* self.weight.to(x.dtype)", "+ 0", f"{ENCODER}test_golden.py"),
    Mutant(
        "encoder/layers.py",
        "F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)",
        "x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)",
        f"{ENCODER}test_fluxvit.py",
    ),
    Mutant(
        "encoder/layers.py",
        "mixed if self.lpe is None else mixed + self.lpe(v)",
        "mixed",
        f"{ENCODER}test_golden.py",
    ),
    Mutant(
        "encoder/layers.py",
        "return self.q_norm(q), self.k_norm(k), v",
        "return q, self.k_norm(k), v",
        f"{ENCODER}test_golden.py",
    ),
    Mutant(
        "encoder/layers.py",
        'self.approximate = "tanh" if gelu == "tanh" else "none"',
        'self.approximate = "none"',
        f"{ENCODER}test_golden.py {ENCODER}test_fluxvit.py {TRAINING}models",
    ),
    Mutant(
        "encoder/layers.py",
        ".permute(0, 2, 3, 5, 4, 6, 1)",
        ".permute(0, 2, 3, 5, 6, 4, 1)",
        f"{ENCODER}test_golden.py",
    ),
    Mutant(
        "encoder/layers.py",
        "query = self.norm1_q(tokens.mean(dim=1, keepdim=True))\n        return self.cross_attn(",
        "query = self.norm1_q(tokens[:, :1])\n        return self.cross_attn(",
        f"{ENCODER}test_golden.py",
    ),
    Mutant(
        "encoder/layers.py",
        "if not self.training or self.rate == 0",
        "if self.rate == 0",
        f"{ENCODER}test_fluxvit.py",
    ),
    Mutant(
        "encoder/layers.py",
        "(stays.to(y.dtype) / (1 - self.rate))",
        "stays.to(y.dtype)",
        f"{ENCODER}test_fluxvit.py",
    ),
    Mutant(
        "encoder/fluxvit.py",
        "config.drop_path * index / max(config.depth - 1, 1)",
        "config.drop_path",
        f"{ENCODER}test_fluxvit.py",
    ),
    Mutant(
        "encoder/fluxvit.py",
        "if self.pos_embed.requires_grad:",
        "if torch.is_grad_enabled() and self.pos_embed.requires_grad:",
        f"{ENCODER}test_fluxvit.py",
    ),
    Mutant(
        "encoder/fluxvit.py",
        "table[kept] if self.gpe_proj is None else self.gpe_proj(table[kept])",
        "table[kept]",
        f"{ENCODER}test_golden.py",
    ),
    Mutant(
        "encoder/fluxvit.py",
        "(2 * (index + 1)) ** 0.5)\n                block.mlp",
        "(index + 1) ** 0.5)\n                block.mlp",
        f"{ENCODER}test_fluxvit.py",
    ),
    Mutant(
        "encoder/positions.py",
        'matrix(source.height, target.height, "bicubic")',
        'matrix(source.height, target.height, "linear")',
        f"{ENCODER}test_positions.py",
    ),
    Mutant(
        "encoder/positions.py",
        "_sin_cos(spatial // 2, column.flatten()),\n            _sin_cos(spatial // 2, row.flatten()),",
        "_sin_cos(spatial // 2, row.flatten()),\n            _sin_cos(spatial // 2, column.flatten()),",
        f"{ENCODER}test_positions.py",
    ),
    Mutant(
        "encoder/selection.py",
        "torch.cat([change[:, :1], change], dim=1)",
        "torch.cat([change, change[:, -1:]], dim=1)",
        f"{ENCODER}test_selection.py",
    ),
    Mutant(
        "encoder/selection.py",
        "group.flatten(1).sort(dim=1, descending=True,",
        "group.flatten(1).sort(dim=1, descending=False,",
        f"{ENCODER}test_selection.py",
    ),
    Mutant(
        "encoder/preprocess.py",
        "IMAGENET_STD = (0.229, 0.224, 0.225)",
        "IMAGENET_STD = (0.5, 0.5, 0.5)",
        f"{ENCODER}test_preprocess.py",
    ),
    Mutant("encoder/preprocess.py", "antialias=True", "antialias=False", f"{ENCODER}test_preprocess.py"),
    Mutant(
        "encoder/checkpoint.py",
        "safe_globals([argparse.Namespace])",
        "safe_globals([])",
        f"{ENCODER}test_checkpoint.py",
    ),
    # -- bridge
    Mutant(
        "llm_bridge/prompt.py",
        "self.labels += ids if learn else [IGNORE] * len(ids)",
        "self.labels += ids",
        f"{BRIDGE}test_prompt.py",
    ),
    Mutant(
        "llm_bridge/packing.py",
        "[length**-power for length in lengths for _ in range(length)]",
        "[1.0 for length in lengths for _ in range(length)]",
        f"{BRIDGE}test_packing.py",
    ),
    Mutant(
        "llm_bridge/packing.py",
        "hidden = ~(sees(numbers, numbers) & before)",
        "hidden = ~(sees(numbers, numbers) | before)",
        f"{BRIDGE}test_packing_branches.py",
    ),
    Mutant(
        "llm_bridge/packing.py",
        "positions[start:end] = torch.arange(shared, shared + end - start)",
        "positions[start:end] = torch.arange(start, end)",
        f"{BRIDGE}test_packing_branches.py",
    ),
    Mutant("llm_bridge/tome.py", "x = join(x * sizes) / total", "x = join(x) / 2", f"{BRIDGE}test_tome.py"),
    Mutant(
        "llm_bridge/projector.py",
        "self.mlp(self.norm(tokens))",
        "self.mlp(tokens)",
        f"{BRIDGE}test_model.py {TRAINING}test_chat_steps.py",
    ),
    Mutant(
        "llm_bridge/model.py",
        "following = labels.roll(-1, dims=1)",
        "following = labels.clone()",
        f"{BRIDGE}test_model.py",
    ),
    Mutant(
        "llm_bridge/model.py",
        "torch.float32 if learns else vision)",
        "vision)",
        f"{TRAINING}test_chat_steps.py",
    ),
    Mutant(
        "llm_bridge/model.py",
        "        super().train(False)\n        self.training = mode\n",
        "        super().train(mode)\n        self.training = mode\n",
        f"{TRAINING}test_chat_steps.py",
    ),
    Mutant(
        "llm_bridge/model.py",
        "return [embeddings[:0] for embeddings in self.project(blank)]",
        "return []",
        f"{TRAINING}test_chat_steps.py",
    ),
    # -- training
    Mutant(
        "training/umt.py",
        "tokens = encoder.encode(patches, grid, kept, layers=self.student_layers)",
        "tokens = encoder.encode(patches, grid, kept, layers=[n - 1 for n in self.student_layers])",
        f"{TRAINING}test_umt.py",
    ),
    Mutant("training/umt.py", "own = weight * (", "own = (", f"{TRAINING}test_umt.py"),
    Mutant(
        "training/distill/teachers.py",
        "depth - int(interval * index) - 1 for",
        "depth - int(interval * index) - 2 for",
        f"{TRAINING}distill/test_teachers.py",
    ),
    Mutant(
        "training/trainer/losses.py",
        "(2 - 2 * (student.float()",
        "(2 - 1 * (student.float()",
        f"{TRAINING}trainer/test_losses.py",
    ),
    Mutant(
        "training/trainer/losses.py",
        "scores.T.log_softmax(dim=1)",
        "scores.log_softmax(dim=1)",
        f"{TRAINING}test_clip.py::test_contrastive_loss_counts_both_directions",
    ),
    Mutant(
        "training/trainer/optim.py",
        "layer_decay ** (last - layer), spared)",
        "layer_decay ** layer, spared)",
        f"{TRAINING}trainer/test_optim.py",
    ),
    Mutant(
        "training/trainer/optim.py",
        "0.5 * (1 + math.cos(math.pi",
        "0.5 * (1 - math.cos(math.pi",
        f"{TRAINING}trainer/test_optim.py",
    ),
    Mutant(
        "training/trainer/optim.py",
        "            parameter.data = parameter.data.float()",
        "            pass",
        f"{TRAINING}test_chat_steps.py",
    ),
    Mutant("training/trainer/loop.py", "        self.model.eval()\n", "", f"{TRAINING}trainer/test_loop.py"),
    Mutant(
        "training/trainer/loop.py",
        "gathered(self._plain), self.accelerator.autocast(), torch.no_grad()",
        "gathered(self._plain), torch.no_grad()",
        f"{TRAINING}trainer/test_loop.py",
    ),
    Mutant(
        "training/trainer/loop.py",
        "share=parts * batch.weight / weight if weight else 1.0",
        "share=1.0",
        f"{TRAINING}test_chat_steps.py",
    ),
    Mutant(
        "training/finetune.py",
        "apart = count_alignment(encoder.align(pooled, number - 1), reference)",
        "apart = count_alignment(encoder.align(pooled, 0), reference)",
        f"{TRAINING}test_finetune.py",
    ),
    Mutant(
        "training/finetune.py",
        "nearest = min(range(len(self.num_tokens))",
        "nearest = max(range(len(self.num_tokens))",
        f"{TRAINING}test_finetune.py",
    ),
    Mutant(
        "training/models/clip_model.py",
        "self.encoder.eval()\n",
        "pass\n",
        f"{TRAINING}data/test_clip_batches.py",
    ),
    Mutant(
        "llm_bridge/clip_head.py",
        "key=lambda count: abs(count - wanted)",
        "key=lambda count: -abs(count - wanted)",
        f"{TRAINING}evaluation/test_encoder_input.py",
    ),
    Mutant(
        "training/data/augment.py", "antialias=True", "antialias=False", f"{TRAINING}data/test_augment.py"
    ),
    Mutant(
        "training/data/augment.py",
        "chance = config.flip if flip is None else flip",
        "chance = config.flip",
        f"{TRAINING}data/test_video_batches.py",
    ),
    Mutant(
        "training/data/chat_batches.py",
        'frames = min(pictures, view.frames) if example.kind == "image" else view.frames',
        "frames = view.frames",
        f"{TRAINING}test_chat_steps.py",
    ),
)


def copy_of(folder: Path) -> Path:
    """The repository without history and build outputs, with the same environment."""
    target = folder / "copy"
    skipped = (".git", ".venv", "runs", "site", "build", "__pycache__", ".*_cache", "*.egg-info")
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*skipped))
    return target


NONE_CHOSEN = 5  # its exit status when no test was chosen


def outcome(copy: Path, tests: str) -> int:
    """Exit status of pytest in the copy: of the quick tests, and where they pass of the slow ones."""
    quick = run(copy, tests, "not slow")
    if quick not in (0, NONE_CHOSEN):
        return quick
    slow = run(copy, tests, "slow")
    return quick if slow == NONE_CHOSEN else slow


def run(copy: Path, tests: str, which: str) -> int:
    """Exit status of pytest in the copy. which: an expression over marks."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(copy)}
    environment.setdefault("OMP_NUM_THREADS", "1")
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-m",
            which,
            "-p",
            "no:cacheprovider",
            *tests.split(),
        ],
        cwd=copy,
        env=environment,
        capture_output=True,
    ).returncode


def main(words: list[str]) -> int:
    """Plant each error in turn; 1 when one survives, or does not fit the source any more."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    killed, faults = 0, []
    with tempfile.TemporaryDirectory() as scratch:
        copy = copy_of(Path(scratch))
        for number, mutant in enumerate(chosen, 1):
            path = copy / mutant.file
            source = path.read_text()
            if source.count(mutant.old) != 1:
                faults.append(f"does not fit: {mutant.name}")
                continue
            path.write_text(source.replace(mutant.old, mutant.new))
            status = outcome(copy, mutant.tests)
            path.write_text(source)
            if status == FAILED:
                killed += 1
            else:
                faults.append(
                    f"{'survives' if status == 0 else f'pytest ended with {status}'}: {mutant.name}"
                )
                print(faults[-1], flush=True)
            print(f"{number}/{len(chosen)}", end="\r", flush=True)
        for tests in sorted({mutant.tests for mutant in chosen}):
            if outcome(copy, tests) != 0:
                faults.append(f"fails without any error planted: {tests}")
    print(f"{killed} of {len(chosen)} planted errors are noticed", *faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
