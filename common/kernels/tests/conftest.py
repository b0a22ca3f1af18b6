import pytest
import torch

from common.kernels.check.device import COMPILER, Device

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
GXX = pytest.mark.skipif(COMPILER is None, reason="needs g++ to execute PTX on the CPU")


@pytest.fixture(scope="module")
def checker(request):
    """Executes and checks the PTX of the kernels of the test module's OP."""
    pytest.importorskip("cuda.bindings", reason="needs cuda-core")
    return Device(request.module.OP.KERNELS)


@pytest.fixture
def ptx(checker, monkeypatch):
    """Plugged in, and nothing falls back: CPU tensors, launch code, the kernels' PTX."""
    monkeypatch.setenv("KERNEL_BACKEND", "cuda")
    checker.order = 0
    with checker.plugged_in():
        yield checker


@pytest.fixture(params=["cpu", pytest.param("ptx", marks=GXX), pytest.param("cuda", marks=GPU)])
def device(request, monkeypatch):
    """Where tensors live. With `ptx`, on the CPU, and with `cuda` nothing falls back to the reference."""
    if request.param == "cuda":
        monkeypatch.setenv("KERNEL_BACKEND", "cuda")
        return "cuda"
    if request.param == "ptx":
        request.getfixturevalue("ptx")
    return "cpu"


@pytest.fixture
def poisoned():
    """New tensors start out as NaN, so an element that a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
