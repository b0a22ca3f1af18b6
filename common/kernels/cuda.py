"""From a .cu file to a running kernel: NVRTC through NVIDIA's cuda-core, a disk cache, a launch on torch's stream.

Nobody needs nvcc, a build step or torch's headers; torch's wheels bring NVRTC and the CUDA headers. Importing
this module needs neither cuda-core nor a GPU, and compiling needs no GPU. Every kernel parameter is a pointer or
a 64-bit integer, so launch arguments are Python ints.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.data import cache_dir

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")  # A100, H100 and H200, B200, RTX 50: what the tests compile for
BACKENDS = ("auto", "reference", "cuda")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of an SM, as ptxas reports it."""

    registers: int
    shared_bytes: int
    spill_bytes: int


@dataclass(frozen=True)
class Binary:
    cubin: bytes
    symbols: dict[str, str]  # template instantiation -> mangled name
    resources: dict[str, Resources]  # by template instantiation


def wanted(device: torch.device) -> bool:
    """Whether to try a kernel on this device, by the environment variable KERNEL_BACKEND.

    auto (default): on a GPU. reference: never. cuda: always, and RuntimeError when that cannot be. torch.compile
    reads it when it traces.
    """
    backend = os.environ.get("KERNEL_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"KERNEL_BACKEND={backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "cuda" and device.type != "cuda":
        raise RuntimeError(f"KERNEL_BACKEND=cuda, but the tensor is on {device}; move it to a GPU or use auto")
    return backend != "reference" and device.type == "cuda"


def required() -> bool:
    """KERNEL_BACKEND=cuda: nothing falls back."""
    return os.environ.get("KERNEL_BACKEND", "auto") == "cuda"


def refuse(why: str) -> None:
    """Called where the reference takes over on a device with kernels: RuntimeError if KERNEL_BACKEND=cuda."""
    if required():
        raise RuntimeError(f"KERNEL_BACKEND=cuda, but {why}")


def plain() -> bool:
    """Whether only PyTorch's own operators will do: in what is recorded to run elsewhere, and under torch.func.

    The flag is private: `torch.compiler.is_exporting()` is folded to True in every compilation (torch 2.11). What
    compiled and exported graphs hold is pinned by tests.
    """
    recording = torch.compiler._is_exporting_flag or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()
    return recording or (not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active())


def load(source: Path, name: str, device: torch.device):
    """A kernel by its template instantiation, "copy<float, 4>".

    None where it cannot be had: the caller takes the reference, a warning has said why. With KERNEL_BACKEND=cuda
    that is a RuntimeError instead.
    """
    kernel = _load(source, name, "sm_{}{}".format(*torch.cuda.get_device_capability(device)))
    if not isinstance(kernel, Exception):
        return kernel
    refuse(f"{source.name}: {name} cannot be loaded: {kernel}")
    return None


def launch(kernel, grid: int, block: int, args: Sequence[Tensor | int | None], device: torch.device) -> None:
    """Enqueue on torch's current stream. args: tensors, which become pointers, and integers, in the kernel's order."""
    from cuda.core import LaunchConfig
    from cuda.core import launch as cuda_launch

    with torch.cuda.device(device):
        values = (a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in args)
        cuda_launch(torch.cuda.current_stream(), LaunchConfig(grid=grid, block=block), kernel, *values)


@functools.cache
def _load(source: Path, name: str, arch: str):
    """The kernel, or the exception that explains its absence: a failed compilation is not tried again."""
    try:
        from cuda.core import ObjectCode

        binary = compile(source, (name,), arch)
        return ObjectCode.from_cubin(binary.cubin).get_kernel(binary.symbols[name])
    except Exception as error:  # a missing package, an old driver, a compiler error: all mean "use the reference"
        warnings.warn(f"{source.name}: {name} not available on {arch}, using PyTorch instead: {error}", stacklevel=2)
        return error


def compile(source: Path, names: Sequence[str], arch: str) -> Binary:
    """Compile the template instantiations `names` of a .cu file for `arch`, or read them from the disk cache."""
    from cuda.bindings import nvrtc
    from cuda.core import Program, ProgramOptions
    from cuda.pathfinder import find_nvidia_header_directory

    code = source.read_text()
    key = hashlib.sha256(repr((code, tuple(names), arch, nvrtc.nvrtcVersion()[1:])).encode()).hexdigest()
    cached = cache_dir("kernels") / f"{source.stem}-{arch}-{key[:32]}"
    if cached.exists():
        return _unpack(cached.read_bytes())

    log = io.StringIO()
    options = ProgramOptions(
        arch=arch, std="c++17", include_path=find_nvidia_header_directory("cudart"), ptxas_options="-v"
    )
    built = Program(code, "c++", options).compile("cubin", name_expressions=tuple(names), logs=log)
    symbols = {name: built.symbol_mapping[name].decode() for name in names}
    packed = json.dumps({"symbols": symbols, "log": log.getvalue()}).encode() + b"\n" + built.code
    _write(cached, packed)
    return _unpack(packed)


def _unpack(packed: bytes) -> Binary:
    header, cubin = packed.split(b"\n", 1)
    header = json.loads(header)
    used = {}
    for entry in header["log"].split("Compiling entry function '")[1:]:
        numbers = (r"Used (\d+) registers", r"(\d+) bytes smem", r"(\d+) bytes spill stores")
        used[entry.split("'")[0]] = Resources(*(int(m[1]) if (m := re.search(n, entry)) else 0 for n in numbers))
    return Binary(cubin, header["symbols"], {name: used[symbol] for name, symbol in header["symbols"].items()})


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: several processes may compile at once. A full disk means no cache, not an error."""
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
