"""Compilation for GPUs that are not here, and the choice of backend."""

import warnings

import pytest
import torch

from common.kernels import cuda
from common.kernels.shift import op as shift_op
from common.kernels.shift import shift
from common.kernels.sparse_mlp import op as sparse_mlp_op


@pytest.mark.parametrize("arch", cuda.ARCHS)
@pytest.mark.parametrize("op", [shift_op, sparse_mlp_op], ids=["shift", "sparse_mlp"])
def test_every_kernel_compiles(op, arch, monkeypatch, tmp_path):
    pytest.importorskip("cuda.core", reason="needs cuda-core")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    binary = cuda.compile(op.SOURCE, op.KERNELS, arch)
    spilling = {name: used for name, used in binary.resources.items() if used.spill_bytes}
    assert set(binary.resources) == set(op.KERNELS) and not spilling
    # the register file holds at least 1024 threads of shift and 384 of sparse_mlp
    assert max(used.registers for used in binary.resources.values()) <= (80 if op is shift_op else 168)
    assert cuda.compile(op.SOURCE, op.KERNELS, arch) == binary  # the second time from the disk


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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("KERNEL_BACKEND", "auto")
    with pytest.warns(UserWarning, match=r"broken\.cu: k not available on sm_90"):
        assert cuda.load(broken, "k", torch.device("cuda")) is None
    with warnings.catch_warnings(action="error"):
        assert cuda.load(broken, "k", torch.device("cuda")) is None
    monkeypatch.setenv("KERNEL_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=r"broken\.cu: k cannot be loaded"):
        cuda.load(broken, "k", torch.device("cuda"))
