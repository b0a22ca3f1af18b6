"""What can be counted of the kernels without a GPU: instructions of a warp, sectors, passes over memory, registers.

Instructions are those of sm_90's machine code (SASS) on a way from the kernel's entry to its exit that loads and stores
16 bytes at a time, per 16 bytes stored; instructions that a predicate switches off count, because they are issued.
The longest such way is that of channels that move, the shortest that of channels that stay. Sectors, of 32 bytes, and
requests, of a warp, come from running the PTX. All for bf16, 1x96x56x56, n_div 12.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch

from common.kernels import cuda
from common.kernels.shift import op as shift_op
from common.kernels.sparse_mlp import op as sparse_mlp_op

from .device import Device

TABLE = Path(__file__).with_name("counts.json")
ARCH, SHAPE, N_DIV = "sm_90", (1, 96, 56, 56), 12
DENSE = {"NCHW": "dense<unsigned short, void, false>", "NHWC": "dense<unsigned short, void, true>"}
IN_PLACE = {"NCHW": "in_place_planes<unsigned short>", "NHWC": "in_place<uint4>"}
PARAMETERS = {
    "dense": ("out", "x"), "in_place_planes": ("x",), "in_place": ("x",),
    "axial_mix": ("u", "z"), "axial_backward": ("dz", "partial", "g", "z"),
}


def measure() -> dict:
    from cuda.bindings import nvrtc

    binaries = {op: cuda.compile(op.SOURCE, op.KERNELS, ARCH) for op in (shift_op, sparse_mlp_op)}
    code = disassemble(binaries[shift_op].cubin)
    symbols = binaries[shift_op].symbols
    moving, instructions = 4 / N_DIV, {}
    for layout, name in DENSE.items():
        stay, move = ways(code[symbols[name]])
        instructions[f"shift {layout}"] = {
            "staying": stay, "moving": move, "weighted": round((1 - moving) * stay + moving * move, 1)
        }
    for layout, name in IN_PLACE.items():
        instructions[f"shift_ {layout}"] = {"moving": ways(code[symbols[name]])[1]}
    return {
        "compiler": f"NVRTC {'.'.join(map(str, nvrtc.nvrtcVersion()[1:]))}, {ARCH}",
        "instructions per 16 bytes": instructions,
        "memory": traffic(),
        "registers, shared bytes, spilled bytes": {
            name: [used.registers, used.shared_bytes, used.spill_bytes]
            for binary in binaries.values() for name, used in binary.resources.items()
        },
    }


def traffic() -> dict[str, dict[str, list[float]]]:
    """By kernel and tensor: times its bytes were read and written, sectors per request that reads and that writes."""
    H, W = SHAPE[2:]
    x = torch.zeros(SHAPE, dtype=torch.bfloat16)
    last = x.contiguous(memory_format=torch.channels_last)
    matrix, bias = torch.zeros(H, W, dtype=x.dtype), torch.zeros(W, dtype=x.dtype)
    table = {}
    for op, runs in (
        (shift_op, [lambda: shift_op.shift(x, N_DIV), lambda: shift_op.shift(last, N_DIV),
                    lambda: shift_op.shift_(x, N_DIV), lambda: shift_op.shift_(last, N_DIV)]),
        (sparse_mlp_op, [lambda: sparse_mlp_op._mix(last, matrix, bias, matrix, bias),
                         lambda: sparse_mlp_op._backward(last.repeat(1, 3, 1, 1), last, matrix, matrix)]),
    ):
        names = [n for n in op.KERNELS if re.search(r"<(unsigned short|uint4|__nv_bfloat16, 64)\b", n)]
        device = Device(names, counting=True)
        with device.plugged_in():
            for run in runs:
                run()
        for kernel, tensors in device.traffic.items():
            names = PARAMETERS[kernel.split("<")[0]]
            table[kernel] = {
                names[k]: [round(v, 2) for v in (
                    32 * t.sectors_read / t.bytes, 32 * t.sectors_written / t.bytes,
                    t.sectors_read / max(1, t.requests_read), t.sectors_written / max(1, t.requests_written),
                )]
                for k, t in tensors.items() if k < len(names)
            }
    return table


def disassemble(cubin: bytes) -> dict[str, list[str]]:
    """Machine code by mangled name: instructions, and labels that end with a colon."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    functions: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"\.text\.(\S+):", line):
            current = functions.setdefault(match[1], [])
        elif match := re.match(r"(\.L_x_\d+):", line):
            current.append(match[1] + ":")
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            current.append(match[1])
    return functions


def ways(code: list[str]) -> tuple[float, float]:
    """Fewest and most instructions per 16 bytes stored; each loop is gone through once."""
    instructions, labels = [], {}
    for line in code:
        if line.endswith(":"):
            labels[line[:-1]] = len(instructions)
        else:
            instructions.append(line)
    # by instruction: vectors loaded and stored so far -> fewest and most instructions so far
    reached: list[dict[tuple[int, int], tuple[int, int]]] = [{} for _ in instructions]
    reached[0] = {(0, 0): (0, 0)}
    found = []
    for k, text in enumerate(instructions):
        predicated, operation = text.startswith("@"), re.sub(r"^@!?U?P\d+\s+", "", text)
        wide = "E.128" in operation
        if operation.startswith(("LDG", "STG")) and not wide:
            continue  # not a main path
        for (loads, stores), (fewest, most) in reached[k].items():
            state = loads + (wide and operation.startswith("LDG")), stores + (wide and operation.startswith("STG"))
            least, greatest = fewest + 1, most + 1
            targets = [k + 1]
            if operation.startswith("EXIT"):
                if all(state):
                    found.append((least / state[1], greatest / state[1]))
                targets = [k + 1] if predicated else []
            elif match := re.match(r"BRA(?:\.\S+)?\s+(?:!?U?P\d+,\s+)?`\((\.L_x_\d+)\)", operation):
                conditional = predicated or "P" in operation.split("`")[0].removeprefix("BRA")
                targets = [labels[match[1]], *([k + 1] if conditional else [])]
            for target in targets:
                if k < target < len(instructions):
                    low, high = reached[target].get(state, (least, greatest))
                    reached[target][state] = min(low, least), max(high, greatest)
    return round(min(low for low, _ in found), 1), round(max(high for _, high in found), 1)


def committed() -> dict:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def write(table: dict) -> None:
    TABLE.write_text(text(table) + "\n", encoding="utf-8")


def text(table: dict) -> str:
    """JSON, an entry of a part on one line."""
    parts = []
    for name, part in table.items():
        if isinstance(part, dict):
            lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in part.items())
            parts.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
        else:
            parts.append(f"  {json.dumps(name)}: {json.dumps(part)}")
    return "{\n" + ",\n".join(parts) + "\n}"


def differences(found: dict, expected: dict) -> list[str]:
    lines = []
    for name in expected.keys() | found.keys():
        a, b = expected.get(name), found.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            differing = [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
            lines += [f"{name}: {key}: {b.get(key)}, committed {a.get(key)}" for key in differing]
        elif a != b:
            lines.append(f"{name}: {b}, committed {a}")
    return sorted(lines)
