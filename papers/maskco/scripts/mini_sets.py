"""Two sets of pictures that differ in what they show, for the comparison: many objects (Flickr8k, COCO), or one (a
folder of classes).

    .venv/bin/python -m papers.maskco.scripts.mini_sets FLICKR8K IMAGENETTE OUT [--count 3000] [--validation 500]

Writes OUT/many_objects and OUT/one_object, with train/ and val/ in each: as many pictures in one as in the other, each
of its own split, reduced to a shorter side of 160 px, for on a CPU reading large ones takes longer than learning from
small crops. Training pictures of the folder of classes are taken evenly from them.
"""

import random
from pathlib import Path

import tyro
from PIL import Image

from common import run
from common.data import images, loader
from papers.maskco import data

SIDE = 160  # px


def main(many: Path, one: Path, out: Path, /, count: int = 3000, validation: int = 500) -> None:
    for split, wanted in (("train", count), ("val", validation)):
        objects = sorted(data.open_pictures(many, split).sources)
        random.Random(0).shuffle(objects)
        classes = images.open_images(one, split)
        if min(len(objects), len(classes)) < wanted:
            raise run.UserError(f"{split}: {many} has {len(objects)} pictures and {one} {len(classes)}; "
                                f"{wanted} of each are needed, or --count and --validation say otherwise")
        write(objects[:wanted], out / "many_objects" / split)
        write(evenly(classes, wanted), out / "one_object" / split)


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
