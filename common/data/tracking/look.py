"""What a folder of tracking sequences holds, in words."""

from __future__ import annotations

from pathlib import Path

from common.data.text import printable
from common.data.tracking.layouts import layout_of
from common.data.tracking.opening import folders, open_coco, open_sequences
from common.run import UserError


def main(folder: Path, /) -> None:
    """Prints what a data folder holds, or each of several that lie side by side in it; says what is expected where it
    holds nothing usable."""
    if _is_data_set(folder):
        _look(folder)
    elif beside := [path for path in folders(folder).values() if _is_data_set(path)]:
        for path in beside:
            print(f"{printable(path)}:")
            _look(path)
    else:
        try:
            open_sequences(folder)
        except UserError as error:
            raise UserError(f"{error}\n  several    {folder}/OTB, {folder}/VOT and the like, each as above") from None


def _is_data_set(folder: Path) -> bool:
    try:
        return (folder / "annotations").is_dir() or bool(layout_of(folder))
    except UserError:
        return False


def _look(folder: Path) -> None:
    if (folder / "annotations").is_dir():
        splits = [s for s in ("train", "val") if (folder / "annotations" / f"instances_{s}2017.json").is_file()]
        found = {split: open_coco(folder, split) for split in splits or ["train"]}
    else:
        found = {split: open_sequences(folder, split) for split in layout_of(folder)[1]}
    for split, sequences in found.items():
        frames, shown = sum(len(s) for s in sequences), sum(int(s.visible.sum()) for s in sequences)
        print(
            f"{split or 'all'}: {len(sequences):,} sequences ({sequences[0].dataset}), {frames:,} frames, the target "
            f"is annotated and visible in {shown:,}; the first is {printable(sequences[0].name)}"
        )
