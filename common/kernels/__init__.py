"""Operators of the papers: the mathematics in `reference.py`, the CUDA kernel, and the door `op.py`."""
