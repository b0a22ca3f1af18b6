"""Processes, devices and seeds."""

from __future__ import annotations

import datetime
import functools
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common.run.files import UserError, temporary_dir
from common.run.options import Options


@dataclass(frozen=True)
class World:
    """This process among its peers, and the device it computes on."""

    rank: int
    size: int
    device: torch.device
    amp: torch.dtype | None  # autocast type of the forward pass; None: full precision
    chosen: bool = False  # somebody asked for that precision, and got it

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0

    def mean(self, value: torch.Tensor) -> float:
        """A scalar averaged over the processes."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value.item() / self.size

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def wait(self) -> None:
        """Returns when all processes have come here: what rank 0 wrote before is whole."""
        if self.size > 1:
            dist.barrier()

    def in_full(self, wanted: bool) -> World:
        """The same in full precision where a recipe wants that and nobody asked for another."""
        return replace(self, amp=None) if wanted and not self.chosen else self

    def wait_long(self) -> None:
        """As `wait`, for what rank 0 does alone and may take longer than the half hour after which a collective gives
        up."""
        if self.size > 1:
            dist.barrier(group=_patient_group())

    def autocast(self):
        """Context of the forward pass."""
        return torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None)


def start_world(options: Options) -> World:
    """Joins torchrun's process group if there is one (nccl on GPUs, gloo on CPUs) and chooses the device."""
    rank, size, local, local_size = _places()
    cuda = torch.cuda.is_available() if options.device == "auto" else options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch sees no CUDA device; use --device cpu")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"there are {local_size} processes, but torch sees {torch.cuda.device_count()} CUDA devices")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32; convolutions use it anyway
        torch.backends.cudnn.benchmark = not options.deterministic  # tries its convolutions, once per shape
    if size > 1:
        join_group("nccl" if cuda else "gloo")
    elif options.threads:
        torch.set_num_threads(options.threads)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    bf16 = options.precision == "bf16" or (options.precision == "auto" and cuda)
    return World(rank, size, device, torch.bfloat16 if bf16 else None, options.precision != "auto")


def _places() -> tuple[int, int, int, int]:
    """(rank, processes, rank on this machine, processes on this machine) from torchrun's environment, or of one."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found = {name: os.environ.get(name, "") for name in names}
    try:
        rank, size, local, local_size = (int(found[name] or default) for name, default in zip(names, (0, 1, 0, 1)))
    except ValueError:
        raise UserError(f"torchrun sets {', '.join(names)} to whole numbers; found {found}") from None
    lacking = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and lacking:
        raise UserError(
            f"WORLD_SIZE is {size}, but {', '.join(lacking)} not set: start several processes with torchrun or "
            "python -m common.run.launch, or unset WORLD_SIZE for one"
        )
    return rank, size, local, local_size


def join_group(backend: str | None = None) -> None:
    """Joins torchrun's process group, or makes one of this process alone."""
    if dist.is_initialized():
        return
    rank, size, _, local_size = _places()
    # On one machine processes meet in a file of the user's: a port would be open to the whole network.
    places = {"store": _store(size), "rank": rank, "world_size": size} if local_size == size else {}
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30), **places)


@functools.cache
def _patient_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


def _store(size: int) -> dist.FileStore:
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    # torchrun makes a folder for each of its starts; its other names may come again, and find the store of the last.
    attempt = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent.parent
    parts = [*(os.environ.get(name, "") for name in names), attempt.parent.name, attempt.name]
    start = "-".join(parts) if size > 1 else str(os.getpid())
    return dist.FileStore(str(temporary_dir("processes") / start), size)


def seed_all(*key: int) -> None:
    """Seeds torch, numpy and python from a tuple of integers, such as (seed, step, rank).

    Called at every step, it makes all randomness of a step a function of its number: a resumed run needs no
    generator states, and two runs that agree at a step agree from there on.
    """
    state = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def accumulation(batch: int, world: World, micro_batch: int) -> int:
    """Chunks in which each rank takes its part of the global batch so that none exceeds `micro_batch`."""
    if batch % world.size:
        raise UserError(
            f"the global batch of {batch} is not a multiple of the {world.size} processes; take a number of processes "
            f"that divides it, or change --batch"
        )
    per_rank = batch // world.size
    return math.ceil(per_rank / micro_batch) if micro_batch else 1


def micro_batches(network: torch.nn.Module, chunks: int, *batch: Tensor) -> Iterator[tuple[float, ...]]:
    """(weight, *tensors) for each of the `chunks` of a batch; the weights are fractions of the batch, and add up to 1.

    The gradients of a DDP `network` are exchanged after the last one only.
    """
    parts = list(zip(*(tensor.chunk(chunks) for tensor in batch)))
    for i, part in enumerate(parts, 1):
        if processes() > 1:
            network.require_backward_grad_sync = i == len(parts)
        yield len(part[0]) / len(batch[0]), *part


# Over processes --------------------------------------------------------------------------------------------


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(rows: Tensor) -> Tensor:
    """(b, ...) of each process -> (B, ...) on all, in the order of their ranks; without gradient."""
    if processes() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(processes())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        return gather(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.narrow(0, dist.get_rank() * ctx.rows, ctx.rows)


def gather_with_gradient(rows: Tensor) -> Tensor:
    """As `gather`, and the gradient of a row is summed over the processes that use it."""
    return _Gather.apply(rows) if processes() > 1 else rows


def gather_objects(rows: list[Any]) -> list[Any]:
    """Every rank's ``rows[rank::size]`` put back into order, on all ranks."""
    if processes() == 1:
        return rows
    parts: list[list[Any]] = [None] * processes()
    dist.all_gather_object(parts, rows)
    whole = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank :: processes()] = part
    return whole


def expect_everywhere(path: Path) -> None:
    """`UserError` if not all processes see a file or folder."""
    seen = gather_objects([path.exists()])
    if not all(seen):
        raise UserError(f"{path} is not there for process {seen.index(False)}: is it the same disk?")


def add_up(sums: Tensor) -> Tensor:
    """Sums of this process -> of all, in place."""
    if processes() > 1:
        dist.all_reduce(sums)
    return sums
