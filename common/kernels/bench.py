"""Times operators, blocks and networks beside their baselines: the authors' formulation, the best eager form of plain
PyTorch, torch.compile of that, ours.

    python -m common.kernels.bench                          the operators, on the GPU if there is one, else on the CPU
    python -m common.kernels.bench --only "in place"        cases whose name has these words
    python -m papers.shiftvit.bench                         blocks and whole networks

A case is timed only after every row has given the authors' result; a row that does not stops the run. The rows of a
case take turns, and ratios are formed within a turn, so that a machine that slows down slows all of them. Written to
benchmarks/: JSON and a Markdown table, named after the subject and the hardware.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

from common import run
from common.kernels.shift import op as shift_op
from common.kernels.shift import reference as shift_reference
from common.kernels.sparse_mlp import op as sparse_mlp_op
from common.kernels.sparse_mlp import reference as sparse_mlp_reference

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
AUTHORS, EAGER, COMPILED, OURS = "authors", "best eager", "torch.compile", "ours"
OURS_COMPILED, COPY = "ours, torch.compile", "copy"
# OURS_COMPILED is what --compile gives: the sparse MLP's kernels where there are some, the shift decomposed
TURNS = 9
FARTHER = 4
"""How much farther than the authors' formulation a row may be from the exact result: rounding, not a mistake."""
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


@dataclass
class Case:
    name: str
    rows: Mapping[str, Callable[[], object]]
    """Each does the whole of what is timed and returns what must agree, a tensor or several."""
    exact: Callable[[], object] | None = None
    """The authors' formulation in a wider type. Without it nothing is rounded, and all bits must agree."""
    x: Tensor | None = None
    """A plain copy of this is timed too, and bytes per second are given over those of the copy."""
    bytes: int = 0
    """That any implementation has to move."""


# Parity -----------------------------------------------------------------------------------------------------


def check_parity(case: Case) -> None:
    """Stops the run where a row disagrees with the authors' formulation: to the last bit without `exact`, else where
    a tensor is `FARTHER` times as far from the exact one as the authors' is."""
    theirs = _tensors(case.rows[AUTHORS]())
    exact = theirs if case.exact is None else _tensors(case.exact())
    whole = sum(t.float().norm() ** 2 for t in exact) ** 0.5  # some gradients are sums that cancel to nothing
    for name, row in case.rows.items():
        for i, (got, want, authors) in enumerate(zip(_tensors(row()), exact, theirs, strict=True)):
            allowed = 0.0
            if case.exact is not None:
                want = want.to(torch.promote_types(want.dtype, torch.float32))
                # a whole network's gradients differ by 4e-5 in float32, sums being taken in another order
                rounding = max(torch.finfo(got.dtype).eps, 1e-4)
                allowed = FARTHER * (authors - want).norm() + rounding * want.norm() + 1e-6 * whole
            off = (got - want).norm()
            if not off <= allowed:
                raise SystemExit(f"{case.name}: {name}, tensor {i} is off by {off:.3g} of {want.norm():.3g}; not timed")


def _tensors(result: object) -> list[Tensor]:
    """Detached copies: the next row may overwrite the gradients of a shared leaf."""
    return [t.detach().clone() for t in (result if isinstance(result, tuple | list) else (result,))]


# Times ------------------------------------------------------------------------------------------------------


def measure(case: Case, seconds: float, graphs: bool = False) -> dict:
    """seconds: spent on each row, in TURNS turns of at least one execution. graphs: every row as a CUDA graph."""
    rows = dict(case.rows) | ({} if case.x is None else {COPY: case.x.clone})
    if graphs:
        rows = {name: in_cuda_graph(row) for name, row in rows.items()}

    clock = _clock()

    def timed(name: str, repeats: int) -> float:
        _synchronize()
        began = clock()
        for _ in range(repeats):
            rows[name]()
        _synchronize()
        return (clock() - began) / repeats

    repeats = {name: max(1, round(seconds / TURNS / timed(name, 1))) for name in rows}
    turns = {name: [] for name in rows}
    names = list(rows)
    for turn in range(TURNS):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            turns[name].append(timed(name, repeats[name]))

    record = {
        "case": case.name,
        "seconds": {name: statistics.median(turns[name]) for name in case.rows},
        "times_faster_than_authors": {name: _quartiles(turns[AUTHORS], turns[name]) for name in case.rows},
    }
    if case.x is not None:
        scale = case.bytes / (2 * case.x.numel() * case.x.element_size())
        record |= {
            "bytes": case.bytes,
            "copy_seconds": statistics.median(turns[COPY]),
            "bytes_per_s_over_copy": {n: _quartiles([scale * t for t in turns[COPY]], turns[n]) for n in case.rows},
        }
    return record


def in_cuda_graph(row: Callable[[], object]) -> Callable[[], object]:
    """The row's launches without Python between them: small maps take the GPU less time than Python the calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compilation, cuDNN's choices, the allocator: none of it may happen while recording
            row()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        row()
    return graph.replay


def _clock() -> Callable[[], float]:
    """Process time for one thread on a CPU, because other processes do not lengthen it; else the wall clock."""
    one_thread = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time if one_thread else time.perf_counter


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _quartiles(longer: list[float], shorter: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the ratios turn by turn."""
    return statistics.quantiles((a / b for a, b in zip(longer, shorter, strict=True)), n=4, method="inclusive")


def table(records: list[dict]) -> str:
    names = list(dict.fromkeys(name for r in records for name in r["seconds"]))
    bandwidth = "bytes_per_s_over_copy" in records[0]
    columns = ["case", *names, *(["over copy"] if bandwidth else [])]
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    for r in records:
        cells = []
        for name in names:
            if name not in r["seconds"]:
                cells.append("–")
                continue
            low, middle, high = r["times_faster_than_authors"][name]
            spread = "" if name == AUTHORS else f" ({middle:.2f}, {low:.2f} to {high:.2f})"
            cells.append(f"{r['seconds'][name] * 1e3:.4g}{spread}")
        if bandwidth:
            cells.append(f"{r['bytes_per_s_over_copy'][OURS][1]:.2f}")
        lines.append(f"| {r['case']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


EXPLANATION = """Milliseconds (Python's {clock}), median of {turns} turns; in brackets how many times faster than the
authors' formulation, median and quartiles of the ratios turn by turn. Over copy: bytes per second of ours over those of
a plain copy of the same tensor, counting the bytes that the operation cannot avoid."""


def main(subjects: Mapping[str, Callable[..., Iterator[Case]]], cpu_batch: Mapping[str, int]) -> None:
    """Command line of a benchmark. A subject yields cases(device, dtype, batch)."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", nargs="*", default=list(subjects), help=f"default: {' '.join(subjects)}")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases with these words in their name; no file")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--batch", type=int, help="default: 128 on a GPU, fewer on a CPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--graphs", action="store_true", help="time CUDA graphs: the GPU's time without Python's")
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on each row at least")
    args = parser.parse_args()
    if unknown := set(args.subject) - set(subjects):
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(subjects)}")

    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # exact results are float32 where the rows are bfloat16
    torch._dynamo.config.recompile_limit = 64  # one compilation per shape and layout
    torch._inductor.config.cpp.threads = args.threads
    on_gpu = args.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    environment = run.environment()
    hardware = torch.cuda.get_device_name() if on_gpu else environment["hardware"]
    for subject in args.subject:
        torch.manual_seed(0)
        load, records = [os.getloadavg()[0]], []
        for case in subjects[subject](args.device, dtype, args.batch or (128 if on_gpu else cpu_batch[subject])):
            if args.only in case.name:
                check_parity(case)
                records.append(measure(case, args.seconds, args.graphs))
                print(table(records[-1:]).splitlines()[-1], flush=True)
        if args.only or not records:
            continue
        load.append(os.getloadavg()[0])
        stamp = (
            f"{hardware}, {args.device}, {dtype}, {args.threads} thread{'s' * (args.threads > 1)}, "
            f"{'CUDA graphs, ' * args.graphs}"
            f"torch {torch.__version__}, revision {environment['git']}, {environment['time']}, load average "
            f"{load[0]:.1f} at the start and {load[1]:.1f} at the end on {os.cpu_count()} cores"
        )
        path = FOLDER / re.sub(r"[^a-z0-9]+", "_", f"{subject} {hardware}".lower()).strip("_")
        path.parent.mkdir(exist_ok=True)
        run.write_json(
            path.with_suffix(".json"), {"environment": environment, "stamp": stamp, "load": load, "records": records}
        )
        explanation = EXPLANATION.format(clock=_clock().__name__, turns=TURNS)
        text = f"`{environment['command']}`\n\n{stamp}\n\n{explanation}\n\n{table(records)}"
        path.with_suffix(".md").write_text(text)
        print(f"written: {path}.json and .md")


# Operators --------------------------------------------------------------------------------------------------


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
    """The four stages of ShiftViT-T at 224 pixels, n_div 12; in place also a map of one pixel, all of it overhead."""
    n_div = 12
    compiled = torch.compile(shift_reference.shift_by_padding, dynamic=False)
    compiled_add = torch.compile(lambda x, r: shift_reference.shift_by_padding(x + r, n_div), dynamic=False)
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
    inference_rows = rows | {EAGER: lambda x: shift_reference.shift(x, n_div)}
    in_place_rows = rows | {
        EAGER: lambda x: shift_reference.shift_(x, n_div), OURS: lambda x: shift_op.shift_(x, n_div)
    }
    for channels, side in ((96, 56), (192, 28), (384, 14), (768, 7), (12, 1)):
        for layout, memory_format in LAYOUTS.items() if side > 1 else [("NCHW", torch.contiguous_format)]:
            shape = (batch if side > 1 else 1, channels, side, side)
            x, r, gy = (_normal(shape, device, dtype, memory_format) for _ in range(3))
            label = f"{'x'.join(map(str, shape))} {layout}"
            size = x.numel() * x.element_size()

            def train(function, *inputs, gy=gy):
                leaves = [t.detach().requires_grad_() for t in inputs]
                y = function(*leaves)
                return y, *torch.autograd.grad(y, leaves, gy)

            if side > 1:
                trained = {name: lambda f=f, x=x, train=train: train(f, x) for name, f in rows.items()}
                yield Case(f"shift, training, {label}", trained, x=x, bytes=4 * size)
                trained = {name: lambda f=f, x=x, r=r, train=train: train(f, x, r) for name, f in add_rows.items()}
                yield Case(f"shift_add, training, {label}", trained, x=x, bytes=5 * size)
                rows_of_x = {name: lambda f=f, x=x: f(x) for name, f in inference_rows.items()}
                yield Case(f"shift, inference, {label}", rows_of_x, x=x, bytes=2 * size)
            copies = {name: x.clone() for name in in_place_rows}  # shifted again and again while being timed
            rows_of_copies = {name: lambda f=f, x=copies[name]: f(x) for name, f in in_place_rows.items()}
            moving = size * 4 // n_div
            yield Case(f"shift in place, inference, {label}", rows_of_copies, x=x, bytes=2 * moving)


def mixing_by_permutation(z: Tensor, A: Tensor, a: Tensor, D: Tensor, d: Tensor, F_: Tensor) -> Tensor:
    """The authors' formulation: permute, 1x1 convolution, permute back; concatenate; 1x1 convolution."""
    row = F.conv2d(z.permute(0, 3, 1, 2), A[:, :, None, None], a).permute(0, 2, 3, 1)
    col = F.conv2d(z.permute(0, 2, 1, 3), D[:, :, None, None], d).permute(0, 2, 1, 3)
    return F.conv2d(torch.cat([z, row, col], dim=1), F_[:, :, None, None])


def sparse_mlp_cases(device: str, dtype: torch.dtype, batch: int) -> Iterator[Case]:
    """The four stages of sMLPNet-T at 224 pixels."""
    rows = {
        AUTHORS: mixing_by_permutation,
        EAGER: sparse_mlp_reference.sparse_mlp,
        COMPILED: torch.compile(sparse_mlp_reference.sparse_mlp, dynamic=False),
        OURS: sparse_mlp_op.sparse_mlp,
    }
    if device == "cuda":  # without kernels it is COMPILED
        rows[OURS_COMPILED] = torch.compile(sparse_mlp_op.sparse_mlp, dynamic=False)
    wide = torch.float64 if dtype is torch.float32 else torch.float32
    for channels, side in ((80, 56), (160, 28), (320, 14), (640, 7)):
        for layout, memory_format in LAYOUTS.items():
            z, gy = (_normal((batch, channels, side, side), device, dtype, memory_format) for _ in range(2))
            shapes = ((side, side), (side,), (side, side), (side,), (channels, 3 * channels))
            inputs = [z, *(torch.randn(s, device=device, dtype=dtype) / s[-1] ** 0.5 for s in shapes)]
            size = z.numel() * z.element_size()

            def infer(function, dtype=dtype, inputs=inputs):
                return function(*(t.to(dtype) for t in inputs))

            def train(function, dtype=dtype, inputs=inputs, gy=gy):
                leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
                y = function(*leaves)
                return y, *torch.autograd.grad(y, leaves, gy.to(dtype))

            # forward z and out, backward the gradient of out, z, the gradient of z
            for mode, function, bytes in (("training", train, 5 * size), ("inference", infer, 2 * size)):
                yield Case(
                    f"sparse_mlp, {mode}, {batch}x{channels}x{side}x{side} {layout}",
                    {name: lambda f=f, function=function: function(f) for name, f in rows.items()},
                    lambda function=function: function(mixing_by_permutation, wide),
                    z,
                    bytes,
                )


def _normal(shape: tuple[int, ...], device: str, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype).to(memory_format=memory_format)


# Blocks and networks, for a paper's own benchmark -----------------------------------------------------------


def module_cases(
    name: str, forms: Mapping[str, nn.Module], shape: tuple[int, ...], device: str, dtype: torch.dtype
) -> Iterator[Case]:
    """Training step and inference of one module in several forms, both layouts.

    forms: AUTHORS, EAGER, OURS and any others, with the same weights; two rows more are torch.compile of EAGER and of
    OURS. Of ShiftViT the second is what compiled code sees of the operator too, pad, slice and cat.
    shape: of the input; with three channels it is an image, takes no gradient, and AdamW belongs to the training step
    (with a learning rate of 0, so that the rows stay comparable).
    dtype: of the computation, by autocast; weights are float32.
    """
    network = shape[1] == 3
    for layout, memory_format in LAYOUTS.items():
        x = _normal(shape, device, torch.float32, memory_format)
        for mode in ("training", "inference"):
            modules = {
                row: copy.deepcopy(form).to(device, memory_format=memory_format).train(mode == "training")
                for row, form in forms.items()
            }
            for row, form in ((COMPILED, EAGER), (OURS_COMPILED, OURS)):
                modules[row] = copy.deepcopy(modules[form])
                modules[row].compile(dynamic=False)
            wide = copy.deepcopy(modules[AUTHORS])
            rows = {row: _execution(m, x, dtype, mode, optimize=network) for row, m in modules.items()}
            exact = torch.float64 if dtype is torch.float32 else torch.float32
            exactly = _execution(wide.to(exact), x.to(exact), exact, mode, optimize=network)
            yield Case(f"{name}, {mode}, {'x'.join(map(str, shape))} {layout}", rows, exactly)


def _execution(module: nn.Module, x: Tensor, dtype: torch.dtype, mode: str, optimize: bool) -> Callable[[], object]:
    autocast = torch.autocast(x.device.type, dtype, enabled=dtype.itemsize == 2)
    if mode == "inference":

        def infer():
            with torch.inference_mode(), autocast:
                return module(x)

        return infer

    weights = list(module.parameters())
    gradient = None
    optimizer = (
        torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0, fused=True, capturable=x.is_cuda) if optimize else None
    )
    x = x.detach().requires_grad_(not optimize)

    def train():
        nonlocal gradient
        module.zero_grad(set_to_none=True)
        x.grad = None
        with autocast:
            y = module(x)
        if gradient is None:
            gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y) / len(y)
        y.backward(gradient)
        if optimizer:
            optimizer.step()
        return y, *(t.grad for t in [x, *weights] if t.grad is not None)

    return train


if __name__ == "__main__":
    main({"shift": shift_cases, "sparse_mlp": sparse_mlp_cases}, cpu_batch={"shift": 32, "sparse_mlp": 8})
