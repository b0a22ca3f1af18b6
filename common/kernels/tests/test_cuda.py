"""Compilation for GPUs that are not here, the disk cache, and the choice of backend."""

import contextlib
import stat
import tempfile
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

from common.kernels import cuda
from common.kernels.check.device import Device
from common.kernels.shift import op as shift_op
from common.kernels.shift import shift
from common.kernels.sparse_mlp import op as sparse_mlp_op

from .conftest import GXX

KERNEL = "in_place<unsigned short>"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda, "_loaded", {})


@pytest.mark.parametrize("arch", cuda.ARCHS)
@pytest.mark.parametrize("op", [shift_op, sparse_mlp_op], ids=["shift", "sparse_mlp"])
def test_every_kernel_compiles(op, arch):
    pytest.importorskip("cuda.core", reason="needs cuda-core")
    binary = cuda.compile(op.SOURCE, op.KERNELS, arch)
    spilling = {name: used for name, used in binary.resources.items() if used.spill_bytes}
    assert set(binary.resources) == set(op.KERNELS) and not spilling
    # the register file holds at least 768 threads of shift and 512 of sparse_mlp
    assert max(used.registers for used in binary.resources.values()) <= (80 if op is shift_op else 128)
    assert cuda.compile(op.SOURCE, op.KERNELS, arch) == binary  # the second time from the disk


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "others may write", "a folder others may write to"])
def test_a_cache_that_cannot_be_trusted_means_compiling_again(damage, tmp_path, monkeypatch):
    pytest.importorskip("cuda.core", reason="needs cuda-core")
    binary = cuda.compile(shift_op.SOURCE, (KERNEL,), "sm_90")
    (file,) = (tmp_path / "vision-reproductions/kernels").iterdir()
    content = file.read_bytes()
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "changed":
        file.write_bytes(content.replace(b"registers", b"Registers"))
    else:
        path = file if damage == "others may write" else file.parent
        path.chmod(path.stat().st_mode | stat.S_IWGRP)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))  # where the cache goes that has no home
    compiled = []
    real = cuda._compile
    monkeypatch.setattr(cuda, "_compile", lambda *args: compiled.append(args) or real(*args))
    assert cuda.compile(shift_op.SOURCE, (KERNEL,), "sm_90") == binary
    assert len(compiled) == 1
    assert len(list(file.parent.iterdir())) == 1  # nothing half written is left


def test_without_a_cache(monkeypatch):
    pytest.importorskip("cuda.core", reason="needs cuda-core")

    def no_folder(name):
        raise PermissionError(name)

    monkeypatch.setattr(cuda, "cache_dir", no_folder)
    assert cuda.compile(shift_op.SOURCE, (KERNEL,), "sm_90").cubin


def test_a_full_disk_leaves_nothing_behind(monkeypatch, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cuda.os, "replace", full)
    cuda._write(tmp_path / "kernel", b"code")
    assert not list(tmp_path.iterdir())


def test_backend_choice(monkeypatch):
    x = torch.randn(1, 8, 3, 3)
    monkeypatch.setenv("KERNEL_BACKEND", "reference")
    assert shift(x, 4).shape == x.shape
    monkeypatch.setenv("KERNEL_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="on cpu"):
        shift(x, 4)
    monkeypatch.setenv("KERNEL_BACKEND", "triton")
    with pytest.raises(ValueError, match="'triton' is not one of auto, reference, cuda"):
        shift(x, 4)


def test_a_kernel_that_does_not_load(monkeypatch, tmp_path):
    """auto warns once and goes on; cuda says why."""
    broken = tmp_path / "broken.cu"
    broken.write_text("__global__ void k() { nonsense }")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("KERNEL_BACKEND", "auto")
    with pytest.warns(UserWarning, match=r"broken\.cu: k not available on sm_90"):
        assert cuda.load(broken, "k", torch.device("cuda")) is None
    with warnings.catch_warnings(action="error"):
        assert cuda.load(broken, "k", torch.device("cuda")) is None
    monkeypatch.setenv("KERNEL_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=r"broken\.cu: k cannot be used"):
        cuda.load(broken, "k", torch.device("cuda"))


def test_a_launch_that_fails(monkeypatch):
    """auto: one warning, the reference's result, and no second try; cuda: the reason."""
    pytest.importorskip("cuda.core", reason="needs cuda-core")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "wanted", lambda device: True)
    tried = []
    monkeypatch.setattr(cuda, "_load", lambda source, name, arch: name)
    monkeypatch.setattr(cuda, "_bind", tried.append)  # then torch.cuda fails: there is no GPU
    monkeypatch.setattr(torch.cuda, "device", FailingDevice)
    x = torch.randn(1, 8, 4, 4)
    monkeypatch.setenv("KERNEL_BACKEND", "auto")
    with pytest.warns(UserWarning, match="could not be launched, using PyTorch instead: no such device"):
        assert torch.equal(shift(x, 4), shift_op.reference.shift(x, 4))
    with warnings.catch_warnings(action="error"):
        assert torch.equal(shift(x, 4), shift_op.reference.shift(x, 4))
    assert FailingDevice.entered == 1 and not tried
    monkeypatch.setenv("KERNEL_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="cannot be used: no such device"):
        shift(x, 4)


class FailingDevice:
    entered = 0

    def __init__(self, device):
        pass

    def __enter__(self):
        FailingDevice.entered += 1
        raise RuntimeError("no such device")

    def __exit__(self, *error):
        pass


def test_what_reaches_the_driver(monkeypatch):
    """Pointers, torch's current stream, a context bound once in every thread; nothing deprecated."""
    core = pytest.importorskip("cuda.core", reason="needs cuda-core")
    launched, bound = [], []

    class Stream:
        @staticmethod
        def from_handle(handle):
            return f"stream {handle}"

    class Device:
        def __init__(self, index):
            self.index = index

        def set_current(self):
            bound.append((threading.get_ident(), self.index))

    def launch(stream, config, kernel, *values):
        launched.append((stream, config.grid, config.block, kernel, values))

    for name, stand_in in (("Stream", Stream), ("Device", Device), ("launch", launch)):
        monkeypatch.setattr(core, name, stand_in)
    monkeypatch.setattr(cuda, "_bound", threading.local())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    x = torch.zeros(4)

    def twice():
        for _ in range(2):
            assert cuda.launch("kernel", 3, 64, [x, None, 5], torch.device("cuda", 1))

    with warnings.catch_warnings(action="error"):
        twice()
        thread = threading.Thread(target=twice)
        thread.start()
        thread.join()
    assert launched == [("stream 7", (3, 1, 1), (64, 1, 1), "kernel", (x.data_ptr(), 0, 5))] * 4
    assert [index for _, index in bound] == [1, 1] and len({ident for ident, _ in bound}) == 2


@GXX
def test_from_source_to_result_above_a_pretend_driver(monkeypatch):
    """Everything of `load` and `launch` is real but the driver: compiled for sm_90, kept on the disk, found by its
    mangled name, launched with pointers, from autograd's thread too. The driver executes the kernel's PTX."""
    core = pytest.importorskip("cuda.core", reason="needs cuda-core")
    driver = PretendDriver(Device(shift_op.KERNELS))
    for name in ("ObjectCode", "Device", "Stream", "launch"):
        monkeypatch.setattr(core, name, getattr(driver, name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(cuda, "wanted", lambda device: True)
    monkeypatch.setattr(cuda, "_bound", threading.local())
    launch = cuda.launch
    monkeypatch.setattr(cuda, "launch", lambda kernel, grid, block, args, device: driver.remember(args) or
                        launch(kernel, grid, block, args, device))
    monkeypatch.setenv("KERNEL_BACKEND", "cuda")
    x = torch.randn(2, 16, 6, 8).requires_grad_()
    g = torch.randn(2, 16, 6, 8)
    gradients = []
    thread = threading.Thread(target=lambda: gradients.append(torch.autograd.grad(shift(x, 4), x, g)[0]))
    assert torch.equal(shift(x, 4), shift_op.reference.shift(x, 4))
    thread.start()
    thread.join()
    assert torch.equal(gradients[0], shift_op.reference.shift(g, 4, -1))
    assert driver.device.launched == {"dense<unsigned int, void, false>": 3}
    assert driver.contexts == 2  # one in each thread


class PretendDriver:
    """cuda.core's names, as far as cuda.py calls them."""

    def __init__(self, device: Device):
        self.device, self.tensors, self.contexts = device, {}, 0
        driver = self

        class ObjectCode:
            @staticmethod
            def from_cubin(cubin):
                assert cubin.startswith(b"\x7fELF")
                return ObjectCode()

            def get_kernel(self, symbol):
                names = cuda.compile(shift_op.SOURCE, shift_op.KERNELS, "sm_90").symbols
                return next(name for name in names if names[name] == symbol)

        class Context:
            def __init__(self, index):
                pass

            def set_current(self):
                driver.contexts += 1

        self.ObjectCode, self.Device = ObjectCode, Context
        self.Stream = SimpleNamespace(from_handle=lambda handle: handle)

    def remember(self, args):
        """What a pointer belongs to, which a driver knows and the checker must."""
        self.tensors = {a.data_ptr(): a for a in args if isinstance(a, torch.Tensor)}

    def launch(self, stream, config, kernel, *values):
        assert stream == 7
        args = [self.tensors.get(v, v) for v in values]
        loaded = self.device.load(shift_op.SOURCE, kernel, None)
        self.device.launch(loaded, config.grid[0], config.block[0], args, None)
