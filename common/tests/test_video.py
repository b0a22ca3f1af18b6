"""Videos: the frame asked for is the frame given, lists mean what they say, damage is found, the tiny set is stable."""

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import loader, video
from common.data.tiny.clips import MOTIONS, clips
from common.run import ROOT, UserError

REAL = ROOT.parent / "shared" / "data" / "video" / "videos_small.tar"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return clips(tmp_path_factory.mktemp("tiny") / "clips")


def _counting(frames: int, height: int = 32, width: int = 48) -> list[np.ndarray]:
    """Frame i is grey level 3 i + 20: a frame tells its number through any codec."""
    return [np.full((height, width, 3), 20 + 3 * i, np.uint8) for i in range(frames)]


def _numbers(frames: np.ndarray) -> list[int]:
    return [round((frame.mean() - 20) / 3) for frame in frames.astype(float)]


def _frames(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i, frame in enumerate(_counting(count), 1):
        Image.fromarray(frame).save(folder / f"{i}.png")  # not padded: 10 comes after 9
    return folder


@pytest.fixture(params=[".avi", ".mp4", ".mkv", "folder"])
def counting(request, tmp_path):
    """61 frames in which each kind of file needs its own way of finding a frame."""
    if request.param == "folder":
        return _frames(tmp_path / "frames", 61)
    path = tmp_path / f"counting{request.param}"
    if request.param == ".mkv":
        _write_with_b_frames(path, _counting(61))
    else:
        video.write_video(path, _counting(61), fps=25)
    return path


def _write_with_b_frames(path, frames):
    """H.264 whose frames are stored out of order, with a key frame every ten."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "2", "g": "10"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_asked_for_a_frame_one_gets_it(counting):
    rng = np.random.default_rng(0)
    with video.open_video(counting) as opened:
        assert len(opened) == 61
    for indices in ([0], [60], [60, 0, 31, 31], *(rng.integers(61, size=5).tolist() for _ in range(5))):
        with video.open_video(counting) as opened:
            frames = opened.read(indices)
            assert frames.dtype == np.uint8 and frames.shape == (len(indices), 32, 48, 3)
            assert _numbers(frames) == indices
            assert _numbers(opened.read([7])) == [7], "a second read of an open file"


def test_a_frame_that_is_not_there_is_an_error(counting):
    with video.open_video(counting) as opened, pytest.raises(IndexError):
        opened.read([61])


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_file(), reason=f"needs the real videos of {REAL}")
def test_real_files_frame_by_frame(tmp_path):
    import av

    with tarfile.open(REAL) as archive:
        archive.extractall(tmp_path, filter="data")
    files = sorted(p for p in tmp_path.rglob("*") if p.suffix in video.SUFFIXES)
    assert len(files) == 15
    for path in files:
        with av.open(str(path), metadata_errors="replace") as container:
            every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        rng = np.random.default_rng(0)
        with video.open_video(path) as opened:
            assert 0 <= len(opened) - len(every) <= video.SLACK, path
            for _ in range(2):
                indices = rng.integers(len(opened), size=4).tolist()
                for number, frame in zip(indices, opened.read(indices)):
                    assert np.array_equal(frame, every[min(number, len(every) - 1)]), (path, number)


# Damage ---------------------------------------------------------------------------------------------------


def _cut(path: Path, share: float = 0.5) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def _noisy(path: Path) -> Path:
    """Frames too rich to be stored in a few bytes, so that half a file is half a video."""
    rng = np.random.default_rng(0)
    video.write_video(path, list(rng.integers(0, 256, (40, 32, 48, 3), dtype=np.uint8)), fps=25)
    return path


@pytest.mark.parametrize("suffix", [".avi", ".mp4"])
@pytest.mark.parametrize("damage, message", [
    (_cut, "cut off|no readable video|damaged"),
    (lambda path: path.write_bytes(b""), "no readable video"),
    (lambda path: path.write_bytes(b"<html>404</html>" * 99), "no readable video"),
    (Path.unlink, "no readable video"),
])
def test_a_damaged_file_is_an_os_error(tmp_path, suffix, damage, message):
    path = _noisy(tmp_path / f"bad{suffix}")
    damage(path)
    with pytest.raises(OSError, match=message), video.open_video(path) as opened:
        opened.read(range(40))


def test_a_file_without_pictures_is_an_os_error(tmp_path):
    import wave

    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    with pytest.raises(OSError, match="no video stream"):
        video.VideoFile(tmp_path / "sound.wav")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="holds no frames"):
        video.open_video(tmp_path / "empty")


def test_a_frame_that_is_cut_off_is_an_os_error(tmp_path):
    folder = _frames(tmp_path / "frames", 5)
    _cut(folder / "3.png")
    with video.open_video(folder) as opened:
        assert _numbers(opened.read([0, 4])) == [0, 4]
        with pytest.raises(OSError):
            opened.read([2])


def _tree(root: Path, count: int = 20) -> Path:
    for split in ("train", "val"):
        for i in range(count):
            path = root / split / "abc"[i % 3] / f"{i:02d}.avi"
            path.parent.mkdir(parents=True, exist_ok=True)
            video.write_video(path, _counting(12), fps=25)
    return root


def _middle(opened, rng):
    return torch.from_numpy(opened.read([int(rng.integers(len(opened)))]))


def test_training_takes_the_neighbour_of_a_damaged_video_and_names_it(tmp_path):
    root = _tree(tmp_path)
    _cut(root / "train" / "b" / "04.avi")
    videos = video.open_videos(root, "train")
    samples = loader.Augmented(video.Clips(videos, _middle), lambda x: x, report=tmp_path / "unreadable.txt")
    bad = next(i for i in range(len(videos)) if "04.avi" in videos.name(i))
    assert samples[(bad, 0)][1] == videos.labels[bad + 1]
    (line,) = (tmp_path / "unreadable.txt").read_text().splitlines()
    assert "04.avi\t" in line
    _cut(root / "train" / "c" / "05.avi")
    with pytest.raises(UserError, match=r"2 of 20 samples.*05\.avi"):
        samples[(next(i for i in range(len(videos)) if "05.avi" in videos.name(i)), 0)]


def test_evaluation_refuses_a_damaged_video(tmp_path):
    root = _tree(tmp_path)
    _cut(root / "val" / "a" / "03.avi")
    plain = loader.Plain(video.Clips(video.open_videos(root, "val"), _middle, seed=0), lambda x: x)
    with pytest.raises(UserError, match=r"cannot evaluate.*03\.avi"):
        list(loader.eval_loader(plain, 4))


# Samples follow from seeds --------------------------------------------------------------------------------


def test_clips_follow_from_the_seed_whatever_the_workers(tiny):
    videos = video.open_videos(tiny, "train")
    seen = []
    for workers in (0, 2):
        batches = loader.train_loader(video.Clips(videos, _middle), lambda x: x, 8, 3, seed=0, workers=workers)
        seen.append(torch.cat([x for x, _ in batches]))
    assert torch.equal(*seen)
    augmented = loader.Augmented(video.Clips(videos, _middle), lambda x: x)
    assert len({augmented[(5, seed)][0].sum().item() for seed in range(8)}) > 1


def test_held_out_clips_are_the_same_every_time(tiny):
    videos = video.open_videos(tiny, "val")
    once, again, other = (video.Clips(videos, _middle, seed=seed) for seed in (0, 0, 1))
    for samples in (once, again):
        np.random.seed(os.getpid() % 1000 + id(samples) % 1000)
    assert all(torch.equal(once[i][0], again[i][0]) for i in (0, 50))
    assert any(not torch.equal(once[i][0], other[i][0]) for i in range(8))


# Layouts --------------------------------------------------------------------------------------------------


def _files(root: Path, names) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def _ucf101(root):
    (root / "ucfTrainTestlist").mkdir()
    (root / "ucfTrainTestlist" / "classInd.txt").write_text("1 Zebra\n2 Archery\n")
    (root / "ucfTrainTestlist" / "trainlist01.txt").write_text("Zebra/a.avi 1\nArchery/b.avi 2\n")
    (root / "ucfTrainTestlist" / "testlist01.txt").write_text("Archery/c.avi\n")
    _files(root / "UCF-101", ["Zebra/a.avi", "Archery/b.avi", "Archery/c.avi"])
    return {"train": [("a.avi", "Zebra", 0), ("b.avi", "Archery", 1)], "val": [("c.avi", "Archery", 1)]}


def _hmdb51(root):
    lists = root / "testTrainMulti_7030_splits"
    lists.mkdir()
    (lists / "wave_test_split1.txt").write_text("w1.avi 1 \nw2.avi 2 \nw3.avi 0 \n")
    (lists / "cartwheel_test_split1.txt").write_text("c1.avi 1 \n")
    (lists / "wave_test_split2.txt").write_text("w3.avi 1 \n")
    (lists / "cartwheel_test_split2.txt").write_text("c1.avi 2 \n")
    _files(root, ["wave/w1.avi", "wave/w2.avi", "wave/w3.avi", "cartwheel/c1.avi"])
    return {"train": [("c1.avi", "cartwheel", 0), ("w1.avi", "wave", 1)], "val": [("w2.avi", "wave", 1)]}


def _ssv1(root):
    (root / "something-something-v1-labels.csv").write_text("Pushing a; thing\nHolding\n")
    (root / "something-something-v1-train.csv").write_text("7;Holding\n8;Pushing a; thing\n")
    (root / "something-something-v1-validation.csv").write_text("9;Holding\n")
    _files(root / "20bn-something-something-v1", ["7/00001.jpg", "8/00001.jpg", "9/00001.jpg"])
    return {"train": [("7", "Holding", 1), ("8", "Pushing a; thing", 0)], "val": [("9", "Holding", 1)]}


def _kinetics(root):
    (root / "annotations").mkdir()
    head = "label,youtube_id,time_start,time_end,split\n"
    (root / "annotations" / "train.csv").write_text(f"{head}tap dancing,--a_b,3,13,train\nabseiling,c,0,10,train\n")
    (root / "annotations" / "val.csv").write_text(f"{head}abseiling,d,1,11,val\ntap dancing,e,1,11,val\n")
    _files(root, ["train/--a_b_000003_000013.mp4", "train/abseiling/c_000000_000010.mp4",
                  "val/d_000001_000011.mp4", "val/e_000001_000011.mp4"])
    return {
        "train": [("--a_b_000003_000013.mp4", "tap dancing", 1), ("c_000000_000010.mp4", "abseiling", 0)],
        "val": [("d_000001_000011.mp4", "abseiling", 0), ("e_000001_000011.mp4", "tap dancing", 1)],
    }


def _list(root):
    (root / "classes.txt").write_text("zero\none\n")
    (root / "train.txt").write_text("some clips/a b.mp4 1\nframes/c 30 0\n")
    (root / "val.txt").write_text("d.mp4 0\n")
    _files(root, ["some clips/a b.mp4", "frames/c/1.jpg", "d.mp4"])
    return {"train": [("a b.mp4", "one", 1), ("c", "zero", 0)], "val": [("d.mp4", "zero", 0)]}


def _folders(root):
    _files(root, ["train/x/a.mp4", "train/x/frames/1.jpg", "train/y/c.AVI", "val/x/d.webm", "val/y/e.mp4",
                  "train/x/notes.md"])
    return {"train": [("a.mp4", "x", 0), ("frames", "x", 0), ("c.AVI", "y", 1)],
            "val": [("d.webm", "x", 0), ("e.mp4", "y", 1)]}


LAYOUTS = [_ucf101, _hmdb51, _ssv1, _kinetics, _list, _folders]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    expected = layout(tmp_path)
    for split, rows in expected.items():
        videos = video.open_videos(tmp_path, split)
        found = [(p.name, videos.classes[label], label) for p, label in zip(videos.paths, videos.labels.tolist())]
        assert found == rows and all(path.exists() for path in videos.paths)


def test_another_fold(tmp_path):
    _hmdb51(tmp_path)
    assert [p.name for p in video.open_videos(tmp_path, "train", fold=2).paths] == ["w3.avi"]


def test_labels_that_count_from_one_are_refused(tmp_path):
    _list(tmp_path)
    (tmp_path / "val.txt").write_text("d.mp4 2\n")
    with pytest.raises(UserError, match="labels run from 2 to 2, expected 0 to 1"):
        video.open_videos(tmp_path, "val")


@pytest.mark.parametrize("prepare, message", [
    (lambda root: shutil.rmtree(root), "no data folder"),
    (lambda root: None, "has no train split"),
    (lambda root: (root / "train").mkdir(), "lists no train videos"),
    (lambda root: (root / "ucfTrainTestlist").mkdir(), r"classInd\.txt is missing"),
    (lambda root: (root / "train.txt").write_text("gone.mp4 0\n"), r"1 of 1 train videos .* no file .*gone\.mp4"),
    (lambda root: (root / "train.txt").write_text("no label\n"), "1 of 1 train videos .* line 'no label'"),
])
def test_a_wrong_folder_is_explained(tmp_path, prepare, message):
    root = tmp_path / "data"
    root.mkdir()
    prepare(root)
    with pytest.raises(UserError, match=message):
        video.open_videos(root, "train")


def test_a_few_missing_videos_are_passed_over_in_training_only(tmp_path, capsys):
    names = [f"{i}.mp4" for i in range(200)]
    _files(tmp_path, names[1:])
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("".join(f"{name} 0\n" for name in names) + "nonsense\n")
    assert len(video.open_videos(tmp_path, "train")) == 199
    assert "2 of 201 train videos" in capsys.readouterr().out
    with pytest.raises(UserError, match="none in evaluation"):
        video.open_videos(tmp_path, "val")


# The tiny set ---------------------------------------------------------------------------------------------


def test_tiny_clips(tiny, tmp_path):
    for split, count in (("train", 36), ("val", 12)):
        videos = video.open_videos(tiny, split)
        assert videos.classes == list(MOTIONS) and np.bincount(videos.labels).tolist() == [count] * 8
    groups = {s: {p.stem.split("_")[2] for p in video.open_videos(tiny, s).paths} for s in ("train", "val")}
    assert not groups["train"] & groups["val"], "a photograph is in one split only"
    with video.open_video(videos.paths[0]) as opened:
        assert opened.read(range(len(opened))).shape == (36, 40, 48, 3)
    again = clips(tmp_path / "again")
    for path in videos.paths[::30]:
        with video.open_video(path) as one, video.open_video(again / path.relative_to(tiny)) as other:
            assert np.array_equal(one.read([0, 20]), other.read([0, 20]))


def test_what_a_camera_sees_moves_the_other_way(tiny):
    """Phase correlation of neighbouring frames: the label is what is in the pixels."""
    for name, sign in (("PanRight", -1), ("PanLeft", 1)):
        moved = []
        for path in sorted((tiny / "UCF-101" / name).iterdir())[:12]:
            with video.open_video(path) as opened:
                a, b = np.fft.fft2(opened.read([10, 14]).mean(3))
            peak = np.unravel_index(np.fft.ifft2(b * a.conj() / np.abs(a * b)).real.argmax(), (40, 48))[1]
            moved.append(peak - 48 * (peak > 24))
        assert np.sign(np.median(moved)) == sign


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_what_is_written_can_be_seen(tmp_path, suffix):
    video.write_video(tmp_path / f"out{suffix}", _counting(5), fps=4)
    if suffix == ".gif":
        with Image.open(tmp_path / "out.gif") as picture:
            assert picture.n_frames == 5 and picture.info["duration"] == 250
    else:
        with video.open_video(tmp_path / "out.mp4") as opened:
            assert _numbers(opened.read(range(5))) == list(range(5))
