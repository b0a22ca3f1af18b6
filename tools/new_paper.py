"""Lays out a paper: ``python -m tools.new_paper NAME``.

Trainer, evaluation, demo and trainer tests start as ShiftViT's under the new name; model, recipes, cases, figures
and README as the shortest thing that passes every check. All of it is the new paper's own from then on.
"""

from __future__ import annotations

import keyword
import re
import shutil
import sys
from pathlib import Path

from common import run
from tools import golden
from tools.list import PAPERS, papers
from tools.tables import table

MODEL = '''"""TITLE: what the network is, in a sentence.

Authors, "Title", venue, arXiv number. Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from timm.layers import ClassifierHead
from timm.models import checkpoint_seq
from torch import nn

from common.run.timm import register


class Block(nn.Module):
    """x = x + conv(norm(x)) (section and equation of the paper)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.norm(x)).relu()


class CLASS(nn.Module):
    """(B, in_chans, H, W) -> (B, num_classes)."""

    def __init__(
        self, *, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg", dim: int = 32, depth: int = 2
    ):
        super().__init__()
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, dim, dim
        self.stem = nn.Conv2d(in_chans, dim, 4, stride=4)
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(depth)))
        self.head = ClassifierHead(dim, num_classes, pool_type=global_pool)
        self.grad_checkpointing = False

    def forward(self, x):
        x = self.stem(x)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.head(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable


VARIANTS = {"NAME_micro": {}}
register(CLASS, VARIANTS, levels=lambda _: 1)
'''

INIT = '''"""CLASS. Importing this package registers its models with timm."""

from .model import VARIANTS, CLASS

__all__ = ["VARIANTS", "CLASS"]
'''

CASES = '''"""What the tools across papers need to know about CLASS (common/run/cases.py)."""

import timm
import torch

from common.run.cases import ModelCase, TrainingCost
from papers.NAME.model import VARIANTS

PARAMS = {"NAME_micro": 53_192}
SAMPLES = {"digits": 1_437}

MODELS = {
    name: ModelCase(
        build=lambda name=name: timm.create_model(name), inputs=lambda: (torch.randn(2, 3, 32, 32),), shape=(2, 1000),
        params=PARAMS[name], compile=True,
    )
    for name in VARIANTS
}


def training_cost(recipe) -> TrainingCost:
    with torch.device("meta"):
        model = timm.create_model(recipe.model, num_classes=10, **recipe.model_args)
        image = torch.empty(1, 3, recipe.input_size_px, recipe.input_size_px)
    return TrainingCost(model, (image,), SAMPLES[recipe.dataset], recipe.epochs, recipe.batch)
'''

EVALUATE = '''"""Top-1 and top-5 of a run folder or a file of weights: ``python -m papers.NAME.evaluate CHECKPOINT``."""

from __future__ import annotations

import timm
import torch

from common import run
from common.metrics import classification
from papers.NAME.model import VARIANTS
from papers.NAME.recipes import RECIPES, Recipe


def build(recipe: Recipe, classes: int) -> torch.nn.Module:
    """The recipe's model."""
    if not timm.is_model(recipe.model):
        raise run.UserError(f"timm knows no model {recipe.model!r}; ours are {', '.join(VARIANTS)}")
    return timm.create_model(recipe.model, num_classes=classes, **recipe.model_args)


PAPER = classification.Paper("NAME", RECIPES, build, lambda weights, _model: weights)

if __name__ == "__main__":
    run.main(lambda: classification.main(PAPER))
'''

FIGURES = '''"""Pictures of a run."""

from common.run import drawing


def draw(folder, model, val, recipe) -> None:
    drawing.curves(folder, [["loss", "val/loss"], ["val/top1"], ["lr"]])
'''

TEST = '''"""The network, held to what the paper says of it."""

import timm
import torch

from common.run.timm import export_timm
from papers.NAME.model import Block


def test_a_block_adds_to_what_it_is_given():
    block, x = Block(5), torch.randn(1, 5, 7, 3)
    torch.testing.assert_close(block(x) - x, block.conv(block.norm(x)).relu())
    torch.nn.init.zeros_(block.conv.weight)
    torch.nn.init.zeros_(block.conv.bias)
    torch.testing.assert_close(block(x), x)


def test_timm_loads_what_a_run_leaves(tmp_path):
    model, x = timm.create_model("NAME_micro", num_classes=2), torch.randn(1, 3, 32, 32)
    export_timm(model, tmp_path / "model", side=32, crop=1.0, classes=["a", "b"], model_args={})
    loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))
'''

README = """# TITLE

The claim in a sentence; the formula or the figure that carries it.

Status: **runs**. No figure of the paper has been reproduced yet.

## Results

<!-- results:start -->
NONE<!-- results:end -->

## Quick start

    make reproduce PAPER=NAME

trains the micro model on handwritten digits for a minute on two CPU cores and ends with a table of the metrics.

    .venv/bin/python -m papers.NAME.demo picture.png     # the newest run answers; writes answer.png

## Data

Folders of pictures, `train/<class>/` and `val/<class>/`, or CIFAR's files:

    make reproduce PAPER=NAME RECIPE=tiny DATA=FOLDER

## Details the paper does not tell

## Differences from the paper

## Citation
"""


def rename(text: str, name: str, title: str) -> str:
    return text.replace("TITLE", title).replace("NAME", name).replace("CLASS", title).replace("NONE", table([]))


def main() -> None:
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise run.UserError(f"NAME={name!r} must be a Python module name in lower case, such as NAME=vit_shift")
    folder = PAPERS / name
    if folder.exists():
        raise run.UserError(f"{folder} exists already; the papers are {', '.join(papers())}")
    try:
        lay_out(folder)
    except BaseException:
        shutil.rmtree(folder)  # half a paper would fail every check
        raise
    print(f"{folder}: start with model.py and README.md. It passes: make test PAPER={name}; make smoke PAPER={name}")


def lay_out(folder: Path) -> None:
    name, source = folder.name, PAPERS / "shiftvit"
    title = name.title().replace("_", "")
    (folder / "tests").mkdir(parents=True)
    (folder / "results").mkdir()
    fresh = {
        "model.py": MODEL, "__init__.py": INIT, "cases.py": CASES, "figures.py": FIGURES, "README.md": README,
        "tests/test_model.py": TEST, "evaluate.py": EVALUATE,
    }
    for file, text in fresh.items():
        (folder / file).write_text(rename(text, name, title), encoding="utf-8")
    for file in ("Makefile", "requirements.txt", "__main__.py", "train.py", "demo.py"):
        text = (source / file).read_text(encoding="utf-8").replace("shiftvit", name).replace("ShiftViT", title)
        if file == "__main__.py":  # a new paper compares nothing yet
            text = re.sub(r"from .*compare import compare\n", "", text).replace(", train, compare)", ", train)")
        (folder / file).write_text(text, encoding="utf-8")

    recipes = (source / "recipes.py").read_text(encoding="utf-8")
    recipes = recipes[: recipes.index("def _row")] + '''RECIPES = {
    "tiny": Recipe(
        "micro model on built-in handwritten digits", "shiftvit_micro", dataset="digits", input_size_px=32, epochs=20,
        warmup_epochs=2, batch=128, lr=4e-3, crop_scale=(0.5, 1.0), flip=0.0, policy=None, erase=0.0, mixup=0.0,
        cutmix=0.0, repeats=1, ema_decay=0.0, eval_crop=1.0,
    ),
}
RECIPES["smoke"] = replace(
    RECIPES["tiny"], about="tiny cut to seconds: does everything run?", epochs=2, warmup_epochs=1
)
'''
    said = f'NAME = "{title}"\nTITLE = "{title}"\nCLAIM = "What the paper claims."\n'
    recipes = re.sub(r"NAME = .*\nTITLE = .*\nCLAIM = .*\n", said, recipes)
    recipes = re.sub(r'    compare: .*\n    """(.|\n)*?"""\n', "", recipes)
    (folder / "recipes.py").write_text(recipes.replace("shiftvit", name), encoding="utf-8")
    golden.path(name).write_text(repr(golden.first_losses(name)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run.main(main)
