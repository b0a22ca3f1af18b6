"""What papers share of detection and segmentation. Most is skipped where mmengine is not installed (tools/mm.sh)."""

import json

import pytest
import torch

from common import run
from common.run import mm, mm_ops

CONFIG = """
data_root = "data/coco/"
pictures = 2
model = dict(backbone=dict(checkpoint=""), head=dict(checkpoint=""))
_data = dict(ann_file="data/coco/annotations.json", prefix=["data/coco", "data/coconut"], root="data/coco/")
train_dataloader = dict(dataset=_data)
val_dataloader = test_dataloader = dict(dataset=_data)
val_evaluator = test_evaluator = dict(ann_file="data/coco/annotations.json")
"""


@pytest.fixture
def load(tmp_path):
    """load(text of a configuration, **arguments): as the command line does it."""
    pytest.importorskip("mmengine", reason="detection and segmentation are not installed: tools/mm.sh")
    boxes = [dict(id=i, image_id=i, iscrowd=int(i == 2)) for i in (1, 2, 3, 5)]
    truth = dict(images=[dict(id=i) for i in range(6)], annotations=boxes, categories=["cat"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data/annotations.json").write_text(json.dumps(truth))

    def load(text=CONFIG, name="here", **arguments):
        (tmp_path / "here.py").write_text(text)
        arguments = mm.Arguments(name, **{"data": tmp_path / "data"} | arguments)
        return mm.load(arguments, tmp_path / "run", tmp_path, "model.backbone.checkpoint")

    return load


def test_paths_settings_and_weights_go_where_they_belong(load, tmp_path):
    config = load(CONFIG, checkpoint="w", seed=3, change=["model.head.width=8", "optimizer.betas=(0.9,0.95)"])
    data = str((tmp_path / "data").resolve())
    assert config.train_dataloader.dataset.prefix == [data, "data/coconut"]
    assert config.train_dataloader.dataset.root == config.data_root == f"{data}/"
    assert config.model.to_dict() == {"backbone": {"checkpoint": "w"}, "head": {"checkpoint": "", "width": 8}}
    assert config.optimizer.betas == (0.9, 0.95) and config.randomness == {"seed": 3} and not config.resume
    both = load(CONFIG + 'checkpoint_in = ["model.backbone.checkpoint", "model.head.checkpoint"]', checkpoint="w")
    assert both.model.to_dict() == {"backbone": {"checkpoint": "w"}, "head": {"checkpoint": "w"}}


def test_the_first_pictures_with_boxes_are_trained_and_tested_on(load):
    config = load()
    used = {part.dataset.ann_file for part in (config.train_dataloader, config.val_dataloader, config.test_dataloader)}
    used |= {config.val_evaluator.ann_file, config.test_evaluator.ann_file}
    (path,) = used
    with open(path) as file:
        part = json.load(file)
    assert [i["id"] for i in part["images"]] == [b["id"] for b in part["annotations"]] == [1, 3]  # 2 shows a crowd
    assert part["categories"] == ["cat"]


def test_mistakes_are_one_line(load, tmp_path):
    with pytest.raises(run.UserError, match="no configuration 'yolo'; there are here"):
        load(name="yolo")
    with pytest.raises(run.UserError, match="no data folder"):
        load(data=tmp_path / "gone")
    with pytest.raises(run.UserError, match="--change takes setting=value, got 'lr'"):
        load(change=["lr"])
    (tmp_path / "data/annotations.json").unlink()
    with pytest.raises(run.UserError, match=r"annotations\.json: expected COCO's annotations/"):
        load()


def test_scores_are_percentages():
    coco = mm.metrics({"coco/bbox_mAP": 0.25, "coco/bbox_mAP_50": 0.5, "coco/bbox_mAP_s": 0.1, "mIoU": 31.0})
    assert {m["name"]: m["value"] for m in coco} == {"bbox_mAP": 25.0, "bbox_mAP_50": 50.0, "mIoU": 31.0}
    voc = mm.metrics({f"pascal_voc/{name}": 0.5 for name in ("mAP", "AP50", "AP55", "AP75", "AP95")})
    assert {m["name"]: m["value"] for m in voc} == {"mAP": 50.0, "AP50": 50.0, "AP75": 50.0}


class Opens:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_checkpoint_with_code_is_refused_before_the_runner_sees_it(load, tmp_path, elsewhere):
    folder, made = tmp_path / "run", tmp_path / "made"
    folder.mkdir()
    torch.save({"state_dict": {}, "meta": Opens(made)}, folder / "iter_1.pth")
    (folder / "last_checkpoint").write_text(f"{'/nowhere' if elsewhere else folder}/iter_1.pth")
    with pytest.raises(run.UserError, match=r"iter_1\.pth is refused: reading it could run \S*open"):
        load(resume=str(folder))
    (folder / "iter_1.pth").rename(tmp_path / "iter_1.pth")
    (folder / "last_checkpoint").write_text(str(tmp_path / "iter_1.pth"))  # outside the folder
    with pytest.raises(run.UserError, match="no checkpoint at"):
        load(resume=str(folder))
    assert not made.exists()
    torch.load(tmp_path / "iter_1.pth", weights_only=False).keys()
    assert made.exists()  # as mmengine would have it


def test_a_resumed_run_goes_on_from_the_checkpoint_in_its_folder(load, tmp_path):
    folder = tmp_path / "run"
    assert (fresh := load(resume="auto")).load_from is None and not fresh.resume
    torch.save({"state_dict": {"w": torch.zeros(1)}, "meta": {"iter": 2}}, folder / "iter_2.pth")
    (folder / "last_checkpoint").write_text("/where/the/run/was/iter_2.pth")
    config = load(resume=str(folder))
    assert config.load_from == str(folder / "iter_2.pth") and config.resume


def test_a_detector_that_finds_nothing_scores_0():
    both = mm.metrics(mm.nothing_found({"type": "CocoMetric", "metric": ["bbox", "segm"]}))
    assert [(m["name"], m["value"]) for m in both] == [
        (f"{kind}_mAP{at}", 0.0) for kind in ("bbox", "segm") for at in ("", "_50", "_75")
    ]
    assert len(mm.nothing_found([{"metric": "bbox"}])) == 3


# What mmcv's compiled operators gave for the inputs below.
STAYS = {
    0: [35, 29, 23, 17, 11, 5, 34, 28, 22, 10, 4, 39, 33, 27, 15, 9, 3, 20, 2, 19, 13, 7, 18, 12, 0],
    1: [35, 29, 23, 17, 11, 5, 34, 28, 22, 10, 4, 33, 27, 15, 3, 20, 19, 13, 7, 30, 18, 12, 0],
}
ALIGNED = {  # (aligned, samples): the first channel's outputs, and every 97th gradient
    (True, 0): ([
        0.432665, 0.5333198, 0.529331, 0.4579896, 0.4038298, 0.5546555, 0.38407, 0.5164599, 0.4490592, 0.2883281,
        0.3729901, 0.3581226, 0.0247056, 0.0499363, 0.0751667, 0.0368493, 0.0610382, 0.0852271, 0.532621, 0.5539564,
        0.0, 0.0562821, 0.0723279, 0.0,
    ], [
        0.0, 0.0181383, 0.004965, 0.0494694, 0.0185957, 0.0505063, 0.0178164, 0.0, 0.0, 0.0,
        0.0249086, 0.0, 0.0, 0.0349107,
    ]),
    (False, 2): ([
        0.4873146, 0.5369586, 0.5014464, 0.4667018, 0.3473614, 0.4977085, 0.4385222, 0.5046744, 0.4882087, 0.222573,
        0.2859225, 0.2625529, 0.2977141, 0.2745588, 0.3764035, 0.301003, 0.2778477, 0.3796924, 0.4332082, 0.4695614,
        0.0, 0.0, 0.0, 0.0,
    ], [
        0.0, 0.0, 0.0, 0.0300157, 0.0, 0.0674012, 0.0411125, 0.0, 0.0, 0.0,
        0.116317, 0.0, 0.0, 0.0816195,
    ]),
}


def grid(*shape: int) -> torch.Tensor:
    """Numbers in [0, 1) that need no generator."""
    count = torch.arange(torch.tensor(shape).prod(), dtype=torch.float64)
    return (count * 0.61803398875 % 1).float().reshape(shape)


@pytest.mark.parametrize("offset", [0, 1])
def test_non_maximum_suppression_is_mmcvs(offset):
    corner, side = (grid(40, 2) * 40).round(), (grid(2, 40).T * 25).round() + 1
    scores = torch.arange(40).mul(7).remainder(41).float() / 41
    assert mm_ops.nms(torch.cat([corner, corner + side], 1), scores, 0.4, offset).tolist() == STAYS[offset]


def test_an_overlap_that_equals_the_threshold_stays_as_in_mmcv():
    boxes = torch.tensor([[0.0, 0, 10, 3], [0, 0, 10, 10]])  # 0.3 as a float is more than 0.3
    assert mm_ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.3, 0).tolist() == [0, 1]


@pytest.mark.parametrize("aligned, samples", ALIGNED)
def test_regions_and_their_gradients_are_mmcvs(aligned, samples):
    x = grid(2, 3, 13, 17)
    rois = torch.tensor([
        [0, 1.3, 2.2, 40.0, 33.0], [1, -5, -3, 20, 60], [1, 10, 10, 10.5, 10.2], [0, 30, 20, 90, 80],
    ])
    how = dict(
        aligned_height=2, aligned_width=3, spatial_scale=0.25, sampling_ratio=samples, pool_mode=1, aligned=aligned,
    )
    seen, slope = torch.full((4, 3, 2, 3), torch.nan), torch.full_like(x, torch.nan)
    mm_ops.roi_align_forward(x, rois, seen, x, x, **how)
    mm_ops.roi_align_backward(grid(4, 3, 2, 3), rois, x, x, slope, **how)
    outputs, gradients = ALIGNED[aligned, samples]
    torch.testing.assert_close(seen[:, 0].flatten(), torch.tensor(outputs), rtol=0, atol=2e-7)
    torch.testing.assert_close(slope.flatten()[::97], torch.tensor(gradients), rtol=0, atol=2e-7)
    half = torch.full((4, 3, 2, 3), torch.nan, dtype=torch.bfloat16)
    mm_ops.roi_align_forward(x.bfloat16(), rois.bfloat16(), half, x, x, **how)
    assert half.isfinite().all()


def test_other_operators_say_that_they_are_not_there():
    for call in (lambda: mm_ops.softnms(1), lambda: mm_ops.deform_conv_forward()):
        with pytest.raises(NotImplementedError, match=r"operator (softnms|deform_conv_forward) .* MMCV_WITH_OPS=1"):
            call()
    assert not hasattr(mm_ops, "__path__")
