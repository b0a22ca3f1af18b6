"""Lists and folders of videos mean what they say, whatever the locale, or are refused in one line."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common.data import video
from common.data.video import check
from common.run import ROOT, UserError


def files(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def clip(path: Path, frames: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    video.write_video(path, [np.full((16, 24, 3), 20 * i, np.uint8) for i in range(frames)], fps=25)
    return path


def rows(root: Path, split: str) -> list[tuple[str, str]]:
    videos = video.open_videos(root, split)
    return [(path.name, videos.classes[label]) for path, label in zip(videos.paths, videos.labels)]


# One numbering --------------------------------------------------------------------------------------------

HEAD = "label,youtube_id,time_start,time_end,split\n"


def _folders(root, train, val):
    files(root, *(f"train/{name}/{name}.mp4" for name in train), *(f"val/{name}/{name}.mp4" for name in val))


def _kinetics(root, train, val):
    for split, names in (("train", train), ("val", val)):
        write(root / "annotations" / f"{split}.csv", HEAD + "".join(f"{name},{name},0,10,{split}\n" for name in names))
        files(root, *(f"{split}/{name}_000000_000010.mp4" for name in names))


@pytest.mark.parametrize("layout", [_folders, _kinetics])
def test_train_numbers_the_classes(tmp_path, layout):
    """A validation split that lacks a class keeps the others' numbers; one that has another is refused."""
    layout(tmp_path / "fewer", "abc", "bc")
    videos = video.open_videos(tmp_path / "fewer", "val")
    assert videos.classes == ["a", "b", "c"] and videos.labels.tolist() == [1, 2]
    layout(tmp_path / "other", "ab", "abz")
    with pytest.raises(UserError, match="val has classes that train has not: z"):
        video.open_videos(tmp_path / "other", "val")


def test_train_numbers_the_classes_of_lists(tmp_path):
    files(tmp_path, *(f"{name}.mp4" for name in "abc"))
    write(tmp_path / "train.txt", "a.mp4 0\nb.mp4 1\nc.mp4 2\n")
    write(tmp_path / "val.txt", "b.mp4 1\n")
    assert video.open_videos(tmp_path, "val").classes == ["0", "1", "2"]
    write(tmp_path / "val.txt", "b.mp4 3\n")
    with pytest.raises(UserError, match="labels run from 3 to 3, expected 0 to 2"):
        video.open_videos(tmp_path, "val")


def test_a_class_folder_without_videos_is_named(tmp_path):
    _folders(tmp_path, "abc", "abc")
    (tmp_path / "train" / "b" / "b.mp4").unlink()
    with pytest.raises(UserError, match=r"no videos in class folders \['b'\]"):
        video.open_videos(tmp_path, "train")


@pytest.mark.parametrize("labels, message", [
    ((1, 2, 3), "run from 1 to 3 over 3 videos, expected to start at 0"),
    ((0, 1, 99_999_999_999), "run from 0 to 99999999999 over 3 videos"),
])
def test_labels_that_name_no_class_are_refused(tmp_path, labels, message):
    files(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    write(tmp_path / "train.txt", "".join(f"{name}.mp4 {label}\n" for name, label in zip("abc", labels)))
    with pytest.raises(UserError, match=message):
        video.open_videos(tmp_path, "train")


def test_labels_that_count_from_one_are_read_where_the_classes_are_numbered(tmp_path):
    """UCF101's own classInd.txt beside the lists says what the numbers are."""
    files(tmp_path, "a.mp4", "b.mp4")
    write(tmp_path / "train.txt", "b.mp4 2\na.mp4 1\n")
    write(tmp_path / "val.txt", "b.mp4 2\n")
    write(tmp_path / "classInd.txt", "1 Archery\n2 Zebra\n")
    assert rows(tmp_path, "train") == [("b.mp4", "Zebra"), ("a.mp4", "Archery")]
    assert video.open_videos(tmp_path, "val").labels.tolist() == [1]
    write(tmp_path / "val.txt", "b.mp4 3\n")  # their conversion to JSON adds one once more
    with pytest.raises(UserError, match=r"label 3, .* has 1 to 2"):
        video.open_videos(tmp_path, "val")


# Prepared by others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "zips", "videos", "frames"])
@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_lists_without_suffixes(tmp_path, folder, suffix):
    """As the authors of CtP prepare their data: names without suffix, each a zip, a folder of frames or a video."""
    names = ["Archery/v_Archery_g01.c01", "Archery/v_b", "Zebra/v_c"]
    base = tmp_path / folder
    files(base, f"{names[0]}.zip", f"{names[1]}.webm", f"{names[2]}/img_00001.jpg")
    write(tmp_path / "annotations" / "classInd.txt", "1 Archery\n2 Zebra\n")
    for split in ("train", "test"):
        text = "".join(f"{name} {label}\n" for name, label in zip(names, (1, 1, 2)))
        if suffix == ".json":
            text = json.dumps([{"name": name, "label": label} for name, label in zip(names, (1, 1, 2))])
        write(tmp_path / "annotations" / f"{split}_split_1{suffix}", text)
    expected = [("v_Archery_g01.c01.zip", "Archery"), ("v_b.webm", "Archery"), ("v_c", "Zebra")]
    assert rows(tmp_path, "train") == rows(tmp_path, "val") == expected


def test_kinetics_as_it_is_found(tmp_path):
    """Converted to another container, in class folders whose spaces are _, without their times."""
    names = ["a_000003_000013.webm", "tap_dancing/b_000003_000013.mkv", "tap dancing/c.mp4", "d.mp4"]
    files(tmp_path / "train", *names)
    write(tmp_path / "annotations/train.csv", HEAD + "".join(f"tap dancing,{name},3,13,train\n" for name in "abcd"))
    assert [str(p.relative_to(tmp_path / "train")) for p in video.open_videos(tmp_path, "train").paths] == names


def test_ucf101_converted_to_another_container(tmp_path):
    write(tmp_path / "ucfTrainTestlist/classInd.txt", "1\tArchery\n")
    write(tmp_path / "ucfTrainTestlist/trainlist01.txt", "Archery/a.avi 1\nArchery/b.avi 1\n")
    files(tmp_path / "UCF-101/Archery", "a.mp4", "b.zip")
    assert rows(tmp_path, "train") == [("a.mp4", "Archery"), ("b.zip", "Archery")]


# What a list may hold -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, text, message", [
    ("ucfTrainTestlist/classInd.txt", "Archery\n", r"classInd\.txt has a line 'Archery', expected a number"),
    ("ucfTrainTestlist/classInd.txt", "", r"classInd\.txt is empty"),
    ("ucfTrainTestlist/classInd.txt", "1 A\n1 B\n", "of its own"),
    ("annotations/train.csv", "a,b\n1,2\n", "has columns a, b, expected label, time_end, time_start, youtube_id"),
    ("annotations/train.csv", HEAD + "x" * 200_000 + "\n", "is no table"),
    ("train.txt", b"a.mp4 0\ncaf\xe9.mp4 0\n", r"train\.txt is not UTF-8 in line 2"),
    ("train.json", '{"a": 0}', "holds no list"), ("train.json", "[" * 99_999, "is no JSON"),
    ("train.txt", "a.mp4 1_000\n", r"1 of 1 train videos .* line 'a\.mp4 1_000'"),
    ("train.txt", "a\0.mp4 0\n", "no file"), ("train.txt", "a" * 5000 + " 0\n", "no file"),
    ("train.txt", " " * 200_000 + "x\n", "1 of 1 train videos"),
    ("train.json", '[{"name": "a.mp4"}, 3, {"name": null, "label": null}]', "3 of 3 train videos"),
])
def test_what_is_wrong_with_a_list_is_one_line(tmp_path, name, text, message):
    files(tmp_path, "a.mp4")
    write(tmp_path / name, text)
    with pytest.raises(UserError, match=message):
        video.open_videos(tmp_path, "train")


def test_a_byte_order_mark_and_other_ends_of_lines(tmp_path):
    files(tmp_path, "a.mp4", "b.mp4")
    write(tmp_path / "train.txt", b"\xef\xbb\xbfa.mp4 0\r\nb.mp4 1\r\n")
    assert rows(tmp_path, "train") == [("a.mp4", "0"), ("b.mp4", "1")]


def test_the_locale_changes_nothing(tmp_path):
    """Lists are UTF-8, and so are names on disk, though Python takes both to be ASCII."""
    clip(tmp_path / "train/café/é.avi")
    clip(tmp_path / "lists/é.avi")
    write(tmp_path / "lists/train.txt", "é.avi 0\n")
    write(tmp_path / "lists/classes.txt", "café\n")
    code = """
import sys
from common.data import video
for root in sys.argv[1:]:
    videos = video.open_videos(root, "train")
    with video.open_video(videos.paths[0]) as opened:
        print(ascii(videos.classes), len(opened))
"""
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, tmp_path / "lists"], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=True,
    )
    assert done.stdout.splitlines() == ["['caf\\xe9'] 6"] * 2


def test_a_class_whose_name_is_no_text(tmp_path):
    folder = os.fsencode(tmp_path / "train") + b"/caf\xe9"
    os.makedirs(folder)
    Path(os.fsdecode(folder + b"/a.mp4")).write_bytes(b"x")
    assert video.open_videos(tmp_path, "train").classes == ["caf\\xe9"]


# What stands beside the videos ----------------------------------------------------------------------------


def test_what_is_no_video_is_counted(tmp_path):
    files(tmp_path, "train/a/1.TS", "train/a/2.wmv", "train/a/3.3gp", "train/a/notes.md", "train/a/README",
          "train/a/._1.ts", "train/a/.ipynb_checkpoints/x.mp4", "train/.ipynb_checkpoints/x.mp4", "train/b/4.gif",
          "train/b/Thumbs.db", "train/b/5.xyz", "train/b/6.md")
    videos = video.open_videos(tmp_path, "train")
    assert [p.name for p in videos.paths] == ["1.TS", "2.wmv", "3.3gp", "4.gif"] and videos.classes == ["a", "b"]
    assert videos.skipped == {
        "hidden or system files": 4, "files that are no video (.md)": 2, "files that are no video (no suffix)": 1,
        "files that are no video (.xyz)": 1,
    }
    assert videos.notes() == (
        "2 files that are no video (.md), 1 files that are no video (.xyz), 1 files that are no video (no suffix), "
        "4 hidden or system files"
    )


def test_what_a_list_names_and_cannot_be_used_is_counted(tmp_path):
    files(tmp_path, *(f"{i}.mp4" for i in range(1, 200)))
    write(tmp_path / "train.txt", "".join(f"{i}.mp4 0\n" for i in range(200)))
    assert video.open_videos(tmp_path, "train").notes() == "1 listed videos that cannot be used"


def test_links_are_followed(tmp_path):
    files(tmp_path, "elsewhere/x.mp4", "elsewhere/y/1.png")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "b").mkdir()
    (tmp_path / "train" / "b" / "z.mp4").symlink_to(tmp_path / "elsewhere" / "x.mp4")
    assert rows(tmp_path, "train") == [("x.mp4", "a"), ("y", "a"), ("z.mp4", "b")]


@pytest.mark.parametrize("link, target", [("train/self", "train"), ("train/a/self", "train"), ("train/up", "")])
def test_a_loop_of_links_is_an_error(tmp_path, link, target):
    files(tmp_path, "train/a/x.mp4")
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=r"links to .* a folder that it lies in"):
        video.open_videos(tmp_path, "train")
    with pytest.raises(UserError, match="a folder that it lies in"):
        check.check(tmp_path)


def test_a_link_to_itself_and_a_pipe_are_missing(tmp_path):
    write(tmp_path / "train.txt", "loop.mp4 0\npipe.mp4 0\n")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(UserError, match=r"2 of 2 train videos .* no file .*loop\.mp4"):
        video.open_videos(tmp_path, "train")


# Commands -------------------------------------------------------------------------------------------------


def _set(root: Path) -> Path:
    for split in ("train", "val"):
        for name in ("a/1.mp4", "a/2.mp4", "b/3.avi"):
            clip(root / split / name)
    (root / "train/a/2.mp4").write_bytes(b"x" * 99)
    files(root, "train/a/notes.md", "train/b/._3.avi")
    (root / "val/b/4").mkdir()
    for i in (1, 2, 4):
        (root / f"val/b/4/{i}.png").write_bytes(b"x")
    return root


def test_check_says_what_is_there_and_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        check.check(_set(tmp_path))
    assert left.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    (first,) = [line for line in lines if line.endswith("train/a/1.mp4")]
    assert first.split()[:6] == ["6", "24", "16", "0", "25.000", "h264"]
    wrong = [line for line in lines if line.startswith("  wrong: ")]
    assert len(wrong) == 2 and "train/a/2.mp4 is no readable video" in wrong[0]
    assert "val/b/4 cannot be read: 1 of 4 frames are missing, the first after 2.png" in wrong[1]
    assert "train: 3 videos of 2 classes; 1 files that are no video (.md), 1 hidden or system files passed over, " in (
        lines[-3]
    )
    assert lines[-1] == (
        "7 videos, 7 looked at, 2 wrong; skipped: 1 files that are no video (.md), 1 hidden or system files"
    )


def test_lists_of_what_can_be_read(tmp_path, capsys):
    """What is wrong is left out and named; the folder of lists is opened as any other."""
    root, out = _set(tmp_path / "set"), tmp_path / "out"
    check.lists(root, out)
    for split, names in (("train", ["1.mp4", "3.avi"]), ("val", ["1.mp4", "2.mp4", "3.avi"])):
        videos = video.open_videos(out, split)
        assert [path.name for path in videos.paths] == names and videos.classes == ["a", "b"]
    left_out = (out / "left_out.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in left_out] == ["train", "val"] and "2.mp4" in left_out[0]
    assert "train: 2 of 3 videos can be read" in capsys.readouterr().out


def test_frames_of_video_are_found_below_any_folder(tmp_path):
    files(tmp_path, "x/1.png", "x/2.png", "y/z/c.mp4", "y/z/d.zip", "y/e.md")
    found = [str(path.relative_to(tmp_path)) for path in check.find(tmp_path, Counter())]
    assert found == ["x", "y/z/c.mp4", "y/z/d.zip"]
