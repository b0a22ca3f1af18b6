import pytest
import torch

from . import emulator

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
GXX = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++ to run the CUDA source on the CPU")


@pytest.fixture(scope="module")
def emulated(request, tmp_path_factory):
    """The kernels of the test module's OP as CPU code."""
    op = request.module.OP
    return emulator.Emulator(op.SOURCE, op.KERNELS, tmp_path_factory.mktemp("emulator"))


@pytest.fixture(params=["cpu", pytest.param("emulated", marks=GXX), pytest.param("cuda", marks=GPU)])
def device(request, monkeypatch):
    """Where tensors live. `emulated`: on the CPU, but through launch code and CUDA source. `cuda`: no fallback."""
    if request.param == "cuda":
        monkeypatch.setenv("KERNEL_BACKEND", "cuda")
        return "cuda"
    if request.param == "emulated":
        monkeypatch.setattr(request.module.OP, "cuda", request.getfixturevalue("emulated"))
    return "cpu"


@pytest.fixture
def poisoned():
    """New tensors start out as NaN, so an element that a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
