"""SPACH against numbers recorded from the authors' code."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.run import UserError
from common.tests import parity
from papers.spach import VARIANTS, load_official, to_official
from papers.spach.model import MixingBlock, Stem, checkpoint_filter_fn, merging, rename

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

    stages = {"stem": model.stem.proj, "norm1": model.stem.norm, "final_norm": model.norm}
    for i, stage in enumerate(model.stages, 1):
        stages[f"stage{i}"] = stage
    for i, block in enumerate(model.stages[0].blocks, 1):
        stages[f"block{i}"] = block
    layout = {stage["name"]: stage["layout"] for stage in about["stages"]}
    seen = {}

    def record(key, out):
        if out.ndim == 4 and layout.get(key) == "BNC":
            out = out.flatten(1, 2) if key.startswith("block") else out.flatten(2).mT
        seen[key] = parity.summary(out)

    for key, module in stages.items():
        module.register_forward_hook(lambda _m, _i, out, key=key: record(key, out))
    with torch.no_grad():
        logits = model(parity.inputs(about))
    for key in layout:
        parity.assert_close(seen[key], theirs[f"stage/{key}"], f"{name} {key}")
    # Where the logits themselves are small, 1e-4 would hide a difference.
    std = about["logits_std"]
    parity.assert_close(logits, theirs["logits"], f"{name} logits", atol=5e-4 * std if std < 0.2 else parity.ATOL)


def _block(args, tokens, dim):
    side = int(tokens**0.5)
    mixer = args.get("spatial", "mlp" if "in_features" in args else "attn")
    return MixingBlock(
        dim, (side, side), mixer={"pass": "conv"}.get(mixer, mixer), num_heads=args.get("num_heads", 1), qkv_bias=True,
        token_ratio=args.get("hidden_features", tokens) / tokens, mlp_ratio=args.get("channel_ratio", 2.0),
        bypass=args.get("cpe", True), drop_path=0.0,
    )


# The fixture's "op" -> where its names stand in the authors' network, and what computes it in our block.
MODULES = {
    "SPACH mixing block": ("blocks.0.", lambda block: _on_square(block)),
    "SPACH spatial attention": ("blocks.0.spatial_func.", lambda block: block.mixer),
    "SPACH spatial MLP": ("blocks.0.spatial_func.", lambda block: block.mixer),
    "SPACH channel MLP": ("blocks.0.channel_func.", lambda block: block.mlp),
    "SPACH convolution / positional bypass": ("blocks.0.cpe_net.", lambda block: _on_square(block.bypass)),
    "SPACH-MS downsample": ("layer2.0.", None),
    "SPACH stem": ("stem.", None),
}


def _module(op):
    """(their prefix, our prefix, the module that owns the tensors, the function from x to y)."""
    args, (theirs, compute) = op["args"], MODULES[op["op"]]
    if op["op"] == "SPACH stem":
        size = (args["img_size"], args["img_size"])
        stem = Stem(args["stem_type"], 3, args["embed_dim"], args["patch_size"], size, args.get("hidden_chans", 64))
        return theirs, "stem.", stem, stem.proj
    if op["op"] == "SPACH-MS downsample":
        downsample = merging(args["out_channels"])
        return theirs, "stages.1.downsample.", downsample, _on_tokens(downsample)
    _, (_, tokens, dim) = op["x"]
    block = _block(args, tokens, dim)
    return theirs, "stages.0.blocks.0.", block, compute(block)


def _on_square(module):
    """A function of (B, H, W, C) as one of tokens."""
    def compute(tokens_BNC):
        side = int(tokens_BNC.shape[1] ** 0.5)
        return module(tokens_BNC.unflatten(1, (side, side))).flatten(1, 2)

    return compute


def _on_tokens(module):
    def compute(tokens_BNC):
        side = int(tokens_BNC.shape[1] ** 0.5)
        return module(tokens_BNC.mT.unflatten(2, (side, side))).flatten(2).mT

    return compute


@pytest.mark.parametrize("name", [n for n in OPS if not n.startswith("net_")])
def test_module(name):
    op, theirs = OPS[name], parity.op_arrays(FIXTURES, name)
    prefix, ours, owner, compute = _module(op)
    names = {n: rename(prefix + n).removeprefix(ours) for n, *_ in op["tensors"]}
    weights = {names[n]: tensor for n, tensor in parity.state_dict(op).items()}
    owner.train(op["mode"] == "train").load_state_dict({**owner.state_dict(), **weights})
    x = parity.op_input(op).requires_grad_()
    y = compute(x)
    y.backward(parity.op_input(op, "gy"))
    parity.assert_close(y, theirs["y"], "output")
    if "gx" in theirs:
        parity.assert_close(x.grad, theirs["gx"], "gradient of the input")
    parameters = dict(owner.named_parameters())
    for n, *_, role in op["tensors"]:
        if role == "param":
            parity.assert_close(parameters[names[n]].grad, theirs[f"grad/{n}"], n)
    if op["op"] == "SPACH mixing block":  # the others are parts of a block, of which the fixture holds no more
        assert set(names.values()) == set(owner.state_dict())


@pytest.mark.parametrize(
    "name, variant", [("net_spach", "spach_xxs_patch16_224_attn"), ("net_spach_ms", "spach_ms_xs_patch4_224_conv")]
)
def test_training_step(name, variant):
    op, theirs = OPS[name], parity.op_arrays(FIXTURES, name)
    model = load_official(variant, parity.state_dict(op), **op["args"]).train()
    logits = model(parity.op_input(op))
    loss = F.cross_entropy(logits, torch.tensor(op["target"]))
    loss.backward()
    parity.assert_close(logits, theirs["logits"], "logits")
    parity.assert_close(loss, theirs["loss"], "loss")
    parameters = dict(model.named_parameters())
    for n, row in zip(op["grads_rows"], theirs["grads"], strict=True):
        grad = parameters[rename(n)].grad.double().flatten()
        ours = torch.cat([grad.norm()[None], grad.mean()[None], grad[:4]])
        parity.assert_close(ours, row[: len(ours)], n)


def test_load_official_lists_every_wrong_tensor():
    op = OPS["net_spach_ms"]
    weights = parity.state_dict(op)
    weights["head.weight"] = weights["head.weight"][:3]
    weights["layer3.3.gamma_1"] = weights["layer3.1.gamma_1"]  # the stage has two blocks
    weights["stray"] = weights.pop("norm2.bias")
    with pytest.raises(RuntimeError) as error:
        load_official("spach_ms_xs_patch4_224_conv", weights, **op["args"])
    wrong = "head.fc.weight", "stages.2.blocks.2.gamma", "stray", "norm.bias"
    assert all(word in str(error.value) for word in wrong)


def test_load_official_refuses_shared_mixers_that_differ():
    about, _ = parity.load(FIXTURES, "spach_ms_s_patch4_224_mlp__shared")
    weights = parity.state_dict(about)
    name = "layer3.5.spatial_func.fc1.bias"
    weights[name] = weights[name] + 1
    with pytest.raises(UserError, match=r"stages\.2\.blocks\.4\.mixer\.fc1\.bias differs from stages\.2\.blocks\.0\."):
        load_official("spach_ms_s_patch4_224_mlp", weights, **about["config"])


def test_load_official_names_the_variants():
    with pytest.raises(UserError) as error:
        load_official("spach_huge", {})
    assert all(name in str(error.value) for name in ("spach_huge", *VARIANTS))
