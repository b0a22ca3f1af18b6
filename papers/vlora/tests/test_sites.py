"""The changed modules are found when they are used: adapters, quantisers and offloaders may replace them."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn

from papers.vlora.tests.models import vlora


def _effect(model, plain, ids, pixels):
    """How far the image moves the last logits."""
    return (model(ids, pixels).logits[0, -1] - model(plain).logits[0, -1]).abs().max().item()


class Wrapped(nn.Module):
    """A quantiser's layer in all that matters here: another module, and no `nn.Linear`."""

    def __init__(self, linear):
        super().__init__()
        self.inner, self.in_features, self.out_features = linear, linear.in_features, linear.out_features

    def forward(self, x):
        return self.inner(x)


@torch.no_grad()
def _expect(model, ids, pixels, expected, atol):
    torch.testing.assert_close(model(ids, pixels).logits, expected, rtol=0, atol=atol)


@torch.no_grad()
def test_replaced_modules_see_the_image(batch):
    ids, pixels = batch[0][:1], batch[1][:1]
    model = vlora()
    expected = model(ids, pixels).logits
    assert _effect(model, ids[:, 2:], ids, pixels) > 0.1
    for layer in model.language_model.model.layers:
        for letter in "qkvo":
            name = f"{letter}_proj"
            setattr(layer.self_attn, name, Wrapped(getattr(layer.self_attn, name)))
    _expect(model, ids, pixels, expected, 1e-6)
    with pytest.raises(ValueError, match=r'plain float Linear layers, not a Wrapped: apply="side"'):
        model.generate(ids, pixels, apply="merge", max_new_tokens=1)
    _expect(model, ids, pixels, expected, 1e-6)


@torch.no_grad()
def test_a_replaced_language_model_sees_the_image(batch):
    ids, pixels = batch[0][:1], batch[1][:1]
    model = vlora()
    expected, other = model(ids, pixels).logits, vlora().language_model
    model.language_model = other
    _expect(model, ids, pixels, expected, 1e-6)
    model.language_model = torch.ao.quantization.quantize_dynamic(model.language_model, {nn.Linear})
    plain = model(ids[:, 2:]).logits[0, -1]
    assert (model(ids, pixels).logits[0, -1] - plain).abs().max() > 0.1
    _expect(model, ids, pixels, expected, 0.1)
    with pytest.raises(ValueError, match="not a DynamicQuantizedLinear"):
        model.generate(ids, pixels, apply="merge", max_new_tokens=1)


@torch.no_grad()
def test_adapters_see_the_image(batch):
    ids, pixels = batch[0][:1], batch[1][:1]
    model = vlora()
    expected = model(ids, pixels).logits
    model.language_model = get_peft_model(model.language_model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    _expect(model, ids, pixels, expected, 1e-5)
    model.language_model = model.language_model.merge_and_unload()
    _expect(model, ids, pixels, expected, 1e-5)


@torch.no_grad()
def test_an_offloaded_model_sees_the_image(batch):
    ids, pixels = batch[0][:1], batch[1][:1]
    model = vlora()
    expected = model(ids, pixels).logits
    cpu_offload(model, "cpu")
    _expect(model, ids, pixels, expected, 1e-5)
    weights = model.perceive(ids, pixels)
    torch.testing.assert_close(model(ids, perceptual_weights=weights).logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="on the meta device"):
        model.generate(ids, pixels, apply="merge", max_new_tokens=1)
    _expect(model, ids, pixels, expected, 1e-5)


@torch.no_grad()
def test_modules_that_hooks_cannot_reach_are_named(batch):
    ids, pixels = batch[0][:1], batch[1][:1]
    model = vlora()
    layer = model.language_model.model.layers[1]
    layer.mlp.forward, inner = None, layer.mlp.forward
    layer.forward = _fused(layer, inner)
    with pytest.raises(RuntimeError, match="the image reached 9 of 10 modules"):
        model(ids, pixels)
    model(ids[:, 2:])  # text alone needs none of them


def _fused(layer, mlp):
    """A layer whose MLP is no module any more."""

    def forward(hidden_states, **kwargs):
        x = hidden_states + layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
        return x + mlp(layer.post_attention_layernorm(x))

    return forward


@torch.no_grad()
def test_two_models_around_one_language_model(batch):
    ids, pixels = batch[0][:1], batch[1][:1]
    first, second = vlora(), vlora(every=1)
    alone = [first(ids, pixels).logits, copy.deepcopy(second)]
    alone[1].language_model = copy.deepcopy(first.language_model)
    alone[1] = alone[1](ids, pixels).logits
    second.language_model = first.language_model
    for _ in range(2):
        _expect(second, ids, pixels, alone[1], 1e-6)
        _expect(first, ids, pixels, alone[0], 1e-6)


@torch.no_grad()
def test_one_graph(batch):
    """torch.compile(fullgraph=True) of a prefill, and nothing of it stays behind."""
    ids, pixels = batch[0][:1], batch[1][:1]
    model = vlora()
    weights, text = model.perceive(ids, pixels), ids[:, 2:]
    expected = [model(ids, pixels).logits, model(text).logits]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(ids, perceptual_weights=weights).logits, expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compiled(text).logits, expected[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(text).logits, expected[1])
