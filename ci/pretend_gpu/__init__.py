"""A pretend GPU: tensors on ``cuda:N`` in the host's memory, computed by the CPU's kernels, refused where CUDA refuses.

    python -m ci.pretend_gpu papers.shiftvit smoke --out runs    any module; ends with its host synchronisations
    PRETEND_GPU=1 .venv/bin/python -m pytest -m gpu              tests that need a GPU (conftest.py)
    PRETEND_GPU=1 PYTHONPATH=ci/pretend_gpu/site ci/gpu.sh       all Python processes that a script starts

They are torch's own CUDA tensors, so modules, autograd, autocast, views and optimizers treat them as on a GPU; only
what would run on it is ours: each operator with a CUDA kernel gets one that looks at its arguments, notes where the
host has to wait for the device, and calls the CPU's kernel on the same memory. Seen are mixed devices, CPU generators,
CUDA tensors as numpy arrays, forked workers that touch the GPU, and every wait with its line of source. Not seen: what
depends on real kernels (speed, memory, races, types that they lack), NCCL, CUDA graphs.

Made for torch 2.11. PRETEND_DEVICES: how many GPUs (1). PRETEND_REPORT: a file for the waits, by optimizer step.
"""

from .device import install
from .waits import waits

__all__ = ["install", "waits"]
