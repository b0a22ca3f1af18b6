"""The trainer: learns, resumes exactly, runs in two processes and under DeepSpeed, hands one stage on to the next."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor

from common import run
from common.data.tiny.scenes import scenes
from common.run import UserError, shipped
from papers.vlora import bench, build, cases, demo, evaluate, flops, official, train
from papers.vlora.baseline import VisualTokensForConditionalGeneration
from papers.vlora.model import VLoRAForConditionalGeneration
from papers.vlora.recipes import ABLATIONS, RECIPES

WORLD = run.World(0, 1, torch.device("cpu"), None)
SMALL = dataclasses.replace(RECIPES["smoke"], batch=8, steps=6, eval_rows=8, eval_every=3, blocks=1, width=32, rank=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few scenes, and some text alone among the conversations."""
    root = scenes(24, 6, 32, root=tmp_path_factory.mktemp("data") / "scenes")
    path = root / "conversations_train.json"
    talks = json.loads(path.read_text())
    for i in range(8):
        turns = [{"from": "human", "value": "What color is it?"}, {"from": "gpt", "value": "red"}]
        talks.append({"id": f"text-{i}", "conversations": turns})
    path.write_text(json.dumps(talks))
    return root


def _train(out, data, recipe=SMALL, **options):
    return train.train("smoke", recipe, run.Options(data=data, out=out, log_every=1, **options), WORLD)


def _results(folder):
    return {m["name"]: m["value"] for m in json.loads((folder / "results.json").read_text())["metrics"]}


def _weights(folder):
    return run.load_weights(folder / "model" / "model.safetensors")


def test_overfits_a_batch(tmp_path):
    root = scenes(4, 2, 32, root=tmp_path / "scenes")
    for path in (root / "conversations_val.json", root / "conversations_train.json"):
        talks = [t for t in json.loads((root / "conversations_val.json").read_text()) if t["category"] == "describe"]
        path.write_text(json.dumps(talks))
    recipe = dataclasses.replace(SMALL, batch=2, steps=90, lr=5e-3, eval_every=90)
    found = _results(_train(tmp_path, root, recipe))
    assert found["training loss"] < 0.05 and found["accuracy"] == 100
    assert found["accuracy, images exchanged"] == 0, "what is said must come from the image"


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, data):
    whole = _train(tmp_path / "whole", data)
    for stop in (2, 5):
        parts_ = _train(tmp_path / "parts", data, stop_at=stop, resume="auto")
        assert not (parts_ / "results.json").exists()
    broken = parts_ / "checkpoints" / "checkpoint-6"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half written")  # killed while saving: has no mark, and does not count
    assert _train(tmp_path / "parts", data, resume=str(parts_), workers=1) == parts_
    torch.testing.assert_close(_weights(parts_), _weights(whole), rtol=0, atol=0)
    assert [r.get("loss") for r in run.read_log(whole)] == [r.get("loss") for r in run.read_log(parts_)]
    ours, theirs = _results(whole), _results(parts_)
    assert ours == theirs
    assert {p.name for p in whole.glob("*.png")} == {"curves.png", "answers.png", "controls.png"}
    assert not any(m["comparable"] for m in json.loads((whole / "results.json").read_text())["metrics"])
    assert len(list((whole / "checkpoints").glob("checkpoint-*"))) <= 2
    assert not list(whole.rglob("training_args.bin")), "a pickle"


def test_a_run_killed_over_its_pictures_has_its_results_and_draws_them_later(tmp_path, data, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    recipe = dataclasses.replace(SMALL, steps=2, eval_every=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.figures, "draw", killed)
        _train(tmp_path, data, recipe)
    (folder,) = (tmp_path / "vlora" / "smoke").iterdir()
    before = _results(folder)
    assert not list(folder.glob("*.png"))
    assert _train(tmp_path, data, recipe, resume="auto") == folder
    assert _results(folder) == before and len(list(folder.glob("*.png"))) == 3 and run.folder.finished(folder)


def test_the_saved_model_is_the_evaluated_one(tmp_path, data, monkeypatch, capsys):
    folder = _train(tmp_path, data)
    monkeypatch.setattr(sys, "argv", ["evaluate", str(folder), "--data", str(data), "--out", str(tmp_path / "s.json")])
    evaluate.main()
    again = {m["name"]: m["value"] for m in json.loads((tmp_path / "s.json").read_text())["metrics"]}
    assert {**_results(folder), **again} == _results(folder)

    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    assert isinstance(model, VLoRAForConditionalGeneration)
    assert AutoProcessor.from_pretrained(folder / "model").image_token_id == model.config.image_token_id

    picture = next((data / "val").glob("*.png"))
    argv = ["demo", str(picture), "--checkpoint", str(folder), "--question", "What color is it?"]
    monkeypatch.setattr(sys, "argv", [*argv, "--out", str(tmp_path / "answer.png")])
    demo.main()
    assert "What color is it?" in capsys.readouterr().out and (tmp_path / "answer.png").exists()
    model, processor = evaluate.load(folder, WORLD.device)
    chat = demo.Chat(model, processor, evaluate.Image.open(picture).convert("RGB"), WORLD, 4)
    first, second = chat.ask("What color is it?"), chat.ask("What shape is it?")
    assert [m["content"][-1]["text"] for m in chat.turns] == ["What color is it?", first, "What shape is it?", second]


def test_shipped_weights_are_what_was_trained(tmp_path):
    """The generator alone in a file, around parts that are installed: here the tiny recipe's."""
    recipe = dataclasses.replace(SMALL, llm="tiny")
    processor = build.processor(recipe)
    model = build.model(recipe, processor.image_token_id)
    weights = {name: torch.randn_like(tensor) for name, tensor in model.generator.state_dict().items()}
    path = tmp_path / "small.safetensors"
    shipped.write(path, weights, paper="vlora", recipe_name="tiny", recipe=recipe, classes=[], revision="0",
                  dtype=torch.bfloat16)
    again, loaded = evaluate.load(path, WORLD.device)
    assert evaluate.recipe_of(path) == recipe and loaded.chat_template == processor.chat_template
    for name, tensor in again.generator.state_dict().items():
        torch.testing.assert_close(tensor, weights[name].bfloat16().float(), rtol=0, atol=0)
    run.save_weights(tmp_path / "bare.safetensors", weights)
    with pytest.raises(UserError, match="holds no model"):
        evaluate.load(tmp_path / "bare.safetensors", WORLD.device)


def test_four_bits_need_their_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs bitsandbytes"):
        build.model(dataclasses.replace(SMALL, llm="some", tune="frozen", llm_dtype="nf4"), 44)


def test_what_each_stage_trains(tmp_path, data):
    """Pre-training moves the generator alone; fine-tuning starts from it; the vision tower stays."""
    run.seed_all(0)
    start = build.model(SMALL, 44)
    start.language_model.save_pretrained(tmp_path / "llm")
    build.word_tokenizer().save_pretrained(tmp_path / "llm")
    llm = dataclasses.replace(SMALL, llm=str(tmp_path / "llm"), steps=3)
    first = _train(tmp_path / "1", data, dataclasses.replace(llm, stage="pretrain", template="plain", tune="frozen"))
    before = {f"language_model.{k}": v for k, v in start.language_model.state_dict().items()}
    after = _weights(first)
    assert all(torch.equal(after[k], before[k]) for k in before if k in after)
    assert after["generator.B_q"].any() and after["generator.queries"].any()

    second = _train(tmp_path / "2", data, dataclasses.replace(llm, init=str(first), lr=1e-5))
    final = _weights(second)
    assert not torch.equal(final["language_model.model.norm.weight"], before["language_model.model.norm.weight"])
    moved = (final["generator.weights_head.weight"] - after["generator.weights_head.weight"]).norm()
    fresh = (build.model(SMALL, 44).generator.weights_head.weight - after["generator.weights_head.weight"]).norm()
    assert 0 < moved < 0.05 * fresh, "the second stage starts from the first one's generator"
    assert all(torch.equal(final[k], after[k]) for k in final if k.startswith("vision_tower."))


def test_lora_trains_little_and_leaves_a_plain_model(tmp_path, data):
    recipe = dataclasses.replace(SMALL, tune="lora", lora_rank=2, lora_alpha=4, steps=4)
    folder = _train(tmp_path, data, recipe, stop_at=2)
    trained = set(run.load_weights(folder / "checkpoints" / "checkpoint-2" / "model.safetensors"))
    assert any("lora_A" in name for name in trained)
    assert not any("embed_tokens" in name or "base_layer" in name for name in trained)
    _train(tmp_path, data, recipe, resume=str(folder))
    whole = _train(tmp_path / "whole", data, recipe)
    torch.testing.assert_close(_weights(folder), _weights(whole), rtol=0, atol=0)
    assert not any("lora" in name or "base" in name for name in _weights(whole))


def test_lora_is_merged_into_what_is_exported(tmp_path):
    recipe = dataclasses.replace(SMALL, tune="lora", lora_rank=2, lora_alpha=6)
    processor = build.processor(recipe)
    model = build.model(recipe, processor.image_token_id).eval()
    build.choose_trained(model, recipe)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or ".B_" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.arange(4, 13)[None]
    ids[0, 1] = processor.image_token_id
    pixels = torch.randn(1, 3, build.TINY_SIDE_PX, build.TINY_SIDE_PX)
    expected = model(ids, pixels).logits
    train.export(tmp_path, recipe, processor, model.state_dict(), torch.float32)
    plain, _ = evaluate.load(tmp_path, WORLD.device)
    torch.testing.assert_close(plain(ids, pixels).logits, expected, rtol=1e-4, atol=1e-4)
    connection = run.load_weights(tmp_path / "connection.safetensors")
    torch.testing.assert_close(connection, dict(model.generator.state_dict()), rtol=0, atol=0)


def _launch(out, data, processes, *words):
    launch = ["-m", "common.run.launch", str(processes)] if processes > 1 else ["-m"]
    fields = ["--device", "cpu", "--log-every", "1", "--batch", "8", "--blocks", "1", "--width", "32", "--rank", "4",
              "--eval-rows", "8", "--eval-every", "2", "--steps", "4"]
    command = [sys.executable, *launch, "papers.vlora.train", "smoke",
               "--data", str(data), "--out", str(out), *fields, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return next(Path(out).glob("vlora/smoke/*"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """What a run starts from, as words of its command, and the run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run.seed_all(0)
    start = build.model(SMALL, 44)
    start.language_model.save_pretrained(folder / "llm")
    build.word_tokenizer().save_pretrained(folder / "llm")
    start.vision_tower.save_pretrained(folder / "vision")
    build.processor(SMALL).image_processor.save_pretrained(folder / "vision")
    run.save_weights(folder / "generator.safetensors", {k: v + 0.01 for k, v in start.generator.state_dict().items()})
    words = [f"--{part}={folder / part}" for part in ("llm", "vision")]
    words += [f"--init={folder / 'generator.safetensors'}"]
    return words, _launch(folder, data, 1, *words)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "zero2", "zero3"])
def test_two_processes_train_as_one(tmp_path, data, alone, how):
    """ZeRO scatters optimizer and gradients (2), and weights (3); what is loaded and saved is whole all the same."""
    words, one = alone
    if how == "ddp":
        words = [*words, "--micro-batch", "2"]
    else:
        words = [*words, "--deepspeed", how]
    if how == "zero3":
        _launch(tmp_path, data, 2, *words, "--stop-at", "2")
        words += ["--resume", "auto"]
    two = _launch(tmp_path, data, 2, *words)
    weights = {folder: _weights(folder) for folder in (one, two)}
    assert {k: v.shape for k, v in weights[two].items()} == {k: v.shape for k, v in weights[one].items()}
    losses = [[row["loss"] for row in run.read_log(folder) if "loss" in row] for folder in (one, two)]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-3)
    for name, weight in weights[one].items():
        torch.testing.assert_close(weights[two][name], weight, rtol=1e-2, atol=1e-3, msg=name)
    connections = [run.load_weights(folder / "connection.safetensors") for folder in (one, two)]
    assert {k: v.shape for k, v in connections[0].items()} == {k: v.shape for k, v in connections[1].items()}
    ours, theirs = _results(one), _results(two)
    assert ours.keys() == theirs.keys() and ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


@pytest.mark.slow
def test_zero3_where_one_process_has_an_image_and_the_other_none(tmp_path, data, alone):
    """The tower's weights are scattered as well: all processes gather them, or none."""
    root = tmp_path / "mixed"
    shutil.copytree(data, root)
    talks = json.loads((root / "conversations_train.json").read_text())
    (root / "conversations_train.json").write_text(json.dumps(talks[:4] + talks[-4:]))  # one batch, half of it text
    words = [*alone[0], "--deepspeed", "zero3", "--micro-batch", "1", "--steps", "2"]
    assert (_launch(tmp_path / "out", root, 2, *words) / "results.json").exists()


def door():
    run.door("vlora", RECIPES, train.train)


@pytest.mark.parametrize("main, argv, message", [
    (door, ["finetune_7b"], "this recipe is meant for LLaVA-1.5 mixture: give its folder with --data"),
    (door, ["tiny", "--data", "nowhere"], "no data folder nowhere"),
    (door, ["tiny", "--every", "3"], "4 layers are not a multiple of every=3"),
    (door, ["tiny", "--weight-types", "qz"], "weight_types='qz'"),
    (door, ["tiny", "--batch", "9999"], "the global batch of 9999 is larger than"),
    (door, ["tiny", "--llm", "/no/such/llm", "--vision", "tiny"], "cannot load"),
    (door, ["tiny", "--init", "WEIGHTS"], "does not fit this recipe's model"),
    (evaluate.main, ["nowhere"], "no checkpoint at nowhere"),
    (evaluate.main, [".", "--recipe", "tiny"], "holds no model"),
    (demo.main, ["x.png"], "no finished run under runs/vlora"),
    (official.main, [".", "out"], "holds neither *.safetensors nor *.bin"),
])
def test_mistakes_are_one_line(tmp_path, data, monkeypatch, capsys, main, argv, message):
    if "WEIGHTS" in argv:
        run.save_weights(tmp_path / "w.safetensors", {"x": torch.ones(1)})
        argv = [str(tmp_path / "w.safetensors") if word == "WEIGHTS" else word for word in argv]
    if main is door and "--data" not in argv and argv[0] == "tiny":
        argv = [*argv, "--data", str(data)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main", *argv])
    with pytest.raises(SystemExit) as exit:
        run.main(main)
    assert exit.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and message in lines[0]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data):
    recipe = dataclasses.replace(SMALL, lr=1e30, clip_norm=0.0, warmup_ratio=0.0)
    with pytest.raises(run.UserError, match=r"the loss is (nan|inf) at step \d"):
        _train(tmp_path, data, recipe)


def test_unreadable_images_are_passed_over_and_named(tmp_path, data):
    root = scenes(110, 6, 32, root=tmp_path / "scenes")
    (root / "train" / "000003.png").write_bytes(b"no picture")
    folder = _train(tmp_path, root, dataclasses.replace(SMALL, batch=44, steps=5))
    assert "000003.png" in (folder / "unreadable.txt").read_text()
    (root / "val" / "000002.png").write_bytes(b"no picture")
    with pytest.raises(run.UserError, match="cannot evaluate"):
        _train(tmp_path / "2", root, SMALL)


def test_training_needs_no_validation_split(tmp_path, data):
    """LLaVA's mixture has none; malformed conversations are passed over and named."""
    root = shutil.copytree(data, tmp_path / "mixture")
    (root / "conversations_val.json").unlink()
    path = root / "conversations_train.json"
    path.write_text(json.dumps([{"id": "no turns"}, *json.loads(path.read_text())]))
    folder = _train(tmp_path, root, dataclasses.replace(SMALL, steps=3, eval_every=1))
    assert _results(folder).keys() == {"training loss"} and not json.loads((folder / "answers.json").read_text())
    assert "entry 0: malformed" in (folder / "unreadable.txt").read_text()
    assert not any("val/loss" in row for row in run.read_log(folder))
    evaluate.load(folder, WORLD.device)


def test_a_checkpoint_of_other_weights_is_refused(tmp_path, data):
    folder = _train(tmp_path, data, stop_at=2)
    path = folder / "checkpoints" / "checkpoint-2" / "model.safetensors"
    weights = run.load_weights(path)
    weights.pop("generator.B_q")
    run.save_weights(path, weights)
    with pytest.raises(run.UserError, match="holds other weights than this recipe trains"):
        _train(tmp_path, data, resume=str(folder))


# Recipes, plans, costs ------------------------------------------------------------------------------------


def test_there_is_a_recipe_for_every_row_of_the_paper():
    for name in ABLATIONS:
        for stage in ("pretrain", "finetune"):
            assert RECIPES[f"{stage}_7b_{name}"].stage == stage
    two = RECIPES["pretrain_7b"], RECIPES["finetune_7b"]
    assert [(r.batch, r.lr, r.tune, r.width, r.blocks, r.rank, r.every) for r in two] == [
        (768, 5e-5, "frozen", 512, 8, 64, 4), (128, 2e-5, "full", 512, 8, 64, 4),
    ]


@pytest.mark.parametrize("name", ["tiny", "tiny_tokens", "smollm2", "smollm2_scenes", "finetune_7b",
                                  "pretrain_7b_tokens"])
def test_a_recipes_training_can_be_planned(name):
    work = cases.training_cost(RECIPES[name])
    assert work.model(*work.inputs).logits.shape[:2] == (1, build.TEXT_TOKENS)
    if name == "finetune_7b":
        trained = sum(p.numel() for p in work.model.parameters() if p.requires_grad)
        assert trained == 851_891_712 + 6_738_415_616


def test_a_plan_of_steps_on_less_than_a_batch_of_data():
    cost = cases.training_cost(dataclasses.replace(RECIPES["smollm2"], batch=512, steps=30))
    assert (cost.samples, cost.epochs) == (239, 30)


@pytest.mark.parametrize("size, text, visual", [("tiny", 7, 16), ("tiny", 33, 5), ("smollm2", 32, 64), ("7b", 32, 576)])
def test_the_formula_is_what_pytorch_counts(size, text, visual):
    kinds = [(VLoRAForConditionalGeneration, bench.prefill_vlora, flops.vlora),
             (VisualTokensForConditionalGeneration, bench.prefill_tokens, flops.visual_tokens)]
    for config, (kind, prefill, formula) in zip(bench.configs(size, visual), kinds):
        config.text_config._attn_implementation = "eager"  # SDPA's masks look at values, which meta tensors have not
        with torch.device("meta"):
            model = kind(config).eval()
            ids, features = torch.zeros(1, text + 1, dtype=torch.long), torch.empty(1, visual, config.visual_width)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            prefill(model, ids, features)
        assert counter.get_total_flops() == formula(config, text)


def test_the_cost_at_7b():
    config = official.config(**official.VARIANTS["vlora_7b"])
    assert flops.generator(config, released=True) == pytest.approx(38.2e9, rel=2e-3)
    assert flops.beside(config, 1) == pytest.approx(0.042e9, rel=2e-3)
    assert flops.paper_language_model(4096, 32, 32) == pytest.approx(413e9, rel=1e-3)
    assert flops.paper_language_model(4096, 32, 32 + 576) == pytest.approx(8028e9, rel=1e-3)
    assert flops.paper_language_model(4096, 32, 32 + 2624) == pytest.approx(37.9e12, rel=2e-3)
    ratios = [flops.paper_ratio(config, text) for text in (32, 128, 256)]
    assert ratios == pytest.approx([0.056, 0.18, 0.31], rel=0.02) and ratios[0] <= 0.06
    assert flops.merging(config) == 4 * 8 * 2 * 4096 * 4096 * 64


def test_the_bench_runs(tmp_path, monkeypatch):
    words = ["--size", "tiny", "--text", "8", "--visual", "64", "--batch", "2", "--device", "cpu", "--seconds", "0.01"]
    monkeypatch.setattr(sys, "argv", ["bench", *words, "--out", str(tmp_path)])
    bench.main()
    found = json.loads(next(tmp_path.glob("vlora_tiny_*.json")).read_text())["records"]
    (row,) = found["prefill"]
    assert row["seconds"]["VLoRA"] > 0 and row["tokens_mb"] > row["vlora_mb"] > 0
    assert row["ratio"] == pytest.approx(1 / row["times_faster"]["VLoRA"][1])
    assert found["operations"][0]["ratio"] < 0.06 and found["operations"][0]["paper_ratio"] < 0.06
    page = next(tmp_path.glob("*.md")).read_text()
    assert "| batch 2, 8 text, 64 visual |" in page and len(list(tmp_path.glob("*.png"))) == 1


def test_the_bench_times_nothing_where_merged_and_beside_differ(monkeypatch):
    ours, _ = bench.models("tiny", 16, WORLD.device)
    ids = torch.randint(4, 64, (1, 9))
    features = torch.randn(1, 16, 64)
    with torch.no_grad():
        bench.check(ours, ids, features)
        deltas = ours.deltas
        monkeypatch.setattr(ours, "deltas", lambda weights: [2 * delta for delta in deltas(weights)])
        with pytest.raises(run.UserError, match=r"merging: merged, tensor 0 is off by .*; not timed"):
            bench.check(ours, ids, features)


@pytest.mark.gpu
def test_a_graph_replays_a_prefill():
    device = torch.device("cuda")
    ours, _ = bench.models("tiny", 16, device)
    ids = torch.randint(4, 64, (2, 9), device=device)
    ids[:, 0] = bench.IMAGE
    features = torch.randn(2, 16, 64, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = bench.prefill_vlora(ours, ids, features)
        torch.testing.assert_close(bench.graphed(lambda: bench.prefill_vlora(ours, ids, features))(), expected)
