"""torch.cuda and torch.accelerator as on a machine with GPUs."""

from __future__ import annotations

import atexit
import collections
import contextlib
import ctypes
import os
import resource
import time
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .tensors import Current, Generator, pinned, place, register, storage_on
from .waits import report, waits


def _set_device(device: torch.device | str | int) -> None:
    index = place(device).index
    if index >= Current.count:
        raise torch.AcceleratorError("CUDA error: invalid device ordinal")
    Current.device = index


def _exchange_device(index: int) -> int:
    before, Current.device = Current.device, Current.device if index < 0 else index
    return before


class _Device:
    def __init__(self, device: torch.device | str | int | None):
        self.index = place(device).index

    def __enter__(self) -> None:
        self.before = _exchange_device(self.index)

    def __exit__(self, *error: object) -> None:
        Current.device = self.before


class _Stream:
    """The only one there is: what is asked for has been done when the question returns."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any):
        self.device = place(None)

    def synchronize(self) -> None:
        waits.note("synchronize")

    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()


class _Event:
    def __init__(self, *_: Any, **__: Any):
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        waits.note("synchronize")

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None: ...
    def elapsed_time(self, end: _Event) -> float:
        return 1000 * (end.time - self.time)


def _memory(*_: Any) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


PROPERTIES = types.SimpleNamespace(
    name="Pretend GPU", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, warp_size=32,
    L2_cache_size=50 * 2**20, max_threads_per_multi_processor=2048, regs_per_multiprocessor=2**16,
    shared_memory_per_block=48 * 2**10, shared_memory_per_block_optin=227 * 2**10, gcnArchName="", is_integrated=False,
)
QUIET = [  # nothing to do, nothing to return
    "init", "_lazy_init", "empty_cache", "ipc_collect", "reset_peak_memory_stats", "manual_seed", "manual_seed_all",
    "seed_all", "set_rng_state", "set_rng_state_all", "set_stream",
]
MEMORY = ["memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"]
NAMES: dict[str, Any] = {
    "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: Current.count,
    "current_device": lambda: Current.device, "set_device": _set_device, "device": _Device,
    "_exchange_device": _exchange_device, "_maybe_exchange_device": _exchange_device,
    "get_device_name": lambda device=None: PROPERTIES.name, "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: PROPERTIES, "is_bf16_supported": lambda *_, **__: True,
    "synchronize": lambda device=None: waits.note("synchronize"), "Stream": _Stream, "Event": _Event,
    "current_stream": lambda device=None: _Stream(), "default_stream": lambda device=None: _Stream(),
    "stream": lambda stream: contextlib.nullcontext(), "is_current_stream_capturing": lambda: False,
    "mem_get_info": lambda device=None: (70 * 2**30, 80 * 2**30), "memory_stats": lambda device=None: {},
    "get_rng_state": lambda device=None: torch.get_rng_state(), "get_rng_state_all": lambda: [torch.get_rng_state()],
    "get_arch_list": lambda: ["sm_90"],
    **{name: lambda *_, **__: None for name in QUIET}, **{name: _memory for name in MEMORY},
}
ACCELERATOR = {
    "is_available": NAMES["is_available"], "device_count": NAMES["device_count"], "set_device_index": _set_device,
    "current_accelerator": lambda check_available=False: torch.device("cuda"), "empty_cache": NAMES["empty_cache"],
    "current_device_index": NAMES["current_device"], "synchronize": NAMES["synchronize"],
    "current_stream": NAMES["current_stream"], "memory_allocated": _memory, "max_memory_allocated": _memory,
}


def _say_that_there_is_a_context() -> list[object]:
    """Autograd's engine asks the CUDA hooks, which without a driver raise. They get a copy of their table of virtual
    functions in which the fourth, hasPrimaryContext (ATen/detail/AcceleratorHooksInterface.h: after two destructors,
    isBuilt and isAvailable), says yes. What is returned has to stay."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    find = library._ZN2at6detail12getCUDAHooksEv
    find.restype = ctypes.POINTER(ctypes.c_size_t)
    hooks, before, size = find(), 2, 100  # two words stand before the first function
    word = ctypes.sizeof(ctypes.c_size_t)
    table = (ctypes.c_size_t * size).from_buffer_copy(ctypes.string_at(hooks[0] - before * word, size * word))
    yes = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_byte)(lambda hooks, device: True)
    table[before + 4] = ctypes.cast(yes, ctypes.c_void_p).value
    hooks[0] = ctypes.addressof(table) + before * word
    return [table, yes]


def _pin_memory(x: Tensor, device: Any = None) -> Tensor:
    if x.is_cuda:
        raise RuntimeError(f"cannot pin '{x.device}': only dense CPU tensors can be pinned")
    x = x.clone()
    x.untyped_storage().pinned = True
    return x


def _plug_in_kernels() -> None:
    """The project's own kernels: their PTX, executed and checked in the tensors' memory."""
    from common.kernels import cuda
    from common.kernels.check.device import COMPILER, Device

    if COMPILER is None:
        os.environ["KERNEL_BACKEND"] = "reference"
        return
    machines: dict[str, Device] = {}

    def load(source: Path, name: str, device: torch.device):
        return machines.setdefault(name, Device((name,))).load(source, name, device)

    def launch(kernel, *how: Any) -> bool:
        return machines[kernel.name].launch(kernel, *how)

    cuda.load, cuda.launch = load, launch


_kept: list[object] = []


def install() -> None:
    """Before anything asks torch for a device. Once; there is no way back."""
    if _kept:
        return
    import torch._dynamo.trace_rules
    import torch.utils.flop_counter
    import torchvision  # its operators
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch._dynamo.trace_rules.get_torch_obj_rule_map()  # goes by names: before they change
    torch._C._ensureCUDADeviceGuardSet()
    _kept.extend([*_say_that_there_is_a_context(), torchvision])
    # All in one thread, so that a wait in a backward pass has a line of source.
    torch.autograd.set_multithreading_enabled(False)
    for name, value in NAMES.items():
        setattr(torch.cuda, name, value)
        if hasattr(torch.cuda.random, name):
            setattr(torch.cuda.random, name, value)
    for name, value in ACCELERATOR.items():  # a function each: torch.compile's tables know them apart
        setattr(torch.accelerator, name, lambda *how, _value=value, **more: _value(*how, **more))
    torch.cuda._initialized = True
    torch.backends.cudnn.enabled = False  # the choice among its kernels asks a driver
    Tensor.pin_memory, Tensor.is_pinned = _pin_memory, lambda x, device=None: pinned(x)
    torch.Generator = Generator
    clone = torch.UntypedStorage.clone
    torch.UntypedStorage.clone = lambda s: storage_on(clone(s.host), s.device) if s.device.type == "cuda" else clone(s)
    torch.UntypedStorage.cpu = lambda s: clone(s.host) if s.device.type == "cuda" else s
    compiled = torch.compile

    def compile_(model: Any = None, **how: Any) -> Any:
        """Inductor would want a driver."""
        how = {k: v for k, v in how.items() if k in ("fullgraph", "dynamic", "disable")}
        return compiled(model, backend="aot_eager", **how)

    torch.compile = compile_
    _kept.extend(register())
    register_optimizer_step_post_hook(lambda *_: waits.steps.append(collections.Counter()))
    _plug_in_kernels()
    atexit.register(report)
