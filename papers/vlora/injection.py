"""How an image's weights reach the modules they change (section 3.2): with the call, never with the model.

While a forward pass runs, its weights are in a context variable, which other threads and requests do not see. The hooks
on the changed modules hold nothing but their place. B rows, T weight types, S sites, d width in, o width out, r rank.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .configuration import MODULES, InputError, VLoRAConfig


@dataclass
class Weights:
    """The perceptual weights of one call."""

    A: torch.Tensor
    """(B, T, S, d, r), or one row for all"""
    B: tuple[torch.Tensor, ...]
    """for each type (S, o, r), times α / r"""
    merged: bool = False
    """q, k, v and o are in the language model's weights already"""
    reached: int = 0
    """modules that have taken note of them"""


_in_force: ContextVar[Weights | None] = ContextVar("perceptual_weights", default=None)


class _Traced:
    """Takes the variable's place in a graph that torch.compile traces, and is empty again at its end."""

    def __init__(self):
        self.weights: Weights | None = None


_traced = _Traced()


def in_force() -> Weights | None:
    if torch.compiler.is_compiling():
        return _traced.weights
    if _traced.weights is not None:
        raise RuntimeError("torch.compile has broken its graph within the language model: compile with fullgraph=True")
    return _in_force.get()


def put(weights: Weights | None) -> Any:
    """From here on `weights` are in force, for this thread; returns what `back` takes."""
    if torch.compiler.is_compiling():
        _traced.weights = weights
        return None
    return _in_force.set(weights)


def back(token: Any) -> None:
    if torch.compiler.is_compiling():
        _traced.weights = None
    else:
        _in_force.reset(token)


def remembered() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """For gradient checkpointing: what is in force now is so again when the backward pass computes anew."""

    @contextlib.contextmanager
    def again(weights: Weights | None = in_force()) -> Iterator[None]:  # noqa: B008 (now, not then)
        token = put(weights)
        try:
            yield
        finally:
            back(token)

    return contextlib.nullcontext(), again()


@dataclass(frozen=True)
class Site:
    """Forward hook of a changed module: y = module(x) + (x A) Bᵀ α / r, each row of the batch with its own A."""

    type_index: int
    site_index: int
    letter: str

    def __call__(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
        weights = in_force()
        if weights is None:
            return None
        weights.reached += 1
        if weights.merged and self.letter != "m":
            return None
        x = inputs[0]
        A, B = weights.A[:, self.type_index, self.site_index], weights.B[self.type_index][self.site_index]
        return output + (x @ A.to(x.device, x.dtype)) @ B.mT.to(x.device, x.dtype)


_hooking = threading.Lock()


class Places:
    """The modules that get perceptual weights, found anew whenever they are wanted: a quantiser, an adapter or an
    offloader may have put others in their place."""

    def __init__(self, config: VLoRAConfig):
        letters = config.weight_types
        self.sites = [Site(t, s, x) for t, x in enumerate(letters) for s in range(len(config.sites))]
        self.layers, self.width = config.sites, config.text_config.hidden_size
        self.hooked: list[nn.Module] = []

    def find(self, language_model: nn.Module) -> list[nn.Module]:
        """A module for each of `sites`."""
        try:
            layers = language_model.get_decoder().layers
        except AttributeError:
            kind = type(language_model).__name__
            raise InputError(f"a {kind} has no get_decoder().layers, as LLaMA's kind has") from None
        found = []
        for site in self.sites:
            layer, name = layers[self.layers[site.site_index]], MODULES[site.letter]
            try:
                module = layer.get_submodule(name)
            except AttributeError:
                kind = type(layer).__name__
                raise InputError(f"weight type {site.letter!r} needs {name} in a {kind}") from None
            if (width := getattr(module, "in_features", self.width)) != self.width:
                raise InputError(f"weight type {site.letter!r}: {name} takes width {width}, not {self.width}")
            found.append(module)
        return found

    def hook(self, language_model: nn.Module) -> list[nn.Module]:
        """`find`, and every module found has its hook."""
        found = self.find(language_model)
        same = len(found) == len(self.hooked) and all(a is b for a, b in zip(found, self.hooked))
        if same and all(site in module._forward_hooks.values() for site, module in zip(self.sites, found)):
            return found
        with _hooking:
            for module in language_model.modules():
                for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, Site)]:
                    del module._forward_hooks[key]
            for site, module in zip(self.sites, found):
                module.register_forward_hook(site)
            self.hooked = found
        return found


_merger: ContextVar[object] = ContextVar("merger", default=None)


class Guard:
    """Either any number of calls use the language model, or one image's weights are merged into it."""

    def __init__(self):
        self.lock, self.calls, self.owner = threading.Lock(), 0, None

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), Guard())  # a copied model is in nobody's use

    def __reduce__(self):
        return Guard, ()

    @property
    def mine(self) -> bool:
        """Whether this thread has merged an image."""
        return self.owner is not None and _merger.get() is self.owner

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        with self.lock:
            if self.owner is not None and not self.mine:
                raise InputError('another image is merged into this model; wait, or leave images beside (apply="side")')
            self.calls += 1
        try:
            yield
        finally:
            with self.lock:
                self.calls -= 1

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self.lock:
            if self.owner is not None:
                raise InputError("an image is merged into this model already, and it holds one")
            if self.calls:
                raise InputError("the model is in use: an image can be merged when no other call is running")
            self.owner = object()
        token = _merger.set(self.owner)
        try:
            yield
        finally:
            _merger.reset(token)
            with self.lock:
                self.owner = None


@contextlib.contextmanager
def added(modules: list[nn.Module], deltas: list[torch.Tensor]) -> Iterator[None]:
    """Within, each module's weight W (o, d) is W + ΔW. On leaving, the weights are the very tensors they were."""
    for module in modules:
        weight = getattr(module, "weight", None)
        plain = type(module) is nn.Linear and type(weight.data) is torch.Tensor and weight.is_floating_point()
        if not plain or weight.is_meta:
            kind = module._get_name() if type(module) is not nn.Linear else type(weight.data).__name__
            kind += " on the meta device (offloaded)" if getattr(weight, "is_meta", False) else ""
            raise InputError(f'an image can be merged into plain float Linear layers, not a {kind}: apply="side"')
    before = [module.weight.data for module in modules]
    try:
        for module, delta in zip(modules, deltas):
            module.weight.data = module.weight.data + delta.to(module.weight.device, module.weight.dtype)
        yield
    finally:
        for module, weight in zip(modules, before):
            module.weight.data = weight
