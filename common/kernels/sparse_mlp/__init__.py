from .op import sparse_mlp

__all__ = ["sparse_mlp"]
