"""Folders and shards as people have them, and the index of them that all processes share."""

import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data import images, index
from common.data.picture import Unreadable, read_picture
from common.run import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


# Folders as they are ----------------------------------------------------------------------------------------


def _picture(path, color=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (color, 0, 0)).save(path, "PNG")


def _opened(root, split="train"):
    data = images.open_images(root, split)
    return [str(path.relative_to(root / split)) for path in data.sources], data.labels.tolist(), data.classes


def test_samples_are_in_the_order_of_sorted_paths(tmp_path):
    """The order in which earlier versions listed them, on which shuffling and resumption depend."""
    root = tmp_path / "train"
    names = [
        "b/a.png", "b/a/b.png", "b/a-b.png", "b/a b.PNG", "b/A.png", "b/a/B/c.jpeg", "b/é.png", "b/e\u0301.png",
        "b/z.png", "b/日本.png", "b/\U0001f600.png", "b/ﬀ.png", "b/a.d/x.png", "b/a/.png.png.png", "b/10.png",
        "b/9.png", "B/x.png", "Ä/x.png", "a b/x.png", "a/x.png", "a-b/x.png", "_/x.WebP",
    ]
    names += [os.fsdecode(b"b/caf\xe9.png"), os.fsdecode(b"caf\xe9/x.png")]
    for name in names:
        _picture(root / name)
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    wanted = [path for name in classes for path in sorted((root / name).rglob("*")) if path.is_file()]
    wanted = [path for path in wanted if not path.name.startswith(".")]
    data = images.open_images(tmp_path, "train")
    assert list(data.sources) == wanted and len(wanted) == len(names) - 1
    assert [data.classes[label] for label in data.labels] == [
        path.relative_to(root).parts[0].replace("\udce9", "\\xe9") for path in wanted
    ]
    assert data.sources[-1] == wanted[-1] and data.sources[2:5] == wanted[2:5]
    assert all(data.name(i).isprintable() for i in range(len(data)))


def test_pictures_without_classes(tmp_path):
    for name in ("b.png", "a/2.png", "a.png", "a/deep/1.jpg", ".hidden/1.png", "z/1.png"):
        _picture(tmp_path / name)
    files = index.Files(tmp_path, index.index_folder(tmp_path, classes=False))
    wanted = sorted(path for path in tmp_path.rglob("*.[pj]*g") if ".hidden" not in path.parts)
    assert list(files) == wanted and len(files) == 5
    with pytest.raises(IndexError):
        files[5]


def test_hidden_and_system_files_are_left_out_and_counted(tmp_path, capsys):
    for name in ("a/1.png", "a/._1.png", "a/.ipynb_checkpoints/1.png", ".ipynb_checkpoints/1.png", "__MACOSX/a/1.png",
                 "b/1.png", "b/@eaDir/1.png/small.jpg", "b/1.gif", "b/2.gif", "loose.png"):
        _picture(tmp_path / "train" / name)
    (tmp_path / "train/b/Thumbs.db").write_bytes(b"")
    names, labels, classes = _opened(tmp_path)
    assert (names, labels, classes) == (["a/1.png", "b/1.png"], [0, 1], ["a", "b"])
    left_out = images.open_images(tmp_path, "train").left_out
    assert left_out == {"hidden or system": 6, ".gif": 2, "beside the class folders": 1}
    assert "left out: 6 hidden or system, 2 .gif" in capsys.readouterr().err


def test_a_folder_of_other_files_is_told_what_lies_there(tmp_path):
    _picture(tmp_path / "train/a/1.tif")
    with pytest.raises(UserError, match=r"holds no images \(\.bmp, .*left out: 1 \.tif: expected one of"):
        images.open_images(tmp_path, "train")


def test_a_link_is_what_it_points_to(tmp_path):
    _picture(tmp_path / "store/x/1.png")
    _picture(tmp_path / "store/2.png")
    root = tmp_path / "data/train"
    (root / "a/deep").mkdir(parents=True)
    (root / "b").symlink_to(tmp_path / "store", target_is_directory=True)
    (root / "a/deep/link").symlink_to(tmp_path / "store/x", target_is_directory=True)
    (root / "a/2.png").symlink_to(tmp_path / "store/2.png")
    (root / "a/gone.png").symlink_to(tmp_path / "nowhere.png")
    names, labels, _ = _opened(tmp_path / "data")
    assert names == ["a/2.png", "a/deep/link/1.png", "a/gone.png", "b/2.png", "b/x/1.png"] and labels == [0, 0, 0, 1, 1]
    with pytest.raises(Unreadable, match="No such file"):
        images.open_images(tmp_path / "data", "train")[2]
    (root / "c").symlink_to(tmp_path / "nowhere", target_is_directory=True)
    with pytest.raises(UserError, match="train/c is a link that leads nowhere"):
        images.open_images(tmp_path / "data", "train")


@pytest.mark.parametrize("link, target", [("self", "."), ("a/deep/up", ".."), ("a/other", "../../train")])
def test_a_link_in_a_circle_is_an_error(tmp_path, link, target):
    _picture(tmp_path / "train/a/deep/1.png")
    (tmp_path / "train" / link).symlink_to(target, target_is_directory=True)
    with pytest.raises(UserError, match=f"{link} is a link that leads back"):
        images.open_images(tmp_path, "train")


def test_pipes_are_no_pictures(tmp_path):
    _picture(tmp_path / "train/a/1.png")
    os.mkfifo(tmp_path / "train/a/2.png")
    (tmp_path / "train/a/3.png").symlink_to("/dev/zero")
    data = images.open_images(tmp_path, "train")
    assert len(data) == 1 and data.left_out == {"pipes, sockets or devices": 2}
    for name in ("2.png", "3.png", ""):
        with pytest.raises(Unreadable, match="folder, pipe or device"):
            read_picture(tmp_path / "train/a" / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(tmp_path):
    _picture(tmp_path / "train/a/1.png")
    (tmp_path / "train/a").chmod(0)
    try:
        with pytest.raises(UserError, match=r"cannot list .*train/a: Permission denied"):
            images.open_images(tmp_path, "train")
    finally:
        (tmp_path / "train/a").chmod(0o700)


# Index ------------------------------------------------------------------------------------------------------


def test_an_index_is_made_anew_when_something_changed(tmp_path, monkeypatch):
    for name in ("a/1.png", "a/deep/2.png", "b/3.png"):
        _picture(tmp_path / "train" / name)
    monkeypatch.setattr(index, "SETTLED_NS", 0)
    walks = []
    monkeypatch.setattr(index, "_list", lambda *args, real=index._list: walks.append(args) or real(*args))
    assert _opened(tmp_path)[0] == _opened(tmp_path)[0] == ["a/1.png", "a/deep/2.png", "b/3.png"] and len(walks) == 1
    _picture(tmp_path / "train/a/deep/4.png")
    assert _opened(tmp_path)[0] == ["a/1.png", "a/deep/2.png", "a/deep/4.png", "b/3.png"] and len(walks) == 2
    (tmp_path / "train/b/3.png").rename(tmp_path / "train/b/0.png")
    assert _opened(tmp_path)[0][-1] == "b/0.png" and len(walks) == 3
    (tmp_path / "train/a/deep").rename(tmp_path / "train/c")
    assert _opened(tmp_path)[1:] == ([0, 1, 2, 2], ["a", "b", "c"]) and len(walks) == 4
    _picture(tmp_path / "train/b/0.png", color=200)  # new pixels need no new index
    assert images.open_images(tmp_path, "train")[1][0].getpixel((0, 0)) == (200, 0, 0) and len(walks) == 4


def test_what_changed_a_moment_ago_is_looked_at_again(tmp_path, monkeypatch):
    """Two changes in one tick of the file system's clock leave the same time behind."""
    _picture(tmp_path / "train/a/1.png")
    walks = []
    monkeypatch.setattr(index, "_list", lambda *args, real=index._list: walks.append(args) or real(*args))
    _opened(tmp_path), _opened(tmp_path)
    assert len(walks) == 2
    monkeypatch.setattr(index, "SETTLED_NS", 0)
    _opened(tmp_path)
    assert len(walks) == 2


@pytest.mark.parametrize("damage", [
    *[lambda home, text=text: (home / "about.json").write_text(text) for text in ("{", "{}", "[]", '{"stamp": 5}')],
    lambda home: next(home.glob("*-names.npy")).write_bytes(b""), lambda home: next(home.glob("*-labels.npy")).unlink(),
    lambda home: next(home.glob("*-starts.npy")).write_bytes(next(home.glob("*-starts.npy")).read_bytes()[:-8]),
])
def test_a_damaged_index_is_made_anew(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "SETTLED_NS", 0)
    for name in ("a/1.png", "b/3.png"):
        _picture(tmp_path / "train" / name)
    before = _opened(tmp_path)
    (home,) = index.cache_dir("index").iterdir()
    damage(home)
    assert _opened(tmp_path) == before


def test_old_arrays_are_deleted_one_index_later(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = []
    for i in range(4):
        _picture(tmp_path / f"train/a/{i}.png")
        data.append(images.open_images(tmp_path, "train"))
    (home,) = index.cache_dir("index").iterdir()
    assert len(list(home.glob("*.npy"))) == 6
    assert len(pickle.loads(pickle.dumps(data[-2])).sources) == 3 and len(data[0].sources) == 1  # mapped all the same
    os.utime(home / "about.json", (0, 0))
    _picture(tmp_path / "other/train/a/1.png")
    images.open_images(tmp_path / "other", "train")
    assert not home.exists() and len(list(index.cache_dir("index").iterdir())) == 1


@pytest.mark.parametrize("locks, builders", [(True, {1}), (False, {1, 2, 3})])
def test_processes_that_start_together_get_one_index(tmp_path, monkeypatch, locks, builders):
    for i in range(5):
        _picture(tmp_path / f"train/{i}/{i}.png")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "SETTLED_NS", 0)
    monkeypatch.setattr(index, "fcntl", index.fcntl if locks else None)

    def slow(*args, real=index._list):
        with open(tmp_path / "builds", "a") as file:
            file.write("x")
        time.sleep(0.5)
        return real(*args)

    monkeypatch.setattr(index, "_list", slow)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(_opened, [tmp_path] * 3, chunksize=1) == [_opened(tmp_path)] * 3
    assert len((tmp_path / "builds").read_text()) in builders and _opened(tmp_path)[1] == [0, 1, 2, 3, 4]


def test_an_index_travels_to_other_processes_as_its_place(tmp_path):
    for i in range(300):
        _picture(tmp_path / f"train/a/{i:03d}.png", i % 256)
    data = images.open_images(tmp_path, "train")
    packed = pickle.dumps(data)
    assert len(packed) < 2000
    again = pickle.loads(packed)
    assert list(again.sources) == list(data.sources) and again[299][0].getpixel((0, 0)) == (299 % 256, 0, 0)
    assert isinstance(again.labels.base, np.memmap)


# Shards -----------------------------------------------------------------------------------------------------


def _shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            content = b"" if isinstance(content, tarfile.TarInfo) else content
            member.size = len(content) or member.size
            tar.addfile(member, io.BytesIO(content))


def _png(color=0):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (color, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("train, val", [
    (["train-000000.tar", "train-000001.tar"], ["val-000000.tar"]),
    (["imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar"], ["imagenet1k-validation-00.tar"]),
    (["train_0.tar", "train_1.tar"], ["test_0.tar"]), (["train-a.tar", "train-b.tar"], ["valid-a.tar"]),
    (["train/000000.tar", "train/000001.tar"], ["val/000000.tar"]),
])
def test_usual_names_of_shards(tmp_path, train, val):
    for i, name in enumerate(train + val):
        _shard(tmp_path / name, {f"{i}.png": _png(i), f"{i}.cls": b"%d" % (i % 2)})
    (tmp_path / train[0]).with_name("._" + Path(train[0]).name).write_bytes(b"a Mac was here")
    data = images.open_images(tmp_path, "train")
    assert [Path(name).name for name in data.shards] == [Path(name).name for name in train]
    assert data.labels.tolist() == [0, 1] and data[1][0].getpixel((0, 0)) == (1, 0, 0)
    assert images.open_images(tmp_path, "val")[0][0].getpixel((0, 0)) == (2, 0, 0)


def test_class_folders_go_before_the_archives_they_came_in(tmp_path):
    _picture(tmp_path / "train/a/1.png")
    _shard(tmp_path / "train/a.tar", {"1.png": _png()})
    assert type(images.open_images(tmp_path, "train")) is images.ImageFolder


def test_a_replaced_shard_is_indexed_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "SETTLED_NS", 0)
    shard = tmp_path / "train-0.tar"
    _shard(shard, {"a.png": _png(), "a.cls": b"0", "b.png": _png(), "b.cls": b"1"})
    before = shard.stat().st_mtime_ns
    assert images.open_images(tmp_path, "train").labels.tolist() == [0, 1]
    _shard(shard, {"a.png": _png(), "a.cls": b"1", "b.png": _png(), "b.cls": b"0"})
    os.utime(shard, ns=(before, before))  # same size, same time
    assert images.open_images(tmp_path, "train").labels.tolist() == [1, 0]


def _odd_member(**fields):
    member = tarfile.TarInfo("a.png")
    for name, value in fields.items():
        setattr(member, name, value)
    return member


@pytest.mark.parametrize("members, expected", [
    ({"a.png": _png(), "a.cls": b"cat"}, "a.cls holds b'cat', no class number"),
    ({"a.png": _png(), "a.cls": b"-1"}, "no class number"), ({"a.png": _png(), "a.cls": b"1" * 30}, "no class number"),
    ({"a.png": _png(), "a.cls": b"2026010"}, "1 samples and label 2026010; .*classes.txt"),
    ({"a.png": _odd_member(type=tarfile.SYMTYPE, linkname="b.png"), "a.cls": b"0"}, "a.png is no plain file"),
    ({"a.png": _png()}, "1 samples lack image or .cls, such as a"),
    ({"a.txt": b"x"}, "no samples KEY.jpg with KEY.cls"),
])
def test_odd_shards_are_explained(tmp_path, members, expected):
    _shard(tmp_path / "train-0.tar", members)
    with pytest.raises(UserError, match=expected):
        images.open_images(tmp_path, "train")


def test_a_shard_with_a_damaged_header_is_not_half_a_shard(tmp_path):
    shard = tmp_path / "train-0.tar"
    _shard(shard, {f"{i}.{kind}": _png() if kind == "png" else b"0" for i in range(4) for kind in ("png", "cls")})
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[4].offset
    content = bytearray(shard.read_bytes())
    content[third + 148 : third + 156] = b"damaged\0"
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"no header at byte {third}"):
        images.open_images(tmp_path, "train")


def test_a_shard_of_negative_sizes_ends(tmp_path):
    """Of which Python's own reader made a loop."""
    head = bytearray(tarfile.TarInfo("a.png").tobuf())
    head[124:136] = b"\xff" * 10 + b"\xfe\x00"  # base 256: -512
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    (tmp_path / "train-0.tar").write_bytes(bytes(head) + bytes(1024))
    with pytest.raises(UserError, match="no readable webdataset shard"):
        images.open_images(tmp_path, "train")


@pytest.mark.parametrize("text, expected", [
    ("cat\n\ndog\n", "line 2 is blank"), ("cat\n", "names 1 classes, but the shards have label 1"),
    (b"caf\xe9\ndog\n", "not in UTF-8"),
])
def test_wrong_names_of_classes(tmp_path, text, expected):
    _shard(tmp_path / "train-0.tar", {"a.png": _png(), "a.cls": b"0", "b.png": _png(), "b.cls": b"1"})
    (tmp_path / "classes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=expected):
        images.open_images(tmp_path, "train")


def test_shards_of_validation_have_no_other_labels(tmp_path):
    _shard(tmp_path / "train-0.tar", {"a.png": _png(), "a.cls": b"0", "b.png": _png(), "b.cls": b"1"})
    _shard(tmp_path / "val-0.tar", {f"{i}.{kind}": _png() if kind == "png" else b"%d" % i
                                    for i in range(4) for kind in ("png", "cls")})
    with pytest.raises(UserError, match="validation has 2, 3, which training lacks"):
        images.open_both(tmp_path)


def test_names_are_utf8_whatever_the_locale(tmp_path):
    _shard(tmp_path / "shards/train-0.tar", {"a.png": _png(), "a.cls": b"0"})
    (tmp_path / "shards/classes.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\n")
    _picture(tmp_path / "folder/train/café/1.png")
    code = """if True:
        import sys; from common.data import images
        for kind in ("shards", "folder"):
            print(ascii(images.open_images(f"{sys.argv[1]}/{kind}", "train").classes))"""
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [r"['caf\xe9']"] * 2


# Classes ----------------------------------------------------------------------------------------------------


def test_the_classes_of_training_number_everything(tmp_path):
    for split, classes in (("train", "abcd"), ("val", "acd")):
        for name in classes:
            _picture(tmp_path / split / name / "1.png", ord(name))
    train, val = (images.open_images(tmp_path, split) for split in ("train", "val"))
    with pytest.raises(UserError, match="validation lacks b; expected the same in both"):
        images.same_classes(train.classes, val)
    renumbered = images.same_classes(train.classes, val, subset=True)
    assert renumbered.classes == list("abcd") and renumbered.labels.tolist() == [0, 2, 3]
    assert [image.getpixel((0, 0))[0] for image, _ in renumbered] == [ord(name) for name in "acd"]
    assert renumbered.name(1) == val.name(1)
    _picture(tmp_path / "val/b/1.png")
    again = images.open_images(tmp_path, "val")
    assert images.same_classes(train.classes, again) is again
    _picture(tmp_path / "val/zz/1.png")
    for subset in (False, True):
        with pytest.raises(UserError, match="validation has zz, which training lacks"):
            images.same_classes(train.classes, images.open_images(tmp_path, "val"), subset=subset)


def test_of_many_classes_that_differ_five_are_named():
    val = images.Images([], [], [f"n{i:03d}" for i in range(900)])
    with pytest.raises(UserError, match="has n000, n001, n002, n003, n004 and 895 more, which training lacks"):
        images.same_classes(["n900"], val, subset=True)
