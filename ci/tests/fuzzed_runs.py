"""Readers of runs, records and weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from ci.tests.fuzzed import add, file, json_file, picture
from common import run
from common.data import pretrained
from common.run import hf, readme
from papers.mm_gem.index import Index, Row
from papers.shiftvit.recipes import RECIPES, Recipe
from tools import report, tables


def _run_folder(root: Path) -> Path:
    folder = root / "shiftvit" / "smoke" / "20260101-000000"
    config = {"paper": "shiftvit", "recipe_name": "smoke", "recipe": RECIPES["smoke"], "options": run.Options()}
    file(folder / "config.json", json.dumps(config, default=lambda value: getattr(value, "__dict__", str(value))))
    about = {"hardware": "2 cores", "git": "1234567", "command": "python -m papers.shiftvit smoke", "threads": 1,
             "time": "2026-01-01T00:00:00+00:00"}
    json_file(folder / "environment.json", about | {"packages": {"torch": "2.11.0"}})
    file(folder / "log.jsonl", '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25, "val/top1": 50.0}\n')
    record = {
        "paper": "shiftvit", "recipe": "smoke", "data": "digits", "params": 7, "flops": 1e6, "wall_s": 1.5,
        "throughput": 20.0, "peak_mem_bytes": 2**20, "seed": 0, "metrics": [
            run.metric("top1", 50.0, "%", paper_value=79.3, paper_source="table 1") | {"spread": 0.5, "seeds": [0, 1]},
            run.metric("loss", 2.25, "nats"),
        ],
    }
    json_file(folder / "results.json", record | about)
    file(folder / "curve.png", picture())
    return folder


def _page(root: Path) -> None:
    report.page(report.find_runs(root, root / "papers"), root)


@add("report page", _page)
def _reported(root: Path) -> list[Path]:
    folder = _run_folder(root)
    return [folder / name for name in ("results.json", "config.json", "environment.json", "log.jsonl", "curve.png")]


@add("table of records", lambda root: tables.table(tables.read_records(root / "shiftvit")))
def _records(root: Path) -> list[Path]:
    record = run.read_json(_run_folder(root / "runs") / "results.json")
    for metric in record["metrics"]:
        for over_seeds in ("seeds", "spread"):
            metric.pop(over_seeds, None)
    return [json_file(root / "shiftvit" / "results" / f"{seed}.json", record | {"seed": seed}) for seed in (0, 1)]


@add("log", lambda root: run.read_log(next(root.glob("*/*/*"))))
def _log(root: Path) -> list[Path]:
    return [_run_folder(root) / "log.jsonl"]


def _checkpointed(root: Path) -> Path:
    folder = _run_folder(root)
    layer = torch.nn.Linear(2, 3)
    state = {"optimizer": torch.optim.AdamW(layer.parameters()).state_dict(), "wall_s": 1.5, "classes": ["cat", "dog"]}
    run.save_checkpoint(folder, 2, {"model": layer.state_dict()}, state)
    return folder


def _restore(root: Path) -> None:
    layer, options = torch.nn.Linear(2, 3), run.Options(resume="auto")
    optimizer = torch.optim.AdamW(layer.parameters())
    run.restore(next(root.glob("*/*/*")), options, optimizer, classes=["cat", "dog"], model=layer)


@add("checkpoint", _restore)
def _checkpoint(root: Path) -> list[Path]:
    return sorted(_checkpointed(root).glob("checkpoints/*/*"))


@add("checkpoint of transformers", hf._newest_checkpoint)
def _transformers(root: Path) -> list[Path]:
    folder = root / "checkpoints" / "checkpoint-2"
    run.save_weights(folder / "model.safetensors", {"a": torch.ones(3)})
    torch.save({"state": [1]}, folder / "optimizer.pt")
    json_file(folder / "trainer_state.json", {"global_step": 2})
    json_file(folder / "whole.json", {"wall_s": 1.5})
    return sorted(folder.iterdir())


@add("recipe of a run", lambda root: run.load_run(next(root.glob("*/*/*")), Recipe))
def _run(root: Path) -> list[Path]:
    return [_checkpointed(root) / "config.json"]


def _weights(root: Path) -> None:
    for path in sorted(root.iterdir()):
        run.load_weights(path)


@add("weights", _weights)
def _weight_files(root: Path) -> list[Path]:
    weights = {"module.a": torch.arange(6.0).reshape(2, 3), "module.b": torch.ones(3, dtype=torch.bfloat16)}
    torch.save({"model": weights, "epoch": 3}, root / "a.pth")
    torch.save({"state_dict": weights, "args": [1, "x"]}, root / "old.pth", _use_new_zipfile_serialization=False)
    run.save_weights(root / "a.safetensors", weights)
    return sorted(root.iterdir())


def _fill_twice(root: Path) -> None:
    text = (root / "README.md").read_bytes().decode(errors="surrogateescape")
    once = readme.filled(text, "results", "| a |\n")
    if once is not None and readme.filled(once, "results", "| a |\n") != once:
        raise AssertionError("a README grows")


@add("markers", _fill_twice)
def _readme(root: Path) -> list[Path]:
    start, end = readme.markers("results")
    return [file(root / "README.md", f"# A\n\n{start}\n| b |\n{end}\n\n{start}\nrest\n")]


def _search(root: Path) -> None:
    Index.open(root, "a model").nearest(torch.ones(8), 3)


@add("index", _search)
def _index(root: Path) -> list[Path]:
    index = Index.create(root, "a model", 8)
    vectors = torch.nn.functional.normalize(torch.arange(40.0).reshape(5, 8).sin())
    index.add([Row(name, 3, 4, "5") for name in "abcde"], vectors)
    index.passed["f"] = [1, 2, "torn"]
    index.save_passed()
    return [*index.parts, root / "about.json", root / "passed.json"]


def _read_gguf(root: Path) -> None:
    with (
        mock.patch.object(pretrained, "_packaged", lambda *_: root / "model.gguf"),
        mock.patch.object(pretrained, "cache_dir", lambda name: root / name),
    ):
        try:
            pretrained.smollm2()
        finally:
            shutil.rmtree(root / "pretrained", ignore_errors=True)


@add("gguf", _read_gguf, quick=False)
def _gguf(root: Path) -> list[Path]:
    """A LLaMA of one layer in the packaged model's format."""
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    rng, width = np.random.default_rng(0), 32
    words = [*(f"w{i}" for i in range(15)), "1", "2", "<|im_start|>", "<|im_end|>", "w"]
    writer = gguf.GGUFWriter(root / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(20)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * 20)
    writer.add_token_merges(["w 1", "w 2"])
    writer.add_bos_token_id(17)
    writer.add_eos_token_id(18)
    shapes = {name: (width,) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
    shapes |= {"token_embd": (20, width)}
    shapes |= {f"blk.0.{name}": (width, width) for name in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{name}": (width // 2, width) for name in ("attn_k", "attn_v")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [root / "model.gguf"]
