"""sMLPNet against numbers recorded from the authors' code."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.run import UserError
from common.tests import parity
from papers.smlpnet import VARIANTS, load_official, to_official
from papers.smlpnet.model import SMLPBlock, SMLPNet, checkpoint_filter_fn, rename

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
    assert len(checkpoint_filter_fn(weights, model)) == len(weights) == len(model.state_dict())
    back = to_official(model)
    assert back.keys() == weights.keys() and all(torch.equal(back[key], weights[key]) for key in weights)

    stages = {"stage1_embed": model.patch_embed, "final_norm": model.norm}
    for i, stage in enumerate(model.stages, 1):
        stages[f"stage{i}_blocks"] = stage
        stages.setdefault(f"stage{i}_embed", stage.downsample)
    seen = {}
    for key, module in stages.items():
        module.register_forward_hook(lambda _m, _i, out, key=key: seen.update({key: parity.summary(out)}))
    with torch.no_grad():
        logits = model(parity.inputs(about))
    for stage in about["stages"]:
        parity.assert_close(seen[stage["name"]], theirs[f"stage/{stage['name']}"], f"{name} {stage['name']}")
    parity.assert_close(logits, theirs["logits"], f"{name} logits")


# The fixture's "op" -> where its names stand in the authors' network, and what computes it in our block.
MODULES = {
    "sMLP": ("token_mix.0.1.", lambda block: block.smlp),
    "sMLPNet depthwise block": ("token_mix.0.0.", lambda block: block.local),
    "sMLPNet token mixing (depthwise block, then sMLP)": ("token_mix.0.", lambda block: block.token_mix),
    "sMLPNet channel mixing": ("channel_mix.0.", lambda block: block.channel_mix),
}


@pytest.mark.parametrize("name", [n for n in OPS if not n.startswith("net_")])
def test_module(name):
    op, theirs = OPS[name], parity.op_arrays(FIXTURES, name)
    prefix, compute = MODULES[op["op"]]
    _, (_, channels, *size) = op["x"]
    alpha = op["args"].get("alpha", 1)
    names = _Names(SMLPNet(img_size=32, embed_dim=4, depths=(1,)), prefix, "stages.0.blocks.0.")
    block = SMLPBlock(channels, tuple(size), alpha, "sparse", drop_path=0.0).train(op["mode"] == "train")
    block.load_state_dict({**block.state_dict(), **names.convert(parity.state_dict(op))})
    x = parity.op_input(op).requires_grad_()
    y = compute(block)(x)
    y.backward(parity.op_input(op, "gy"))
    parity.assert_close(y, theirs["y"], "output")
    if "gx" in theirs:
        parity.assert_close(x.grad, theirs["gx"], "gradient of the input")
    parameters, buffers = dict(block.named_parameters()), dict(block.named_buffers())
    for n, shape, _, role in op["tensors"]:
        if role == "param":
            parity.assert_close(parameters[names(n)].grad.view(shape), theirs[f"grad/{n}"], n)
        elif op["mode"] == "train":
            parity.assert_close(buffers[names(n)], theirs[f"buffer_after/{n}"], n)


class _Names:
    """Names inside a module, through the converter of the whole network."""

    def __init__(self, model, theirs: str, ours: str):
        self.model, self.theirs, self.ours = model, theirs, ours

    def __call__(self, name):
        return rename(self.theirs + name, self.model).removeprefix(self.ours)

    def convert(self, weights):
        weights = checkpoint_filter_fn({self.theirs + name: tensor for name, tensor in weights.items()}, self.model)
        return {name.removeprefix(self.ours): tensor for name, tensor in weights.items()}


def test_training_step():
    op, theirs = OPS["net_smlpnet"], parity.op_arrays(FIXTURES, "net_smlpnet")
    model = load_official("smlpnet_tiny", parity.state_dict(op), **op["args"]).train()
    logits = model(parity.op_input(op))
    loss = F.cross_entropy(logits, torch.tensor(op["target"]))
    loss.backward()
    parity.assert_close(logits, theirs["logits"], "logits")
    parity.assert_close(loss, theirs["loss"], "loss")
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, row in zip(op["grads_rows"], theirs["grads"], strict=True):
        grad = parameters[rename(name, model)].grad.double().flatten()
        ours = torch.cat([grad.norm()[None], grad.mean()[None], grad[:4]])
        parity.assert_close(ours, row[: len(ours)], name)
    for key, value in theirs.items():
        if key.startswith("buffer_after/"):
            name = key.removeprefix("buffer_after/")
            parity.assert_close(buffers[rename(name, model)], value, name)


def test_load_official_lists_every_wrong_tensor():
    op = OPS["net_smlpnet"]
    weights = parity.state_dict(op)
    weights["mlp_head.0.weight"] = weights["mlp_head.0.weight"][:3]
    weights["token_mix.4.1.fuse.weight"] = weights["token_mix.0.1.fuse.weight"]  # the network has four blocks
    weights["token_mix.1.1.proj_h.weight"] = weights["token_mix.0.1.proj_h.weight"]
    weights["stray"] = weights.pop("batch_norm.bias")
    with pytest.raises(RuntimeError) as error:
        load_official("smlpnet_tiny", weights, **op["args"])
    wrong = "head.fc.weight", "token_mix.4.1.fuse.weight", "stages.1.blocks.0.smlp.mix_row.weight", "stray", "norm.bias"
    assert all(word in str(error.value) for word in wrong)


def test_load_official_names_the_variants():
    with pytest.raises(UserError) as error:
        load_official("smlpnet_huge", {})
    assert all(name in str(error.value) for name in ("smlpnet_huge", *VARIANTS))
