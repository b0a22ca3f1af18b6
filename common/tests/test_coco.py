"""COCO's annotation files through each of their readers: what is wrong with one is told by file and entry."""

import json

import pytest
from PIL import Image

from common.data import captions, tracking
from common.data.picture import Unreadable
from common.run import UserError


def _coco(tmp_path, change=lambda content: None, encoding="utf-8"):
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 20, "height": 10} for i in (7, 8)],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": 7 + i % 2, "category_id": 3, "caption": f"café {i}", "bbox": [1, 2.5, 3, 0]}
            for i in range(4)
        ],
    }
    changed = change(content)
    content = content if changed is None else changed
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    for kind in ("captions_train", "instances_train2017"):
        path = tmp_path / "annotations" / f"{kind}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode(encoding))
    (tmp_path / "train2017").mkdir(exist_ok=True)
    return tmp_path


READERS = {
    "captions": lambda root: captions.read_captions(root, "train"),
    "boxes": lambda root: captions.read_regions(root, "train"),
    "objects": lambda root: tracking.open_coco(root, "train", min_side_px=-1),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_coco_files_of_any_unicode(tmp_path, encoding):
    root = _coco(tmp_path, encoding=encoding)
    assert [row.captions for row in READERS["captions"](root)] == [("café 0", "café 2"), ("café 1", "café 3")]
    assert READERS["boxes"](root)[0] == captions.Region(
        root / "train2017/7.png", (1, 2.5, 3, 0), "cat", 7, (20, 10)
    )
    assert [s.name for s in READERS["objects"](root)][:2] == ["000000000007-0", "000000000008-1"]


def _put(part, number, **fields):
    def change(content):
        content[part][number].update(fields)

    return change


ALL = ("captions", "boxes", "objects")
WRONG_COCO = [
    (lambda c: '{"images": [', ALL, "no whole JSON file"), (lambda c: "", ALL, "no whole JSON file"),
    (lambda c: "[" * 100_000, ALL, "no whole JSON file"), (lambda c: "[]", ALL, "it holds a list, not an object"),
    (lambda c: c.pop("annotations") and None, ALL, "has no list 'annotations'"),
    (lambda c: c.update(images={"7": 1}), ALL, "has no list 'images'"),
    (lambda c: c.pop("categories") and None, ("boxes",), "has no list 'categories'"),
    (lambda c: c["images"].append(None), ALL, r"images\[2\] has no id and file_name: None"),
    (_put("images", 1, file_name=3), ALL, r"images\[1\] has no id and file_name"),
    (_put("images", 1, id=7), ALL, r"images\[1\] has an id that an earlier one has"),
    (_put("images", 1, id=[7]), ALL, r"images\[1\] has no id"),
    (_put("images", 1, id=8.0), ALL, r"images\[1\] has no id"),
    (_put("images", 1, width=None), ("boxes", "objects"), r"images\[1\] has no width and height"),
    (_put("images", 1, height=0), ("boxes", "objects"), r"images\[1\] has no width and height"),
    (_put("annotations", 2, image_id=99), ALL, r"annotations\[2\] belongs to an image that the file does not list"),
    (_put("annotations", 2, image_id=None), ALL, r"annotations\[2\] belongs to an image"),
    (_put("annotations", 2, image_id={}), ALL, r"annotations\[2\] belongs to an image"),
    (lambda c: c["annotations"].append(5), ALL, r"annotations\[4\] is no object: 5"),
    (_put("annotations", 2, caption=None), ("captions",), r"annotations\[2\] has no text"),
    (_put("annotations", 2, caption=7), ("captions",), r"annotations\[2\] has no text"),
    (_put("annotations", 2, category_id=4), ("boxes",), r"annotations\[2\] has a category that the file does not list"),
    (_put("annotations", 2, category_id=None), ("boxes",), r"annotations\[2\] has a category"),
    (_put("annotations", 2, id=1), ("objects",), r"annotations\[2\] has an id that an earlier one has"),
    (_put("annotations", 2, id=None), ("objects",), r"annotations\[2\] has no id"),
    (_put("categories", 0, name=None), ("boxes",), r"categories\[0\] has no id and name"),
    *[
        (_put("annotations", 2, bbox=box), ("boxes", "objects"), r"annotations\[2\] has no bbox of four finite numbers")
        for box in (None, [], "1 2 3 4", [1, 2, 3], [1, 2, "3", 4], [1, 2, None, 4], [1, 2, float("nan"), 4], 5,
                    [1, 2, float("inf"), 4], [10**400, 2, 3, 4], [1, 2, -3, 4], [True, 2, 3, 4], {"x": 1})
    ],
]


@pytest.mark.parametrize("change, readers, message", WRONG_COCO)
def test_wrong_coco_files_are_one_line_that_names_the_entry(tmp_path, change, readers, message):
    root = _coco(tmp_path, change)
    for name, read in READERS.items():
        if name in readers:
            with pytest.raises(UserError, match=rf"annotations/.*train.*\.json.*{message}") as error:
                read(root)
            assert "\n" not in str(error.value) and len(str(error.value)) < 500
        else:
            assert read(root), "what a reader does not use does not matter to it"


def test_blank_captions_do_not_count(tmp_path):
    root = _coco(tmp_path, lambda c: [c["annotations"][i].update(caption=text) for i, text in ((0, " "), (1, ""),
                                                                                              (3, "\n"))] and None)
    data = captions.Captions(READERS["captions"](root))
    Image.new("RGB", (4, 4)).save(tmp_path / "8.png")
    assert data.captions(0) == ("café 2",)
    with pytest.raises(Unreadable, match=r"8\.png has an empty caption"):
        data.captions(1)


@pytest.mark.parametrize("content, message", [
    (b"folder,file\ntrain,1.png\n", "no table with the columns folder, file, split: 'split'"),
    (b"folder,file,split\ntrain,caf\xe9.png,train\n", "not in UTF-8"),
])
def test_wrong_split_tables(tmp_path, content, message):
    root = _coco(tmp_path)
    (root / "annotations/caption_split.csv").write_bytes(content)
    with pytest.raises(UserError, match=rf"caption_split\.csv.*{message}"):
        captions.read_captions(root, "train")
