"""Two sets of pictures that differ in what they show, for `compare.sh`: many objects (COCO), or one (an image folder).

    .venv/bin/python -m papers.maskco.scripts.mini_sets COCO IMAGENETTE OUT

Writes OUT/many_objects and OUT/one_object, with train/ and val/ in each: as many pictures in one as in the other,
reduced to a shorter side of 160 px, for on a CPU reading large ones takes longer than learning from crops of 64 px.
Training pictures of the image folder are taken evenly from its classes; validation pictures are of its own split.
"""

import random
from pathlib import Path

import tyro
from PIL import Image

from common import run
from common.data import images, loader
from papers.maskco import data

SIDE = 160  # px
VALIDATION = 57  # pictures


def main(coco: Path, folder: Path, out: Path, /) -> None:
    many = [image for split in ("train", "val") for image in data.open_pictures(coco, split).sources]
    random.Random(0).shuffle(many)
    count = len(many) - VALIDATION
    one = {split: images.open_images(folder, split) for split in ("train", "val")}
    if count < 1 or len(one["train"]) < count or len(one["val"]) < VALIDATION:
        raise run.UserError(f"{coco} has {len(many)} pictures: more than {VALIDATION}, and as many in {folder}, needed")
    write(many[:count], out / "many_objects" / "train")
    write(many[count:], out / "many_objects" / "val")
    write(evenly(one["train"], count), out / "one_object" / "train")
    write(evenly(one["val"], VALIDATION), out / "one_object" / "val")


def evenly(pictures: images.Images, count: int) -> list[Path]:
    """The first of each class, then the second of each, and so on."""
    places: dict[int, int] = {}
    ranked = []
    for source, label in zip(pictures.sources, pictures.labels.tolist()):
        places[label] = places.get(label, -1) + 1
        ranked.append((places[label], label, source))
    return [source for *_, source in sorted(ranked)[:count]]


def write(sources: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, source in enumerate(loader.progress(sources, folder)):
        picture = Image.open(source).convert("RGB")
        scale = SIDE / min(picture.size)
        size = [round(side * scale) for side in picture.size]
        picture.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:04d}.jpg", quality=95)


if __name__ == "__main__":
    run.main(lambda: tyro.cli(main))
