"""SBT's mathematics, and what timm and torch.compile ask of it."""

import copy
import dataclasses
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from common import run
from papers.sbt import bench
from papers.sbt.cases import PARAMS
from papers.sbt.correlation import CorrelationNet, Siamese
from papers.sbt.loss import BACKGROUND_WEIGHT, assign, terms, total, totals
from papers.sbt.model import (
    VARIANTS,
    Attention,
    EoCBlock,
    Prediction,
    SBTBackbone,
    checkpoint_filter_fn,
    create_tracker,
    first_three,
)
from papers.sbt.official import init_weights, load_backbone
from papers.sbt.tracker import SBTTracker

GMACS = {"sbt_base": 20.7, "sbt_large": 34.1, "sbt_huge": 50.6}  # 256 and 128 pixels, counted on the authors' code


@pytest.fixture
def crops():
    torch.manual_seed(0)
    return torch.randn(2, 3, 64, 64), torch.randn(2, 3, 128, 128)


@pytest.fixture
def micro():
    """A tracker whose every tensor matters: random norms and biases too."""
    return lively(create_tracker("sbt_micro", search_size=128))


def lively(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("name", GMACS)
def test_cost(name):
    """A little less than the authors' code, which computes what is then dropped of the template in the last block."""
    with torch.device("meta"):
        model = create_tracker(name)
        crops = torch.empty(1, 3, 128, 128), torch.empty(1, 3, 256, 256)
    ours = run.multiply_adds(model, *crops) / 1e9
    assert 0.96 * GMACS[name] < ours < GMACS[name] + 0.05
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name][0]


@pytest.mark.parametrize("sr_ratio, cross", [(1, False), (2, False), (2, True)])
def test_attention_equals_a_loop_over_heads(sr_ratio, cross):
    torch.manual_seed(0)
    attention = Attention(12, 3, sr_ratio, qkv_bias=True).double()
    query, source = torch.randn(2, 4, 6, 12).double(), torch.randn(2, 2, 8, 12).double()
    source = source if cross else query
    ours = attention(query, source)
    reduced = source
    if sr_ratio > 1:
        reduced = attention.norm(F.conv2d(source.permute(0, 3, 1, 2), attention.sr.weight, attention.sr.bias, sr_ratio)
                                 .permute(0, 2, 3, 1))
    keys, values = attention.kv(reduced.flatten(1, 2)).chunk(2, dim=-1)
    queries, heads = attention.q(query.flatten(1, 2)), []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        weights = (queries[..., part] @ keys[..., part].mT / 2).softmax(-1)
        heads.append(weights @ values[..., part])
    torch.testing.assert_close(ours, attention.proj(torch.cat(heads, -1)).view_as(query))


def test_both_directions_of_a_cross_block_see_the_maps_before_it(micro, crops):
    backbone = SBTBackbone(
        **first_three("sbt_micro") | {"num_classes": 0, "depths": (1, 1, 1), "cross_blocks": ((), (), (1,))}
    ).eval()
    z, x = backbone.encode(crops[0]), backbone.encode(crops[1])
    block, norm = backbone.stages[2].blocks[0], backbone.stages[2].norm
    both = backbone.correlate(z, x, both=True)
    torch.testing.assert_close(both[0], norm(block(z, x)))
    torch.testing.assert_close(both[1], norm(block(x, z)))


def test_a_template_encoded_once_changes_nothing(micro, crops):
    template, search = crops
    with torch.no_grad():
        z = micro.encode(template)
        whole, cached = micro(template, search), micro.predict(z, search)
        theirs = bench.authors(erring := with_errors(micro), template, search)
        ours = erring(template, search)
    for a, b in zip(whole, cached):
        assert torch.equal(a, b)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_whole_frames_of_the_benchmark_gives_the_trackers_box(micro):
    model = with_errors(micro)
    frame = np.random.default_rng(0).integers(0, 256, (*bench.FRAME, 3), dtype=np.uint8)
    recipe = dataclasses.replace(bench.RECIPE, template_px=64, search_px=128)
    tracker, timed = (SBTTracker(model, recipe) for _ in range(2))
    tracker.init(frame, bench.BOX)
    template = tracker.crop(frame, bench.BOX, 2.0, 64)[1]
    expected = tracker.track(frame)[0]
    way = bench.Way(partial(bench.authors, model), template, torch.zeros(1, 3, 128, 128))
    for z in (template, template.flip(-1)):
        track = bench.frame_of(way._replace(z=z), timed, frame)
        for _ in range(2):  # the second frame starts where the first did
            assert np.allclose(track(), expected, atol=1e-3) == (z is template)


def with_errors(model):
    same = create_tracker("sbt_micro", search_size=128, authors_errors=True)
    same.load_state_dict(model.state_dict())
    return same.eval()


def test_the_authors_leave_the_inner_norms_out(micro, crops):
    theirs = with_errors(micro)
    with torch.no_grad():
        assert not torch.allclose(micro(*crops).logits, theirs(*crops).logits, atol=1e-3)
        for stage in theirs.backbone.stages[:2]:
            stage.norm.weight.fill_(torch.nan)
        assert theirs(*crops).logits.isfinite().all()


@pytest.mark.parametrize("cross", [((), (), ()), ((1,), (), (2,)), ((), (1,), ()), ((), (), (1, 2, 3, 4))])
def test_cross_blocks_anywhere(crops, cross):
    """The shortcut through `encode` gives what computing all of both images, layer by layer, gives."""
    backbone = lively(SBTBackbone(**first_three("sbt_micro") | {"num_classes": 0, "cross_blocks": cross}))
    z, x = (image.permute(0, 2, 3, 1) for image in crops)
    with torch.no_grad():
        for layer in backbone.layers():
            if isinstance(layer, EoCBlock) and layer.cross:
                z, x = layer(z, x), layer(x, z)
            else:
                z, x = layer(z), layer(x)
        ours = backbone.correlate(backbone.encode(crops[0]), backbone.encode(crops[1]))
        torch.testing.assert_close(ours, x)
        both = backbone.correlate(backbone.encode(crops[0]), backbone.encode(crops[1]), both=True)
    torch.testing.assert_close(both, (z, x))


def test_the_template_reaches_the_search_tokens_through_cross_blocks_alone(crops):
    template, search = crops
    for cross, reached in (((), False), ((3,), True)):
        model = lively(create_tracker("sbt_micro", search_size=128, cross_blocks=((), (), cross)))
        with torch.no_grad():
            same = torch.allclose(model(template, search).logits, model(template.flip(-1), search).logits, atol=1e-4)
        assert same != reached


def test_single_image_equals_pvt_v2():
    """With PVTv2's strides the single-image path is PVTv2, under its ImageNet weights' names in timm."""
    torch.manual_seed(0)
    pvt = timm.create_model("pvt_v2_b1", num_classes=10).eval()
    lively(pvt)
    ours = timm.create_model("sbt_light", strides=(4, 2, 2, 2), num_classes=10).eval()
    assert load_backbone(ours, pvt.state_dict()) == ["head.fc.weight", "head.fc.bias"]
    ours.head.fc.load_state_dict(pvt.head.state_dict())
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), pvt(x), rtol=1e-4, atol=1e-5)


def test_weights_for_a_tracker(tmp_path, micro, crops):
    classifier = lively(timm.create_model("sbt_micro", num_classes=10))
    assert load_backbone(micro.backbone, classifier.state_dict()) == []
    with torch.no_grad():
        for stage, same in zip(micro.backbone.stages, classifier.stages):
            torch.testing.assert_close(stage.state_dict(), same.state_dict())
        image = crops[1]
        torch.testing.assert_close(micro.backbone.forward_features(image), classifier.stages[:3](image))
    run.save_weights(tmp_path / "w.safetensors", classifier.state_dict())
    assert init_weights(str(tmp_path / "w.safetensors"), "sbt_micro").keys() == classifier.state_dict().keys()
    # the authors' base takes the first 10 of B3's 18 blocks
    with torch.device("meta"):
        pvt, base = timm.create_model("pvt_v2_b3"), create_tracker("sbt_base").backbone
    own = {name: torch.zeros_like(t) for name, t in pvt.state_dict().items()}
    assert load_backbone(base, own) == []
    with pytest.raises(run.UserError, match=r"stages.0.patch_embed.proj.weight \[64, 3, 7, 7\], expected \[32"):
        load_backbone(micro.backbone, own)
    with pytest.raises(run.UserError, match="do not fit the backbone: it has names such as a"):
        load_backbone(micro.backbone, {"a": torch.zeros(1)})
    with pytest.raises(run.UserError, match="no checkpoint at"):
        init_weights("resnet_of_mine", "sbt_base")


def test_a_backbone_of_another_pipeline_takes_its_own_weights():
    """Of timm's network, and of the same one in a correlation tracker."""
    weights = timm.create_model("resnet10t").state_dict()
    for given in (weights, {f"backbone.body.{name}": tensor for name, tensor in weights.items()}):
        siamese = Siamese("resnet10t")
        assert load_backbone(siamese, given) == []
        torch.testing.assert_close(siamese.body.conv1[0].weight, weights["conv1.0.weight"])


@pytest.mark.parametrize("variant, pvt", [("light", "b1"), ("small", "b2"), ("base", "b3"), ("large", "b3")])
def test_a_tracker_starts_from_the_pvt_that_fits_it(monkeypatch, variant, pvt):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name))
    with torch.device("meta"):
        weights, expected = init_weights("pvt_v2", f"sbt_{variant}"), create(f"pvt_v2_{pvt}").state_dict()
        own = create_tracker(f"sbt_{variant}").backbone
    assert {name: t.shape for name, t in weights.items()} == {name: t.shape for name, t in expected.items()}
    assert load_backbone(own, weights) == []


def test_a_tracker_file_keeps_its_names(micro):
    assert checkpoint_filter_fn(micro.state_dict(), micro).keys() == micro.state_dict().keys()


def test_features_only():
    model = timm.create_model("sbt_micro", features_only=True)
    x = torch.randn(1, 3, 64, 96)
    assert [f.shape[1] for f in model(x)] == model.feature_info.channels() == [32, 48, 64, 96]
    assert model.feature_info.reduction() == [4, 8, 8, 16]
    assert [tuple(f.shape[2:]) for f in model(x)] == [(16, 24), (8, 12), (8, 12), (4, 6)]


def test_timm_interface(tmp_path):
    model = timm.create_model("sbt_micro", num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, 96)
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in model.named_parameters())
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.get_classifier().out_features == 7
    assert set(VARIANTS) <= set(timm.list_models("sbt*"))


@pytest.mark.slow
def test_compiled_prediction_equals_eager(micro, crops):
    with torch.no_grad():
        z = micro.encode(crops[0])
        compiled = torch.compile(micro.predict, fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(z, crops[1]), micro.predict(z, crops[1]), rtol=1e-4, atol=1e-4)


def test_bad_shapes_are_said():
    with pytest.raises(ValueError, match="search_size 100 is not a multiple of the stride 8"):
        create_tracker("sbt_micro", search_size=100)
    with pytest.raises(ValueError, match="block numbers 1 to 4"):
        create_tracker("sbt_micro", cross_blocks=((), (), (5,)))
    with pytest.raises(ValueError, match="expected 'mixer' or 'mlp'"):
        create_tracker("sbt_micro", head="conv")
    model = create_tracker("sbt_micro", search_size=128)
    with pytest.raises(ValueError, match="built for 256 search tokens, not 64"):
        model(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))
    mlp = create_tracker("sbt_micro", search_size=128, head="mlp")  # has no such number
    assert mlp(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)).logits.shape == (1, 64, 2)


# Correlation tracker -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", [
    lambda: SBTBackbone(num_classes=0, **first_three("sbt_micro")), lambda: Siamese("resnet10t"),
], ids=["sbt", "resnet10t"])
def test_correlation_tracker(backbone, crops):
    net = CorrelationNet(backbone(), search_size=128).eval()
    with torch.no_grad():
        out = net(*crops)
        again = net.predict(net.encode(crops[0]), crops[1])
    assert out.logits.shape == (2, 256, 2) and out.boxes.shape == (2, 256, 4) and (out.boxes[..., 2:] > 0).all()
    assert torch.equal(out.boxes, again.boxes)
    loss = total(_terms(net(*crops), torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.5, 0.1, 0.3, 0.4]]), 16))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.head.parameters())


def test_correlation_finds_the_template_where_it_is():
    """With an untrained backbone's features the raw correlation already peaks where the same patch lies."""
    torch.manual_seed(0)
    net = CorrelationNet(Siamese("resnet10t"), search_size=128).eval()
    net.head.x.load_state_dict(net.head.z.state_dict())
    search = torch.randn(1, 3, 128, 128)
    template = search[..., 40:104, 24:88].clone()  # its middle is at (56, 72): column 7, row 9 of 16
    seen = {}
    net.head.cls[0].register_forward_hook(lambda _m, inputs, _o: seen.update(y=inputs[0]))
    with torch.no_grad():
        net(template, search)
    peak = seen["y"].sum(1)[0].argmax().item()
    assert abs(peak // 16 - 9) <= 1 and abs(peak % 16 - 7) <= 1


def test_a_timm_backbone_without_a_map_of_the_stride_is_refused():
    with pytest.raises(ValueError, match="none of 3"):
        Siamese("resnet10t", reduction=3)


# Loss ----------------------------------------------------------------------------------------------------


def _terms(prediction, boxes, grid):
    positives = assign(boxes, grid)
    return terms(prediction, boxes, positives, totals(positives))


@pytest.mark.parametrize("box, columns, rows", [
    ((0.25, 0.5, 0.25, 0.25), (2, 3), (4, 5)),
    ((-0.2, 0.3, 0.4, 0.2), (0, 1), (3, 3)),  # sticks out on the left
    ((0.8, -0.5, 0.9, 0.7), (7, 7), (0, 1)),  # on the right and at the top
    ((0.3, 0.3, 0.01, 0.01), (3, 3), (3, 3)),  # too small to cover a token's corner
    ((0.99, 0.2, 0.005, 0.2), (7, 7), (2, 3)),
])
def test_assignment(box, columns, rows):
    cells = assign(torch.tensor([box]), 8).view(8, 8)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1] = True
    assert torch.equal(cells, expected)


def test_a_box_outside_the_crop_has_no_positives():
    boxes = torch.tensor([[1.1, 0.2, 0.3, 0.3], [-0.5, 0.2, 0.3, 0.3], [0.2, -0.4, 0.3, 0.4]])
    assert not assign(boxes, 8).any()
    prediction = Prediction(torch.zeros(3, 64, 2), torch.full((3, 64, 4), 0.5))
    assert _terms(prediction, boxes, 8).l1 == 0


def test_the_authors_assignment_counts_negative_starts_from_the_far_end():
    left = torch.tensor([[-0.2, 0.3, 0.4, 0.2]])
    assert not assign(left, 8, authors_errors=True).any() and assign(left, 8).sum() == 2
    outside = torch.tensor([[-0.5, 0.25, 0.3, 0.25]])  # from column -4 up to -1
    cells = assign(outside, 8, authors_errors=True).view(8, 8)
    assert cells.any(0).nonzero().flatten().tolist() == [4, 5, 6]


def test_terms_by_hand():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    boxes = torch.tensor([[[0.25, 0.25, 0.5, 0.5], *[[0.5, 0.5, 0.5, 0.5]] * 3]])
    truth = torch.tensor([[0.0, 0.0, 0.5, 0.25]])  # covers the first of 2 x 2 tokens
    out = _terms(Prediction(logits, boxes), truth, 2)
    ce = torch.nn.functional.softplus(torch.tensor([-2.0, 0.0, -1.0, 0.0]))
    weights = torch.tensor([1.0, *[BACKGROUND_WEIGHT] * 3])
    assert out.ce.item() == pytest.approx(((ce * weights).sum() / weights.sum()).item(), rel=1e-5)
    assert out.l1.item() == pytest.approx(0.125 + 0.25) and out.iou.item() == pytest.approx(0.5)
    assert out.giou.item() == pytest.approx(0.5, abs=1e-5)


def test_parts_of_a_batch_add_up_to_it():
    torch.manual_seed(0)
    boxes = torch.rand(4, 4) * 0.4 + 0.1
    prediction = Prediction(torch.randn(4, 64, 2), torch.rand(4, 64, 4))
    whole, positives = _terms(prediction, boxes, 8), assign(boxes, 8)
    parts = [
        torch.stack(terms(Prediction(*(t[i:j] for t in prediction)), boxes[i:j], positives[i:j], totals(positives)))
        for i, j in ((0, 1), (1, 4))
    ]
    torch.testing.assert_close(sum(parts), torch.stack(whole))


def test_bf16_weights_predict_alike(micro, crops):
    half = copy.deepcopy(micro).bfloat16()
    with torch.no_grad():
        ours, theirs = half(*(c.bfloat16() for c in crops)), micro(*crops)
    assert ours.boxes.dtype == torch.float32 and (ours.boxes - theirs.boxes).abs().max() < 0.02
    assert (ours.boxes != ours.boxes.bfloat16()).any()  # finer than bfloat16 can say
