"""Model folders of strangers: nothing is fetched, no code is run, what is wrong is one line; and what is saved is open
to whom the umask lets."""

import json
import os
import socket

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    TimmWrapperConfig,
    TrainingArguments,
)

from common import run
from common.run import UserError, hf, model_folder


@pytest.fixture
def saved(tmp_path):
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model_folder.save(tmp_path / "model", CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4)))
    return tmp_path / "model"


@pytest.fixture
def offline(monkeypatch):
    def refused(*_):
        raise AssertionError("something asked the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


def test_modes_follow_the_umask(saved):
    os.umask(mask := os.umask(0))
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o666 & ~mask}
    assert (saved / "model.safetensors").is_file()


def _changed(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


TIMM = {"model_type": "timm_wrapper", "num_classes": 2}


@pytest.mark.parametrize("part, message", [
    ({**TIMM, "architecture": "hf-hub:attacker/model"}, "architecture 'hf-hub:attacker/model'"),
    ({**TIMM, "architecture": "local-dir:/tmp"}, "architecture 'local-dir:/tmp'"),
    ({**TIMM, "architecture": "resnet18", "model_args": {"pretrained_cfg_overlay": {"url": "x"}}},
     "pretrained_cfg_overlay in model_args"),
    ({**TIMM, "architecture": "resnet18", "model_args": {"checkpoint_path": "/x"}},
     "checkpoint_path in model_args"),
])
def test_a_part_is_of_transformers_and_timms_own(offline, part, message):
    with pytest.raises(UserError, match=message):
        model_folder.checked(TimmWrapperConfig.from_dict(part))


def test_parts_that_are_meant():
    part = {**TIMM, "architecture": "tf_efficientnet_lite0", "model_args": {"global_pool": ""}}
    assert model_folder.checked(TimmWrapperConfig.from_dict(part)).architecture == "tf_efficientnet_lite0"
    assert model_folder.checked(LlamaConfig()).model_type == "llama"


def test_code_beside_a_model_is_not_run(offline, saved, tmp_path, monkeypatch):
    (saved / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask on a terminal
    _changed(saved, model_type="foreign", auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Model"})
    for kind in (AutoConfig, AutoModel):
        with pytest.raises(UserError, match=r"cannot load .*model: "):
            model_folder.load(kind, saved)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
    lambda folder: (folder / "config.json").write_text("{"),
    lambda folder: (folder / "config.json").write_text("[1]"),
    lambda folder: _changed(folder, hidden_size="x"),
    lambda folder: _changed(folder, hidden_size=24),
    lambda folder: _changed(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
])
def test_a_damaged_folder_is_one_line(offline, saved, damage):
    assert model_folder.load(AutoModel, saved).training is False
    damage(saved)
    with pytest.raises(UserError, match=r"cannot load .*model: \S") as found:
        model_folder.load(AutoModel, saved)
    assert "\n" not in str(found.value)


def test_the_recipe_of_a_run(tmp_path):
    recipes = {"r": run.Options()}
    with pytest.raises(UserError, match="needs --recipe, one of r; got None"):
        model_folder.recipe_of(tmp_path, None, recipes)
    assert model_folder.recipe_of(tmp_path, "r", recipes) is recipes["r"]
    for content in ('{"recipe": {"no_such": 1}}', "{", '{"recipe": 3}', "3"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="is damaged or of another version"):
            model_folder.recipe_of(tmp_path, None, recipes)
    (tmp_path / "config.json").write_text('{"recipe": {"seed": 3}}')
    assert model_folder.recipe_of(tmp_path, None, recipes).seed == 3


def test_a_process_uses_one_device(tmp_path, monkeypatch):
    """On a machine with several GPUs as well: transformers would wrap the model in DataParallel. And processes on CPUs
    call theirs "cpu", where torch.load knows no "cpu:1"."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: torch.device("cpu", 1)))
    world = run.World(0, 1, torch.device("cpu"), None)
    found = hf.arguments(tmp_path, run.Options(), world, batch=8, steps=2)
    assert found.n_gpu == 1 and found.train_batch_size == 8 and found.device == torch.device("cpu")
