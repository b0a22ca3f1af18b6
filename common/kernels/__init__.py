"""Operators of the papers: the mathematics in `reference.py`, the CUDA kernel, and `op.py` that picks between them."""
