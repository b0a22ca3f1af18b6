"""What visual weights save over visual tokens, counted and measured: operations, prefill time, peak memory.

    python -m papers.vlora.bench                                    SmolLM2's shapes on a CPU
    python -m papers.vlora.bench --size 7b --batch 1 8 --graphs     7B's in bf16 on a GPU, also as one CUDA graph

Both models share the language model and get the same visual features (the vision tower is left out of both) and the
same text; they answer with the last token's logits and a filled cache. They take turns. Writes results/bench/vlora_*.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
import tyro
from transformers import LlamaConfig
from transformers.modeling_utils import local_torch_dtype

from common import run
from common.run import UserError, drawing
from common.run.bench import Case, check_parity, measure, peak_bytes, prepare, write_record
from common.run.bench import table as bench_table
from papers.vlora import build, flops, official
from papers.vlora.baseline import VisualTokensForConditionalGeneration
from papers.vlora.configuration import VisualTokensConfig, VLoRAConfig
from papers.vlora.model import VLoRAForConditionalGeneration

IMAGE = 3  # placeholder's id here
LLMS = {"tiny": "tiny", "smollm2": "smollm2", "7b": "lmsys/vicuna-7b-v1.5"}
# Width and blocks of the generator, rank, layer spacing, width of the visual features.
SHAPES = {"tiny": (64, 2, 8, 2, 64), "smollm2": (128, 8, 16, 6, 1024), "7b": (512, 8, 64, 4, 1024)}
Row = dict[str, Any]


@dataclass
class Arguments:
    size: Literal["tiny", "smollm2", "7b"] = "smollm2"
    """Shapes of the LLM and, in proportion, of the generator. The weights are random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    text: tuple[int, ...] = (32, 128, 256)
    """Text tokens."""
    visual: tuple[int, ...] = (64, 256, 576)
    """Visual features of an image."""
    batch: tuple[int, ...] = (1,)
    """Images, each with its own question, prefilled at once."""
    answer: int = 32
    """Tokens of a whole answer, measured at the shortest text; 0: prefills alone."""
    graphs: bool = False
    """On a GPU: also replay each prefill as one CUDA graph."""
    compile: bool = False
    """Also run each prefill through torch.compile, as one graph."""
    threads: int = torch.get_num_threads()
    seconds: float = 0.5
    """Spent on each prefill at least."""
    out: Path = Path(__file__).parent / "results" / "bench"
    """Folder of the record."""


def configs(size: str, visual: int) -> tuple[VLoRAConfig, VisualTokensConfig]:
    """Both models for images of `visual` features, around the smallest of towers, which is never asked."""
    width, blocks, rank, every, dv = SHAPES[size]
    text: LlamaConfig = build.CONFIGS[LLMS[size]]
    shared = dict(
        text_config=text, vision_config=build.TOWERS["tiny"], num_features=visual, visual_width=dv, image_token_id=IMAGE
    )
    ours = VLoRAConfig(width=width, blocks=blocks, rank=rank, alpha=rank, every=every, **shared)
    return ours, VisualTokensConfig(**shared)


def prefill_vlora(model: VLoRAForConditionalGeneration, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    weights = model.generator(features)[0]
    places = torch.arange(1, ids.shape[1], device=ids.device).expand(len(ids), -1)
    ids = ids[:, 1:]  # generate leaves the image's slot out as well: `VLoRAForConditionalGeneration.prompt`
    return model(ids, position_ids=places, perceptual_weights=weights, use_cache=True, logits_to_keep=1).logits


def prefill_tokens(
    model: VisualTokensForConditionalGeneration, ids: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    embeds, mask, _ = model.sequence(ids, features, None)
    return model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=True, logits_to_keep=1).logits


# Prefills, measured -----------------------------------------------------------------------------------------


@torch.no_grad()
def study_prefill(args: Arguments, device: torch.device) -> Iterator[Row]:
    """One record for every batch, number of visual features and text length."""
    for visual in args.visual:
        torch.manual_seed(0)
        ours, theirs = models(args.size, visual, device)
        for batch in args.batch:
            for text in args.text:
                ids = torch.randint(4, ours.config.text_config.vocab_size, (batch, text + 1), device=device)
                ids[:, 0] = IMAGE
                like = ours.generator.pos_embed
                features = torch.randn(batch, visual, ours.config.visual_width, device=device, dtype=like.dtype)
                check(ours, ids, features)
                yield prefill_record(ours, theirs, ids, features, args)


def prefill_record(
    ours: VLoRAForConditionalGeneration, theirs: VisualTokensForConditionalGeneration, ids: torch.Tensor,
    features: torch.Tensor, args: Arguments,
) -> Row:
    """Ratios are VLoRA / visual tokens."""
    batch, text, visual = len(ids), ids.shape[1] - 1, features.shape[1]
    ways = {
        "visual tokens": partial(prefill_tokens, theirs, ids, features),
        "VLoRA": partial(prefill_vlora, ours, ids, features),
    }
    alone = {
        "visual tokens": products(ours.language_model, batch * (text + visual)),
        "VLoRA": products(ours.language_model, batch * text),
    }
    tokens_gflops = batch * flops.visual_tokens(theirs.config, text) / 1e9
    vlora_gflops = batch * flops.vlora(ours.config, text) / 1e9
    case = Case(f"batch {batch}, {text} text, {visual} visual", ways)
    record = measure(case, args.seconds)
    record |= {
        "batch": batch, "text": text, "visual": visual, "tokens_gflops": tokens_gflops, "vlora_gflops": vlora_gflops,
        "ratio_operations": vlora_gflops / tokens_gflops, "ratio": 1 / record["times_faster"]["VLoRA"][1],
        "ratio_products": 1 / measure(Case("products", alone), args.seconds)["times_faster"]["VLoRA"][1],
        "tokens_mb": peak_bytes(ways["visual tokens"], ids.device) / 1e6,
        "vlora_mb": peak_bytes(ways["VLoRA"], ids.device) / 1e6,
    }
    if args.graphs:
        replays = {name: graphed(way) for name, way in ways.items()}
        for name, replay in replays.items():
            check_parity(Case(f"{name} as a graph", {"eager": ways[name], "graph": replay}, tolerance=0.02))
        graphs = measure(Case("graphs", replays), args.seconds)
        record |= {"graph_seconds": graphs["seconds"], "ratio_graphs": 1 / graphs["times_faster"]["VLoRA"][1]}
    if args.compile:
        whole = {name: torch.compile(way, fullgraph=True, dynamic=False) for name, way in ways.items()}
        for name, way in whole.items():
            check_parity(Case(f"{name} compiled", {"eager": ways[name], "compiled": way}, tolerance=0.02))
        compiled = measure(Case("compiled", whole), args.seconds)
        record |= {
            "compiled_seconds": compiled["seconds"], "ratio_compiled": 1 / compiled["times_faster"]["VLoRA"][1],
            "gain_compiled": record["seconds"]["VLoRA"] / compiled["seconds"]["VLoRA"],
        }
    return record


def models(
    size: str, visual: int, device: torch.device
) -> tuple[VLoRAForConditionalGeneration, VisualTokensForConditionalGeneration]:
    """Both models with random weights around one and the same language model; bf16 on a GPU."""
    ours_config, theirs_config = configs(size, visual)
    with device, local_torch_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32):
        ours = VLoRAForConditionalGeneration(ours_config).eval()
        llm = copy.copy(ours.language_model)
        theirs = VisualTokensForConditionalGeneration(theirs_config, language_model=llm).eval()
    for name, parameter in ours.named_parameters():
        if ".B_" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return ours, theirs


def check(ours: VLoRAForConditionalGeneration, ids: torch.Tensor, features: torch.Tensor) -> None:
    """Weights merged and beside must agree, to a tenth of what the image changes, before anything is timed."""
    weights, ids = ours.generator(features[:1])[0], ids[:1]
    beside = ours(ids, perceptual_weights=weights, logits_to_keep=1).logits
    plain = ours(ids, perceptual_weights=torch.zeros_like(weights), logits_to_keep=1).logits
    change = (plain - beside).abs().max() / beside.abs().max()

    def merged() -> torch.Tensor:
        with ours.merged(weights):
            return ours(ids, logits_to_keep=1).logits

    check_parity(Case("merging", {"beside": lambda: beside, "merged": merged}, tolerance=0.1 * change.item()))


def products(llm: torch.nn.Module, rows: int) -> Callable[[], Any]:
    """The language model's products with its weights and nothing else, for so many rows: what its speed rests on."""
    layers = [module for module in llm.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    inputs = {layer.in_features: layer.weight.new_empty(rows, layer.in_features).normal_() for layer in layers}
    return lambda: [inputs[layer.in_features] @ layer.weight.mT for layer in layers]


def graphed(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A CUDA function of fixed inputs as one graph: its many small launches become a single one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


# Whole answers, measured -----------------------------------------------------------------------------------


@torch.no_grad()
def study_answers(args: Arguments, device: torch.device) -> Iterator[Row]:
    """What a user waits for and pays: prefill, decoding from the cache, both, and all memory, side by side."""
    visual, text, new = max(args.visual), min(args.text), args.answer
    torch.manual_seed(0)
    ours, theirs = models(args.size, visual, device)
    tower = flops.tower(official.config(**official.VARIANTS["vlora_7b"])) / 1e9
    for batch in args.batch:
        ids = torch.randint(4, ours.config.text_config.vocab_size, (batch, text + 1), device=device)
        ids[:, 0] = IMAGE
        like = ours.generator.pos_embed
        features = torch.randn(batch, visual, ours.config.visual_width, device=device, dtype=like.dtype)
        both = {"visual tokens": theirs, "VLoRA": ours}

        def way(model: Any, count: int, ids: torch.Tensor = ids, features: torch.Tensor = features) -> Callable:
            length = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
            return partial(model.generate, ids, features, **length)

        about = f"batch {batch}, {text} text, {visual} visual"
        first = measure(Case(f"{about}, first token", {k: way(m, 1) for k, m in both.items()}), args.seconds)
        whole = measure(Case(f"{about}, {new} tokens", {k: way(m, new) for k, m in both.items()}), args.seconds)
        row: Row = {"batch": batch, "text": text, "visual": visual, "new": new, "tower_gflops": batch * tower}
        for key, name in (("vlora", "VLoRA"), ("tokens", "visual tokens")):
            model = both[name]
            count = flops.vlora if key == "vlora" else flops.visual_tokens
            held = sum(p.numel() * p.element_size() for p in {*model.parameters()} - {*model.vision_tower.parameters()})
            row |= {
                f"{key}_first_ms": 1e3 * first["seconds"][name], f"{key}_whole_ms": 1e3 * whole["seconds"][name],
                f"{key}_next_ms": 1e3 * (whole["seconds"][name] - first["seconds"][name]) / (new - 1),
                f"{key}_weights_mb": held / 1e6, f"{key}_peak_mb": peak_bytes(way(model, new), device) / 1e6,
                f"{key}_gflops": batch * count(model.config, text) / 1e9,
            }
        row |= {
            "first": 1 / first["times_faster"]["VLoRA"][1], "whole": 1 / whole["times_faster"]["VLoRA"][1],
            "next": row["vlora_next_ms"] / row["tokens_next_ms"],
            "memory": (row["vlora_weights_mb"] + row["vlora_peak_mb"])
            / (row["tokens_weights_mb"] + row["tokens_peak_mb"]),
            "gflops": row["vlora_gflops"] / row["tokens_gflops"],
            "with_tower": (row["vlora_gflops"] + row["tower_gflops"]) / (row["tokens_gflops"] + row["tower_gflops"]),
        }
        yield row


def answers_table(rows: Sequence[Row]) -> list[str]:
    """All of it in one table, a line for each cost."""
    lines = []
    for row in rows:
        lines += [
            f"Batch {row['batch']}, {row['text']} text tokens, {row['visual']} visual features, an answer of "
            f"{row['new']} tokens:", "", "| | VLoRA | visual tokens | ratio |", "|---|---:|---:|---:|",
        ]
        costs = (
            ("perceive and prefill, ms", "first_ms", "first"), ("each further token, ms", "next_ms", "next"),
            ("whole answer, ms", "whole_ms", "whole"), ("prefill, GFLOPs", "gflops", "gflops"),
            ("weights, generator or projector counted, MB", "weights_mb", ""), ("peak beside them, MB", "peak_mb", ""),
        )
        for title, key, ratio in costs:
            found = f"{row[ratio]:.3f}" if ratio else ""
            lines.append(f"| {title} | {row[f'vlora_{key}']:,.1f} | {row[f'tokens_{key}']:,.1f} | {found} |")
        lines += [
            f"| memory, all of it | | | {row['memory']:.3f} |",
            f"| GFLOPs with CLIP ViT-L/14 at 336 px, {row['tower_gflops']:,.0f} | | | {row['with_tower']:.3f} |", "",
        ]
    return lines


# Merging or not, measured -----------------------------------------------------------------------------------


def study_merging(size: str, device: torch.device) -> list[Row]:
    """Microseconds of the two ways to apply an image's weights to one module."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    d, r = build.CONFIGS[LLMS[size]].hidden_size, SHAPES[size][2]
    W, A, B = (torch.randn(d, n, device=device, dtype=dtype) for n in (d, r, r))
    rows = []
    for tokens in (1, 8, 32, 128, 512, 2048):
        x = torch.randn(tokens, d, device=device, dtype=dtype)
        ways = {"beside": partial(lambda x: x + (x @ A) @ B.mT, x), "merged": lambda: W + B @ A.mT}
        seconds = measure(Case(f"{tokens} tokens", ways), 0.05)["seconds"]
        rows.append({"tokens": tokens, "side_us": 1e6 * seconds["beside"], "merge_us": 1e6 * seconds["merged"]})
    return rows


# Operations, counted ----------------------------------------------------------------------------------------


def study_operations() -> list[Row]:
    """GFLOPs of both prefills at 7B for an image of 576 features, by formula."""
    ours, theirs = configs("7b", 576)
    rows = []
    for text in (32, 128, 256):
        a, b = flops.vlora(ours, text), flops.visual_tokens(theirs, text)
        rows.append({
            "text": text, "vlora": a / 1e9, "tokens": b / 1e9, "ratio": a / b,
            "paper_ratio": flops.paper_ratio(ours, text),
        })
    return rows


# Reporting --------------------------------------------------------------------------------------------------


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Against visual tokens, by text length: the paper's figure 4 (cost ratio); operations and time as measured."""
    figure, (ratio, counts, times) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    config = official.config(**official.VARIANTS["vlora_7b"])
    for i, (text, points) in enumerate(flops.FIGURE_4.items()):
        ratio.plot(points.keys(), points.values(), "x", color=f"C{i}", label=f"{text} text tokens, paper's figure")
        ratios = []
        for count in points:
            config.num_features = count
            ratios.append(flops.paper_ratio(config, text))
        ratio.plot(points.keys(), ratios, color=f"C{i}", label=f"{text}, released generator counted")
    batch = min(row["batch"] for row in rows)
    for i, text in enumerate(sorted({row["text"] for row in rows})):
        found = [row for row in rows if (row["text"], row["batch"]) == (text, batch)]
        visual = [row["visual"] for row in found]
        for key, way, line in (("vlora", "VLoRA", "-"), ("tokens", "visual tokens", "--")):
            style = {"color": f"C{i}", "linestyle": line, "marker": ".", "label": f"{text} text tokens, {way}"}
            counts.plot(visual, [row[f"{key}_gflops"] for row in found], **style)
            times.plot(visual, [1e3 * row["seconds"][way] for row in found], **style)
    ratio.set_title("operations at 7B, VLoRA / LLaVA", fontsize=10)
    counts.set_title(f"operations of a prefill, GFLOPs, batch {batch}", fontsize=10)
    times.set_title(f"time of that prefill, ms, {run.hardware()}", fontsize=10)
    for axis in (ratio, counts, times):
        axis.set_xlabel("visual tokens")
        axis.set_ylim(0)
        axis.legend(frameon=False, fontsize=7)
    drawing.save(figure, path)


def table(rows: Sequence[Row], columns: dict[str, str]) -> list[str]:
    """Lines of Markdown; `columns` maps each header to a format of a row's fields."""
    cells = (" | ".join(cell.format(**row) for cell in columns.values()) for row in rows)
    return [f"| {' | '.join(columns)} |", "|" + "---:|" * len(columns), *(f"| {line} |" for line in cells), ""]


def page(found: dict[str, list[Row]]) -> str:
    """Markdown of all studies."""
    graphs = {"as graphs": "{ratio_graphs:.3f}"} if "ratio_graphs" in found["prefill"][0] else {}
    if "ratio_compiled" in found["prefill"][0]:
        graphs |= {"compiled": "{ratio_compiled:.3f}", "VLoRA's gain by compiling": "{gain_compiled:.2f}x"}
    return "\n".join([
        bench_table(found["prefill"]),
        "Ratios VLoRA / visual tokens, of a prefill's time, of the time of the language model's products with its "
        "weights alone, of the operations; operations; peak memory beside the weights.", "",
        *table(found["prefill"], {
            "case": "{case}", "time": "{ratio:.3f}", **graphs, "products alone": "{ratio_products:.3f}",
            "operations": "{ratio_operations:.3f}", "VLoRA GFLOPs": "{vlora_gflops:.1f}",
            "tokens GFLOPs": "{tokens_gflops:.1f}", "VLoRA MB": "{vlora_mb:.1f}", "tokens MB": "{tokens_mb:.1f}",
        }),
        *answers_table(found["answers"]),
        "Applying an image's weights to one module: microseconds beside its weight, for each pass of so many tokens, "
        "against merging once (`generate(apply=\"merge\")`).", "",
        *table(found["merging"], {"tokens": "{tokens}", "beside": "{side_us:.1f}", "merging": "{merge_us:.1f}"}),
        "Operations at 7B, 576 visual features: GFLOPs by formula, the ratio, and the ratio as the paper counts.", "",
        *table(found["operations"], {
            "text": "{text}", "VLoRA": "{vlora:.1f}", "visual tokens": "{tokens:.1f}", "ratio": "{ratio:.4f}",
            "paper's count": "{paper_ratio:.4f}",
        }),
        "Bounds at 7B, 576 visual and 32 text tokens, bf16, computed from data sheets, not measured: the least time of "
        "a prefill. VLoRA at its bound is as many times faster as wanted if the baseline reaches no more than this "
        "share of its own bound's speed.", "",
        *table(found["bounds"], {
            "GPU": "{gpu}", "batch": "{batch}", "VLoRA ms": "{vlora_ms:.2f}", "tokens ms": "{tokens_ms:.2f}",
            "ratio of the bounds": "{ratio:.1f}", "wanted": "{target}x", "share": "{share:.0%}",
        }),
    ])


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.vlora.bench", description=__doc__)
    device = run.start_world(run.Options(device=args.device, precision="fp32")).device
    if args.graphs and device.type != "cuda":
        raise UserError("--graphs needs a GPU")
    prepare(args.threads)
    prefill = []
    for record in study_prefill(args, device):
        prefill.append(record)
        print(bench_table([record]).splitlines()[-1], flush=True)
    found = {
        "prefill": prefill, "answers": list(study_answers(args, device)) if args.answer > 1 else [],
        "merging": study_merging(args.size, device), "operations": study_operations(),
        "bounds": flops.bounds(official.config(**official.VARIANTS["vlora_7b"]), configs("7b", 576)[1]),
    }
    stamp = f"{args.size} shapes, random weights, {args.threads} thread{'s' * (args.threads > 1)}"
    path = write_record(args.out, f"vlora_{args.size}", device.type, found, page(found), stamp=stamp)
    draw(path.with_suffix(".png"), prefill)
    print(page(found))


if __name__ == "__main__":
    run.main(main)
