"""CUDA tensors in the host's memory, and kernels for them."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .waits import PROCESS, waits


class Current:
    device, count = 0, int(os.environ.get("PRETEND_DEVICES", "1"))


def place(device: torch.device | str | int | None) -> torch.device:
    """With its number, that of the current one unless said."""
    if isinstance(device, int):
        return torch.device("cuda", device)
    index = torch.device(device).index if device is not None else None
    return torch.device("cuda", Current.device if index is None else index)


# Memory ----------------------------------------------------------------------------------------------------


def to_gpu(host: Tensor, device: torch.device) -> Tensor:
    """A CUDA tensor in the memory of a CPU tensor, which lives as long as its storage does."""
    view = {
        "size": tuple(host.shape), "stride": host.stride(), "storage_offset": host.storage_offset(),
        "dtype": host.dtype, "layout": host.layout, "device": device, "requires_grad": False,
    }
    return torch._C._construct_CUDA_Tensor_From_Storage_And_Metadata(view, storage_on(host.untyped_storage(), device))


def storage_on(host: torch.UntypedStorage, device: torch.device) -> torch.UntypedStorage:
    storage = torch._C._construct_storage_from_data_pointer(host.data_ptr(), device, host.nbytes())
    storage.host = host
    return storage


def to_host(x: Tensor) -> Tensor:
    """The CPU tensor in the memory of a CUDA tensor."""
    host = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage().host, x.storage_offset(), x.shape, x.stride())
    host = torch._conj(host) if x.is_conj() else host
    return torch._neg_view(host) if x.is_neg() else host


def _follow(gpu: Tensor, host: Tensor) -> None:
    """What the CPU's kernel made of an output: it may have resized it."""
    storage, memory = gpu.untyped_storage(), host.untyped_storage()
    if storage.host.data_ptr() != memory.data_ptr() or storage.nbytes() != memory.nbytes():
        storage = storage_on(memory, gpu.device)
    elif gpu.shape == host.shape and gpu.stride() == host.stride():
        return
    torch.ops.aten.set_.source_Storage_storage_offset(gpu, storage, host.storage_offset(), host.shape, host.stride())


def pinned(x: Tensor) -> bool:
    return getattr(x.untyped_storage(), "pinned", False)


class Generator(torch.Generator):
    """torch's own, of a GPU: the CPU's with another name."""

    def __new__(cls, device: torch.device | str = "cpu") -> torch.Generator:
        return super().__new__(cls if torch.device(device).type == "cuda" else torch.Generator, "cpu")


# What CUDA refuses, and where it waits ---------------------------------------------------------------------

INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
CPU_SCALARS = {"where", "masked_fill", "masked_fill_", "fill", "fill_", "clamp", "lerp", "lerp_", "addcmul", "addcdiv"}
RESULT_DECIDES = {  # the shape of the result, or the host's next step
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "unique_dim_consecutive", "bincount", "histc", "repeat_interleave", "multinomial", "is_nonzero",
}
NOT_DETERMINISTIC = {  # raise under torch.use_deterministic_algorithms
    "nll_loss2d_forward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "avg_pool3d_backward",
    "adaptive_max_pool2d_backward", "max_pool3d_with_indices_backward", "upsample_bicubic2d_backward",
    "upsample_linear1d_backward", "upsample_trilinear3d_backward", "grid_sampler_2d_backward",
    "grid_sampler_3d_backward", "reflection_pad2d_backward", "replication_pad2d_backward", "kthvalue", "histc",
    "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward", "_ctc_loss_backward", "embedding_bag",
    "_roi_align_backward", "deform_conv2d",
}


def check(op: torch._ops.OpOverload, name: str, tensors: list[Tensor], given: dict[str, Any], written: list) -> None:
    """Raises what CUDA would."""
    if os.getpid() != PROCESS:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
    if name in NOT_DETERMINISTIC and torch.get_deterministic_debug_mode() == 2:
        raise RuntimeError(f"{name} does not have a deterministic implementation")
    generator = given.get("generator")
    if generator is not None and not isinstance(generator, Generator):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device}' ({op})")
    if name in ("copy_", "_copy_from_and_resize"):
        return
    devices = {x.device for x in tensors if x.is_cuda}
    scalars = torch.Tag.pointwise in op.tags or name in CPU_SCALARS or name.startswith("_foreach")
    indices = [id(i) for i in given.get("indices") or ()] if name in INDEXING and given["self"].is_cuda else []
    outputs = [id(x) for argument in written for x in _tensors(given.get(argument))]
    for x in tensors:
        allowed = id(x) in indices or (scalars and x.dim() == 0 and id(x) not in outputs)
        if x.is_cpu and not allowed:
            devices.add(x.device)
    if len(devices) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(map(str, devices)))}! ({op})"
        )


def note_waits(name: str, given: dict[str, Any]) -> None:
    if name == "copy_":
        to, source = given["self"], given["src"]
        if to.device.type == source.device.type or not source.numel():
            return
        host = source if to.is_cuda else to
        if not given.get("non_blocking") or not pinned(host):
            kind = "to the device" if to.is_cuda else "to the host"
            waits.note(f"copy {kind}, {'pinned' if pinned(host) else 'pageable'}")
    elif name in INDEXING:
        for index in given["indices"]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                waits.note("boolean index")
            elif index is not None and index.is_cpu and index.dim() and given["self"].is_cuda:
                waits.note("index on the CPU")
    elif name in RESULT_DECIDES and given.get("output_size") is None:
        waits.note("item" if name == "_local_scalar_dense" else name)


# Kernels ---------------------------------------------------------------------------------------------------


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    if not x.dtype == weight.dtype == (x if bias is None else bias).dtype:
        raise RuntimeError(f"Input type ({x.dtype}) and weight type ({weight.dtype}) should be the same")
    wide = [t if t is None else t.float() for t in (x, weight, bias)] if x.dtype.itemsize == 2 else (x, weight, bias)
    return torch.ops.aten.convolution(*wide, *how).to(x.dtype)


def _convolution_backward(g: Tensor, x: Tensor, weight: Tensor, *how: Any) -> tuple[Tensor | None, ...]:
    """In float32: oneDNN's 16-bit gradients are wrong for some shapes."""
    wide = [t.float() for t in (g, x, weight)] if x.dtype.itemsize == 2 else (g, x, weight)
    return tuple(t if t is None else t.to(x.dtype) for t in torch.ops.aten.convolution_backward(*wide, *how))


def _group_norm(x: Tensor, *how: Any) -> tuple[Tensor, ...]:
    return torch.ops.aten.native_group_norm(x.contiguous(), *how)  # as CUDA's kernel: channels first


SUBSTITUTES: dict[str, Callable[..., Any]] = {
    "aten::convolution": _convolution, "aten::convolution_backward": _convolution_backward,
    "aten::native_group_norm": _group_norm,
}
COMPOSITE = [  # have no kernel of CUDA's own, and ask about devices or wait inside
    "copy_", "convolution", "convolution_backward", "resize_", "_index_put_impl_", "index_put_",
    "empty.memory_format", "empty_strided", "repeat_interleave.Tensor",
]
UNTOUCHED = {"set_", "is_set_to", "record_stream", "_pin_memory", "is_pinned"}


class Kernel:
    """What takes the place of an operator's CUDA kernel."""

    def __init__(self, op: torch._ops.OpOverload):
        schema = op._schema
        self.op, self.name = op, schema.name.split("::")[1]
        self.arguments = [a.name for a in schema.arguments]
        aliases = {a.name: a.alias_info.before_set for a in schema.arguments if a.alias_info}
        self.written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        self.results = [  # the argument that is returned, or None: a new tensor
            next((name for name, names in aliases.items() if names == r.alias_info.before_set), None)
            if r.alias_info else None for r in schema.returns
        ]
        self.tensors = {a.name for a in schema.arguments if str(a.type) == "Tensor"}
        self.compute = SUBSTITUTES.get(schema.name, op)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.arguments, args)) | kwargs
        tensors = list(_tensors(list(given.values())))
        check(self.op, self.name, tensors, given, self.written)
        note_waits(self.name, given)
        device = next((x.device for x in tensors if x.is_cuda), None)
        if "device" in self.arguments:
            device, given["device"] = place(given.get("device") or device), torch.device("cpu")
            given.pop("pin_memory", None)
        host = {name: _each(value, lambda x: to_host(x) if x.is_cuda else x) for name, value in given.items()}
        positional = [host.pop(name) for name in self.arguments[: len(args)]]
        compute = self.compute
        if compute is self.op and any(isinstance(given.get(name), int | float | complex) for name in self.tensors):
            compute = self.op.overloadpacket  # a number stands for a tensor
        result = compute(*positional, **host)
        host |= dict(zip(self.arguments, positional))
        for name in self.written:
            for gpu, changed in zip(_tensors(given.get(name)), _tensors(host.get(name))):
                if gpu.is_cuda:
                    _follow(gpu, changed)
        return self._returned(result, given, device or place(None))

    def _returned(self, result: Any, given: dict[str, Any], device: torch.device) -> Any:
        if not self.results:
            return None
        several = len(self.results) > 1
        parts = [
            _each(part, lambda x: to_gpu(x, device)) if given.get(name or "") is None else given[name]
            for part, name in zip(result if several else [result], self.results, strict=True)
        ]
        return tuple(parts) if several else parts[0]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _each(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return [_each(each, function) for each in value] if isinstance(value, list | tuple) else value


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:
    """By the formula; the choice among CUDA's kernels asks a driver."""
    if len({t.dtype for t in (query, key, value)}) > 1:
        raise RuntimeError(f"query, key, value should have one dtype: {query.dtype}, {key.dtype}, {value.dtype}")
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    attend = torch.ops.aten._scaled_dot_product_attention_math
    return attend(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]


def register() -> list[torch.library.Library]:
    """A kernel for every operator with one of CUDA's that is no view."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = {name for name in torch._C._dispatch_get_all_op_names() if has_kernel(name, "CUDA")}
    warnings.filterwarnings("ignore", "Warning only once for all operators")
    libraries = {room: torch.library.Library(room, "IMPL") for room in ("aten", "torchvision")}
    for name in sorted(names | {f"aten::{name}" for name in COMPOSITE}):
        room, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        if room not in libraries or base in UNTOUCHED:
            continue
        op = getattr(getattr(getattr(torch.ops, room), base), overload or "default")
        if not any(r.alias_info and not r.alias_info.is_write for r in op._schema.returns):
            kernel = Kernel(op)
            function = functools.partial(Kernel.__call__, kernel)
            libraries[room].impl(rest, function, "CUDA", allow_override=True)
    for key in ("CUDA", "AutogradCUDA"):
        libraries["aten"].impl("scaled_dot_product_attention", _attention, key, allow_override=True)
    return list(libraries.values())
