"""A CUDA device without a driver and without memory: tensors have shape, type and place, and no values.

PyTorch's FakeTensorMode follows every operation by its rules for CUDA, autocast's among them, and refuses what a device
would: operands in two places, a value that is needed on the host while nobody has computed it. Beside it `Live` adds up
the storages that are alive at a time.
"""

from __future__ import annotations

import ctypes
import functools
import traceback
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from common.run import ROOT, World

ON_EITHER = {torch.ops.aten.detach.default}
BLOCK = 512  # bytes: the allocator of CUDA hands out multiples of it


class Waits(RuntimeError):
    """What the host asks of the device makes it wait until everything before is computed."""


class Live(TorchDispatchMode):
    """Sends to the pretence what concerns the device, and leaves the rest to the CPU, values and all. Adds up the bytes
    of the storages on the device that are alive: `now`, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, on_device = kwargs or {}, False
        for x in tree_leaves((args, kwargs)):
            on_device |= isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda")
        if not on_device:
            with _disable_current_modes():
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                if x.device.type == "cpu" and func not in ON_EITHER:
                    raise Waits(f"{func} brings values to the host")
                self.add(x)
        return out

    def add(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cuda" and (key := (storage := tensor.untyped_storage())._cdata) not in self.seen:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self.seen[key] = weakref.ref(storage, functools.partial(self._gone, key, size))
            self.now += size
            self.peak = max(self.peak, self.now)
        return tensor

    def _gone(self, key: int, size: int, _ref: weakref.ref) -> None:
        if self.seen.pop(key, None) is not None:
            self.now -= size


class Pretend(World):
    """One process of `size`, on a pretended GPU."""

    def mean(self, value: Tensor) -> float:
        return float("nan")

    def agree(self, value):
        return value

    def wait(self) -> None:
        pass


@contextmanager
def pretended_device() -> Iterator[Live]:
    """In it the first module that goes to a CUDA device takes everything after it into the pretence."""
    with ExitStack() as stack:
        live, to = Live(), nn.Module.to

        def begin() -> None:
            if not live.entered:
                live.entered = True
                stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
                stack.enter_context(live)

        def to_device(module: nn.Module, *args, **kwargs) -> nn.Module:
            place = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.device | str)), None)
            if place is not None and torch.device(place).type == "cuda":
                begin()
            return to(module, *args, **kwargs)

        live.entered, live.begin = False, begin
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # what is pretended is the thread's
        if not torch.cuda.is_available():
            stack.enter_context(_context_accepted())
        stack.enter_context(patch.object(nn.Module, "to", to_device))
        stack.enter_context(patch.object(FakeTensor, "__deepcopy__", _copied, create=True))
        stack.enter_context(patch.object(torch, "Generator", _Generator))
        # Autocast would refuse where there is no GPU.
        stack.enter_context(patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        stack.enter_context(patch.object(torch.cuda, "is_bf16_supported", lambda *_args, **_kwargs: True))
        yield live


class _Generator(torch.Generator):
    """Of the CPU, whatever it is asked for: nothing is drawn."""

    def __new__(cls, device=None):
        return super().__new__(cls, "cpu")


def _copied(tensor: FakeTensor, memo: dict[int, object]) -> Tensor:
    """torch's own way leads to the storage's bytes."""
    if id(tensor) not in memo:
        copy = torch.empty_like(tensor, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    return memo[id(tensor)]


@contextmanager
def _context_accepted() -> Iterator[None]:
    """Autograd asks the CUDA hooks whether the device has a context, and without a driver they raise: here they say
    yes. That is slot 4 of their virtual table, after two destructors, isBuilt and isAvailable
    (ATen/detail/AcceleratorHooksInterface.h); a copy of the table stands in for it."""
    torch._C._ensureCUDADeviceGuardSet()
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    find = library._ZN2at6detail12getCUDAHooksEv
    find.restype = ctypes.c_void_p
    hooks = ctypes.cast(find(), ctypes.POINTER(ctypes.c_void_p))
    own, entries, before = hooks[0], 96, 2  # what stands before the first entry: offset and type
    old = ctypes.cast(own - before * 8, ctypes.POINTER(ctypes.c_void_p))
    table = (ctypes.c_void_p * entries)(*(old[i] for i in range(entries)))
    yes = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_byte)(lambda _hooks, _index: True)
    table[before + 4] = ctypes.cast(yes, ctypes.c_void_p).value
    hooks[0] = ctypes.addressof(table) + before * 8
    try:
        yield
    finally:
        hooks[0] = own


def fault(error: BaseException) -> str:
    """What a device would have stumbled on, and the line of ours that asked for it."""
    ours = [
        f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if any(frame.filename.startswith(f"{ROOT}/{room}/") for room in ("papers", "common"))
    ]
    where = ours[-1] if ours else "?"
    text = f"{error}".strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    if isinstance(error, Waits):
        return f"{where} waits for the device: {text}"
    if isinstance(error, DataDependentOutputException):
        return f"{where} waits for the device: {error.func} needs a value on the host"
    if isinstance(error, DynamicOutputShapeException):
        return f"{where} waits for the device: the shape of {error.func} follows from values"
    if "two different devices" in text:
        return f"{where} mixes devices: {text[text.find('found two'):]}"
    return f"{where}: {type(error).__name__}: {text}"
