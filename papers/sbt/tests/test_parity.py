"""SBT against numbers recorded from the authors' code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.data import crops as crops_module
from common.metrics.trackers import hann_window, keep_inside
from common.run import UserError, World
from common.tests import parity
from papers.sbt import load_official
from papers.sbt.evaluate import build, convert_weights, make_tracker, official
from papers.sbt.loss import assign, terms, total, totals
from papers.sbt.model import Prediction, checkpoint_filter_fn
from papers.sbt.recipes import RECIPES
from papers.sbt.tracker import SBTTracker, best_token

FIXTURES = Path(__file__).parent / "fixtures"
VARIANTS = ["base", "large", "base_mlp_head"]


@pytest.fixture(autouse=True, scope="module")
def _stream():
    parity.check_stream()


def read(name):
    return json.loads((FIXTURES / f"{name}.json").read_text())


def arrays(name):
    with np.load(FIXTURES / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def network(variant):
    about = read(f"params_{variant}")
    return load_official(variant, parity.state_dict(about), **about["config"])


def crops(about):
    sizes = {"search": about["search_size"], "template": about["template_size"]}
    shapes = {key: (about["batch"], 3, size, size) for key, size in sizes.items()}
    return {key: parity.probe(name, shapes[key]) for key, name in about["probes"].items()}


def summary(tokens_BNC):
    """What the fixtures record of a tensor: mean, population std, largest magnitude, 16 evenly spread values."""
    flat = tokens_BNC.detach().double().contiguous().flatten()
    values = flat[torch.arange(16) * (len(flat) - 1) // 15].numpy()
    return {"mean": flat.mean(), "std": flat.std(correction=0), "absmax": flat.abs().max(), "values": values}


def watch(model):
    """Collects every layer's tokens by the fixture's name of the layer and the number of tokens."""
    seen = {}

    def collect(name, module):
        def keep(_module, _inputs, out):
            tokens = out.flatten(1, 2)
            seen[name, tokens.shape[1]] = tokens

        module.register_forward_hook(keep)

    for s, stage in enumerate(model.backbone.stages, 1):
        collect(f"patch_embed{s}", stage.patch_embed)
        collect(f"norm{s}", stage.norm)
        for i, block in enumerate(stage.blocks):
            collect(f"block{s}.{i}", block)
    return seen


def check_layers(about, seen):
    for row in about["intermediates"]:
        tokens = seen[row["name"].split(".search")[0].split(".template")[0], row["shape"][1]]
        assert tokens.shape == tuple(row["shape"])
        for key, value in summary(tokens).items():
            parity.assert_close(np.asarray(value), np.asarray(row[key]), f"{about['case']} {row['name']} {key}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_network(variant):
    about, theirs = read(f"forward_{variant}"), arrays(f"forward_{variant}")
    model, inputs = network(variant), crops(about)
    with torch.no_grad():
        out = model(**inputs)
        seen = watch(model)
        z, x = (model.backbone.encode(inputs[key]) for key in ("template", "search"))
        _, features = model.backbone.correlate(z, x, both=True)  # the authors' code computes the last template tokens
    check_layers(about, seen)
    sample = features.flatten(1, 2)[:, theirs["feat_rows"], ::4]
    parity.assert_close(sample, theirs["feat_sample"], f"{variant} features")
    parity.assert_close(out.logits, theirs["logits"], f"{variant} logits")
    parity.assert_close(out.boxes, theirs["boxes"], f"{variant} boxes")


def test_backbone_at_another_size():
    about, theirs = read("forward_base_features_320"), arrays("forward_base_features_320")
    backbone, inputs = network("base").backbone, crops(about)
    with torch.no_grad():
        features = backbone.correlate(backbone.encode(inputs["template"]), backbone.encode(inputs["search"]))
    (row,) = about["intermediates"]
    for key, value in summary(features.flatten(1, 2)).items():
        parity.assert_close(np.asarray(value), np.asarray(row[key]), key)
    parity.assert_close(features.flatten(1, 2)[:, theirs["feat_rows"], ::4], theirs["feat_sample"], "features")


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters(variant):
    about = read(f"params_{variant}")
    model = network(variant)
    counts = [sum(p.numel() for p in part.parameters()) for part in (model, model.backbone, model.head)]
    assert counts == [about["total_parameters"], about["backbone_parameters"], about["head_parameters"]]
    stages = [sum(p.numel() for p in stage.parameters()) for stage in model.backbone.stages]
    assert stages == about["stage_parameters"]
    names = [name for name, *_ in about["tensors"]]
    assert set(checkpoint_filter_fn(dict.fromkeys(names))) == set(model.state_dict())
    assert len(names) == len(model.state_dict())


LOSSES = read("losses")


@pytest.mark.parametrize("case", LOSSES["cases"], ids=lambda case: case["case"])
def test_losses(case):
    grid, boxes = LOSSES["grid"], torch.tensor(case["boxes_xywh"])
    positives = assign(boxes, grid, authors_errors=True)
    for cells, expected in zip(positives.view(-1, grid, grid), case["positives"], strict=True):
        assert cells.sum() == expected["count"]
        for axis, key in ((0, "cols"), (1, "rows")):
            if key in expected:
                found = cells.any(axis).nonzero()
                assert [found.min(), found.max()] == expected[key]
    logits, raw = (
        parity.probe(case["probes"][key], (case["batch"], grid * grid, n)).requires_grad_()
        for key, n in (("logits", 2), ("boxes_before_sigmoid", 4))
    )
    out = terms(Prediction(logits, raw.sigmoid()), boxes, positives, totals(positives))
    whole = total(out)
    whole.backward()
    theirs = [case[key] for key in ("loss_ce", "loss_bbox", "loss_giou", "mean_iou", "total")]
    ours = torch.stack([*out, whole])
    np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-4, atol=1e-9)
    for key, tensor in (("logits", logits), ("boxes_before_sigmoid", raw)):
        assert tensor.grad.norm().item() == pytest.approx(case["grad_l2"][key], rel=1e-4)


TRACK = read("tracker_a")


def test_tracker_step_by_step():
    frames, model = arrays("tracker_a_frames")["frames"], network(TRACK["model"])
    tracker = SBTTracker(model, RECIPES["authors_base"])
    tracker.init(frames[0], TRACK["init_xywh"])
    seen = []
    step = tracker.step
    tracker.step = lambda *inputs: seen.append(step(*inputs)) or seen[-1]
    for frame, theirs in zip(frames[1:], TRACK["steps"], strict=True):
        np.testing.assert_allclose(tracker.box, theirs["state_before_xywh"], atol=1e-3)
        tracker.box = theirs["state_before_xywh"]
        box, _ = tracker.track(frame)
        *cxcywh, _, penalised, cell = seen[-1].tolist()
        assert cell == theirs["best_cell"]
        assert penalised == pytest.approx(theirs["best_penalised_score"], abs=1e-4)
        np.testing.assert_allclose(cxcywh, theirs["predicted_cxcywh_in_crop"], atol=1e-4)
        np.testing.assert_allclose(box, theirs["state_after_xywh"], atol=2e-2)


@pytest.mark.parametrize("case", TRACK["postprocess_only"], ids=lambda case: case["probes"]["logits"][-1])
def test_postprocessing(case):
    logits, raw = (
        parity.probe(case["probes"][key], (1, 1024, n))[0] for key, n in (("logits", 2), ("boxes_before_sigmoid", 4))
    )
    cx, cy, w, h, score, penalised, cell = best_token(logits, raw.sigmoid(), hann_window(32), 0.49).tolist()
    assert cell == case["best_cell"]
    assert [score, penalised] == pytest.approx([case["best_score_raw"], case["best_penalised_score"]], abs=1e-5)
    x, y, box_w, box_h = case["state_before_xywh"]
    reach = 128 / case["resize_factor"]
    crop = crops_module.Crop(x + box_w / 2 - reach, y + box_h / 2 - reach, 1, case["resize_factor"])
    box = crop.to_frame(np.array([cx - w / 2, cy - h / 2, w, h]) * 256)
    np.testing.assert_allclose(box, case["box_before_clip_xywh"], atol=1e-3)
    clipped = keep_inside(box, case["image_width"], case["image_height"])
    np.testing.assert_allclose(clipped, case["state_after_xywh"], atol=1e-3)


def test_load_official_lists_every_wrong_tensor():
    weights = parity.state_dict(read("params_base"))
    weights["backbone.norm3.bias"] = weights["backbone.norm3.bias"][:10]
    weights["stray"] = weights.pop("box_head.bbox_head.layers_channle.1.bias")
    with pytest.raises(RuntimeError) as error:
        load_official("base", weights)
    assert all(word in str(error.value) for word in ("backbone.stages.2.norm.bias", "stray", "head.box.channel.1.bias"))
    with pytest.raises(UserError, match="light, small, base"):
        load_official("medium", weights)


def test_the_authors_weights_need_a_recipe_that_errs_as_they_do():
    weights = parity.state_dict(read("params_base"))
    with pytest.raises(UserError, match="authors_base"):
        convert_weights(weights, build(RECIPES["full"]))
    network = build(RECIPES["authors_base"])
    network.load_state_dict(convert_weights(weights, network))
    assert official(weights) and not official(network.state_dict())  # whose scores may be called comparable
    tracker = make_tracker(network, RECIPES["authors_base"], World(0, 1, torch.device("cpu"), None))
    assert tracker.recipe.authors_errors
