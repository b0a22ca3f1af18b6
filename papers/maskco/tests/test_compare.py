"""MaskCo's comparison: its sets of pictures, its judges of places, and that it goes on after a kill."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common import run
from papers.maskco import data, dense
from papers.maskco.compare import COLUMNS, MEMBERS, compare
from papers.maskco.recipes import RECIPES
from papers.maskco.scripts import mini_sets
from papers.maskco.train import train

WORLD = run.World(0, 1, torch.device("cpu"), None)
COLORS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 210)}
SPLITS = {"train2017": 6, "val2017": 3}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Pictures whose left half is a thing of one colour and whose right half is one of another, with masks and boxes;
    a strip at the top is labelled as nothing."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    names = list(COLORS)
    categories = [{"id": 10 + i, "name": name, "supercategory": f"kind of {name}"} for i, name in enumerate(names)]
    for split, count in SPLITS.items():
        (root / split).mkdir()
        masks = root / "annotations" / f"panoptic_{split}"
        masks.mkdir()
        images, panoptic, boxes = [], [], []
        for i in range(count):
            pair = names[i % 3], names[(i + 1) % 3]
            pixels, ids = np.zeros((60, 80, 3), np.uint8), np.zeros((60, 80, 3), np.uint8)
            for half, name in enumerate(pair):
                pixels[:, 40 * half : 40 * half + 40] = COLORS[name]
                ids[6:, 40 * half : 40 * half + 40] = 7 + half, 3, 1  # segment 7 + half + 256 * 3 + 65536
                boxes.append({"id": len(boxes), "image_id": i, "bbox": [40 * half, 0, 40, 60],
                              "category_id": 10 + names.index(name)})
            boxes.append({"id": len(boxes), "image_id": i, "bbox": [0, 0, 4, 60], "category_id": 10})  # 8 px as shown
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            Image.fromarray(ids).save(masks / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": 80, "height": 60})
            segments = [{"id": 7 + half + 256 * 3 + 65536, "category_id": 10 + names.index(name)}
                        for half, name in enumerate(pair)]
            panoptic.append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
        for name, entries in (("panoptic", panoptic), ("instances", boxes)):
            (root / "annotations" / f"{name}_{split}.json").write_text(
                json.dumps({"images": images, "annotations": entries, "categories": categories})
            )
    return root


class Colors(nn.Module):
    """A backbone that knows nothing but the mean colour of each 8 px cell."""

    def forward(self, x):
        return nn.functional.avg_pool2d(x, 8)


class Blind(nn.Module):
    """A backbone that shows the same in every cell of every picture."""

    def forward(self, x):
        return torch.ones(len(x), 3, 20, 20)


def test_a_map_that_knows_the_places_is_told_from_one_that_does_not(coco):
    """Three kinds, each a third of the cells."""
    seeing, blind = dense.scores(Colors(), coco, WORLD), dense.scores(Blind(), coco, WORLD)
    assert seeing == pytest.approx(dict.fromkeys(seeing, 100))
    assert blind["cell_top1"] == pytest.approx(100 / 3) and blind["cell_miou"] == pytest.approx(100 / 9)
    assert blind["region_R@1"] == 0, "of equally similar regions those of another category come first"


def test_masks_are_read_as_coco_codes_them(coco):
    paths, masks = dense.panoptic(coco, "val")
    assert [path.name for path in paths] == ["0.png", "1.png", "2.png"] and masks[0].shape == (160, 160)
    kinds = sorted(f"kind of {name}" for name in COLORS)
    assert masks[0][80, 0] == kinds.index("kind of red") and masks[0][80, 159] == kinds.index("kind of green")
    assert masks[0][0, 0] == dense.UNLABELLED


def test_a_cell_has_what_over_half_of_it_shows():
    mask = np.array([[1, 1, 2, 2], [1, 3, 3, 3], [4, 4, -1, -1], [5, 5, -1, 6]])
    assert dense.cell_labels(mask, 2).tolist() == [[1, -1], [-1, -1]]  # 1 of three; halves; halves; nothing of three
    with pytest.raises(ValueError, match="no whole number"):
        dense.cell_labels(mask, 3)


def test_only_large_regions_are_asked(coco):
    features, kinds = dense.regions(Colors(), coco, "train", WORLD)
    assert len(features) == len(kinds) == 12 and torch.allclose(features.norm(dim=1), torch.ones(12).double())


def test_masks_that_are_not_there_are_one_line(coco, tmp_path):
    (tmp_path / "annotations").mkdir()
    with pytest.raises(run.UserError, match=r"panoptic_train2017\.json"):
        dense.cell_scores(Colors(), tmp_path, WORLD)
    broken = json.loads((coco / "annotations" / "panoptic_val2017.json").read_text())
    del broken["annotations"][0]["segments_info"]
    (tmp_path / "annotations" / "panoptic_val2017.json").write_text(json.dumps(broken))
    with pytest.raises(run.UserError, match=r"do not hold COCO's panoptic masks.*segments_info"):
        dense.panoptic(tmp_path, "val")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Few pictures of many objects, as COCO has them, and of one, in folders of classes; and the two sets of them."""
    root = tmp_path_factory.mktemp("sets")
    for split, count in (("train2017", 9), ("val2017", 3)):
        (root / "many" / split).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((640, 480)).save(root / "many" / split / f"{i}.png")
    for split, of, count in (("train", "a", 6), ("train", "b", 5), ("val", "a", 2), ("val", "b", 2)):
        (root / "one" / split / of).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (224, 224), (20 * i, 0, 80 * (of == "b"))).save(root / "one" / split / of / f"{i}.png")
    mini_sets.main(root / "many", root / "one", root / "out", count=8, validation=3)
    return root


def test_the_sets_are_of_one_size(sets, tmp_path):
    for name in ("many_objects", "one_object"):
        found = [data.open_pictures(sets / "out" / name, split) for split in ("train", "val")]
        assert [len(pictures) for pictures in found] == [8, 3]
        assert all(min(picture.size) == 160 for pictures in found for picture, _ in pictures)
    one = data.open_pictures(sets / "out" / "one_object", "train")
    assert [np.asarray(picture)[0, 0, 2] > 40 for picture, _ in one] == [False, True] * 4, "evenly from both classes"
    with pytest.raises(run.UserError, match=r"val: .* has 3 pictures and .* 4; 4 of each are needed"):
        mini_sets.main(sets / "many", sets / "one", tmp_path, count=8, validation=4)


def test_the_comparison_pre_trains_each_on_its_own_pictures_and_goes_on_after_a_kill(sets, coco, tmp_path):
    recipe = replace(
        RECIPES["compare"], backbone="resnet10_narrow", input_size_px=32, overlap_px=14, region_px=(8, 12), epochs=1,
        batch=4, queue=8, mph_width=8, probe=str(sets / "one"), dense=str(coco),
        compare=("maskco_many_objects", "moco_v2_one_object"),
    )
    options = run.Options(data=sets / "out", out=tmp_path, seeds=(0,), resume="auto")
    folder = compare("compare", recipe, replace(options, stop_at=1), WORLD, train)
    assert not (folder / "results.json").exists()
    assert compare("compare", recipe, options, WORLD, train) == folder
    found = run.read_json(folder / "results.json")["metrics"]
    table = run.by_member(found, COLUMNS)
    assert set(table) == {*recipe.compare, "untrained"} and all(set(its) == set(COLUMNS) for its in table.values())
    for label in recipe.compare:
        (config,) = (folder / "seed0" / "maskco" / label).glob("*/config.json")
        written = run.read_json(config)
        assert written["recipe"]["method"] == MEMBERS[label][0]
        assert written["options"]["data"].endswith(MEMBERS[label][1])


@pytest.mark.parametrize("lacking", ["probe", "dense"])
def test_a_comparison_without_judges_is_one_line(sets, tmp_path, lacking):
    recipe = replace(RECIPES["compare"], **{"probe": "a", "dense": "b"} | {lacking: ""})
    with pytest.raises(run.UserError, match="a comparison needs --data"):
        compare("compare", recipe, run.Options(data=sets / "out", out=tmp_path), WORLD, train)
