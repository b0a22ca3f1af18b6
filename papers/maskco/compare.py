"""What pre-training is worth, by data and method: the README's second table, from results/mini*.json.

``python -m papers.maskco.compare`` writes it anew between the two marker lines.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from common.run import readme
from papers.maskco.recipes import RECIPES

HERE = Path(__file__).parent
SCORES = ("probe_top1", "probe_map", "random_probe_top1", "random_probe_map", "contrast_top1", "contrast_rank")


def table(folder: Path = HERE / "results") -> str:
    """Markdown: a row for each pre-training data set and recipe, mean ± sample standard deviation over its seeds."""
    runs = defaultdict(list)
    for path in folder.glob("mini*.json"):
        record = json.loads(path.read_text())
        runs[record["data"], list(RECIPES).index(record["recipe"]), record["recipe"]].append(record)
    scores = {key: [{m["name"]: m["value"] for m in r["metrics"]} for r in found] for key, found in runs.items()}
    columns = [name for name in SCORES if any(name in one for found in scores.values() for one in found)]
    if not columns:
        return ""
    return "\n".join([
        f"| pre-trained on | recipe | {' | '.join(columns)} | seeds |", "|---" * (len(columns) + 3) + "|",
        *(
            f"| {key[0]} | {key[2]} | {' | '.join(_cell(scores[key], name) for name in columns)} "
            f"| {', '.join(str(seed) for seed in sorted(r['seed'] for r in runs[key]))} |" for key in sorted(runs)
        ), "",
    ])


def _cell(found: list[dict[str, Any]], name: str) -> str:
    values = [scores[name] for scores in found if name in scores]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} %"


if __name__ == "__main__":
    readme.fill(HERE / "README.md", "compare", table())
