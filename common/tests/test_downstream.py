"""What papers share of detection and segmentation. Most is skipped where mmengine is not installed (tools/mm.sh)."""

import json

import pytest

from common import run
from common.run import mm

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
