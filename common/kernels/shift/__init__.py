from .op import shift, shift_, shift_add

__all__ = ["shift", "shift_", "shift_add"]
