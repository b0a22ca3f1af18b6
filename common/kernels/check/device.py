"""Stands in for the driver below `common.kernels.cuda`: kernels are NVRTC's PTX, run and checked by `machine.h`."""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from common.kernels import cuda

from .translate import Translation, translate

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
ARCH = "compute_90"
ORDERS = (0, 1, 2)
"""Of blocks and threads: ascending, descending; from 2 on shuffled, the number being the seed."""


class KernelError(AssertionError):
    """A kernel did what it must not do."""


class _Span(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_uint64), ("bytes", ctypes.c_uint64), ("valid", ctypes.c_void_p),
        ("written", ctypes.c_int), ("initialised", ctypes.c_int),
    ]


@dataclass(frozen=True)
class Loaded:
    name: str  # "dense<float, void, true>"
    library: ctypes.CDLL
    index: int
    outputs: tuple[bool, ...]  # by parameter: a pointer to what is not const
    translation: Translation
    source: str


@dataclass(frozen=True)
class Traffic:
    """What one launch asked of memory for one tensor: sectors of 32 bytes, and requests of a warp."""

    bytes: int  # of the tensor
    sectors_read: int
    sectors_written: int
    requests_read: int
    requests_written: int


class Device:
    """`wanted`, `load` and `launch` as in common.kernels.cuda, for tensors in the CPU's memory."""

    def __init__(self, names: Sequence[str], counting: bool = False, edit: Callable[[str], str] = str):
        """edit: changes a source before it is compiled."""
        self.names = tuple(names)
        self.edit = edit
        self.order = 0
        self.counting = counting
        self.launched: dict[str, int] = {}
        self.traffic: dict[str, dict[int, Traffic]] = {}  # of a kernel's last launch, by parameter

    @contextmanager
    def plugged_in(self) -> Iterator["Device"]:
        with mock.patch.multiple(cuda, wanted=self.wanted, load=self.load, launch=self.launch):
            yield self

    def wanted(self, device: torch.device) -> bool:
        return True

    def load(self, source: Path, name: str, device: torch.device) -> Loaded:
        return _build(self.edit(source.read_text(encoding="utf-8")), self.names)[name]

    def launch(self, kernel: Loaded, grid: int, block: int, args: Sequence[Tensor | int | None], device) -> bool:
        if len(args) != len(kernel.outputs):
            raise KernelError(f"{kernel.name}: {len(args)} arguments for {len(kernel.outputs)} parameters")
        spans, alive, numbers = [], [], []
        for arg, output in zip(args, kernel.outputs, strict=True):
            numbers.append(arg.data_ptr() if isinstance(arg, Tensor) else int(arg or 0))
            if isinstance(arg, Tensor):
                valid = _elements(arg).repeat_interleave(arg.element_size() // 2)
                alive.append(valid)
                often = WRITES.get(kernel.name.split("<")[0], 1) if output else 0
                in_place = kernel.name.startswith("in_place")
                spans.append(_Span(arg.data_ptr(), 2 * len(valid), valid.data_ptr(), often, in_place or not output))
        packed = (ctypes.c_uint64 * len(args))(*(n % 2**64 for n in numbers))
        count = kernel.library.run(
            kernel.index, grid, block, packed, len(args), (_Span * len(spans))(*spans), len(spans), self.order,
            self.counting,
        )
        self.launched[kernel.name] = self.launched.get(kernel.name, 0) + 1
        if count:
            raise KernelError(_report(kernel, count))
        if self.counting:
            tensors = {k: arg for k, arg in enumerate(args) if isinstance(arg, Tensor)}
            self.traffic[kernel.name] = _traffic(kernel, tensors)
        return True


WRITES = {"axial_backward": 2}  # dz, along the width and along the height
"""How often a kernel may write one element of its output, where that is not once."""


def _elements(x: Tensor) -> Tensor:
    """Which elements of the memory from x's first to its last belong to x: (extent,) uint8."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) if x.numel() else 0
    valid = torch.zeros(extent, dtype=torch.uint8)
    valid.as_strided(x.shape, x.stride()).fill_(1)
    return valid


def _report(kernel: Loaded, count: int) -> str:
    kernel.library.errors.restype = ctypes.c_char_p
    lines = [f"{kernel.name}: {count} errors"]
    for error in kernel.library.errors().decode().splitlines():
        line, kind, what = error.split("\t")
        place = kernel.translation.source_lines.get(int(line))
        text = kernel.source.splitlines()[place - 1].strip() if place else ""
        lines.append(f"  {kind}: {what}; {kernel.translation.instructions.get(int(line), 'at the end')}; {text}")
    return "\n".join(lines)


def _traffic(kernel: Loaded, tensors: dict[int, Tensor]) -> dict[int, "Traffic"]:
    sectors, requests = ((ctypes.c_uint64 * (2 * len(tensors)))() for _ in range(2))
    kernel.library.traffic(sectors, requests)
    traffic = {}
    for k, (parameter, tensor) in enumerate(tensors.items()):
        of_tensor = slice(2 * k, 2 * k + 2)
        size = tensor.numel() * tensor.element_size()
        traffic[parameter] = Traffic(size, *sectors[of_tensor], *requests[of_tensor])
    return traffic


@functools.lru_cache(maxsize=16)
def _build(source: str, names: tuple[str, ...]) -> dict[str, Loaded]:
    """Every kernel of a source, by its template instantiation."""
    ptx, symbols = compile_ptx(source, names)
    translation = translate(ptx)
    with tempfile.TemporaryDirectory() as folder:
        program, library = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        program.write_text(translation.code, encoding="utf-8")
        flags = ["-std=c++17", "-Og", "-ffp-contract=off", "-shared", "-fPIC", "-w", f"-I{HERE}"]
        subprocess.run([COMPILER, *flags, "-o", library, program], check=True)
        loaded = ctypes.CDLL(str(library))
    signatures = subprocess.run(
        ["c++filt"], input="\n".join(symbols.values()), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    kernels = {}
    for (name, symbol), signature in zip(symbols.items(), signatures, strict=True):
        parameters = re.sub(r".*>\(|\)$", "", signature).split(", ")
        outputs = tuple(p.endswith("*") and "const" not in p for p in parameters)
        kernels[name] = Loaded(name, loaded, translation.entries.index(symbol), outputs, translation, source)
    return kernels


def compile_ptx(source: str, names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """PTX and the mangled name of each template instantiation. Needs NVRTC, no driver."""
    from cuda.bindings import nvrtc
    from cuda.pathfinder import find_nvidia_header_directory

    def checked(result):
        status, *values = result
        if status.value:
            raise RuntimeError(f"NVRTC: {status.name}\n{log(program) if program else ''}")
        return values[0] if values else None

    def log(program) -> str:
        text = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, text)
        return text.decode()

    program = None
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))
    for name in names:
        checked(nvrtc.nvrtcAddNameExpression(program, name.encode()))
    headers = find_nvidia_header_directory("cudart")
    options = [f"--gpu-architecture={ARCH}", "--std=c++17", "-lineinfo", f"-I{headers}"]
    checked(nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options]))
    ptx = b" " * checked(nvrtc.nvrtcGetPTXSize(program))
    nvrtc.nvrtcGetPTX(program, ptx)
    symbols = {name: checked(nvrtc.nvrtcGetLoweredName(program, name.encode())).decode() for name in names}
    return ptx.decode().rstrip("\0"), symbols
