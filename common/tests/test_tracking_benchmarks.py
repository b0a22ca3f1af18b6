"""Further benchmarks, each in a folder of its real layout; which sequences make one whole; their rules."""

import numpy as np
import pytest
from PIL import Image

from common.data import tracking
from common.metrics import tracking as rules
from common.metrics.trackers import RULES, Protocol
from common.run import UserError

BOXES = [(10, 12, 20, 16), (12, 13, 20, 16), (14, 14, 20, 16)]


def frames(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (64, 48), "gray").save(folder / name, "PNG" if name.lower().endswith("png") else "JPEG")


def text(path, boxes, separator=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(separator.join(map(str, box)) + "\n" for box in boxes))


def only(root, split=None):
    (found,) = tracking.open_sequences(root, split)
    assert tracking.read_frame(found.frames[0]).shape == (48, 64, 3) and len(found.frames) == len(found)
    return found


def test_uav123_is_ranges_of_folders_and_nan_where_the_target_is_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LISTS, "uav123", {"bird1_2": ["bird1", 3, 5]})
    monkeypatch.setitem(tracking.LISTS, "uav20l", {"bird1": ["bird1", 1, 6]})
    frames(tmp_path / "data_seq" / "UAV123" / "bird1", *(f"{i:06d}.jpg" for i in range(1, 7)))
    text(tmp_path / "anno" / "UAV123" / "bird1_2.txt", [BOXES[0], ["NaN"] * 4, BOXES[2]])
    text(tmp_path / "anno" / "UAV20L" / "bird1.txt", BOXES * 2)
    part, whole = only(tmp_path), only(tmp_path, "uav20l")
    assert (part.name, part.dataset, whole.name, whole.dataset) == ("bird1_2", "uav123", "bird1", "uav20l")
    assert [path.name for path in part.frames] == ["000003.jpg", "000004.jpg", "000005.jpg"] and len(whole) == 6
    assert part.visible.tolist() == [True, False, True] and part.boxes[0].tolist() == [9, 11, 20, 16]
    (tmp_path / "data_seq" / "UAV123" / "bird1" / "000005.jpg").unlink()
    with pytest.raises(UserError, match="bird1_2 is frames 3 to 5"):
        only(tmp_path)


def test_uav123s_rule_forgives_the_place_and_not_the_overlap_of_an_absent_target():
    truth = np.array([BOXES[0], [np.nan] * 4, BOXES[2], BOXES[2]], float)
    track = rules.Track("a", truth, np.array([BOXES[0], BOXES[0], BOXES[2], (300, 300, 9, 9)], float))
    uav, otb = rules.uav123([track]).scores, rules.otb([track]).scores
    assert uav["auc"] == otb["auc"] == pytest.approx(2000 / 21 / 2)
    assert (uav["precision"], otb["precision"]) == (75, 50)


def test_nfs_as_released_has_a_line_for_every_frame_at_240(tmp_path):
    lines = [[0, 10 + i, 12, 30 + i, 28, i, 0, 0, 0, '"ball_1"'] for i in range(17)]
    for rate, count in (("30", 3), ("240", 17)):
        frames(tmp_path / "ball_1" / rate / "ball_1", *(f"{i:05d}.jpg" for i in range(1, count + 1)))
        text(tmp_path / "ball_1" / rate / "ball_1.txt", lines, " ")
    slow, fast = only(tmp_path, "30"), only(tmp_path, "240")
    assert (slow.name, slow.dataset, fast.dataset, len(fast)) == ("ball_1", "nfs", "nfs240", 17)
    assert slow.boxes.tolist() == [[10, 12, 20, 16], [18, 12, 20, 16], [26, 12, 20, 16]]
    with pytest.raises(UserError, match=r"the splits \['240', '30'\]"):
        tracking.open_sequences(tmp_path)
    text(tmp_path / "ball_1" / "30" / "ball_1.txt", [[0, 1]], " ")
    with pytest.raises(UserError, match=r"ball_1\.txt: expected lines of a number, then left"):
        only(tmp_path, "30")


def test_nfs_as_prepared_for_30_frames_a_second(tmp_path):
    frames(tmp_path / "sequences" / "Skiing_red", *(f"{i:05d}.PNG" for i in (1, 2, 3)))
    text(tmp_path / "anno" / "nfs_Skiing_red.txt", BOXES, "\t")
    found = only(tmp_path)
    assert (found.name, found.dataset, found.boxes.tolist()) == ("Skiing_red", "nfs", [list(b) for b in BOXES])


def test_tnl2k(tmp_path):
    frames(tmp_path / "CartoonHuLuWa" / "imgs", "9.png", "10.png", "11.png")
    text(tmp_path / "CartoonHuLuWa" / "groundtruth.txt", BOXES)
    found = only(tmp_path)
    assert (found.dataset, [path.name for path in found.frames]) == ("tnl2k", ["9.png", "10.png", "11.png"])


def test_avist_targets_are_visible_where_neither_flag_is_set(tmp_path):
    frames(tmp_path / "sequences" / "air_show", *(f"img_{i:05d}.jpg" for i in (1, 2, 3)))
    text(tmp_path / "anno" / "air_show.txt", BOXES, " ")
    text(tmp_path / "full_occlusion" / "air_show_full_occlusion.txt", [[0], [1], [0]])
    text(tmp_path / "out_of_view" / "air_show_out_of_view.txt", [[0], [0], [1]])
    found = only(tmp_path)
    assert found.dataset == "avist" and found.visible.tolist() == [True, False, False]
    track = rules.Track("air_show", found.boxes, found.boxes, ~found.absent)
    assert rules.avist([track]).scores == pytest.approx({"auc": 2000 / 21 / 3, "op50": 100 / 3, "op75": 100 / 3})


def test_lasots_extension_is_known_by_its_names(tmp_path):
    for name in ("atv-1", "badminton-2"):
        folder = tmp_path / name.partition("-")[0] / name
        frames(folder / "img", "00000001.jpg", "00000002.jpg")
        text(folder / "groundtruth.txt", BOXES[:2])
        for flag in ("full_occlusion", "out_of_view"):
            text(folder / f"{flag}.txt", [[0, 0]])
    assert {s.dataset for s in tracking.open_sequences(tmp_path)} == {"lasot_ext"}
    (tmp_path / "atv" / "atv-1").rename(tmp_path / "atv" / "atv-99")
    assert {s.dataset for s in tracking.open_sequences(tmp_path)} == {"lasot"}


def test_parts_of_otb(tmp_path):
    for name, count in (("Basketball", 3), ("Boy", 3), ("Biker", 3), ("Mine", 3)):
        frames(tmp_path / name / "img", *(f"{i:04d}.jpg" for i in range(1, count + 1)))
        text(tmp_path / name / "groundtruth_rect.txt", BOXES)
    frames(tmp_path / "KiteSurf" / "jpg", *(f"{i:04d}.PNG" for i in (1, 2, 3)))
    text(tmp_path / "KiteSurf" / "groundtruth_rect.txt", BOXES)
    found = {split: tracking.open_sequences(tmp_path, split) for split in (None, "otb50", "otb2013")}
    assert len(found[None]) == 5 and {s.dataset for s in found["otb2013"]} == {"otb2013"}
    assert [s.name for s in found["otb50"]] == ["Basketball", "Biker"]
    assert [s.name for s in found["otb2013"]] == ["Basketball", "Boy"]


def test_vid_is_an_object_of_a_snippet_each(tmp_path):
    snippet = "ILSVRC2015_VID_train_0000/ILSVRC2015_train_00139005"
    frames(tmp_path / "Data" / "VID" / "train" / snippet, *(f"{i:06d}.JPEG" for i in range(3)))
    there = tmp_path / "Annotations" / "VID" / "train" / snippet
    there.mkdir(parents=True)

    def entry(track, x, occluded=0):
        return (f"<object><trackid>{track}</trackid><bndbox><xmax>{x + 20}</xmax><xmin>{x}</xmin><ymax>30</ymax>"
                f"<ymin>10</ymin></bndbox><occluded>{occluded}</occluded></object>")

    for i, entries in enumerate((entry(0, 1) + entry(1, 5), entry(0, 2, occluded=1), entry(0, 3))):
        (there / f"{i:06d}.xml").write_text(f"<annotation>{entries}</annotation>")
    first, second = tracking.open_sequences(tmp_path)
    assert (first.name, second.name) == ("ILSVRC2015_train_00139005-0", "ILSVRC2015_train_00139005-1")
    assert first.boxes.tolist() == [[x, 10, 20, 20] for x in (1, 2, 3)]
    assert first.visible.tolist() == [True, False, True] and second.visible.tolist() == [True, False, False]
    assert tracking.read_frame(first.frames[2]).shape == (48, 64, 3)
    (there / "000003.xml").write_text("<annotation><object>")
    with pytest.raises(UserError, match=r"cannot use .*000003\.xml"):
        tracking.open_sequences(tmp_path)


@pytest.mark.parametrize("dataset, count", [
    ("otb", 100), ("otb50", 50), ("otb2013", 51), ("uav123", 123), ("uav20l", 20), ("nfs", 100), ("avist", 120),
    ("lasot", 280), ("lasot_ext", 150),
])
def test_a_benchmark_is_whole_by_the_names_of_its_sequences(dataset, count):
    names = list(tracking.LISTS[dataset])
    assert len(names) == count and tracking.is_whole(dataset, names[::-1])
    assert not tracking.is_whole(dataset, names[1:]) and not tracking.is_whole(dataset, [*names[1:], "another"])
    assert not tracking.is_whole(dataset, [*names[1:], names[1]])


def test_sets_whose_boxes_are_on_a_server_are_never_whole():
    assert not any(tracking.is_whole(dataset, ["a"] * 180) for dataset in ("got10k", "trackingnet", "vot"))


@pytest.mark.parametrize("dataset", RULES)
def test_each_data_set_has_a_rule_of_its_own(dataset):
    assert RULES[dataset] in rules.RULES and Protocol(dataset, RULES[dataset]).name == dataset


def test_rules_of_lasot_differ_at_the_border_of_the_image():
    """x = 0 in the files is no valid box to two of the three."""
    truth = np.array([[5, 5, 9, 9], [0, 5, 9, 9], [5, 5, 9, 9], [5, 5, 9, 9.0]])
    track = rules.Track("a", truth, truth)
    scores = {rule: rules.RULES[rule]([track]).scores for rule in ("lasot", "lasot_wh_valid", "lasot_xywh_valid")}
    half = 2000 / 21 * 3 / 4
    assert scores["lasot"] == pytest.approx({"auc": half, "precision": 100, "norm_precision": 100})
    assert scores["lasot_wh_valid"] == pytest.approx({"auc": 2000 / 21, "precision": 100, "norm_precision": 100})
    assert scores["lasot_xywh_valid"] == pytest.approx({"auc": half, "precision": 75, "norm_precision": 100})


@pytest.mark.parametrize("suffix", ["png", "JPG"])
def test_numbered_frames_may_have_another_suffix(tmp_path, suffix):
    frames(tmp_path / "frames" / "a", *(f"{i}.{suffix}" for i in range(3)))
    frames(tmp_path / "TRAIN_0" / "frames" / "a", *(f"{i}.{suffix}" for i in range(3)))
    text(tmp_path / "TRAIN_0" / "anno" / "a.txt", BOXES)
    assert [path.name for path in only(tmp_path, "train").frames] == [f"{i}.{suffix}" for i in range(3)]
