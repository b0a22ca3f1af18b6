"""A backbone trained here under mmdetection and mmsegmentation. Skipped where they are not installed (tools/mm.sh)."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common import run
from common.run import mm

pytest.importorskip("mmengine", reason="detection and segmentation are not installed: tools/mm.sh")

from mmdet.datasets import CocoDataset
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from papers.maskco.downstream import pretrained, train  # noqa: F401 (the first registers)
from papers.maskco.export import export
from papers.maskco.model import build_backbone


@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_an_export_is_a_stock_resnet(tmp_path, scope):
    init_default_scope(scope)
    torch.manual_seed(0)
    ours = build_backbone("resnet18_narrow").eval()
    export(ours, "resnet18_narrow", tmp_path / "model", 64, 1.0)
    start = dict(type="MaskCo", checkpoint=str(tmp_path / "model"))
    stock = MODELS.build(dict(
        type=f"{scope}.ResNet", depth=18, base_channels=32, stem_channels=64, norm_eval=False, init_cfg=start,
    ))
    stock.init_weights()
    x = torch.randn(1, 3, 64, 64)
    stock.eval()
    torch.testing.assert_close(stock(x)[-1], ours(x), rtol=1e-4, atol=1e-4)
    wider = MODELS.build(dict(type=f"{scope}.ResNet", depth=18, init_cfg=start))
    with pytest.raises(run.UserError, match="does not fit this backbone"):
        wider.init_weights()


@pytest.mark.parametrize("name", sorted(path.stem for path in train.CONFIGS.glob("*.py")))
def test_a_configuration_builds_its_model(name, tmp_path):
    (tmp_path / "data").mkdir()
    arguments = mm.Arguments(name, tmp_path / "data", checkpoint="here", change=["pictures=0"])
    config = mm.load(arguments, tmp_path / "run", train.CONFIGS, train.CHECKPOINT)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    assert model.backbone.init_cfg["type"] == "MaskCo" and model.backbone.init_cfg["checkpoint"] == "here"
    assert all(p.requires_grad for p in model.parameters())
    assert str(tmp_path / "data") in str(config.train_dataloader)


# Training at full scale, but for the pictures' size, and the number of steps and proposals.
_ONE_STEP = [
    "train_cfg.max_iters=1", "default_hooks.checkpoint.save_last=False", "train_dataloader.batch_size=2",
    "train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False",
    "train_cfg.val_begin=2", "test_dataloader.num_workers=0", "test_dataloader.persistent_workers=False",
    "test_dataloader.dataset.pipeline.1.scale=(96,64)",
]
_FEW = [
    "model.train_cfg.rpn_proposal.nms_pre=50", "model.train_cfg.rcnn.sampler.num=16",
    "model.test_cfg.rpn.nms_pre=50", "model.test_cfg.rpn.max_per_img=16", "model.test_cfg.rcnn.score_thr=0.0",
]
SMALL = {
    "mask_rcnn_1x": [*_FEW, "train_dataloader.dataset.pipeline.2.scales=[(96,64)]"],
    "faster_rcnn_voc": [*_FEW, *(f"train_dataloader.dataset.datasets.{i}.pipeline.3.scales=[(96,64)]" for i in (0, 1))],
    "fcn_voc": [
        "model.data_preprocessor.size=(64,64)",
        *(f"train_dataloader.dataset.datasets.{i}.pipeline.{change}" for i in (0, 1)
          for change in ("2.scale=(96,64)", "3.crop_size=(64,64)", "6.size=(64,64)")),
    ],
}
SCORES = {
    "mask_rcnn_1x": {f"{kind}_mAP{at}" for kind in ("bbox", "segm") for at in ("", "_50", "_75")},
    "faster_rcnn_voc": {"mAP", "AP50", "AP75"},
    "fcn_voc": {"aAcc", "mIoU", "mAcc"},
}


def write(path, content: str | np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content) if isinstance(content, str) else Image.fromarray(content).save(path)


def pictures(folder, names: list[str], seed: int) -> None:
    for i, name in enumerate(names):
        write(folder / f"{name}.jpg", np.random.default_rng(seed + i).integers(0, 256, (64, 96, 3), np.uint8))


def coco(folder) -> None:
    """Two pictures with a box each, in COCO's layout."""
    polygon = [10, 8, 70, 8, 70, 50, 10, 50]
    truth = dict(
        images=[dict(id=i, file_name=f"{i}.jpg", width=96, height=64) for i in (1, 2)],
        annotations=[
            dict(id=i, image_id=i, category_id=i, iscrowd=0, bbox=[10, 8, 60, 42], area=2520, segmentation=[polygon])
            for i in (1, 2)
        ],
        categories=[dict(id=i, name=name) for i, name in enumerate(CocoDataset.METAINFO["classes"], 1)],
    )
    for split in ("train", "val"):
        pictures(folder / f"{split}2017", ["1", "2"], 0)
        write(folder / f"annotations/instances_{split}2017.json", json.dumps(truth))


def voc(folder) -> None:
    """Two pictures of each year, one box difficult, with masks, in the layout of VOCdevkit/VOC<year>."""
    box = "<bndbox><xmin>11</xmin><ymin>9</ymin><xmax>71</xmax><ymax>51</ymax></bndbox>"
    for year in (2007, 2012):
        home, names = folder / f"VOC{year}", [f"{year}_1", f"{year}_2"]
        pictures(home / "JPEGImages", names, year)
        for i, name in enumerate(names):
            write(home / f"Annotations/{name}.xml", f"<annotation><size><width>96</width><height>64</height></size>"
                  f"<object><name>cat</name><difficult>{i}</difficult>{box}</object></annotation>")
            mask = np.zeros((64, 96), np.uint8)
            mask[8:50, 10:70] = 8
            write(home / f"SegmentationClass/{name}.png", mask)
            write(home / f"SegmentationClassAug/{name}.png", mask)
        for part in ("Main/trainval", "Main/test", "Segmentation/train", "Segmentation/aug", "Segmentation/val"):
            write(home / f"ImageSets/{part}.txt", "\n".join(names))


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory):
    """An export with every tensor unlike what a network starts with."""
    torch.manual_seed(0)
    network = build_backbone("resnet50")
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(1 + 0.1 * torch.rand_like(tensor))
    folder = tmp_path_factory.mktemp("export")
    export(network, "resnet50", folder, 224, 0.875)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_step_at_full_scale_starts_from_the_export(name, resnet50, tmp_path):
    data = tmp_path / "data"
    coco(data) if name == "mask_rcnn_1x" else voc(data)
    arguments = mm.Arguments(
        name, data / "VOC2012" if name == "fcn_voc" else data, checkpoint=str(resnet50), change=_ONE_STEP + SMALL[name],
    )
    runner = Runner.from_cfg(mm.load(arguments, tmp_path / "run", train.CONFIGS, train.CHECKPOINT))
    model = runner.model
    model.init_weights()
    loaded = {k.removeprefix("backbone.").removeprefix("roi_head.shared_head."): v.clone()
              for k, v in model.state_dict().items() if k.startswith(("backbone.", "roi_head.shared_head."))}
    exported = load_file(resnet50 / "model.safetensors")
    assert loaded.keys() == exported.keys()
    assert all(torch.equal(loaded[name], exported[name]) for name in exported)
    truths = [sample["data_samples"] for sample in runner.train_dataloader.dataset]
    assert name == "fcn_voc" or [len(truth.gt_instances) for truth in truths] == [1] * len(truths)
    runner.train()
    loss = runner.message_hub.get_scalar("train/loss").current()
    assert 0 < loss < 20
    assert not torch.equal(model.backbone.conv1.weight, exported["conv1.weight"])
    assert {row["name"] for row in mm.metrics(runner.test())} == SCORES[name]


@pytest.mark.slow
def test_a_training_is_resumed_from_a_checkpoint_without_code(tmp_path, monkeypatch):
    coco(tmp_path / "data")
    arguments = ["train", "mask_rcnn_small", "--data", str(tmp_path / "data"), "--out", str(tmp_path), "--change",
                 "pictures=2", "train_cfg.max_iters=3", "train_cfg.val_interval=4", "param_scheduler.1.T_max=3",
                 "default_hooks.checkpoint.interval=2", "default_hooks.checkpoint.max_keep_ckpts=3",
                 "default_hooks.visualization.draw=False"]
    monkeypatch.setattr("sys.argv", arguments)
    run.main(lambda: mm.main("maskco", train.CONFIGS, train.CHECKPOINT))
    (folder,) = (tmp_path / "maskco/downstream_mask_rcnn_small").iterdir()
    first = run.read_json(folder / "results.json")
    for name in ("iter_3.pth", "results.json"):  # as if killed after step 2
        (folder / name).unlink()
    (folder / "last_checkpoint").write_text("iter_2.pth")
    saved = torch.load(folder / "iter_2.pth", weights_only=True)
    saved["message_hub"]["runtime_info"]["wall_s"] += 1000
    torch.save(saved, folder / "iter_2.pth")
    monkeypatch.setattr("sys.argv", [*arguments, "--resume", "auto"])
    run.main(lambda: mm.main("maskco", train.CONFIGS, train.CHECKPOINT))
    assert list((tmp_path / "maskco/downstream_mask_rcnn_small").iterdir()) == [folder]
    again = run.read_json(folder / "results.json")
    assert again["wall_s"] > 1000 and first["wall_s"] < 1000
    saved = torch.load(folder / "iter_3.pth", weights_only=True)
    assert saved["meta"]["iter"] == 3 and {int(step["step"]) for step in saved["optimizer"]["state"].values()} == {3}
