"""Runs the CUDA kernels as the compiler emits them, without a GPU: `python -m common.kernels.check --help`."""
