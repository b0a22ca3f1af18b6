"""Training pairs: which frames are drawn, what is cut out of them, and what is passed over."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import pairs, tracking
from common.data.tiny import sequences as tiny
from common.data.tiny.sequences import sequences
from common.run import UserError


def _frames(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (64, 48), "gray").save(folder / name)


def _sequence(count, visible=None, name="a", path=Path("none")):
    seen = np.isin(np.arange(count), visible) if visible is not None else np.ones(count, bool)
    return tracking.Sequence(name, "otb", (path,) * count, np.tile([10.0, 8, 20, 16], (count, 1)), seen)


def test_frames_are_drawn_within_the_gap():
    rng = np.random.default_rng(0)
    s = _sequence(400, [*range(0, 100, 3), 350, 399])
    drawn = np.array([pairs.draw_frames(s, 3, 20, rng) for _ in range(800)])
    first, others = drawn[:, :1], drawn[:, 1:]
    assert s.visible[drawn].all() and (others > first).all() and (others[:, 0] != others[:, 1])[first[:, 0] < 90].all()
    near = first[:, 0] < 80
    assert (others - first)[near].max() == 18 and set(others[first[:, 0] == 99].flat) == {350}
    assert set(others[first[:, 0] == 350].flat) == {399} and 399 not in first
    assert pairs.draw_frames(_sequence(1), 3, 20, rng) == [0, 0, 0]
    assert pairs.draw_frames(_sequence(30, [0, 7, 9, 20]), 2, 1, np.random.default_rng(2))[1] in (7, 9, 20)


def test_the_gap_grows_by_five():
    s, rng = _sequence(100, [0, 12, 14, 16, 99]), np.random.default_rng(0)
    seen = {b for a, b in (pairs.draw_frames(s, 2, 10, rng) for _ in range(400)) if a == 0}
    assert seen == {12, 14}  # 10 finds none, 15 finds two


def test_data_sets_are_drawn_by_weight():
    sets = {"few": [_sequence(20, name="x")], "many": [_sequence(20, name=str(i)) for i in range(9)]}

    def drawn(**more):
        data = pairs.Pairs(sets, None, length=9, **more)
        rng = np.random.default_rng(0)
        return np.mean([data.sequences[data._draw(rng)].name == "x" for _ in range(2000)])

    assert drawn() == pytest.approx(0.5, abs=0.05)
    assert drawn(weights={"few": 1, "many": 3}) == pytest.approx(0.25, abs=0.05)
    with pytest.raises(UserError, match="weights are given for"):
        drawn(weights={"few": 1})
    for wrong in (0, -1):  # nothing would ever be drawn as a negative for a single sequence of "few"
        with pytest.raises(UserError, match="expected numbers above 0"):
            drawn(weights={"few": 1, "many": wrong}, negatives=1.0)
    with pytest.raises(UserError, match="0 samples of few, many are asked for: expected at least 1"):
        pairs.Pairs(sets, None, length=0)
    with pytest.raises(UserError, match="none of the 1 sequences of few can be used"):
        pairs.Pairs({"few": [_sequence(19)]}, None, length=9)
    usable = pairs.Pairs({"a": [_sequence(20, range(4)), _sequence(20), _sequence(1)]}, None, length=1).sequences
    assert [len(s) for s in usable] == [20, 1]


def _coded(box):
    """A dark frame of 160x120 with a bright target."""
    frame = np.full((120, 160, 3), 30, np.uint8)
    x, y, w, h = box
    frame[y : y + h, x : x + w] = (250, 120, 60)
    s = tracking.Sequence("a", "otb", (), np.array([box], float), np.ones(1, bool))
    return pairs.Sample(frame, s.boxes[0], s)


@pytest.mark.parametrize("box", [(60, 50, 30, 22), (0, 0, 24, 30), (130, 100, 30, 20), (150, 3, 10, 40)])
def test_the_target_lies_in_its_box(box):
    """Whatever was drawn, inside the frame and at its corners: crop, scale, mirror and box agree."""
    transform = pairs.PairTransform(96, 128, brightness=0, gray=0)
    sample, found = _coded(box), 0
    for seed in range(60):
        made = transform([sample, sample], np.random.default_rng(seed))
        if made is None:
            continue
        for name, side in (("template", 96), ("search", 128)):
            pixels, (x, y, w, h) = made[name], (made[f"{name}_box"].numpy() * side)
            assert pixels.shape == (3, side, side) and pixels.dtype == torch.uint8
            rows, columns = (np.flatnonzero((pixels[0] > 140).any(axis)) for axis in (1, 0))
            if not len(rows) or rows[0] == 0 or columns[0] == 0 or rows[-1] == side - 1 or columns[-1] == side - 1:
                continue
            found += 1
            off = [columns[0] - x, rows[0] - y, columns[-1] + 1 - x - w, rows[-1] + 1 - y - h]
            assert np.abs(off).max() <= 1
    assert found > 25


def test_mirroring_gray_and_brightness():
    sample = _coded((60, 50, 30, 22))
    plain = dict(center_jitter=0, scale_jitter=0, brightness=0, gray=0, flip=0)

    def made(**more):
        return pairs.PairTransform(**{**plain, **more})([sample, sample], np.random.default_rng(0))

    still, flipped = made(), made(flip=1)
    assert torch.equal(flipped["search"], still["search"].flip(-1))
    x, y, w, h = still["search_box"]
    torch.testing.assert_close(flipped["search_box"], torch.stack([1 - x - w, y, w, h]))
    gray = made(gray=1)
    assert all((gray[name][0] == gray[name][2]).all() for name in ("template", "search"))
    factors = {
        round(float(made_["search"].max()) / 250, 2) for seed in range(30)
        if (made_ := pairs.PairTransform(**{**plain, "brightness": 0.2})([sample] * 2, np.random.default_rng(seed)))
    }
    assert min(factors) < 0.9 and max(factors) == pytest.approx(255 / 250, abs=0.01)


def test_a_crop_that_shows_nothing_is_drawn_again():
    sample = _coded((60, 50, 30, 22))
    lost = pairs.Sample(sample.image, np.array([900.0, 50, 30, 22]), sample.sequence)
    assert pairs.PairTransform()([lost, lost], np.random.default_rng(0)) is None


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tiny.sequences(tmp_path_factory.mktemp("tiny") / "sequences")


@pytest.fixture(scope="module")
def training(small):
    return pairs.open_data(SimpleNamespace(datasets=("got10k",), held_out=()), small).train


def test_order_and_augmentation_follow_from_the_seed_whatever_workers_and_ranks(training):
    data = pairs.Pairs(training, pairs.PairTransform(32, 64), length=12)

    def batches(**more):
        return list(pairs.pairs_loader(data, 4, 5, **{"seed": 0, **more}))

    whole = batches()
    assert len(whole) == 5 and set(whole[0]) == {"template", "search", "template_box", "search_box"}
    assert whole[0]["search"].shape == (4, 3, 64, 64) and whole[0]["search_box"].dtype == torch.float32
    for name in whole[0]:
        everything = torch.cat([batch[name] for batch in whole])
        assert torch.equal(everything, torch.cat([batch[name] for batch in batches(workers=2)]))
        assert torch.equal(everything[12:], torch.cat([batch[name] for batch in batches(start=3)]))
        shares = [batches(rank=rank, world=2) for rank in range(2)]
        assert all(torch.equal(w[name][rank::2], b[name]) for rank in range(2) for w, b in zip(whole, shares[rank]))
    assert not torch.equal(whole[0]["search"], whole[3]["search"])  # the second epoch draws anew
    assert not torch.equal(whole[0]["search"], batches(seed=1)[0]["search"])


def test_negatives_take_the_last_frame_from_another_sequence(training):
    def names(negatives):
        data = pairs.Pairs(training, lambda samples, _: [s.sequence.name for s in samples], length=1, n=3,
                           negatives=negatives, max_gap=10)
        return [data[(0, seed)] for seed in range(60)]

    assert all(len(set(drawn)) == 1 for drawn in names(0.0))
    assert all(drawn[0] == drawn[1] != drawn[2] for drawn in names(1.0))
    assert 5 < sum(len(set(drawn)) == 2 for drawn in names(0.3)) < 35


def test_frames_that_cannot_be_read_are_named_and_replaced_up_to_a_limit(small, tmp_path):
    found = tracking.open_sequences(small, "val")
    bad = [_sequence(40, name=s.name, path=tmp_path / f"{s.name}.jpg") for s in found[:2]]
    report = tmp_path / "unreadable.txt"
    data = pairs.Pairs({"a": [*found[2:], bad[0]]}, pairs.PairTransform(32, 64), length=40, report=report)
    assert len([data[(0, seed)] for seed in range(40)]) == 40
    (line,) = report.read_text().splitlines()
    assert bad[0].name in line
    data = pairs.Pairs({"a": [*found[2:], *bad]}, pairs.PairTransform(32, 64), length=40)
    with pytest.raises(UserError, match="2 of 6 sequences have frames that cannot be read, expected at most 1"):
        [data[(0, seed)] for seed in range(40)]
    strict = pairs.Pairs({"a": bad}, pairs.PairTransform(32, 64), length=40, limit=0)
    with pytest.raises(UserError, match="1 of 2"):
        strict[(0, 0)]


def test_boxes_outside_their_frames_end_in_an_error(small):
    s = tracking.open_sequences(small, "val")[0]
    lost = tracking.Sequence(s.name, "got10k", s.frames, s.boxes + (5000, 0, 0, 0), s.visible)
    match = rf"last got10k {s.name} frame \d+, .*: 100 showed nothing of their frames, 0 could not be read; do the"
    with pytest.raises(UserError, match=match):
        pairs.Pairs({"a": [lost]}, pairs.PairTransform(32, 64), length=4)[(0, 0)]


def test_a_box_that_cannot_be_cropped_is_named(small):
    s = tracking.open_sequences(small, "val")[0]
    empty = tracking.Sequence(s.name, "got10k", s.frames, s.boxes * (1, 1, 0, 1), s.visible)
    with pytest.raises(UserError, match=rf"got10k {s.name} frame \d+, got10k {s.name} frame \d+: cannot crop 0.0 px"):
        pairs.Pairs({"a": [empty]}, pairs.PairTransform(32, 64), length=4)[(0, 0)]


def test_data_sets_are_found_by_name(small, tmp_path):
    (tmp_path / "GOT-10k").symlink_to(small)
    one = SimpleNamespace(datasets=("got10k",), held_out=())
    for root in (tmp_path, small):
        data = pairs.open_data(one, root)
        assert len(data.train["got10k"]) == 60 and len(data.val) == len(data.test) == 6
    with pytest.raises(UserError, match="no folder for lasot; it has got10k"):
        pairs.open_data(SimpleNamespace(datasets=("got10k", "lasot"), held_out=()), tmp_path)


def test_a_data_set_that_trains_and_is_held_out_gives_each_its_split(tmp_path):
    (tmp_path / "GOT-10k").symlink_to(sequences())
    both = SimpleNamespace(datasets=("sequences", "got10k"), held_out=("got10k",))
    data = pairs.open_data(both, tmp_path)
    train, test = {s.name for s in data.train["got10k"]}, {s.name for s in data.test}
    assert (len(train), len(test)) == (60, 6) and not train & test and not data.val


def test_small_objects_of_coco_train_where_they_are_asked_for(tmp_path):
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2017").mkdir()
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "1.jpg", "width": 90, "height": 90}], "categories": [],
        "annotations": [{"id": i, "image_id": 1, "category_id": 1, "iscrowd": int(side == 80), "bbox": [1, 1, side, 60]}
                        for i, side in enumerate((9, 60, 80, 0))]}))
    coco = SimpleNamespace(datasets=("coco",), held_out=())
    found = {
        side: [s.boxes[0, 2] for s in pairs.open_data(coco, folder, coco_side_px=side).train["coco"]]
        for side in (50.0, 0.0)
    }
    assert found == {50.0: [60], 0.0: [9, 60]}


def test_held_out_data_sets_train_nothing(small, tmp_path):
    (tmp_path / "LaSOT").symlink_to(small / "val")
    data = pairs.open_data(SimpleNamespace(datasets=("sequences",), held_out=("lasot",)), tmp_path)
    assert len(data.train["sequences"]) == 60 and not data.val and len(data.test) == 6
    assert data.describe("mine") == "mine: 60 training sequences, 6 test sequences"
    with pytest.raises(UserError, match="has no folder for sequences"):
        pairs.open_data(SimpleNamespace(datasets=("lasot",), held_out=("sequences",)), tmp_path)
    hidden = tmp_path / "got10k" / "test" / "GOT-10k_Test_000001"
    _frames(hidden, ["00000001.jpg", "00000002.jpg"])
    (hidden / "groundtruth.txt").write_text("5,6,10,10\n")
    (hidden.parent / "list.txt").write_text(f"{hidden.name}\n")
    with pytest.raises(UserError, match="without boxes beyond the first frame: GOT-10k_Test_000001"):
        pairs.open_data(SimpleNamespace(datasets=("lasot",), held_out=("got10k",)), tmp_path)
