"""Several processes: one accelerator for DDP, FSDP and DeepSpeed, and gradients and weights across them.

    accelerate launch --config_file training/recipes/accelerate/fsdp.yaml -m training.STAGE --config ...

FSDP means its second version, whose sharded parameters are DTensors: every place here that makes one whole
is a collective call that all ranks must join.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from encoder.errors import ConfigError
from llm_bridge.llm import default_device, default_dtype
from training.trainer.recipe import OptimConfig


def open_accelerator(precision: str) -> Any:
    """The accelerator of this process; raises ConfigError when the machine cannot do `precision`."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    # An encoder has pools, heads and aligners that a stage does not use: they get no gradients.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    has_gpu = torch.accelerator.is_available()
    if precision == "fp16" and not has_gpu:
        raise ConfigError("loop.precision fp16 needs a GPU: use bf16 or fp32 here.")
    if precision == "bf16" and has_gpu and default_dtype(default_device()) == torch.float16:
        raise ConfigError("This GPU has no bfloat16: use loop.precision fp16 or fp32.")
    # A second run in one process may have another precision.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            cpu=not has_gpu,
            kwargs_handlers=[unused],
        )
    except ImportError as error:  # such as DeepSpeed
        raise ConfigError(f"The launch settings ask for what is not installed: {error}") from error
    if is_deepspeed(accelerator):
        if precision == "fp16":
            raise ConfigError("loop.precision fp16 does not go with DeepSpeed here: use bf16 or fp32.")
        if (zero := accelerator.state.deepspeed_plugin.zero_stage) > 1:
            # Gradients of accumulated micro-batches and weights outside `forward` must be whole.
            raise ConfigError(
                f"DeepSpeed's ZeRO-{zero} is not supported: use fsdp.yaml, which shards as much, or "
                "deepspeed_zero1.yaml, both in training/recipes/accelerate."
            )
    if is_sharded(accelerator) and not accelerator.is_fsdp2:
        raise ConfigError("FSDP needs fsdp_version: 2, as in training/recipes/accelerate/fsdp.yaml.")
    return accelerator


def is_deepspeed(accelerator: Any) -> bool:
    """DeepSpeed steps, clips and saves on its own."""
    return accelerator.distributed_type.value == "DEEPSPEED"


def is_sharded(accelerator: Any) -> bool:
    """Under FSDP no rank holds whole parameters."""
    return accelerator.distributed_type.value == "FSDP"


def choose_sharded_layers(accelerator: Any, model: nn.Module) -> None:
    """Which layers FSDP gathers one at a time: those of its settings that the model has, and those that the
    model itself names in `sharded_layers`."""
    if not is_sharded(accelerator):
        return
    plugin, known = accelerator.state.fsdp_plugin, {type(module).__name__ for module in model.modules()}
    wanted = [*(plugin.transformer_cls_names_to_wrap or ()), *getattr(model, "sharded_layers", ())]
    plugin.transformer_cls_names_to_wrap = [name for name in dict.fromkeys(wanted) if name in known]


def share_of(accelerator: Any, optim: OptimConfig, precision: str) -> int:
    """Micro-batches of this rank in one step; raises ConfigError when the ranks do not divide them.

    Tells DeepSpeed, which counts micro-batches and casts by itself.
    """
    per_step, ranks = optim.batch_size // optim.micro_batch, accelerator.num_processes
    if per_step % ranks:
        raise ConfigError(f"{per_step} micro-batches per step cannot be shared by {ranks} processes evenly.")
    share = per_step // ranks
    if is_deepspeed(accelerator):
        accelerator.gradient_accumulation_steps = share
        accelerator.state.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=optim.micro_batch,
            gradient_accumulation_steps=share,
            gradient_clipping=optim.clip_grad or 0.0,
            # As everywhere else: weights in fp32, products in bf16. Its own bf16 mode casts the weights.
            bf16={"enabled": False},
            torch_autocast={"enabled": precision == "bf16", "dtype": "bfloat16"},
        )
    return share


def device_of_process(kind: str | None = None) -> torch.device:
    """The device of this process: of several on a machine each has its own, by its local number.

    kind: "cuda" and so on; default, that of the machine.
    """
    from accelerate.utils import get_int_from_env

    kind = kind or default_device().type
    if kind in ("cpu", "mps"):
        return torch.device(kind)
    names = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
    return torch.device(kind, get_int_from_env(names, 0))


def rank_of() -> tuple[int, int]:
    """(this process's number, number of processes)."""
    ready = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if ready else (0, 1)


def merged_on_ranks(value: Any) -> list[Any]:
    """What every rank found, on every rank."""
    from accelerate.utils import gather_object

    return gather_object([value]) if rank_of()[1] > 1 else [value]


def backward(accelerator: Any, loss: Tensor, share: int, *, last: bool) -> None:
    """Add this micro-batch's part of the step's mean loss to the gradients."""
    accelerator.sync_gradients = last
    # DeepSpeed divides by the number of micro-batches itself, and steps within the last one.
    accelerator.backward(loss if is_deepspeed(accelerator) else loss / share)


class GradientNorms:
    """Norms of the gradients of a model's parts, by dotted name.

    The parts are the first components of the trained parameters' names (one level deeper where all share
    the first), and those named in `more`. Raises ConfigError for a name that nothing trained has.
    """

    def __init__(self, model: nn.Module, more: Sequence[str] = ()) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        level = 1 if len({name.split(".")[0] for name in trained}) > 1 else 2
        parts = list(dict.fromkeys(".".join(name.split(".")[:level]) for name in trained))
        self._members: dict[str, list[nn.Parameter]] = {}
        for part in (*parts, *more):
            members = [p for name, p in trained.items() if f"{name}.".startswith(f"{part}.")]
            if not members:
                raise ConfigError(f"loop.modules names {part!r}, but nothing that is trained has that name.")
            self._members[part] = members

    def after_clipping(self, norm: float, limit: float | None) -> dict[str, float]:
        """Norms as they were before gradients of total `norm` were clipped to `limit`."""
        factor = min(1.0, limit / (norm + 1e-6)) if limit and math.isfinite(norm) else 1.0
        norms = {}
        for part, members in self._members.items():
            gradients = [p.grad for p in members if p.grad is not None]
            if gradients:
                norms[part] = whole(torch.nn.utils.get_total_norm(gradients)) / factor
        return {f"grad_norm/{part}": float(value) for part, value in norms.items()}


# -- rows of all ranks --------------------------------------------------------------------------------------


def gather_rows(x: Tensor) -> Tensor:
    """(B, ...) of each rank -> (ranks * B, ...); x itself in one process.

    Every rank must give the same number of rows. The gradient of a row is the sum over the ranks' losses, so
    that DDP's mean over ranks is the gradient of the whole batch's loss, whichever rank holds the row.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return x
    return _GatheredRows.apply(x) if x.requires_grad else _all_rows(x)


def _all_rows(x: Tensor) -> Tensor:
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for _ in range(distributed.get_world_size())
    ]
    distributed.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return _all_rows(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        summed = grads[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(summed)
        first = distributed.get_rank() * ctx.rows
        return summed[first : first + ctx.rows]


# -- sharded parameters -------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which every rank holds a shard, whole; others as they are."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor of the parameter's shape, on its device and sharded as it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor):
        local = tensor.to(parameter.device, parameter.dtype)
        return distribute_tensor(local, parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device, parameter.dtype)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, methods of the model other than `forward` can run on sharded weights; all ranks must enter."""
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def make_whole(model: nn.Module) -> None:
    """Replace sharded parameters by whole ones in main memory, to save the model; it cannot run after.

    All ranks must call it.
    """
    complete: Mapping[str, Tensor] = {
        name: whole(p.detach()).cpu() for name, p in model.named_parameters() if whole(p) is not p
    }
    for name, tensor in complete.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
