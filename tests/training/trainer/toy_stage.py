"""A stage small enough to run in a second: `python -m tests.training.trainer.toy_stage OUT [key=value ...]`.

With SLOW_SAVE set, saving pauses before a checkpoint is moved into place, so that a test can kill it there.
With SHARDED set, the processes shard the model among them as FSDP does.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from encoder.checkpoint import save_tensors
from training.trainer import checkpoints, loop
from training.trainer import distributed as parallel
from training.trainer.recipe import LoopConfig, OptimConfig, build


class ToyModel(nn.Module):
    """Two layers with dropout, so that randomness inside the model matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 1))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        x, y = batch
        return (self.net(self.frozen(x)).squeeze(-1) - y).square().mean(), {
            "mean": y.mean().item(),
            "tokens": x.numel(),
        }


class ToyStage:
    """Batches are a function of their index; index `poison`, or those in it, are not finite."""

    def __init__(self, poison: int | range = -1) -> None:
        self.model = ToyModel()
        self.micro_batches = 40
        self.poison = range(poison, poison + 1) if isinstance(poison, int) else poison

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(index))
        return x, x.sum(dim=1) * (float("nan") if index in self.poison else 1.0)

    def evaluate(self) -> dict[str, float]:
        return {"weight": self.model.net[0].weight.detach().abs().sum().item()}

    def finish(self, out: Path) -> None:
        save_tensors(self.model.state_dict(), out / "model.safetensors")


def shard_on_cpu(layers: Sequence[str] = ("Linear",)) -> None:
    """Let the loop use FSDP: accelerate offers it on GPUs only, though the sharding works anywhere."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    opened = parallel.open_accelerator

    def sharded(precision: str):
        accelerator = opened(precision)
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=list(layers),
            cpu_ram_efficient_loading=False,
        )
        assert accelerator.is_fsdp2
        return accelerator

    loop.open_accelerator = sharded


def configs(out: str | Path, **changes) -> tuple[OptimConfig, LoopConfig]:
    """A run of 20 steps of two micro-batches."""
    optim = {"lr": 0.01, "batch_size": 8, "micro_batch": 4, "warmup_ratio": 0.1, "weight_decay": 0.01}
    settings = {"out": str(out), "precision": "fp32", "checkpoint_every": 4, "log_every": 1}
    for key, value in changes.items():
        (optim if key in OptimConfig.__dataclass_fields__ else settings)[key] = value
    return build(OptimConfig, optim, "optim"), build(LoopConfig, settings, "loop")


if __name__ == "__main__":
    import yaml

    given = dict(argument.split("=") for argument in sys.argv[2:] if "=" in argument)
    changes = {key: yaml.safe_load(value) for key, value in given.items()}
    stage = ToyStage(poison=changes.pop("poison", -1))
    if os.environ.get("SLOW_SAVE"):
        save_json = checkpoints.save_json

        def slowly(*args) -> None:
            save_json(*args)
            if "step_00000012" in str(args[1]):
                print("SAVING", flush=True)
                time.sleep(60)

        checkpoints.save_json = slowly
    if os.environ.get("SHARDED"):
        shard_on_cpu()
    loop.train(stage, *configs(sys.argv[1], **changes), resume="--resume" in sys.argv)
