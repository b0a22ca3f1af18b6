"""ShiftViT against numbers recorded from the authors' code."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from common.tests import parity
from papers.shiftvit import load_official, to_official
from papers.shiftvit.model import PatchMerging, ShiftBlock, checkpoint_filter_fn
from papers.shiftvit.official import LAYERS

FIXTURES = Path(__file__).parent / "fixtures"
OPS = parity.ops(FIXTURES)


@pytest.fixture(autouse=True, scope="module")
def _stream():
    parity.check_stream()


@pytest.mark.parametrize("name", parity.names(FIXTURES))
def test_network(name):
    about, theirs = parity.load(FIXTURES, name)
    weights = parity.state_dict(about)
    model = load_official(name.split("__")[0], weights, **about["config"])
    assert sum(p.numel() for p in model.parameters()) == about["total_params"]
    assert len(checkpoint_filter_fn(weights)) == len(weights) == len(model.state_dict())
    back = to_official(model)
    assert back.keys() == weights.keys() and all(torch.equal(back[key], weights[key]) for key in weights)

    stages = {"patch_embed": model.patch_embed, "final_norm": model.norm}
    for i, stage in enumerate(model.stages):
        stages[f"stage{i + 1}_blocks"] = stage
        stages[f"stage{i}_downsample"] = stage.downsample
    seen = {}
    for key, module in stages.items():
        module.register_forward_hook(lambda _m, _i, out, key=key: seen.update({key: parity.summary(out)}))
    with torch.no_grad():
        logits = model(parity.inputs(about))
    for stage in about["stages"]:
        parity.assert_close(seen[stage["name"]], theirs[f"stage/{stage['name']}"], f"{name} {stage['name']}")
    parity.assert_close(logits, theirs["logits"], f"{name} logits")


def _module(op):
    args = op["args"]
    layers = {k: timm.layers.__dict__[f"get_{k}_layer"](LAYERS[args[k]]) for k in ("norm", "act") if k in args}
    if op["op"] == "ShiftViT downsample":
        return PatchMerging(args["dim"], layers["norm"])
    return ShiftBlock(args["dim"], args["n_div"], args["mlp_ratio"], 0.0, layers["norm"], layers["act"])


@pytest.mark.parametrize("name", [n for n in OPS if not n.startswith("net_")])
def test_module(name):
    op, theirs = OPS[name], parity.op_arrays(FIXTURES, name)
    rename = {n: n.replace("norm2.", "norm.") for n, *_ in op["tensors"]}
    module = _module(op).train(op["mode"] == "train")
    module.load_state_dict({rename[n]: v for n, v in parity.state_dict(op).items()})
    x = parity.op_input(op).requires_grad_()
    y = module(x)
    y.backward(parity.op_input(op, "gy"))
    parity.assert_close(y, theirs["y"], "output")
    if "gx" in theirs:
        parity.assert_close(x.grad, theirs["gx"], "gradient of the input")
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    for n, *_, role in op["tensors"]:
        if role == "param":
            parity.assert_close(parameters[rename[n]].grad, theirs[f"grad/{n}"], n)
        elif op["mode"] == "train":
            parity.assert_close(buffers[rename[n]], theirs[f"buffer_after/{n}"], n)


def test_training_step():
    op, theirs = OPS["net_shiftvit"], parity.op_arrays(FIXTURES, "net_shiftvit")
    model = load_official("shiftvit_light_tiny", parity.state_dict(op), **op["args"]).train()
    logits = model(parity.op_input(op))
    loss = F.cross_entropy(logits, torch.tensor(op["target"]))
    loss.backward()
    parity.assert_close(logits, theirs["logits"], "logits")
    parity.assert_close(loss, theirs["loss"], "loss")
    parameters = dict(model.named_parameters())
    for theirs_name, row in zip(op["grads_rows"], theirs["grads"], strict=True):
        (ours_name,) = checkpoint_filter_fn({theirs_name: None})
        grad = parameters[ours_name].grad.double().flatten()
        ours = torch.cat([grad.norm()[None], grad.mean()[None], grad[:4]])
        parity.assert_close(ours, row[: len(ours)], theirs_name)


def test_load_official_lists_every_wrong_tensor():
    about, _ = parity.load(FIXTURES, "shiftvit_light_tiny")
    weights = parity.state_dict(about)
    weights["head.weight"] = weights["head.weight"][:10]
    weights["stray"] = weights.pop("norm.bias")
    with pytest.raises(RuntimeError) as error:
        load_official("shiftvit_light_tiny", weights)
    assert all(word in str(error.value) for word in ("head.fc.weight", "stray", "norm.bias"))
