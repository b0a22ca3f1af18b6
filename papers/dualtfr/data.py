"""Which sequences a recipe trains on, and which it is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.data import pairs, tracking
from common.run import UserError
from papers.dualtfr.recipes import Recipe


@dataclass(frozen=True)
class Data:
    train: dict[str, list[tracking.Sequence]]
    val: list[tracking.Sequence]
    """For losses on pairs; empty where the data have no validation split."""
    test: list[tracking.Sequence]
    """For tracking; may be of several data sets."""

    def describe(self, name: str) -> str:
        videos = sum(len(s) > 1 for found in self.train.values() for s in found)
        stills = sum(len(s) == 1 for found in self.train.values() for s in found)
        stills = f" and {stills:,} still objects" if stills else ""
        return f"{name}: {videos:,} training sequences{stills}, {len(self.test)} test sequences"


def open_data(recipe: Recipe, root: Path, report: Path | None = None) -> Data:
    """Opens the recipe's data sets under `root`. Annotations that cannot be used in training go to `report`."""
    folders = tracking.folders(root)
    if not recipe.held_out:
        train = pairs.open_mix(root, recipe.datasets, limit=0.01, report=report)
        got10k = folders.get("got10k", root)
        has_val = "got10k" in recipe.datasets and (got10k / "val" / "list.txt").is_file()
        val = tracking.open_sequences(got10k, "val") if has_val else []
        return Data(train, val, val)
    if missing := sorted({*recipe.datasets, *recipe.held_out} - folders.keys()):
        raise UserError(f"{root} has no folders for {', '.join(missing)}; it has {', '.join(folders) or 'none'}")
    train = {
        name: [s for split in ("train", "val") for s in tracking.open_coco(folders[name], split)]
        if name == "coco" else tracking.open_sequences(folders[name]) for name in recipe.datasets
    }
    return Data(train, [], [s for name in recipe.held_out for s in tracking.open_sequences(folders[name])])


def transform(recipe: Recipe) -> pairs.PairTransform:
    """Template and search crops as the recipe asks for them."""
    return pairs.PairTransform(
        recipe.template_px, recipe.search_px, recipe.template_factor, recipe.search_factor, recipe.centre_jitter,
        recipe.scale_jitter, recipe.grey, recipe.flip, recipe.brightness,
    )
