"""From a .cu file to a running kernel: NVRTC through NVIDIA's cuda-core, a disk cache, a launch on torch's stream.

Nobody needs nvcc, a build step or torch's headers; torch's wheels bring NVRTC and the CUDA headers. Importing
this module needs neither cuda-core nor a GPU, and compiling needs no GPU. Every kernel parameter is a pointer or
a 64-bit integer, so launch arguments are Python ints.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import stat
import tempfile
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.run.files import cache_dir

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
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    key = source, name, arch
    if key not in _loaded:
        try:
            _loaded[key] = _load(*key)
        except Exception as error:  # a missing package, an old driver, a compiler error: all mean "use the reference"
            _fail(key, f"not available on {arch}", error)
    if isinstance(kernel := _loaded[key], Exception):
        refuse(f"{source.name}: {name} cannot be used: {kernel}")
        return None
    return kernel


def launch(kernel, grid: int, block: int, args: Sequence[Tensor | int | None], device: torch.device) -> bool:
    """Enqueue on torch's current stream. args: tensors, which become pointers, and integers, in the kernel's order.

    False where the driver refuses: the caller takes the reference, now and, after one warning, ever after. With
    KERNEL_BACKEND=cuda that is a RuntimeError instead.
    """
    from cuda.core import LaunchConfig, Stream
    from cuda.core import launch as cuda_launch

    values = (a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in args)
    try:
        with torch.cuda.device(device):
            _bind(device)
            stream = Stream.from_handle(torch.cuda.current_stream().cuda_stream)
            cuda_launch(stream, LaunchConfig(grid=grid, block=block), kernel, *values)
    except Exception as error:
        key = next((key for key, loaded in _loaded.items() if loaded is kernel), None)
        if key is None:  # not from `load`
            raise
        _fail(key, "could not be launched", error)
        refuse(f"{key[0].name}: {key[1]} could not be launched: {error}")
        return False
    return True


_loaded: dict[tuple[Path, str, str], object] = {}
"""By source, instantiation and architecture: the kernel, or the exception that says why there is none."""


def _fail(key: tuple[Path, str, str], what: str, error: Exception) -> None:
    """What failed once is not tried again."""
    _loaded[key] = error
    warnings.warn(f"{key[0].name}: {key[1]} {what}, using PyTorch instead: {error}", stacklevel=3)


_bound = threading.local()


def _bind(device: torch.device) -> None:
    """A thread, autograd's for one, has no CUDA context before torch's runtime needs one there; the driver does."""
    index = torch.cuda.current_device()
    bound = _bound.__dict__.setdefault("devices", set())
    if index not in bound:
        from cuda.core import Device

        Device(index).set_current()
        bound.add(index)


def _load(source: Path, name: str, arch: str):
    from cuda.core import ObjectCode

    binary = compile(source, (name,), arch)
    return ObjectCode.from_cubin(binary.cubin).get_kernel(binary.symbols[name])


OPTIONS = dict(std="c++17", ptxas_options="-v")


def compile(source: Path, names: Sequence[str], arch: str) -> Binary:
    """Compile the template instantiations `names` of a .cu file for `arch`, or read them from the disk cache.

    A cache that is damaged, cannot be written to or that others may write to is done without.
    """
    from cuda.bindings import nvrtc

    code = source.read_text(encoding="utf-8")
    key = hashlib.sha256(repr((code, tuple(names), arch, OPTIONS, nvrtc.nvrtcVersion()[1:])).encode()).hexdigest()
    cached = _cache_file(f"{source.stem}-{arch}-{key[:32]}")
    if cached and (packed := _read(cached)):
        return _unpack(packed)
    packed = _compile(code, names, arch)
    if cached:
        _write(cached, packed)
    return _unpack(packed)


def _compile(code: str, names: Sequence[str], arch: str) -> bytes:
    from cuda.core import Program, ProgramOptions
    from cuda.pathfinder import find_nvidia_header_directory

    log = io.StringIO()
    options = ProgramOptions(arch=arch, include_path=find_nvidia_header_directory("cudart"), **OPTIONS)
    built = Program(code, "c++", options).compile("cubin", name_expressions=tuple(names), logs=log)
    symbols = {name: built.symbol_mapping[name].decode() for name in names}
    return json.dumps({"symbols": symbols, "log": log.getvalue()}).encode() + b"\n" + built.code


def _unpack(packed: bytes) -> Binary:
    header, cubin = packed.split(b"\n", 1)
    header = json.loads(header)
    used = {}
    for entry in header["log"].split("Compiling entry function '")[1:]:
        numbers = (r"Used (\d+) registers", r"(\d+) bytes smem", r"(\d+) bytes spill stores")
        used[entry.split("'")[0]] = Resources(*(int(m[1]) if (m := re.search(n, entry)) else 0 for n in numbers))
    return Binary(cubin, header["symbols"], {name: used[symbol] for name, symbol in header["symbols"].items()})


# The disk cache: a file begins with the digest of its rest. Machine code is run, so who may write it matters.


def _cache_file(name: str) -> Path | None:
    """None where there is no folder that only this user can write to."""
    try:
        path = cache_dir("kernels") / name
        return path if _ours(path.parent) else None
    except OSError:
        return None


def _ours(path: Path) -> bool:
    if not hasattr(os, "getuid"):  # Windows: a user's folders are the user's
        return True
    status = path.lstat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _read(path: Path) -> bytes | None:
    try:
        if not _ours(path):
            return None
        digest, packed = path.read_bytes().split(b"\n", 1)
    except (OSError, ValueError):
        return None
    return packed if digest == hashlib.sha256(packed).hexdigest().encode() else None


def _write(path: Path, packed: bytes) -> None:
    """Whole or not at all: several processes may compile at once. A full disk means no cache, not an error."""
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(hashlib.sha256(packed).hexdigest().encode() + b"\n" + packed)
            file.close()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise
