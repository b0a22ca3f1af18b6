"""ImageNet's other test sets, ImageNet-V2, -A, -R and -Sketch, in the folders they are published in: FOLDER/<class>/*.

timm ships the lists of their classes. ImageNet-A and -R have 200 of the thousand: there a network chooses among these
alone, as the sets' authors prescribe.
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path
from typing import Literal

import torch

from common.data import images
from common.data.text import printable
from common.run import UserError

TestSet = Literal["imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch"]
LISTS = {"imagenet-a": "imagenet_a_synsets.txt", "imagenet-r": "imagenet_r_synsets.txt"}


def synsets(name: str = "imagenet") -> list[str]:
    """The WordNet numbers of a set's classes, those of ImageNet-1K in the order of its networks' outputs."""
    return resources.files("timm.data").joinpath("_info", LISTS.get(name, "imagenet_synsets.txt")).read_text().split()


def open_test_set(name: str, folder: Path | None) -> images.Images:
    """The set's pictures, numbered as `synsets(name)`. `UserError` for a folder that does not hold it."""
    if folder is None:
        raise UserError(f"{name}: give its folder, as it is published, with --data")
    data, wanted = images.ImageFolder(folder), synsets(name)
    if name == "imagenet-v2" and all(each.isdecimal() and int(each) < len(wanted) for each in data.classes):
        data.classes = [wanted[int(each)] for each in data.classes]  # its folders are called 0 to 999
    unknown, missing = {*data.classes} - {*wanted}, {*wanted} - {*data.classes}
    if unknown:
        raise UserError(
            f"{folder} is not {name}: expected folders of its {len(wanted)} classes, {wanted[0]} and others; found "
            f"{len(unknown)} of another kind, such as {printable(min(unknown))}"
        )
    if missing:
        print(f"{folder} holds {len(data.classes)} of {name}'s {len(wanted)} classes", file=sys.stderr)
    return images.same_classes(wanted, data, subset=True)


class Among(torch.nn.Module):
    """A network of ImageNet-1K's classes that chooses among a set's alone."""

    def __init__(self, network: torch.nn.Module, name: str):
        super().__init__()
        place = {synset: i for i, synset in enumerate(synsets())}
        self.network, self.columns = network, [place[synset] for synset in synsets(name)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, the set's classes)"""
        return self.network(x)[:, self.columns]
