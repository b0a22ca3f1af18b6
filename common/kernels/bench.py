"""Times the kernels beside their baselines: the authors' formulation, the best eager form, torch.compile, ours.

    python -m common.kernels.bench                  every op, on the GPU if there is one, else on the CPU
    python -m common.kernels.bench --op shift --batch 32

A case is timed only after every row has given the authors' result; a row that does not stops the run. Ratios are
to the authors' row of the same case, and bytes/s are given over those of a plain copy (x.clone()) of the same
tensor measured beside it, counting for every row the bytes that the operation cannot avoid. Result: a JSON and a
Markdown file in benchmarks/, named after the hardware.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from common import run
from common.kernels.shift import op as shift_op
from common.kernels.shift import reference as shift_reference
from common.kernels.sparse_mlp import op as sparse_mlp_op
from common.kernels.sparse_mlp import reference as sparse_mlp_reference

ROOT = Path(__file__).resolve().parents[2]
AUTHORS, EAGER, COMPILED, OURS, COPY = "authors", "best eager", "torch.compile", "ours", "copy"


@dataclass
class Case:
    name: str
    x: Tensor
    rows: dict[str, Callable[[], object]]  # each does the whole of what is timed and returns what must agree
    bytes: int  # that any implementation has to move
    tolerance: float = 0.0


def shift_by_slices(x: Tensor, n_div: int) -> Tensor:
    """The authors' formulation: zeros, then five slice copies."""
    g = x.size(1) // n_div
    out = torch.zeros_like(x)
    out[:, : 1 * g, :, :-1] = x[:, : 1 * g, :, 1:]
    out[:, 1 * g : 2 * g, :, 1:] = x[:, 1 * g : 2 * g, :, :-1]
    out[:, 2 * g : 3 * g, :-1] = x[:, 2 * g : 3 * g, 1:]
    out[:, 3 * g : 4 * g, 1:] = x[:, 3 * g : 4 * g, :-1]
    out[:, 4 * g :] = x[:, 4 * g :]
    return out


def shift_cases(device: str, dtype: torch.dtype, batch: int) -> Iterator[Case]:
    """The four stages of ShiftViT-T at 224 pixels, n_div 12."""
    n_div = 12
    compiled = torch.compile(shift_reference.shift_by_padding, dynamic=False)
    compiled_add = torch.compile(lambda x, r: shift_reference.shift_by_padding(x + r, n_div), dynamic=False)
    for channels, side in ((96, 56), (192, 28), (384, 14), (768, 7)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x, r, gy = (
                torch.randn(batch, channels, side, side, device=device, dtype=dtype).to(memory_format=layout)
                for _ in range(3)
            )
            label = f"{batch}x{channels}x{side}x{side} {'NHWC' if layout is torch.channels_last else 'NCHW'}"
            size = x.numel() * x.element_size()
            leaf, leaf_r = x.clone().requires_grad_(), r.clone().requires_grad_()

            def train(function, *inputs, gy=gy):
                y = function(*inputs)
                return y, *torch.autograd.grad(y, inputs, gy)

            rows = {
                AUTHORS: lambda x: shift_by_slices(x, n_div),
                EAGER: lambda x: shift_reference.shift_by_padding(x, n_div),
                COMPILED: lambda x: compiled(x, n_div),
                OURS: lambda x: shift_op.shift(x, n_div),
            }
            add_rows = {
                AUTHORS: lambda x, r: shift_by_slices(x + r, n_div),
                EAGER: lambda x, r: shift_reference.shift_by_padding(x + r, n_div),
                COMPILED: compiled_add,
                OURS: lambda x, r: shift_op.shift_add(x, r, n_div),
            }
            yield Case(
                f"shift, training, {label}",
                x,
                {name: lambda f=f, leaf=leaf: train(f, leaf) for name, f in rows.items()},
                4 * size,
            )
            yield Case(
                f"shift_add, training, {label}",
                x,
                {name: lambda f=f, a=leaf, b=leaf_r: train(f, a, b) for name, f in add_rows.items()},
                5 * size,
            )
            rows[EAGER] = lambda x: shift_reference.shift(x, n_div)
            yield Case(
                f"shift, inference, {label}", x, {name: lambda f=f, x=x: f(x) for name, f in rows.items()}, 2 * size
            )
            moving = 4 * (channels // n_div) * size // channels
            rows[EAGER] = lambda x: shift_reference.shift_(x, n_div)
            rows[OURS] = lambda x: shift_op.shift_(x, n_div)
            copies = {name: x.clone() for name in rows}  # shifted again and again while being timed
            yield Case(
                f"shift in place, inference, {label}",
                x,
                {name: lambda f=f, x=copies[name]: f(x) for name, f in rows.items()},
                2 * moving,
            )


def mixing_by_permutation(z: Tensor, A: Tensor, a: Tensor, D: Tensor, d: Tensor, F_: Tensor) -> Tensor:
    """The authors' formulation: permute, 1x1 convolution, permute back; concatenate; 1x1 convolution."""
    row = F.conv2d(z.permute(0, 3, 1, 2), A[:, :, None, None], a).permute(0, 2, 3, 1)
    col = F.conv2d(z.permute(0, 2, 1, 3), D[:, :, None, None], d).permute(0, 2, 1, 3)
    return F.conv2d(torch.cat([z, row, col], dim=1), F_[:, :, None, None])


def sparse_mlp_cases(device: str, dtype: torch.dtype, batch: int) -> Iterator[Case]:
    """The four stages of sMLPNet-T at 224 pixels."""
    compiled = torch.compile(sparse_mlp_reference.sparse_mlp, dynamic=False)
    rows = {
        AUTHORS: mixing_by_permutation,
        EAGER: sparse_mlp_reference.sparse_mlp,
        COMPILED: compiled,
        OURS: sparse_mlp_op.sparse_mlp,
    }
    for channels, side in ((80, 56), (160, 28), (320, 14), (640, 7)):
        for layout in (torch.contiguous_format, torch.channels_last):
            z, gy = (
                torch.randn(batch, channels, side, side, device=device, dtype=dtype).to(memory_format=layout)
                for _ in range(2)
            )
            shapes = ((side, side), (side,), (side, side), (side,), (channels, 3 * channels))
            inputs = [z, *(torch.randn(s, device=device, dtype=dtype) / s[-1] ** 0.5 for s in shapes)]
            leaves = [t.clone().requires_grad_() for t in inputs]
            label = f"{batch}x{channels}x{side}x{side} {'NHWC' if layout is torch.channels_last else 'NCHW'}"
            size = z.numel() * z.element_size()

            def train(function, leaves=leaves, gy=gy):
                y = function(*leaves)
                return y, *torch.autograd.grad(y, leaves, gy)

            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
            yield Case(
                f"sparse_mlp, training, {label}",
                z,
                {name: lambda f=f, train=train: train(f) for name, f in rows.items()},
                5 * size,  # forward z and out, backward the gradient of out, z, the gradient of z
                tolerance,
            )
            yield Case(
                f"sparse_mlp, inference, {label}",
                z,
                {name: lambda f=f, inputs=inputs: f(*inputs) for name, f in rows.items()},
                2 * size,
                tolerance,
            )


OPS = {"shift": (shift_cases, 32), "sparse_mlp": (sparse_mlp_cases, 8)}  # and the batch on a CPU


def check_parity(case: Case) -> None:
    """Stops the run when a row disagrees with the authors' formulation."""

    def results(row: Callable) -> tuple[Tensor, ...]:
        result = row()
        return result if isinstance(result, tuple) else (result,)

    expected = results(case.rows[AUTHORS])
    for name, row in case.rows.items():
        for got, want in zip(results(row), expected, strict=True):
            worst = (got - want).abs().max() / want.abs().max()
            if not worst <= case.tolerance:
                raise SystemExit(f"{case.name}: {name} is off by {worst:.2g} of the largest value; not timed")


def measure(case: Case, seconds: float) -> dict:
    """Rows take turns, so that a slow spell of the machine meets all of them; each keeps its fastest turn."""
    turns = 8
    timers = {
        name: Timer("row()", globals={"row": row}, num_threads=torch.get_num_threads())
        for name, row in (case.rows | {COPY: case.x.clone}).items()
    }
    repeats = {
        name: timer.blocked_autorange(min_run_time=seconds / turns).number_per_run for name, timer in timers.items()
    }
    times = dict.fromkeys(timers, float("inf"))
    for _ in range(turns):
        times = {name: min(times[name], timer.timeit(repeats[name]).mean) for name, timer in timers.items()}
    copy_rate = 2 * case.x.numel() * case.x.element_size() / times.pop(COPY)
    return {
        "case": case.name,
        "seconds": times,
        "times_faster_than_authors": {name: times[AUTHORS] / t for name, t in times.items()},
        "bytes": case.bytes,
        "bytes_per_s_over_copy": {name: case.bytes / t / copy_rate for name, t in times.items()},
        "copy_bytes_per_s": copy_rate,
    }


def table(records: list[dict], stamp: str) -> str:
    names = list(records[0]["seconds"])
    lines = [
        stamp,
        "",
        "Milliseconds; in brackets how many times faster than the authors' formulation, and for ours the bytes per "
        "second over those of a plain copy.",
        "",
        f"| case | {' | '.join(names)} | over copy |",
        f"| --- |{' ---: |' * (len(names) + 1)}",
    ]
    for r in records:
        cells = [f"{r['seconds'][n] * 1e3:.3g} ({r['times_faster_than_authors'][n]:.2f})" for n in names]
        lines.append(f"| {r['case']} | {' | '.join(cells)} | {r['bytes_per_s_over_copy'][OURS]:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--op", choices=OPS, nargs="+", default=list(OPS))
    parser.add_argument("--batch", type=int, help="default: 128 on a GPU, fewer on a CPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.2, help="time spent on each row")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # one compilation per shape and layout
    torch._inductor.config.cpp.threads = args.threads
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    environment = run.environment()
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else environment["hardware"]
    stamp = (
        f"{hardware}, {args.device}, {dtype}, {args.threads} thread{'s' * (args.threads > 1)}, "
        f"torch {torch.__version__}, revision {environment['git']}, {environment['time']}"
    )
    print(stamp)
    records = []
    for op in args.op:
        cases, cpu_batch = OPS[op]
        for case in cases(args.device, dtype, args.batch or (128 if args.device == "cuda" else cpu_batch)):
            check_parity(case)
            records.append(measure(case, args.seconds))
            print(table(records[-1:], "").splitlines()[-1], flush=True)

    slug = re.sub(r"[^a-z0-9]+", "_", f"kernels {hardware} {' '.join(args.op)}".lower()).strip("_")
    folder = ROOT / "benchmarks"
    folder.mkdir(exist_ok=True)
    run.write_json(folder / f"{slug}.json", {"environment": environment, "stamp": stamp, "records": records})
    (folder / f"{slug}.md").write_text(f"`{environment['command']}`\n\n{table(records, stamp)}")
    print(f"written: {folder / slug}.json and .md")


if __name__ == "__main__":
    main()
