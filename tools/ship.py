"""Takes the network of a finished run into its paper's weights, with a card:

    python -m tools.ship RUN --name NAME --data-licence TEXT --limits TEXT [--bf16] [--only PREFIX ...] [--most-mb 4]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from common import run
from common.run import UserError, shipped
from tools.list import recipes

CARD = """# {name}

Weights of the `{recipe}` recipe of [{paper}](../README.md): {about}

| | |
|---|---|
| Use | `python -m papers.{paper}.evaluate shipped:{name} --data FOLDER`, `make demo PAPER={paper} INPUT=FILE` |
| Trained on | {data} |
| Licence of the data | {licence} |
| Licence of the weights | as the data's; the code's is Apache-2.0 |
| Made by | `{command}` |
| Revision | `{git}`, {threads}on {hardware}, seed {seed}, {wall} minutes |
| Size | {params:,} parameters, {bytes:,} bytes, {dtype} |

| metric | value |
|---|---|
{metrics}

As the run measured them, before its weights were rounded to {dtype}. {comparable}Limits: {limits}
"""


@dataclass
class Arguments:
    run: Annotated[Path, tyro.conf.Positional]
    """A finished run folder."""
    name: str
    """What the weights are called."""
    data_licence: str
    """Of what they were trained on."""
    limits: str
    """What they cannot do, in a sentence or two."""
    only: tuple[str, ...] = ()
    """Beginnings of the names of tensors that are kept; none: all."""
    bf16: bool = False
    """bfloat16 instead of float16."""
    most_mb: float = 4
    """Largest file in megabytes."""


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m tools.ship", description="Takes a run's network into a paper's weights.")
    try:
        results, config = (run.read_json(args.run / name) for name in ("results.json", "config.json"))
        paper = config["paper"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{args.run} is no finished run: {error}") from None
    kind = recipe_type(paper, config["recipe_name"])
    if (trained := args.run / "connection.safetensors").is_file():  # beside parts that others have published
        recipe, found, classes = kind(**config["recipe"]), run.load_weights(trained), []
    else:
        recipe, weights, state = run.load_run(args.run, kind)
        found, classes = weights["model"], state["classes"]
    kept = {k: t for k, t in found.items() if k.startswith(args.only or "")}
    path = shipped.folder(paper) / f"{args.name}.safetensors"
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    shipped.write(
        path, kept, paper=paper, recipe_name=config["recipe_name"], recipe=recipe, classes=classes,
        revision=results["git"], dtype=dtype, most_bytes=int(args.most_mb * 1e6),
    )
    run.write_text(path.with_suffix(".md"), card(args, paper, recipe, results, path, dtype))
    print(f"{path} and its card, {path.stat().st_size:,} bytes")


def recipe_type(paper: str, name: str) -> type:
    known: dict[str, Any] = recipes(paper).RECIPES
    if name in {member for each in known.values() for member in getattr(each, "compare", ())}:
        return type(next(iter(known.values())))  # a member of a comparison: a paper's recipes are of one type
    if name not in known:
        raise UserError(f"{paper} has no recipe {name!r} any more; use the revision the run was made with")
    return type(known[name])


def card(args: Arguments, paper: str, recipe: Any, results: dict[str, Any], path: Path, dtype: torch.dtype) -> str:
    """The card of weights, as Markdown."""
    threads = results.get("threads")
    return CARD.format(
        name=args.name, recipe=results["recipe"], paper=paper, about=recipe.about, data=results["data"],
        licence=args.data_licence, command=results["command"], git=results["git"], hardware=results["hardware"],
        threads=f"{threads} thread{'s' * (threads > 1)} " if threads else "", seed=results["seed"],
        wall=round(results["wall_s"] / 60), params=results["params"], bytes=path.stat().st_size,
        dtype=str(dtype).removeprefix("torch."),
        metrics="\n".join(f"| {row['name']} | {row['value']:.4g} {row['unit']} |" for row in results["metrics"]),
        comparable="" if any(row["comparable"] for row in results["metrics"]) else "Not comparable with the paper. ",
        limits=args.limits,
    )


if __name__ == "__main__":
    run.main(main)
