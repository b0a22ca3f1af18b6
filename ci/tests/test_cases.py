"""What holds for every public model of every paper (common/run/cases.py)."""

import copy
import importlib

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from common import run
from tools.list import papers


def _models():
    for paper in papers():
        module = importlib.import_module(f"papers.{paper}.cases")
        for name, model in module.MODELS.items():
            yield pytest.param(model, id=f"{paper}-{name}")


def _first(output):
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _gradients(model, inputs):
    model.zero_grad()
    outputs = [x for x in tree_leaves(model(*inputs)) if isinstance(x, torch.Tensor)]
    sum(out.float().square().mean() for out in outputs).backward()
    return outputs[0].shape, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", _models())
def test_model(case, tmp_path):
    model, inputs = case.build(), case.inputs()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == case.params

    shape, gradients = _gradients(model.train(), inputs)
    assert shape == case.shape
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.isfinite().all(), f"gradient of {name}"

    model.eval()
    with torch.no_grad():
        once = _first(model(*inputs))
        torch.testing.assert_close(_first(model(*inputs)), once, rtol=0, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            half = _first(model(*inputs)).float()
        assert (half - once).norm() < 0.1 * once.norm() + 1e-3, "bf16 autocast"

        run.save_weights(tmp_path / "weights.safetensors", model.state_dict())
        again = copy.deepcopy(model)
        for tensor in again.state_dict().values():
            tensor.zero_()
        again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        torch.testing.assert_close(_first(again(*inputs)), once, rtol=0, atol=0)

    if hasattr(model, "set_grad_checkpointing"):
        _, plain = _gradients(model, inputs)
        plain = {name: gradient.clone() for name, gradient in plain.items()}
        model.set_grad_checkpointing(True)
        for name, gradient in _gradients(model, inputs)[1].items():
            assert torch.allclose(gradient, plain[name], rtol=1e-4, atol=1e-6), f"gradient of {name}, checkpointed"


@pytest.mark.slow
@pytest.mark.parametrize("case", [p for p in _models() if p.values[0].compile])
def test_compiled_equals_eager(case):
    model, inputs = case.build().eval(), case.inputs()
    with torch.no_grad():
        eager = _first(model(*inputs))
        torch.testing.assert_close(_first(torch.compile(model, fullgraph=True)(*inputs)), eager, rtol=1e-4, atol=1e-4)
