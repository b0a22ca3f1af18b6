"""What visual weights save over visual tokens, counted and measured: operations, prefill time, peak memory.

    python -m papers.vlora.bench                                    SmolLM2's shapes on a CPU
    python -m papers.vlora.bench --size 7b --batch 1 8 --graphs     7B's in bf16 on a GPU, also as one CUDA graph

Both models share the language model and get the same visual features (the vision tower is left out of both) and the
same text; they answer with the last token's logits and a filled cache. They take turns. Writes results/bench/vlora_*.
"""

from __future__ import annotations

import copy
import gc
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.modeling_utils import local_torch_dtype

from common import run
from common.run import ROOT, UserError, drawing
from papers.vlora import application, flops, official, parts
from papers.vlora.baseline import VisualTokensConfig, VisualTokensForConditionalGeneration
from papers.vlora.model import VLoRAConfig, VLoRAForConditionalGeneration

IMAGE = 3  # placeholder's id here
TURNS = 5
LLMS = {"tiny": "tiny", "smollm2": "smollm2", "7b": "lmsys/vicuna-7b-v1.5"}
# Width and blocks of the generator, rank, layer spacing, width of the visual features.
SHAPES = {"tiny": (64, 2, 8, 2, 64), "smollm2": (128, 8, 16, 6, 1024), "7b": (512, 8, 64, 4, 1024)}


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
    graphs: bool = False
    """On a GPU: also replay each prefill as one CUDA graph."""
    out: Path = ROOT / "papers" / "vlora" / "results" / "bench"


def configs(size: str, visual: int) -> tuple[VLoRAConfig, VisualTokensConfig]:
    """Both models for images of `visual` features, around the smallest of towers, which is never asked."""
    width, blocks, rank, every, dv = SHAPES[size]
    text: LlamaConfig = parts.CONFIGS[LLMS[size]]
    shared = dict(
        text_config=text, vision_config=parts.TOWERS["tiny"], num_features=visual, visual_width=dv, image_token_id=IMAGE
    )
    ours = VLoRAConfig(width=width, blocks=blocks, rank=rank, alpha=rank, every=every, **shared)
    return ours, VisualTokensConfig(**shared)


# Counting ---------------------------------------------------------------------------------------------------


def counted(size: str, text: int, visual: int) -> tuple[int, int]:
    """FLOPs of both prefills by PyTorch's counter, on the meta device."""
    totals = []
    for config, kind in zip(configs(size, visual), PREFILL):
        config.text_config._attn_implementation = "eager"  # SDPA's masks look at values, which meta tensors have not
        with torch.device("meta"):
            model = kind(config).eval()
            ids, features = torch.zeros(1, text + 1, dtype=torch.long), torch.empty(1, visual, config.visual_width)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            PREFILL[kind](model, ids, features)
        totals.append(counter.get_total_flops())
    return totals[0], totals[1]


def operations() -> list[dict[str, float]]:
    """GFLOPs of both prefills at 7B for an image of 576 features."""
    ours, theirs = configs("7b", 576)
    rows = []
    for text in (32, 128, 256):
        a, b = flops.vlora(ours, text), flops.visual_tokens(theirs, text)
        ca, cb = counted("7b", text, 576)
        rows.append({"text": text, "vlora": a / 1e9, "vlora_counted": ca / 1e9, "tokens": b / 1e9,
                     "tokens_counted": cb / 1e9, "ratio": a / b, "paper_ratio": flops.paper_ratio(ours, text)})
    return rows


# Measuring --------------------------------------------------------------------------------------------------


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


PREFILL = {VLoRAForConditionalGeneration: prefill_vlora, VisualTokensForConditionalGeneration: prefill_tokens}


def models(size: str, visual: int, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
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
    """Merged and beside must agree, and differ from the plain LLM, before anything is timed."""
    weights = ours.generator(features[:1])[0]
    beside = ours(ids[:1], perceptual_weights=weights, logits_to_keep=1).logits
    with ours.merged(weights):
        merged = ours(ids[:1], logits_to_keep=1).logits
    plain = ours(ids[:1], logits_to_keep=1).logits
    off, change = (merged - beside).norm().item(), (plain - beside).norm().item()
    if not off < 0.1 * change:
        raise UserError(f"merged weights and those beside differ by {off:.3g}, images change {change:.3g}; not timed")


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


def seconds(cases: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each, taking turns after a warm-up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(TURNS + 1):
        for name, function in cases.items():
            wait()
            began = time.perf_counter()
            function()
            wait()
            if turn:
                times[name].append(time.perf_counter() - began)
    return times


def products(llm: torch.nn.Module, rows: int) -> Callable[[], Any]:
    """The language model's products with its weights and nothing else, for so many rows: what its speed rests on."""
    layers = [module for module in llm.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    inputs = {layer.in_features: layer.weight.new_empty(rows, layer.in_features).normal_() for layer in layers}
    return lambda: [inputs[layer.in_features] @ layer.weight.mT for layer in layers]


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Most memory a prefill takes beside the weights."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@torch.no_grad()
def measure(args: Arguments, device: torch.device) -> list[dict[str, Any]]:
    """One row for every batch, number of visual features and text length."""
    rows = []
    for visual in args.visual:
        torch.manual_seed(0)
        ours, theirs = models(args.size, visual, device)
        for batch, text in ((batch, text) for batch in args.batch for text in args.text):
            ids = torch.randint(4, ours.config.text_config.vocab_size, (batch, text + 1), device=device)
            ids[:, 0] = IMAGE
            like = ours.generator.pos_embed
            features = torch.randn(batch, visual, ours.config.visual_width, device=device, dtype=like.dtype)
            check(ours, ids, features)
            cases = {
                "vlora": lambda m=ours, i=ids, f=features: prefill_vlora(m, i, f),
                "tokens": lambda m=theirs, i=ids, f=features: prefill_tokens(m, i, f),
            }
            row = {"batch": batch, "text": text, "visual": visual}
            row |= {f"{name}_mb": peak_bytes(function, device) / 1e6 for name, function in cases.items()}
            if args.graphs:
                cases |= {f"{name}_graph": graphed(function) for name, function in list(cases.items())}
            for name, more in (("vlora", 0), ("tokens", visual)):
                cases[f"{name}_products"] = products(ours.language_model, batch * (text + more))
            times = seconds(cases, device)
            row |= {f"{name}_ms": 1e3 * statistics.median(each) for name, each in times.items()}
            for kind in ["", "_products", *(["_graph"] if args.graphs else [])]:
                pairs = zip(times[f"vlora{kind}"], times[f"tokens{kind}"])
                row[f"ratio{kind}"] = statistics.median(a / b for a, b in pairs)
            work = batch * flops.vlora(ours.config, text), batch * flops.visual_tokens(theirs.config, text)
            row |= {"flops_ratio": work[0] / work[1], "vlora_flops": work[0], "tokens_flops": work[1],
                    "vlora_gflops": work[0] / row["vlora_ms"] / 1e6, "tokens_gflops": work[1] / row["tokens_ms"] / 1e6}
            rows.append(row)
            print("  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
    return rows


def applications(size: str, device: torch.device) -> list[dict[str, float]]:
    """Microseconds of the two ways to apply an image's weights to one module."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (device, dtype, parts.CONFIGS[LLMS[size]].hidden_size, SHAPES[size][2])
    merge = 1e6 * application.merge_seconds(*shape)
    return [
        {"tokens": tokens, "side_us": 1e6 * application.side_seconds(*shape, tokens), "merge_us": merge}
        for tokens in (1, 8, 32, 128, 512, 2048)
    ]


# Reporting --------------------------------------------------------------------------------------------------


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Against visual tokens, by text length: the paper's figure 4 (cost ratio); operations and time as measured."""
    figure, (ratio, counts, times) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    config = official.config(**official.VARIANTS["vlora_7b"])
    for i, (text, points) in enumerate(flops.FIGURE_4.items()):
        ratio.plot(points.keys(), points.values(), "x", color=f"C{i}", label=f"{text} text tokens, paper's figure")
        ratios = []
        for config.num_features in points:
            ratios.append(flops.paper_ratio(config, text))
        ratio.plot(points.keys(), ratios, color=f"C{i}", label=f"{text}, released generator counted")
    batch = min(row["batch"] for row in rows)
    for i, text in enumerate(sorted({row["text"] for row in rows})):
        found = [row for row in rows if (row["text"], row["batch"]) == (text, batch)]
        x = [row["visual"] for row in found]
        for name, label, style in (("vlora", "VLoRA", "-"), ("tokens", "visual tokens", "--")):
            style = {"color": f"C{i}", "linestyle": style, "marker": ".", "label": f"{text} text tokens, {label}"}
            counts.plot(x, [row[f"{name}_flops"] / 1e9 for row in found], **style)
            times.plot(x, [row[f"{name}_ms"] for row in found], **style)
    ratio.set_title("operations at 7B, VLoRA / LLaVA", fontsize=10)
    counts.set_title(f"operations of a prefill, GFLOPs, batch {batch}", fontsize=10)
    times.set_title(f"time of that prefill, ms, {run.hardware()}", fontsize=10)
    for axis in (ratio, counts, times):
        axis.set_xlabel("visual tokens")
        axis.set_ylim(0)
        axis.legend(frameon=False, fontsize=7)
    drawing.save(figure, path)


def table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> list[str]:
    """Lines of Markdown; `columns` maps each header to a format of a row's fields."""
    cells = (" | ".join(cell.format(**row) for cell in columns.values()) for row in rows)
    return [f"| {' | '.join(columns)} |", "|" + "---:|" * len(columns), *(f"| {line} |" for line in cells), ""]


def page(found: dict[str, Any]) -> str:
    """The Markdown page."""
    graphs = {"as graphs": "{ratio_graph:.3f}"} if "ratio_graph" in found["rows"][0] else {}
    return "\n".join([
        f"`{found['command']}`", "", found["about"], "",
        "Prefill: milliseconds (median) and their ratio, VLoRA / visual tokens; the same ratio of the language model's "
        "products with its weights alone, and of the operations; rate; peak memory beside the weights.", "",
        *table(found["rows"], {
            "batch": "{batch}", "text": "{text}", "visual": "{visual}", "VLoRA ms": "{vlora_ms:.1f}",
            "tokens ms": "{tokens_ms:.1f}", "ratio": "{ratio:.3f}", **graphs,
            "of products alone": "{ratio_products:.3f}", "of operations": "{flops_ratio:.3f}",
            "VLoRA GFLOP/s": "{vlora_gflops:.0f}", "tokens GFLOP/s": "{tokens_gflops:.0f}",
            "VLoRA MB": "{vlora_mb:.1f}", "tokens MB": "{tokens_mb:.1f}",
        }),
        "Applying an image's weights to one module (`generate(apply=\"auto\")` decides by this): microseconds beside "
        "its weight, for each pass of so many tokens, against merging once.", "",
        *table(found["applications"], {"tokens": "{tokens}", "beside": "{side_us:.1f}", "merging": "{merge_us:.1f}"}),
        "Operations at 7B, 576 visual features: GFLOPs by formula (by PyTorch's counter), the ratio, and the ratio as "
        "the paper counts.", "",
        *table(found["operations"], {
            "text": "{text}", "VLoRA": "{vlora:.1f} ({vlora_counted:.1f})",
            "visual tokens": "{tokens:.1f} ({tokens_counted:.1f})", "ratio": "{ratio:.4f}",
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
    environment = run.environment()
    found = {
        "command": environment["command"],
        "about": f"{args.size} shapes, random weights, {'bf16' if device.type == 'cuda' else 'float32'}, "
                 f"{environment['hardware']}, {environment['threads']} thread(s), torch {torch.__version__}, revision "
                 f"{environment['git'][:7]}, {environment['time']}",
        "rows": measure(args, device), "applications": applications(args.size, device), "operations": operations(),
        "bounds": flops.bounds(official.config(**official.VARIANTS["vlora_7b"]), configs("7b", 576)[1]),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    name = "vlora_" + re.sub(r"\W+", "_", f"{args.size} {run.hardware()}").lower()
    run.write_json(args.out / f"{name}.json", found)
    (args.out / f"{name}.md").write_text(page(found))
    draw(args.out / f"{name}.png", found["rows"])
    print(page(found))


if __name__ == "__main__":
    run.main(main)
