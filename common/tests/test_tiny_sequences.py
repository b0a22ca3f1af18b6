"""The generated tracking set: GOT-10k's layout, true boxes and labels, the same every time."""

import numpy as np
import pytest

from common.data import tracking
from common.data.tiny import sequences as tiny
from common.metrics import trackers


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tiny.sequences(tmp_path_factory.mktemp("tiny") / "sequences")


def test_tiny_sequences_are_got10k(small, capsys):
    splits = {split: tracking.open_sequences(small, split) for split in ("train", "val")}
    assert {split: len(found) for split, found in splits.items()} == {"train": 60, "val": 6}
    for s in (s for found in splits.values() for s in found):
        assert len(s) == 40 and s.size == (240, 180) == tracking.read_frame(s.frames[0]).shape[1::-1]
        assert (s.boxes[:, :2] >= 0).all() and (s.boxes[:, :2] + s.boxes[:, 2:] <= (240, 180)).all()
        assert s.visible[0] and s.visible.sum() >= 20 and s.boxes[:, 2:].min() > 8
        steps = np.abs(np.diff(s.boxes[:, :2] + s.boxes[:, 2:] / 2, axis=0))
        assert steps.mean() > 0.2 and steps.max() < 20
    covers = np.concatenate([s.cover for s in splits["train"]])
    assert covers.min() < 4 and (covers == 8).mean() > 0.7
    tracking.main(small)
    assert "train: 60 sequences (got10k), 2,400 frames" in capsys.readouterr().out


def test_tiny_splits_share_no_photograph(small):
    used = {
        split: {name for meta in small.glob(f"{split}/*/meta_info.ini")
                for name in meta.read_text().splitlines()[1].split("photographs ")[1].split(", ")}
        for split in ("train", "val")
    }
    assert used == {split: set(photos) for split, photos in tiny.PHOTOS.items()}
    assert not used["train"] & used["val"]


def test_a_tiny_scene_is_written_the_same_every_time(small, tmp_path):
    photos = {name: tiny._photo(name) for name in tiny.PHOTOS["val"]}
    (again,) = tiny._write_scene(tmp_path, photos, 2, "val")
    for path in sorted((tmp_path / again).iterdir()):
        assert (small / "val" / "GOT-10k_Val_000003" / path.name).read_bytes() == path.read_bytes()


def test_a_training_scene_has_a_sequence_for_each_object(small):
    """The same frames under other boxes, the hidden parts of each known."""
    scenes = {}
    for s in tracking.open_sequences(small, "train"):
        scenes.setdefault(s.frames[20].read_bytes(), []).append(s)
    assert len(scenes) == 24 and {len(scene) for scene in scenes.values()} == {2, 3}
    overlap, cover = [], []
    for number, (top, *below) in enumerate(scenes.values()):
        for s in below if number % 3 != 2 else ():  # in the others a bar hides things, too
            low = np.maximum(s.boxes[:, :2], top.boxes[:, :2])
            high = np.minimum(s.boxes[:, :2] + s.boxes[:, 2:], top.boxes[:, :2] + top.boxes[:, 2:])
            overlap += ((high - low).clip(0).prod(1) / s.boxes[:, 2:].prod(1)).tolist()
            cover += s.cover.tolist()
    overlap, cover = np.array(overlap), np.array(cover)
    assert cover[overlap > 0.7].max() < 6 and cover[overlap == 0].mean() > 7


def test_tiny_boxes_enclose_what_is_drawn():
    thing = tiny._thing(np.full((300, 300, 3), 255, np.uint8), np.random.default_rng(0))
    turn = 0.4
    matrix = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0]]) * 61.3
    matrix[:, 2] = 100.3, 80.8
    opacity = tiny._draw(np.zeros((180, 240, 3), np.float32), thing, matrix, 1.0)
    outline = thing.corners() @ matrix[:, :2].T + matrix[:, 2]
    rows, columns = (np.flatnonzero((opacity > 0.5).any(axis)) for axis in (1, 0))
    drawn = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose([*outline.min(0), *outline.max(0)], drawn, atol=0.8)


def test_hard_sequences_begin_as_the_others_and_change_more(small, tmp_path):
    hard = tiny.hard_sequences(tmp_path / "hard")
    pairs = list(zip(tracking.open_sequences(small, "val"), tracking.open_sequences(hard, "val")))
    assert len(tracking.open_sequences(hard, "train")) == 60 and len(pairs) == 6

    def extent(sequence):  # of the logarithm of its area, and of its shape
        w, h = sequence.boxes[:, 2:].T
        return np.ptp(np.log(w * h)), np.ptp(np.log(w / h))

    for easy, other in pairs:
        assert easy.frames[0].read_bytes() == other.frames[0].read_bytes()
        assert other.boxes[:, 2:].min() > 8 and other.visible[0] and other.visible.sum() >= 20
    (area, shape), (more, bent) = (np.mean([extent(pair[i]) for pair in pairs], axis=0) for i in (0, 1))
    assert more > 1.4 * area and bent > 1.2 * shape
    scores = []
    for i in (0, 1):
        sequences, out = [pair[i] for pair in pairs], tmp_path / f"ncc{i}"
        trackers.evaluate(trackers.BASELINES["template matching (NCC)"](), sequences, out, settings={"tracker": "ncc"})
        scores.append(trackers.score(sequences, out).scores["ao"])
    assert scores[1] < scores[0] - 10
