"""The adapter for VLMEvalKit, against a stand-in for the toolkit's base class: what it is given and what it gives."""

import importlib
import sys
import types

import pytest
from PIL import Image

from common.run import UserError
from papers.vlora import build, evaluate, vlmevalkit
from papers.vlora.recipes import RECIPES


@pytest.fixture
def adapter(monkeypatch):
    class BaseModel:
        """As the toolkit's: `generate` checks the message and passes it on."""

        INTERLEAVE = False

        def generate(self, message, dataset=None):
            assert all(set(part) >= {"type", "value"} for part in message)
            return self.generate_inner(message, dataset)

        def dump_image(self, line, dataset):
            return [f"/{dataset}/{line['index']}.jpg"]

    for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base", "vlmeval.dataset"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vlmeval.vlm.base"].BaseModel = BaseModel
    sys.modules["vlmeval.dataset"].DATASET_TYPE = lambda name: "Y/N" if name == "MME" else "MCQ"
    yield importlib.reload(vlmevalkit)
    monkeypatch.undo()
    importlib.reload(vlmevalkit)


def test_answers_like_the_model_itself(adapter, tmp_path):
    processor = build.processor(RECIPES["tiny"])
    model = build.model(RECIPES["tiny"], processor.image_token_id)
    for key, parameter in model.named_parameters():
        if ".B_" in key:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    picture = Image.new("RGB", (40, 30), "red")
    picture.save(tmp_path / "a.png")
    image = {"type": "image", "value": str(tmp_path / "a.png")}
    words = [{"type": "text", "value": "What color is it?"}, {"type": "text", "value": "What shape is it?"}]

    harness = adapter.VLoRA(str(tmp_path), max_new_tokens=5, device="cpu")
    told = harness.generate([image, *words], dataset="MMBench_DEV_EN")
    text = {"type": "text", "text": "What color is it?\nWhat shape is it?"}
    turns = [{"role": "user", "content": [{"type": "image"}, text]}]
    (expected,) = evaluate.answer(harness.model, processor, [[picture]], [turns], harness.world, 5)
    assert told == expected
    assert harness.generate([image, image, *words]) == told, "of several images the first is seen"
    assert isinstance(harness.generate(words), str), "text alone"


def test_multiple_choice_is_asked_as_llava_asks_it(adapter):
    model = adapter.VLoRA.__new__(adapter.VLoRA)
    assert model.use_custom_prompt("MMBench_DEV_EN") and not model.use_custom_prompt("MME")
    line = {"index": 7, "question": "What is it?", "hint": float("nan"), "A": "a cat", "B": 3, "C": float("nan")}
    image, words = model.build_prompt(line, "MMBench_DEV_EN")
    assert image == {"type": "image", "value": "/MMBench_DEV_EN/7.jpg"}
    end = "Answer with the option's letter from the given choices directly."
    assert words["value"] == f"What is it?\nA. a cat\nB. 3\n{end}"
    assert model.build_prompt(line | {"hint": "Look."}, "x")[1]["value"].startswith("Look.\nWhat is it?\nA.")
    chinese = model.build_prompt({"index": 1, "question": "这是什么？", "A": "猫"}, "CCBench")[1]["value"]
    assert chinese == "这是什么？\nA. 猫\n请直接回答选项字母。"
    open_ended = model.build_prompt({"index": 1, "question": "Why?"}, "x")[1]["value"]
    assert open_ended == "Why?\nAnswer the question directly."


def test_without_the_toolkit():
    with pytest.raises(UserError, match="VLMEvalKit is not installed"):
        vlmevalkit.VLoRA("model")
