"""The checker sees known mistakes, refuses what it does not know, and counts what is committed."""

import json

import pytest
import torch

from common.kernels.check import cases, counts, passes
from common.kernels.check.device import Device
from common.kernels.check.mutants import MUTANTS, mutate, verdict
from common.kernels.check.translate import UnknownPTX, translate
from common.kernels.shift import op as shift_op
from common.kernels.shift import shift
from common.kernels.sparse_mlp import op as sparse_mlp_op

from .conftest import GXX

pytest.importorskip("cuda.bindings", reason="needs cuda-core")
FEW = ["backward, no barrier between the axes", "mma, two left operands swapped", "no border test, channels last"]


@GXX
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name in FEW], ids=lambda m: m.name)
def test_a_mutant_is_seen(mutant):
    assert verdict(mutant)


@GXX
@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_every_mutant_is_seen(mutant):
    assert verdict(mutant)


@GXX
@pytest.mark.long
@pytest.mark.parametrize("op", [shift_op, sparse_mlp_op], ids=["shift", "sparse_mlp"])
def test_every_case(op):
    device = Device(op.KERNELS)
    with device.plugged_in():
        run = cases.shift if op is shift_op else cases.sparse_mlp
        assert run(device) == []
    assert set(device.launched) == set(op.KERNELS)


def test_mutants_change_the_source():
    """Each once, and there are enough of them."""
    sources = {"shift": shift_op.SOURCE.read_text(), "sparse_mlp": sparse_mlp_op.SOURCE.read_text()}
    mutated = {mutate(m, sources[m.op]) for m in MUTANTS}
    assert len(mutated) == len({m.name for m in MUTANTS}) == len(MUTANTS) >= 20
    assert not mutated & set(sources.values())


ENTRY = """
.visible .entry k(
\t.param .u64 k_param_0
)
{{
\t.reg .b32 \t%r<9>;
\t.reg .f32 \t%f<9>;
\t{}
\tret;
}}
"""


def test_what_is_unknown_is_refused():
    assert "kernel0" in translate(ENTRY.format("add.s32 %r1, %r2, 3;")).code
    for text in ("sin.approx.f32 %f1, %f2;", "add.s32 %r1, %q2, 3;", "atom.global.add.u32 %r1, [%r2], 3;",
                 "ld.local.u32 %r1, [%r2];", "setp.ltu.f32 %p1, %f1, %f2;", "add.f16x2 %r1, %r2, %r3;"):
        with pytest.raises(UnknownPTX, match="line 8"):
            translate(ENTRY.format(text))


def test_counts_are_the_committed_ones():
    pytest.importorskip("triton", reason="its package has the disassembler")
    expected = counts.committed()
    found = counts.measure()
    if found["compiler"] != expected["compiler"]:
        pytest.skip(f"counted with {expected['compiler']}, this is {found['compiler']}")
    assert counts.differences(found, expected) == []


def test_what_the_counts_promise():
    table = counts.committed()
    instructions = table["instructions per 16 bytes"]
    assert max(instructions[f"shift {layout}"]["weighted"] for layout in ("NCHW", "NHWC")) <= 120
    assert all(spilled == 0 for *_, spilled in table["registers, shared bytes, spilled bytes"].values())
    backward = table["memory"]["axial_backward<__nv_bfloat16, 64>"]
    assert backward["g"][:2] == [1.0, 0.0]  # read once
    assert table["memory"]["axial_mix<__nv_bfloat16, 64>"]["u"][:2] == [0.0, 1.0]  # written once


def test_the_way_through_machine_code():
    """Fewest and most instructions between entry and exit, not through the loop of 2-byte accesses."""
    code = ["ISETP", "@P0 EXIT", "@P1 BRA `(.L_x_1)", "IMAD", "IMAD", "LDG.E.128 R4", "BRA `(.L_x_2)", ".L_x_1:",
            "LDG.E.128 R4", ".L_x_2:", "@P2 BRA `(.L_x_3)", "STG.E.128 R4", "EXIT", ".L_x_3:", "STG.E.U16 R4", "EXIT"]
    assert counts.ways(code) == (7, 10)
    assert json.loads(counts.text({"a": {"b": 1}, "c": "d"})) == {"a": {"b": 1}, "c": "d"}


def test_the_oracle_is_the_reference():
    x = torch.randn(2, 11, 5, 4)
    assert torch.equal(cases.shift_oracle(x, 3, 2), shift_op.reference.shift(x, 3, 2))


def test_passes_of_a_block():
    """By hand: bf16 copies of the float32 map and of the output's gradient, a product, an addition, a shift."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(8, 8, 1, bias=False)

        def forward(self, x):
            x = shift(x, 4)
            return x + self.conv(x)

    forward, backward = passes.count(Block(), (64, 8, 16, 16), kernels=True)
    rounded = {name: round(value) for name, value in forward.by_operator.items()}
    assert rounded == {"kernels::shift": 4, "aten::_to_copy": 3, "aten::convolution": 2, "aten::add.Tensor": 5}
    assert round(backward.by_operator["kernels::shift"]) == 4
