"""Known mistakes in the CUDA sources. The checker is worth what it sees of them."""

from dataclasses import dataclass

import torch

from common.kernels.shift import op as shift_op
from common.kernels.sparse_mlp import op as sparse_mlp_op

from . import cases
from .device import Device, KernelError


@dataclass(frozen=True)
class Mutant:
    name: str
    op: str  # "shift" or "sparse_mlp"
    old: str  # stands in the source
    new: str
    which: int = 0  # occurrence of old


BARRIER = "__syncthreads();"
MUTANTS = [
    # sparse_mlp.cu, in the order of the source: two barriers of axial_mix, three of axial_backward
    Mutant("mix, no barrier before the tile is read", "sparse_mlp", BARRIER, "", 0),
    Mutant("mix, no barrier before the result is read", "sparse_mlp", BARRIER, "", 1),
    Mutant("backward, no barrier before the tiles are read", "sparse_mlp", BARRIER, "", 2),
    Mutant("backward, no barrier before the result is read", "sparse_mlp", BARRIER, "", 3),
    Mutant("backward, no barrier between the axes", "sparse_mlp", BARRIER, "", 4),
    Mutant("a barrier that half of the block passes by", "sparse_mlp", BARRIER,
           "if (threadIdx.x < 128) __syncthreads();", 3),
    Mutant("mma, two left operands swapped", "sparse_mlp", '"r"(a[0]), "r"(a[1])', '"r"(a[1]), "r"(a[0])', 0),
    Mutant("mma, right operands swapped", "sparse_mlp", '"r"(b[0]), "r"(b[1])', '"r"(b[1]), "r"(b[0])', 0),
    Mutant("mma of the other 16-bit type", "sparse_mlp", "f32.bf16.bf16.f32", "f32.f16.f16.f32", 0),
    Mutant("mma that only half of the lanes reach", "sparse_mlp", "multiply(acc, a[k], b, T{});",
           "if (at.lane < 16) multiply(acc, a[k], b, T{});"),
    Mutant("ldmatrix without .trans", "sparse_mlp", "x2.trans.shared", "x2.shared"),
    Mutant("ldmatrix, one row too far", "sparse_mlp", "at.lane % 16][n * 8]", "at.lane % 16 + 1][n * 8]"),
    Mutant("tile rows not at 16-byte addresses", "sparse_mlp", "PITCH = TILE + 8", "PITCH = TILE + 4"),
    Mutant("a matrix read beyond its end", "sparse_mlp", "if (row >= n || column >= n) return zero;", ""),
    Mutant("the matrix where its transpose belongs", "sparse_mlp", "TRANSPOSED ? column * n + row : row * n + column",
           "row * n + column"),
    Mutant("channels beyond the last read", "sparse_mlp", " && column < channels", ""),
    Mutant("wrong stride of z", "sparse_mlp", "z_from, (int)z_stride,", "z_from, (int)C,"),
    Mutant("the padding of a line written", "sparse_mlp", "position < lines.length", "position <= lines.length"),
    Mutant("the bias gradient not written", "sparse_mlp", "if (at.half == 0 && at.t == 0 && part % 2 == 0) out",
           "if (false) out"),
    Mutant("the second half of the columns not computed", "sparse_mlp", "const int n = at.half * (TILE / 16) + k8;",
           "const int n = k8;"),
    # shift.cu
    Mutant("no barrier in place, channels first", "shift", BARRIER, "", 0),
    Mutant("no barrier in place, any strides", "shift", BARRIER, "", 1),
    Mutant("in place from the wrong end", "shift", "m.jump < 0 ? count - 1 - number : number", "number", 0),
    Mutant("no border test, channels first", "shift", "const bool inside = t + m.jump < m.period;",
           "const bool inside = true;"),
    Mutant("no border test, channels last", "shift", "if (t + m.jump < m.period) moved", "if (true) moved"),
    Mutant("a row's end not noticed within a vector", "shift", "if (++t == m.period) t = 0;", "++t;"),
    Mutant("an aligned load before the tensor", "shift", "if ((u32)low < vectors) ", "if (low < (int)vectors) "),
    Mutant("an aligned load beyond the tensor", "shift", "if (bytes && (u32)(low + 1) < vectors) ", "if (bytes) "),
    Mutant("a vector over two groups taken as one", "shift", "if (offset + V <= end) {", "if (offset < end) {"),
    Mutant("funnel by a byte", "shift", "8 * (bytes & 2)", "4 * (bytes & 2)"),
    Mutant("left and right exchanged", "shift", "group % 2 ? -jump : jump", "group % 2 ? jump : -jump"),
    Mutant("threads beyond the last vector", "shift", "if (number >= (u32)vectors) return;", ""),
    Mutant("wrong stride of the output", "shift", "out[n * on + c * oc + i * oi + j * oj]",
           "out[n * on + c * oc + i * oj + j * oi]"),
]

KERNELS = {
    "shift": [name for name in shift_op.KERNELS if "unsigned short" in name or name.startswith("in_place<")],
    "sparse_mlp": [name for name in sparse_mlp_op.KERNELS if "bfloat16" in name],
}
SHIFT_SHAPES = [((2, 13, 5, 7), 5), ((2, 32, 7, 7), 4), ((2, 24, 6, 8), 3), ((1, 8, 64, 80), 4)]
SPARSE_MLP_SHAPES = [(1, 40, 7, 13), (1, 8, 17, 28), (1, 8, 33, 64)]


def mutate(mutant: Mutant, source: str) -> str:
    parts = source.split(mutant.old)
    if len(parts) < mutant.which + 2:
        raise ValueError(f"{mutant.name}: {mutant.old!r} is not in the source")
    head, tail = parts[: mutant.which + 1], parts[mutant.which + 1 :]
    return mutant.old.join(head) + mutant.new + mutant.old.join(tail)


def verdict(mutant: Mutant | None, op: str = "") -> str | None:
    """What the checker says of a mutant, or of the source itself: None if it sees nothing."""
    op = mutant.op if mutant else op
    device = Device(KERNELS[op], edit=lambda source: mutate(mutant, source) if mutant else source)
    try:
        with device.plugged_in():
            if op == "shift":
                wrong = shift_cases(device)
            else:
                wrong = cases.sparse_mlp(device, SPARSE_MLP_SHAPES, [torch.bfloat16], orders=[0])
    except KernelError as error:
        return str(error).splitlines()[1].strip()
    return f"wrong result: {wrong[0]}" if wrong else None


def shift_cases(device: Device) -> list[str]:
    """Without shift_add, whose kernels are others."""
    wrong = []
    for (shape, n_div), layout, step in ((s, l, k) for s in SHIFT_SHAPES for l in cases.LAYOUTS for k in (1, -2)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16().contiguous(memory_format=layout)
        for y in (x, x[..., 1:]):
            want = cases.shift_oracle(y, n_div, step)
            results = {"shift": shift_op.shift(y, n_div, step), "shift_": shift_op.shift_(y.clone(), n_div, step)}
            for name, got in results.items():
                if not torch.equal(got, want):
                    wrong.append(f"{name} {tuple(y.shape)} n_div {n_div} step {step} {layout}")
    return wrong
