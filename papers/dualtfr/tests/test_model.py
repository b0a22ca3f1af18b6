"""DualTFR's parts against their definitions, Swin's against timm's, and what timm, torch.compile and ONNX expect."""

import copy
import itertools
import math

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch.nn.functional import gelu, layer_norm
from torch.utils.flop_counter import FlopCounterMode

from common.run import UserError
from papers.dualtfr import DualTFRBackbone, create_tracker
from papers.dualtfr.model import CAB, GAB, LAB, CrossAttention, Head, Position
from papers.dualtfr.weights import load_backbone, widen
from papers.dualtfr.windows import local_attention_mask, merge, partition

SIZES = [(1, 1), (5, 7), (7, 14), (8, 13), (33, 3)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def lively(module):
    """Weights large enough that a mistake in attention shows: the initial ones make it almost uniform."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return module.double().eval()


def lab(shift=0, window=4, dim=12, heads=3, **kwargs):
    return lively(LAB(dim, heads, window=window, shift=shift, mlp_ratio=2.0, drop_path=0.0, **kwargs))


def pixels(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# Windows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [(7, 7), (3, 5), (1, 1)])
def test_merging_undoes_partition(size, window):
    x = torch.randn(2, *size, 3)
    windows = partition(x, window)
    assert windows.shape == (2, math.ceil(size[0] / window[0]) * math.ceil(size[1] / window[1]), math.prod(window), 3)
    assert torch.equal(merge(windows, window, size), x)
    numbers = torch.arange(float(math.prod(size))).view(1, *size, 1) + 1
    inside = partition(numbers, window)[0, :, :, 0]
    for y, x in itertools.product(range(size[0]), range(size[1])):
        row = y // window[0] * math.ceil(size[1] / window[1]) + x // window[1]
        assert inside[row, y % window[0] * window[1] + x % window[1]] == numbers[0, y, x, 0]
    assert (inside > 0).sum() == math.prod(size)  # the rest is padding


def together(size, window, shift, bias):
    """Of every pair of tokens, looked at one by one: whether they share a window and were neighbors before the roll,
    and the bias of their offset. Two (N, N) matrices, the second per head."""
    (H, W), n = size, math.prod(size)
    span = 2 * int((len(bias) ** 0.5 + 1) / 2) - 1
    allowed, biases = torch.zeros(n, n, dtype=torch.bool), torch.zeros(bias.shape[1], n, n, dtype=bias.dtype)
    tokens = list(itertools.product(range(H), range(W)))
    for (i, a), (j, b) in itertools.product(enumerate(tokens), repeat=2):
        share = True
        for axis, side in enumerate(size):
            rolled = [(place[axis] - shift[axis]) % side for place in (a, b)]
            wrapped = [place[axis] < shift[axis] for place in (a, b)]
            share &= rolled[0] // window[axis] == rolled[1] // window[axis] and wrapped[0] == wrapped[1]
        if share:
            allowed[i, j] = True
            dy, dx = a[0] - b[0] + span // 2, a[1] - b[1] + span // 2
            biases[:, i, j] = bias[dy * span + dx]
    return allowed, biases


def dense(block, x, window, shift):
    """The block's formula on all tokens at once, with everything masked that its windows keep apart."""
    (B, H, W, C), heads = x.shape, block.attn.num_heads
    allowed, bias = together((H, W), window, shift, block.attn.relative_position_bias_table)
    x = x.flatten(1, 2)

    def norm(x, layer):
        return layer_norm(x, (C,), layer.weight, layer.bias, 1e-5)

    q, k, v = (norm(x, block.norm1) @ block.attn.qkv.weight.T + block.attn.qkv.bias).split(C, -1)
    parts = []
    for head in range(heads):
        own = slice(head * C // heads, (head + 1) * C // heads)
        scores = q[..., own] @ k[..., own].mT / (C // heads) ** 0.5 + bias[head]
        parts.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v[..., own])
    x = x + torch.cat(parts, -1) @ block.attn.proj.weight.T + block.attn.proj.bias
    hidden = gelu(norm(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    return (x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias).view(B, H, W, C)


@pytest.mark.parametrize("size", SIZES + [(8, 8)])
@pytest.mark.parametrize("shift", [0, 2])
def test_local_block_equals_dense_attention_with_a_mask(size, shift):
    block, x = lab(shift), pixels(2, *size, 12)
    window = tuple(min(4, side) for side in size)
    moved = tuple(shift if side > 4 else 0 for side in size)
    torch.testing.assert_close(block(x), dense(block, x, window, moved))


@pytest.mark.parametrize("size", [(14, 14), (7, 7), (3, 5)])
def test_global_block_equals_dense_attention(size):
    block = lively(GAB(12, 3, grid=14, mlp_ratio=2.0, drop_path=0.0))
    x = pixels(2, *size, 12)
    torch.testing.assert_close(block(x), dense(block, x, size, (0, 0)))


def test_global_block_is_a_local_block_whose_window_is_the_grid():
    local = lab(window=6)
    everywhere = lively(GAB(12, 3, grid=6, mlp_ratio=2.0, drop_path=0.0))
    everywhere.load_state_dict(local.state_dict())
    x = pixels(2, 6, 6, 12)
    assert torch.equal(everywhere(x), local(x))
    with pytest.raises(ValueError, match=r"7x6 tokens.*at most 6x6.*gab_grid"):
        everywhere(pixels(1, 7, 6, 12))
    bare = GAB(12, 3, grid=6, mlp_ratio=2.0, drop_path=0.0, bias=False).double()
    assert "attn.relative_position_bias_table" not in bare.state_dict() and bare(pixels(1, 9, 9, 12)).shape[1] == 9


@pytest.mark.parametrize("size, shift", [((8, 8), 0), ((8, 8), 2), ((9, 7), 2)])
def test_nothing_leaks_between_windows(size, shift):
    block, x = lab(shift), pixels(1, *size, 12)
    allowed, _ = together(size, (4, 4), (shift, shift), block.attn.relative_position_bias_table)
    before = block(x)
    for token in (0, 10, math.prod(size) - 1):
        changed = x.clone()
        changed.view(-1, 12)[token] = pixels(12)
        moved = (block(changed) != before).any(-1).flatten()
        assert torch.equal(moved, allowed[:, token]), "the tokens that feel a token are those that may see it"


def test_shift_mask_tells_who_was_near():
    visible = local_attention_mask((8, 8), (4, 4), (2, 2))
    assert visible[0].all() and not visible[1].all()  # the first window holds no token that came from the far side
    # the last window: four quarters from the four corners of the image
    corners = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]).flatten()
    assert torch.equal(visible[3], corners[:, None] == corners)
    padded = local_attention_mask((5, 4), (4, 4), (0, 0))[1]
    assert padded[:4, :4].all() and not padded[:4, 4:].any() and padded[4:, 4:].all()


# Two images ----------------------------------------------------------------------------------------------


def cab():
    return lively(CAB(12, 3, mlp_ratio=2.0))


def test_cross_attention_equals_its_formula():
    ours = lively(CrossAttention(12, 3))
    x, other = pixels(2, 3, 5, 12), pixels(2, 2, 2, 12)
    q = x.flatten(1, 2) @ ours.q.weight.T + ours.q.bias
    k, v = (other.flatten(1, 2) @ ours.kv.weight.T + ours.kv.bias).split(12, -1)
    heads = [
        (q[..., h : h + 4] @ k[..., h : h + 4].mT / 2).softmax(-1) @ v[..., h : h + 4] for h in (0, 4, 8)
    ]
    expected = torch.cat(heads, -1) @ ours.proj.weight.T + ours.proj.bias
    torch.testing.assert_close(ours(x, other), expected.view(2, 3, 5, 12))


def micro(**changes):
    """The micro tracker in float64, with weights that make it look."""
    return lively(create_tracker("dualtfr_micro", **changes))


def crops(n=2):
    return pixels(n, 3, 32, 32), pixels(n, 3, 64, 64)


@pytest.mark.parametrize("cab_after", [(2, 2), (0, 1, 2), (1,)])
def test_swapping_the_images_swaps_the_outputs(cab_after):
    model = micro(cab_after=cab_after)
    a, b = (model.encode(image) for image in crops())
    (z, x), (x_swapped, z_swapped) = model.fuse(a, b, both=True), model.fuse(b, a, both=True)
    assert torch.equal(z, z_swapped) and torch.equal(x, x_swapped)
    same = pixels(2, 3, 64, 64)
    z, x = model.fuse(model.encode(same), model.encode(same), both=True)
    assert torch.equal(z, x)


@pytest.mark.parametrize("cab_after", [(2, 2), (0, 1, 2), (1,), ()])
def test_the_templates_share_is_computed_once_and_ends_early(cab_after):
    model, (z, x) = micro(cab_after=cab_after), crops()
    cached = model.encode(z)
    for _ in range(2):  # the first frame leaves nothing behind that would change the second
        torch.testing.assert_close(model.predict(cached, x), model(z, x), rtol=0, atol=0)
    assert torch.equal(model.fuse(cached, model.encode(x), both=True)[1], model.fuse(cached, model.encode(x)))


def test_without_cross_attention_the_branches_are_independent():
    model, (z, x) = micro(cab_after=()), crops()
    with_other = model(pixels(2, 3, 32, 32), x)
    assert torch.equal(model(z, x).logits, with_other.logits) and torch.equal(model(z, x).boxes, with_other.boxes)
    meeting = micro(cab_after=(2,))
    assert not torch.allclose(meeting(z, x).logits, meeting(pixels(2, 3, 32, 32), x).logits)
    # and each branch is the backbone on its own
    alone = micro(cab_after=(), position=False)
    torch.testing.assert_close(alone.encode(z), alone.backbone.forward_features(z))
    assert torch.equal(alone.fuse(alone.encode(z), alone.encode(x), both=True)[0], alone.encode(z))


def test_order_of_the_templates_tokens_does_not_matter_to_a_cross_block():
    block, x, z = cab(), pixels(1, 4, 4, 12), pixels(1, 2, 3, 12)
    shuffled = z.flatten(1, 2)[:, torch.randperm(6)].view_as(z)
    torch.testing.assert_close(block(x, shuffled), block(x, z))
    assert not torch.allclose(block(x, z[:, :, :2]), block(x, z))


def test_cross_blocks_are_placed_where_asked():
    order = [type(layer).__name__ for layer in create_tracker("dualtfr_micro", cab_after=(0, 1, 1)).layers()]
    assert order == [
        "PatchEmbed", "Stage", "Stage", "PatchMerging", "Position", "CAB", "GAB", "CAB", "CAB", "GAB", "LayerNorm"
    ]
    order = [type(layer).__name__[:3] for layer in create_tracker("dualtfr_micro", cab_after=(2,)).layers()]
    assert order[3:] == ["Pat", "GAB", "GAB", "Pos", "CAB", "Lay"]
    for wrong in ((3,), (2, 1), (-1,)):
        with pytest.raises(ValueError, match="numbers from 0 to 2"):
            create_tracker("dualtfr_micro", cab_after=wrong)


def test_only_the_added_codes_say_where_a_token_lies():
    """An even image looks the same everywhere: without them no token could say where it is, nor one of the template's
    whether it is the target's."""
    plain, z = torch.full((1, 3, 64, 64), 0.3, dtype=torch.float64), pixels(1, 3, 32, 32)
    lost = micro(position=False, reference_points=False)(z, plain).boxes[0]
    torch.testing.assert_close(lost, lost[:1].expand_as(lost))
    for codes in ({"position": True, "reference_points": False}, {"position": False, "reference_points": True}):
        found = micro(**codes)(z, plain).boxes[0]
        assert len(found.round(decimals=6).unique(dim=0)) == 64, codes


def test_position_is_the_offset_from_the_centre():
    template, search = (Position()(torch.zeros(1, side, side, 8))[0] for side in (3, 6))
    # offsets -1, 0, 1 and -2.5 ... 2.5; 2 frequencies: 1 and 1/10; rows first
    y, x = 0 - 2.5, 4 - 2.5
    angles = [y, y / 10, x, x / 10]
    sines, cosines = ([f(angle) for angle in angles] for f in (math.sin, math.cos))
    torch.testing.assert_close(search[0, 4], torch.tensor([*sines[:2], *cosines[:2], *sines[2:], *cosines[2:]]))
    assert template[1, 1].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


def test_box_head_starts_at_the_tokens_centres():
    head = Head(12, reference_points=True)
    for p in head.box[-2].parameters():
        torch.nn.init.zeros_(p)
    boxes = head(torch.randn(1, 2, 4, 12)).boxes[0]
    torch.testing.assert_close(boxes[5], torch.tensor([0.375, 0.75, 0.5, 0.5]))
    torch.testing.assert_close(boxes[:4, 0], torch.tensor([0.125, 0.375, 0.625, 0.875]))


# Sizes and gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant, changes, params, multiply_adds", [
    ("dualtfr", {}, 19_883_856, 6_568_214_016),
    ("dualtfr", {"cab_after": ()}, 12_786_000, 4_912_556_544),
    ("dualtfr", {"gab_bias": False}, 19_831_368, 6_568_214_016),
    ("dualtfr_micro", {}, 252_484, 31_924_224),
])
def test_counts(variant, changes, params, multiply_adds):
    with torch.device("meta"):
        model = create_tracker(variant, **changes).eval()
        side, stride = (224, 16) if variant == "dualtfr" else (64, 8)
        images = torch.empty(1, 3, side // 2, side // 2), torch.empty(1, 3, side, side)
    assert sum(p.numel() for p in model.parameters()) == params
    with FlopCounterMode(display=False) as counter:
        out = model(*images)
    assert counter.get_total_flops() == 2 * multiply_adds
    assert out.logits.shape == (1, (side // stride) ** 2, 2) and out.boxes.shape == (1, (side // stride) ** 2, 4)


@pytest.mark.parametrize("variant, side", [("dualtfr", 224), ("dualtfr_micro", 64)])
def test_gradient_reaches_every_parameter(variant, side):
    model = create_tracker(variant).eval()  # no block is dropped
    out = model(torch.randn(1, 3, side // 2, side // 2), torch.randn(1, 3, side, side))
    (out.logits.square().mean() + out.boxes.square().mean()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        # entries of the tables of offsets one by one: each must be used
        used = p.grad.ne(0).any(1).all() if name.endswith("bias_table") else p.grad.ne(0).any()
        assert used, name


def test_initial_weights_and_drop_path():
    model = create_tracker("dualtfr")
    assert model.backbone.stages[2].blocks[5].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.cabs[0].attn.kv.weight.std().item() == pytest.approx((2 / (384 + 768)) ** 0.5, rel=0.05)
    assert model.cabs[3].mlp.fc1.bias.eq(0).all()
    rates = [b.drop_path.drop_prob for stage in model.backbone.stages for b in stage.blocks]
    assert rates == pytest.approx([0.2 * i / 9 for i in range(10)])
    with pytest.raises(ValueError, match=r"CNN.*LAB or GAB"):
        create_tracker("dualtfr", blocks=("LAB", "LAB", "CNN"))


# Swin and timm -------------------------------------------------------------------------------------------


def swin(**kwargs):
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **kwargs).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias_table"):
            torch.nn.init.normal_(p)
    return model


def as_swins_authors(weights):
    """timm's names back to those of Swin's own release, where a stage ends with the patch merging."""
    return {
        name.replace(f"layers.{s + 1}.downsample", f"layers.{s}.downsample"): tensor
        for name, tensor in weights.items() for s in [int(name.split(".")[1]) - 1 if "downsample" in name else 0]
    } | {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.long)}


@pytest.mark.parametrize("form", [dict, as_swins_authors])
def test_local_stages_are_swins(form):
    theirs = swin()
    ours = timm.create_model("dualtfr", blocks=("LAB", "LAB", "LAB"), num_classes=5).eval()
    left = load_backbone(ours, form(theirs.state_dict()))
    assert left == ["norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"]
    x = y = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        x, y = theirs.patch_embed(x), ours.patch_embed(y)
        for s in range(3):
            x, y = theirs.layers[s](x), ours.stages[s](y)
            torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)


def test_swins_weights_in_global_blocks():
    theirs, ours = swin(), timm.create_model("dualtfr", num_classes=5).eval()
    assert load_backbone(ours, theirs.state_dict()) == ["norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"]
    x = torch.randn(1, 3, 224, 224)
    features = timm.create_model("swin_tiny_patch4_window7_224", features_only=True).eval()
    features.load_state_dict({
        name.replace("layers.", "layers_"): tensor for name, tensor in theirs.state_dict().items()
        if not name.startswith(("norm", "head"))
    })
    pyramid = timm.create_model("dualtfr", features_only=True).eval()
    weights = {name.replace("stages.", "stages_"): tensor for name, tensor in ours.state_dict().items()}
    pyramid.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for mine, swins in zip(pyramid(x)[:2], features(x)[:2], strict=True):
            torch.testing.assert_close(mine, swins, rtol=1e-4, atol=1e-4)
        # on one window's worth of tokens, a global block is Swin's block of the same weights
        small = torch.randn(1, 7, 7, 384)
        block = copy.deepcopy(theirs.layers[2].blocks[1])
        block.set_input_size((7, 7), (7, 7))
        torch.testing.assert_close(ours.stages[2].blocks[1](small), block(small), rtol=1e-4, atol=1e-4)


def test_widening_a_table_keeps_what_it_knew():
    table = torch.randn(13 * 13, 3)
    wide = widen(table, 27 * 27).view(27, 27, 3)
    assert torch.equal(wide[7:20, 7:20], table.view(13, 13, 3))
    assert (wide[:8, 13] == wide[7, 13]).all() and (wide[-7:, :8] == wide[19, 7]).all()
    assert torch.equal(widen(wide.reshape(-1, 3), 13 * 13), table)


def test_weights_that_do_not_fit_are_one_error():
    with pytest.raises(UserError, match=r"patch_embed.norm.weight \[16\], expected \[96\]"):
        load_backbone(timm.create_model("dualtfr"), timm.create_model("dualtfr_micro").state_dict())
    with pytest.raises(UserError, match="names such as conv1"):
        load_backbone(timm.create_model("dualtfr"), {"conv1.weight": torch.zeros(3)})


def test_a_trackers_branch_starts_from_the_classifiers():
    classifier, model = timm.create_model("dualtfr_micro", num_classes=5), create_tracker("dualtfr_micro")
    assert load_backbone(model.backbone, classifier.state_dict()) == []
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(
        model.backbone.forward_features(x), classifier.forward_features(x), rtol=0, atol=0
    )
    other = create_tracker("dualtfr_micro")
    load_backbone(other.backbone, model.state_dict())
    torch.testing.assert_close(other.encode(x), model.encode(x), rtol=0, atol=0)


def test_timm():
    x = torch.randn(2, 3, 48, 32)
    model = timm.create_model("dualtfr_micro", num_classes=5).eval()
    features = model.forward_features(x)
    assert features.shape == (2, 6, 4, 64) and model.forward_head(features, pre_logits=True).shape == (2, 64)
    torch.testing.assert_close(model.forward_head(features), model(x))
    model.reset_classifier(7, "max")
    assert model(x).shape == (2, 7) and model.get_classifier().out_features == 7
    assert timm.create_model("dualtfr_micro", in_chans=1, num_classes=0).eval()(x[:, :1]).shape == (2, 64)

    pyramid = timm.create_model("dualtfr_micro", features_only=True).eval()
    pyramid.load_state_dict({k.replace("stages.", "stages_"): v for k, v in model.state_dict().items()}, strict=False)
    maps = pyramid(x)
    assert [tuple(m.shape) for m in maps] == [(2, 24, 16, 16), (2, 12, 8, 32), (2, 6, 4, 64)]
    assert pyramid.feature_info.reduction() == [2, 4, 8]
    torch.testing.assert_close(model.norm(maps[2]), features)

    groups = param_groups_layer_decay(timm.create_model("dualtfr_micro"), layer_decay=0.5)
    assert len({group["lr_scale"] for group in groups}) == 1 + 6 + 1


def test_gradient_checkpointing_changes_nothing():
    images, grads = crops(1), []
    for enable in (False, True):
        torch.manual_seed(0)
        model = micro()
        model.set_grad_checkpointing(enable)
        model.train()(*images).boxes.square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*grads)


@pytest.mark.slow
def test_export():
    model = micro().float()
    z, x = (image.float() for image in crops(3))
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (z[:2], x[:2]), dynamic_shapes=(batch, batch))
    torch.testing.assert_close(tuple(program.module()(z, x)), tuple(model(z, x)))


def test_the_branch_is_a_backbone_by_itself():
    assert isinstance(timm.create_model("dualtfr_micro"), DualTFRBackbone)
    assert timm.get_pretrained_cfg("dualtfr").input_size == (3, 224, 224)
