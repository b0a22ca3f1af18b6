"""Folders of tracking sequences."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data import pairs, tracking
from common.run import UserError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"

# Folders --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    archive = REAL / "tracking" / "tracking_small.tar"
    if not archive.exists():
        pytest.skip(f"no real sequences: {archive.name} is not beside the project")
    folder = tmp_path_factory.mktemp("real")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(p.parent for p in folder.rglob("OTB") if p.is_dir())


@pytest.mark.parametrize("folder, dataset, counts, size, offset", [
    ("OTB", "otb", {"Basketball": 150, "Crossing": 120, "Man": 134}, (360, 240), 1),
    ("VOT", "vot", {"bag": 196}, (480, 360), 0),
    ("GOT-10k", "got10k", {"GOT-10k_Train_900001": 300, "GOT-10k_Train_900002": 300}, (640, 360), 0),
    ("LaSOT", "lasot", {"person-901": 300}, (640, 338), 1),
])
def test_real_sequences(real, folder, dataset, counts, size, offset):
    found = tracking.open_sequences(real / folder)
    assert {s.name: len(s) for s in found} == counts
    for s in found:
        assert (s.dataset, s.offset, len(s.frames)) == (dataset, offset, len(s)) and s.visible.all()
        for i in (0, len(s) - 1):
            height, width, _ = tracking.read_frame(s.frames[i]).shape
            x, y, w, h = s.boxes[i]
            assert s.size in (None, (width, height)) and -1 <= x < width and -1 <= y < height
            assert x + w <= width + 1 and y + h <= height + 1
    assert size in {tracking.read_frame(s.frames[0]).shape[1::-1] for s in found}


def test_real_boxes_are_zero_based(real):
    man = tracking.open_sequences(real / "OTB")[2]
    assert man.name == "Man" and man.boxes[0].tolist() == [68, 47, 26, 39]  # the file says 69,48,26,39
    bag = tracking.open_sequences(real / "VOT")[0]  # corners in the file, pixels of the target
    np.testing.assert_allclose(bag.boxes[0], [292.23, 128.36, 146.96, 133.47], atol=1e-6)


def test_real_coco(tmp_path):
    archive = REAL / "coco" / "coco_small.tar"
    if not archive.exists():
        pytest.skip(f"no real images: {archive.name} is not beside the project")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    root = next(p.parent for p in tmp_path.rglob("annotations"))
    annotations = json.loads((root / "annotations" / "instances_val2017.json").read_text())["annotations"]
    large = [a["bbox"] for a in annotations if not a["iscrowd"] and a["bbox"][2] > 50 and a["bbox"][3] > 50]
    found = tracking.open_coco(root, "val")
    assert 0 < len(found) == len(large) < len(annotations) == 624
    assert sorted(map(tuple, large)) == sorted(tuple(s.boxes[0]) for s in found)
    assert len({s.name for s in found}) == len(found)
    assert all(tracking.read_frame(s.frames[0]).shape[1::-1] == s.size for s in found[::20])


def _frames(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (64, 48), "gray").save(folder / name)


def _got10k(root, boxes=20, frames=20, labels=20, name="GOT-10k_Train_000001"):
    folder = root / name
    _frames(folder, [f"{i:08d}.jpg" for i in range(1, frames + 1)])
    (folder / "groundtruth.txt").write_text("".join(f"{i},2.5,10,12\n" for i in range(boxes)))
    for label, value in (("absence", 0), ("cover", 8)):
        (folder / f"{label}.label").write_text(f"{value}\n" * labels)
    with open(root / "list.txt", "a") as file:
        file.write(name + "\n")
    return folder


def test_got10k(tmp_path):
    folder = _got10k(tmp_path / "train")
    (folder / "absence.label").write_text("0\n" * 18 + "1\n0\n")
    (folder / "cover.label").write_text("0\n" + "8\n" * 19)
    (folder / "meta_info.ini").write_text("[METAINFO]\nresolution: (64, 48)\n")
    _got10k(tmp_path / "train", name="GOT-10k_Train_000002")
    _got10k(tmp_path / "test", boxes=1, name="GOT-10k_Test_000001")
    first, second = tracking.open_sequences(tmp_path, "train")
    assert np.flatnonzero(~first.visible).tolist() == [0, 18] and first.cover[:2].tolist() == [0, 8]
    assert first.size == (64, 48) and second.size is None and second.boxes[7].tolist() == [7, 2.5, 10, 12]
    assert first.frames[-1].name == "00000020.jpg" and [p.name for p in first.frames[:2]][1] == "00000002.jpg"
    (blind,) = tracking.open_sequences(tmp_path, "test")
    assert blind.visible.tolist() == [True] + [False] * 19 and np.isnan(blind.boxes[1:]).all()
    assert len(tracking.open_sequences(tmp_path / "train")) == 2
    for wrong, message in ((None, r"\['test', 'train'\]"), ("val", "'val'")):
        with pytest.raises(UserError, match=message):
            tracking.open_sequences(tmp_path, wrong)


def test_lasot(tmp_path):
    for name, count in (("cat-2", 3), ("cat-10", 3), ("monkey-17", 4)):
        folder = tmp_path / name.split("-")[0] / name
        _frames(folder / "img", [f"{i:08d}.jpg" for i in range(1, count + 1)])
        (folder / "groundtruth.txt").write_text("5,6,10,10\n5,6,0,0\n5,6,10,10\n")
        (folder / "full_occlusion.txt").write_text("0,0,1")
        (folder / "out_of_view.txt").write_text("0,0,0")
    found = tracking.open_sequences(tmp_path)
    assert [s.name for s in found] == ["cat-2", "cat-10", "monkey-17"] and [len(s.frames) for s in found] == [3, 3, 3]
    assert found[0].visible.tolist() == [True, False, False] and found[0].boxes[0].tolist() == [4, 5, 10, 10]
    assert found[0].absent.tolist() == [False, False, True], "the toolkit's rule asks the labels alone"
    assert found[0].middle() == 0
    with pytest.raises(UserError, match=r"testing_set\.txt"):
        tracking.open_sequences(tmp_path, "test")
    (tmp_path / "testing_set.txt").write_text("cat-10\n")
    names = {split: [s.name for s in tracking.open_sequences(tmp_path, split)] for split in ("train", "test")}
    assert names == {"train": ["cat-2", "monkey-17"], "test": ["cat-10"]}
    (tmp_path / "testing_set.txt").write_text("cat-10\ndog-1\n")
    with pytest.raises(UserError, match="dog-1"):
        tracking.open_sequences(tmp_path, "test")
    (tmp_path / "cat" / "cat-2" / "out_of_view.txt").unlink()
    with pytest.raises(UserError, match=r"cat-2.*out_of_view"):
        tracking.open_sequences(tmp_path)


def test_trackingnet(tmp_path):
    for chunk, name, boxes in (("TRAIN_10", "b", 12), ("TRAIN_2", "a", 12), ("TEST", "c", 1)):
        _frames(tmp_path / chunk / "frames" / name, [f"{i}.jpg" for i in range(12)])
        (tmp_path / chunk / "anno").mkdir()
        (tmp_path / chunk / "anno" / f"{name}.txt").write_text("1.5,2,10,10\n" * boxes)
    train, (test,) = (tracking.open_sequences(tmp_path, split) for split in ("train", "test"))
    assert [s.name for s in train] == ["a", "b"]
    assert [path.name for path in train[0].frames][9:] == ["9.jpg", "10.jpg", "11.jpg"]
    assert train[0].boxes[0, 0] == 1.5 and test.visible.sum() == 1 and len(test) == 12


@pytest.mark.parametrize("separator", [",", "\t", "  ", ", "])
def test_otb(tmp_path, separator):
    line = separator.join(("11", "21", "5", "6")) + "\r\n"
    for name, frames in (("Jogging", range(1, 4)), ("Human4", range(1, 4)), ("BlurCar1", range(245, 250)),
                         ("Board", range(1, 4)), ("David", range(298, 772))):
        _frames(tmp_path / name / "img", [f"{i:0{5 if name == 'Board' else 4}d}.jpg" for i in frames])
    for name, files in (("Jogging", {".1": 3, ".2": 3}), ("Human4", {".1": 0, ".2": 3}), ("BlurCar1", {"": 3}),
                        ("Board", {"": 3}), ("David", {"": 471})):
        for suffix, count in files.items():
            (tmp_path / name / f"groundtruth_rect{suffix}.txt").write_text(line * count)
    found = {s.name: s for s in tracking.open_sequences(tmp_path)}
    assert list(found) == ["BlurCar1", "Board", "David", "Human4", "Jogging-1", "Jogging-2"]
    assert found["BlurCar1"].frames[0].name == "0247.jpg" and found["David"].frames[-1].name == "0770.jpg"
    assert found["Board"].frames[-1].name == "00003.jpg" and found["Human4"].boxes[0].tolist() == [10, 20, 5, 6]


def test_vot(tmp_path):
    (tmp_path / "list.txt").write_text("a\n")
    _frames(tmp_path / "a" / "color", [f"{i:08d}.jpg" for i in range(1, 5)])
    # The mask as vot-trax writes it, for rows 5..8 and columns 7..11 of a 30x20 image with corners missing.
    lines = ["10,20,30,40", "1,2,11,2,11,8,1,8", "m0,0,30,20,157,5,25,4,26,5,28,2", "m4,5,3,2,6"]
    (tmp_path / "a" / "groundtruth.txt").write_text("\n".join(lines))
    (found,) = tracking.open_sequences(tmp_path)
    assert found.boxes[:3].tolist() == [[10, 20, 30, 40], [1, 2, 11, 7], [7, 5, 5, 4]]
    assert found.visible.tolist() == [True, True, True, False]
    (tmp_path / "a" / "groundtruth.txt").write_text("\n".join([*lines[:3], "1,2,3,4,5"]))
    with pytest.raises(UserError, match="no box, polygon or mask"):
        tracking.open_sequences(tmp_path)


@pytest.mark.parametrize("prepare, expected", [
    (lambda p: p.rmdir(), "no data folder"),
    (lambda p: None, r"no tracking sequences(.|\n)*GOT-10k(.|\n)*LaSOT(.|\n)*TrackingNet(.|\n)*OTB(.|\n)*VOT"),
    (lambda p: _got10k(p, boxes=19), "has 20 labels for 19 boxes|20 frames, but 19 boxes"),
    (lambda p: _got10k(p, frames=19), "19 frames, but 20 boxes"),
    (lambda p: _got10k(p, labels=19), "19 labels"),
    (lambda p: (_got10k(p) / "groundtruth.txt").write_text("1,2,3,4\n" * 19 + "1,2"), "line 20 has 2 numbers, not 4"),
    (lambda p: (_got10k(p) / "groundtruth.txt").write_text("1,2,x,4\n" * 20), "could not convert"),
    (lambda p: (_got10k(p) / "groundtruth.txt").write_text(""), "is empty"),
    (lambda p: (_got10k(p) / "groundtruth.txt").unlink(), "No such file"),
    (lambda p: (p / "list.txt").write_text("GOT-10k_Val_000001\n"), "No such file"),
    (lambda p: (_got10k(p) / "00000020.jpg").rename(p / "GOT-10k_Train_000001" / "x.jpg"), "not 00000020.jpg"),
])
def test_a_wrong_folder_is_explained(tmp_path, prepare, expected):
    root = tmp_path / "data"
    root.mkdir()
    prepare(root)
    with pytest.raises(UserError, match=expected):
        tracking.open_sequences(root)


def test_bad_annotations_are_left_out_of_training_up_to_a_limit(tmp_path, capsys):
    for i in range(1, 8):
        _got10k(tmp_path / "train", name=f"GOT-10k_Train_{i:06d}", labels=5 if i == 3 else 20)
    damaged = []
    found = tracking.open_sequences(tmp_path, "train", limit=0.01, damaged=damaged)
    assert len(found) == 6 and len(damaged) == 1 and "000003" in damaged[0]
    data = pairs.Data({"got10k": found}, [], [], damaged)
    for _ in range(2):  # as a resumed run does
        data.name_damaged(tmp_path / "unusable.txt")
    assert (tmp_path / "unusable.txt").read_text() == f"{damaged[0]}\n" and "left out 1 of 7" in capsys.readouterr().out
    (tmp_path / "train" / "GOT-10k_Train_000005" / "groundtruth.txt").write_text("1,2\n")
    with pytest.raises(UserError, match="2 of 7 sequences"):
        tracking.open_sequences(tmp_path, "train", limit=0.01)


def test_coco(tmp_path, capsys):
    _frames(tmp_path / "train2017", ["000000000009.jpg"])
    file = tmp_path / "annotations" / "instances_train2017.json"
    with pytest.raises(UserError, match="expected COCO 2017"):
        tracking.open_coco(tmp_path, "train")
    file.parent.mkdir()
    objects = [{"bbox": [1, 2, 60, 51]}, {"bbox": [1, 2, 60, 50]}, {"bbox": [3, 4, 60, 51], "iscrowd": 1}]
    file.write_text(json.dumps({
        "images": [{"id": 9, "file_name": "000000000009.jpg", "width": 64, "height": 48}], "categories": [],
        "annotations": [{"id": i, "image_id": 9, "category_id": 1, **o} for i, o in enumerate(objects, 1)],
    }))
    (found,) = tracking.open_coco(tmp_path, "train")
    assert found.name == "000000000009-1" and found.boxes.tolist() == [[1, 2, 60, 51]] and found.size == (64, 48)
    tracking.main(tmp_path)
    assert capsys.readouterr().out.startswith("train: 1 sequences (coco)"), "the validation split may be missing"
    for text in ("{", "[]", '{"annotations": [{"id": 1}]}'):
        file.write_text(text)
        with pytest.raises(UserError, match="no COCO annotation file"):
            tracking.open_coco(tmp_path, "train")


def test_hidden_files_are_no_frames(tmp_path):
    folder = _got10k(tmp_path / "got/train")
    (folder / "._00000001.jpg").write_bytes(b"a Mac was here")
    (found,) = tracking.open_sequences(tmp_path / "got")
    assert len(found.frames) == 20
    _frames(tmp_path / "otb/Man/img", ["0001.JPG", "0002.jpg", "0003.jpg"])
    (tmp_path / "otb/Man/img/._0001.JPG").write_bytes(b"")
    (tmp_path / "otb/Man/groundtruth_rect.txt").write_text("1,1,5,5\n" * 3)
    (found,) = tracking.open_sequences(tmp_path / "otb")
    assert [path.name for path in found.frames] == ["0001.JPG", "0002.jpg", "0003.jpg"]
    _frames(tmp_path / "otb/Man/img", ["0001 (1).jpg"])
    with pytest.raises(UserError, match=r"0001 \(1\)\.jpg is not called by the number"):
        tracking.open_sequences(tmp_path / "otb")


def test_a_lasot_sequence_that_lacks_a_file_is_named(tmp_path):
    _frames(tmp_path / "cat/cat-1/img", ["00000001.jpg"])
    (tmp_path / "cat/cat-1/groundtruth.txt").write_text("5,6,10,10\n")
    with pytest.raises(UserError, match=r"cannot use .*cat-1/full_occlusion\.txt"):
        tracking.open_sequences(tmp_path)


@pytest.mark.parametrize("file, content, message", [
    ("groundtruth.txt", b"1,2,3,1e9\n" * 20, "line 1 has a number beyond 100000 px"),
    ("groundtruth.txt", b"1,2,3,4\n" * 19 + b"1,2,inf,4\n", "line 20 has a number beyond"),
    ("groundtruth.txt", b"1,2,3,\xff\n", r"groundtruth\.txt is not in UTF-8"),
    ("absence.label", b"9" * 30 + b"\n", r"absence\.label"), ("cover.label", b"\xff", r"cover\.label is not in UTF-8"),
    ("meta_info.ini", b"\xff", r"meta_info\.ini is not in UTF-8"),
])
def test_a_damaged_annotation_is_named(tmp_path, file, content, message):
    (_got10k(tmp_path / "train") / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        tracking.open_sequences(tmp_path)


def test_a_damaged_list_is_named(tmp_path):
    _got10k(tmp_path / "train")
    with open(tmp_path / "train/list.txt", "a") as file:
        file.write("GOT-10k_Train_000001\n")
    with pytest.raises(UserError, match=r"list\.txt lists GOT-10k_Train_000001 more than once"):
        tracking.open_sequences(tmp_path)
    (tmp_path / "train/list.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"list\.txt is not in UTF-8"):
        tracking.open_sequences(tmp_path)


@pytest.mark.parametrize("line", ["m0,0,3,2,1,9", "m0,0,1000000,1000000,1", "m0,0,-3,-2,1", "m0,0,3,2,-1,2", "m1"])
def test_absurd_masks_are_refused(line):
    with pytest.raises(ValueError):
        tracking.box_around(line)


def test_frames_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "a.jpg"
    Image.effect_noise((64, 48), 50).convert("RGB").save(path)
    whole = path.read_bytes()
    assert tracking.read_frame(path).shape == (48, 64, 3)
    for content in (whole[:-200], whole[:20], b"junk", b""):
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"cannot read .*a\.jpg"):
            tracking.read_frame(path)
    path.unlink()
    with pytest.raises(OSError, match=r"cannot read .*a\.jpg"):
        tracking.read_frame(path)
