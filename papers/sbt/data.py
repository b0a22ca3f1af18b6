"""Which sequences a recipe trains on, which it measures its loss on, and which it tracks at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.data import pairs, tracking
from common.run import UserError
from papers.sbt.recipes import Recipe

Sets = dict[str, list[tracking.Sequence]]


@dataclass(frozen=True)
class Data:
    train: Sets
    val: Sets
    """For losses; empty where the data have no validation split."""
    test: list[tracking.Sequence]
    """For tracking; may be of several data sets."""

    def describe(self, name: str) -> str:
        videos = sum(len(s) > 1 for found in self.train.values() for s in found)
        stills = sum(len(s) == 1 for found in self.train.values() for s in found)
        stills = f" and {stills:,} still objects" if stills else ""
        return f"{name}: {videos:,} training sequences{stills}, {len(self.test)} test sequences"


def open_data(recipe: Recipe, root: Path, report: Path | None = None) -> Data:
    """Opens the recipe's data sets under `root`. Annotations that cannot be used in training go to `report`."""
    if recipe.held_out:
        return _leave_out(recipe, root)
    train = pairs.open_mix(root, recipe.datasets, limit=0.01, report=report)
    val = []
    if "got10k" in recipe.datasets:
        folder = tracking.folders(root).get("got10k", root)
        if (folder / "val" / "list.txt").is_file():
            val = tracking.open_sequences(folder, "val")
    return Data(train, {"got10k": val} if val else {}, val)


def _leave_out(recipe: Recipe, root: Path) -> Data:
    """Data sets without splits: those in `held_out` are tested on, and train nothing."""
    folders, train, test = tracking.folders(root), {}, []
    for name in (*recipe.datasets, *recipe.held_out):
        if name not in folders:
            raise UserError(f"{root} has no folder for {name}; it has {', '.join(sorted(folders)) or 'none'}")
        if name == "coco":
            train[name] = [s for split in ("train", "val") for s in tracking.open_coco(folders[name], split)]
        elif name in recipe.held_out:
            test += tracking.open_sequences(folders[name])
        else:
            train[name] = tracking.open_sequences(folders[name])
    return Data(train, {}, test)
