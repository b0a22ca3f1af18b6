"""The adapter for lmms-eval, against stand-ins for its classes: what it is given and what it gives."""

import importlib
import sys
import types

import pytest
from PIL import Image

from common.run import UserError
from papers.vlora import build, evaluate, lmmseval
from papers.vlora.data import assistant_message
from papers.vlora.recipes import RECIPES


@pytest.fixture
def adapter(monkeypatch):
    class Base:
        def __init__(self):
            self.task_dict = {}

    known = {}
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Base
    sys.modules["lmms_eval.api.registry"].register_model = lambda name: lambda kind: known.setdefault(name, kind)
    yield importlib.reload(lmmseval), known
    monkeypatch.undo()
    importlib.reload(lmmseval)


def test_answers_and_likelihoods_like_the_model_itself(adapter, tmp_path):
    module, known = adapter
    processor = build.processor(RECIPES["tiny"])
    model = build.model(RECIPES["tiny"], processor.image_token_id)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    picture = Image.new("RGB", (40, 30), "red")
    assert known == {"vlora": module.VLoRA}
    harness = module.VLoRA(model_path=str(tmp_path), device="cpu", batch_size=1)
    harness.task_dict["scenes"] = {"test": [{"image": picture.convert("L"), "answer": " red"}]}

    def request(*args):
        return types.SimpleNamespace(args=(*args, lambda doc: [doc["image"]] * 2, 0, "scenes", "test"))

    content = [{"type": "image"}, {"type": "text", "text": "What color is it?"}]
    turns = [{"role": "user", "content": content}]
    grey = picture.convert("L").convert("RGB")
    (expected,) = evaluate.answer(harness.model, processor, [[grey]], [turns], harness.world, 5)
    found = harness.generate_until([request("What color is it?", {"max_new_tokens": 5, "until": ["\n\n"]})])
    assert found == [expected]
    (loss,) = evaluate.losses(
        harness.model, processor, [[grey]], [[*turns, assistant_message("red")]], harness.world
    ).tolist()
    assert harness.loglikelihood([request("What color is it?", "red")])[0][0] == pytest.approx(loss)
    with pytest.raises(UserError, match="one round"):
        harness.generate_until_multi_round([])


def test_without_lmms_eval():
    with pytest.raises(UserError, match="lmms-eval is not installed"):
        lmmseval.VLoRA("model")
