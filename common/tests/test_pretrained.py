"""Pretrained parts from installed packages: converted once, and what they were."""

from pathlib import Path

import pytest
import torch

from common.data import pretrained
from common.run import UserError


def _needs(part):
    module, package, pattern = part
    try:
        pretrained._packaged(module, package, pattern)
    except UserError as error:
        return pytest.mark.skip(reason=str(error))
    return pytest.mark.slow


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(pretrained, "SMOLLM2", ("no_such_module", "no-such-package", "x"))
    with pytest.raises(UserError, match=r"no-such-package are not installed; install them with: .* -m pip install"):
        pretrained.smollm2()


def test_a_damaged_package_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "_packaged", lambda module, package, pattern: tmp_path / Path(pattern).name)
    for content in (b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 40, b"no such file", b""):
        (tmp_path / pretrained.SMOLLM2[2]).write_bytes(content)
        with pytest.raises(UserError, match=r"gguf is damaged \(.*\); install them with: .* --force") as found:
            pretrained.smollm2()
        assert "\n" not in str(found.value)
    (tmp_path / Path(pretrained.LITE0[2]).name).write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"is refused|is truncated or not a checkpoint"):
        pretrained.efficientnet_lite0()
    assert not list((tmp_path / "cache").rglob(".*.part"))


@_needs(pretrained.LITE0)
@torch.no_grad()
def test_efficientnet_lite0_is_the_packages_network():
    from efficientnet_lite_pytorch import EfficientNet
    from transformers import AutoImageProcessor, AutoModel

    folder = pretrained.efficientnet_lite0()
    model = AutoModel.from_pretrained(folder).eval()
    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    file = pretrained._packaged(*pretrained.LITE0)
    theirs.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    pixels = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(model(pixels).last_hidden_state, theirs.extract_features(pixels), rtol=0, atol=1e-5)
    images = AutoImageProcessor.from_pretrained(folder)
    assert images.crop_size["height"] == 224 and list(images.image_mean) == [0.498] * 3


@_needs(pretrained.SMOLLM2)
@torch.no_grad()
def test_smollm2_knows_the_capital_of_france():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = pretrained.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (tokenizer.eos_token, model.config.eos_token_id) == ("<|im_end|>", 2)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(out[0]) == "The capital of France is Paris."
    losses = [model(ids, labels=ids).loss.item() for ids in (
        tokenizer(text, return_tensors="pt").input_ids
        for text in ("A man rides a horse on the beach.", "beach. the on horse a rides man A")
    )]
    assert losses[0] + 1 < losses[1], "it has read English"
