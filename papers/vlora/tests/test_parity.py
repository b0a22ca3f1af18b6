"""VLoRA against numbers recorded from the authors' code, and the published checkpoint's tensors one by one."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import initialization as init

from common.run import UserError
from common.tests import parity
from papers.vlora import VLoRAForConditionalGeneration
from papers.vlora.official import CLIP_L_336, GENERATOR_7B, VARIANTS, VICUNA_7B, config, convert, load_official

FIXTURES = Path(__file__).parent / "fixtures"
CASES = ["case_a", "case_b", "case_c", "case_d"]


@pytest.fixture(autouse=True, scope="module")
def _stream():
    parity.check_stream()


@pytest.fixture(scope="module", params=CASES)
def case(request):
    about, theirs = parity.load(FIXTURES, request.param)
    return about, theirs, load_official(request.param, parity.state_dict(about), **about["config"])


def _batch(about, theirs, swapped=False):
    """(input_ids, pixel_values in the order of the placeholders, attention_mask, labels)."""
    images = dict(zip("BA" if swapped else "AB", parity.inputs(about)))
    pixels = torch.stack([images[name] for name in about["image_of_row"] if name])
    ids, mask, labels = (torch.from_numpy(theirs[key]).long() for key in ("input_ids", "attention_mask", "labels"))
    return ids, pixels, mask, labels


def _last(logits, mask):
    return logits[torch.arange(len(mask)), mask.sum(1) - 1]


def test_every_tensor_is_placed(case):
    about, _, model = case
    assert sum(p.numel() for p in model.parameters()) == sum(about["parameters"].values())
    assert sum(p.numel() for p in model.generator.parameters()) == about["parameters"]["generator"]
    assert convert(parity.state_dict(about), model).keys() == model.state_dict().keys()


@torch.no_grad()
def test_generator(case):
    about, theirs, model = case
    A, B = model.generator(parity.probe(*about["features_probe"]))
    types, sites = model.config.weight_types, model.config.sites
    assert [[i, letter] for i in sites for letter in types] == about["sites"]
    for s, i in enumerate(sites):
        for t, letter in enumerate(types):
            parity.assert_close(A[:, t, s], theirs[f"A.{i}.{letter}"], f"A.{i}.{letter}")
            if f"B.{i}.{letter}" in theirs:
                parity.assert_close(B[t][s], theirs[f"B.{i}.{letter}"], f"B.{i}.{letter}")
            if (name := f"delta_W.{i}.{letter}") in theirs:
                place = [(site.type_index, site.site_index) for site in model.places.sites].index((t, s))
                parity.assert_close(model.deltas(A)[place], theirs[name], name)


@torch.no_grad()
def test_logits(case):
    about, theirs, model = case
    ids, pixels, mask, labels = _batch(about, theirs)
    parity.assert_close(model.visual_features(parity.inputs(about)), theirs["vision_features"], "visual features")
    out = model(ids, pixels, mask, labels=labels)
    real = mask.bool()
    parity.assert_close(out.logits[real], theirs["logits"][real.numpy()], "logits")
    parity.assert_close(out.loss, theirs["loss"], "loss")

    ids, pixels, mask, labels = _batch(about, theirs, swapped=True)
    out = model(ids, pixels, mask, labels=labels)
    parity.assert_close(_last(out.logits, mask), theirs["last_logits_swapped"], "logits, images exchanged")
    parity.assert_close(out.loss, theirs["loss_swapped"], "loss, images exchanged")
    nothing = torch.zeros(1, *model.generator.shape)
    plain = model(ids, None, mask, perceptual_weights=nothing).logits
    parity.assert_close(_last(plain, mask), theirs["last_logits_plain"], "logits without images")


def test_gradients(case):
    about, theirs, model = case
    ids, pixels, mask, labels = _batch(about, theirs)
    model.zero_grad()
    for parameter in model.language_model.parameters():
        parameter.requires_grad_(True)
    model(ids, pixels, mask, labels=labels).loss.backward()
    grads = [getattr(model.generator, f"B_{letter}").grad.flatten(1) for letter in model.config.weight_types]
    parity.assert_close(torch.cat(grads)[None], theirs["grad_B"], "gradient of B")

    # The norms of all gradients, the stacked ones taken apart as the authors' tensors are.
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with_norm = about["grad_l2_norm"]
    assert not any("vision_tower" in name for name in [*ours, *with_norm])
    squares = dict.fromkeys(ours, 0.0)
    for name, norm in with_norm.items():
        for place, _, _ in _places(name, model):
            squares[place] += norm**2 / len(_places(name, model))
    for name, square in squares.items():
        if not any(part in name for part in ("cross_q", "cross_kv", ".B_")):  # halves of one tensor of theirs
            assert ours[name].norm().item() == pytest.approx(square**0.5, rel=1e-4, abs=1e-6), name
    halves = {name: grad for name, grad in ours.items() if "cross_" in name and "out" not in name}
    theirs_cross = sum(norm**2 for name, norm in with_norm.items() if "multihead_attn.in_proj" in name)
    assert sum(grad.norm().item() ** 2 for grad in halves.values()) == pytest.approx(theirs_cross, rel=1e-4)
    model.zero_grad()


def _places(name, model):
    from papers.vlora.official import places

    return places(name, model.config.weight_types)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("apply", ["merge", "side"])
def test_greedy_decoding(case, cached, apply):
    about, theirs, model = case
    prompt = torch.from_numpy(theirs["greedy_prompt"]).long()[None]
    image = dict(zip("AB", parity.inputs(about)))[about["placeholder_row_of_greedy"]][None]
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    out = model.generate(prompt, image, use_cache=cached, apply=apply, **options)
    assert out[0, : prompt.shape[1]].tolist() == prompt[0].tolist()
    assert out[0, prompt.shape[1] :].tolist() == theirs["greedy_tokens"].tolist()


def test_published_7b_checkpoint():
    """Names and shapes of the released 7B model, all three parts, each used exactly once."""
    about = json.loads((FIXTURES / "official_7b_generator.json").read_text())
    names = {name: shape for name, shape, _ in about["tensors"]}
    assert len(names) == len(about["tensors"])
    pattern = json.loads((FIXTURES / "case_a.json").read_text())["tensors"]
    for name, shape, *_ in pattern:  # the same names with the released sizes: LLaMA's and CLIP's own
        if "mm_projector" in name:
            continue
        part = CLIP_L_336 if "vision_tower" in name else VICUNA_7B
        small = {128: 32000, 64: 4096, 176: 11008} if part is VICUNA_7B else {32: 1024, 64: 4096, 17: 577, 8: 14}
        number = re.search(r"layers\.(\d+)\.", name)
        if number and int(number[1]):
            continue
        for i in range(part["layers"] if number else 1):
            names[re.sub(r"layers\.0\.", f"layers.{i}.", name)] = [small.get(n, n) for n in shape]
    with torch.device("meta"), init.no_init_weights():
        model = VLoRAForConditionalGeneration(config(**VARIANTS["vlora_7b"]))
        weights = {name: torch.empty(shape) for name, shape in names.items()}
    placed = convert(weights, model)
    assert {n: t.shape for n, t in placed.items()} == {n: t.shape for n, t in model.state_dict().items()}

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(model.generator) == about["parameters"] == 851_891_712
    assert count(model.language_model) == 6_738_415_616 and count(model.vision_tower) == 303_507_456
    assert count(model.generator.weights_head) == 5 * 134_479_872


@pytest.mark.parametrize("change, parameters", [
    ({"rank": 16}, 339_727_872), ({"rank": 32}, 510_449_152), ({"rank": 128}, 1_534_776_832),
    ({"blocks": 4}, 767_811_072), ({"blocks": 12}, 935_972_352), ({"separate": False}, 179_439_104),
    ({"types": "qkvm"}, 681_677_312), ({"types": "qko"}, 511_462_912), ({"types": "qk"}, 341_248_512),
    ({"every": 1}, 883_410_432), ({"dim": 1024}, 2_027_531_264),
])
def test_parameters_of_the_ablations(change, parameters):
    with torch.device("meta"), init.no_init_weights():
        parts = VARIANTS["vlora_7b"] | {"generator": GENERATOR_7B | change}
        model = VLoRAForConditionalGeneration(config(**parts))
    assert sum(p.numel() for p in model.generator.parameters()) == parameters


def test_load_official_lists_every_wrong_tensor():
    about, _ = parity.load(FIXTURES, "case_a")
    weights = parity.state_dict(about)
    weights["model.mm_projector.gen.2.weights_head.bias"] = torch.zeros(3)
    weights["stray"] = weights.pop("model.norm.weight")
    del weights["model.mm_projector.gen.4.decoders.1.linear1.weight"]
    with pytest.raises(RuntimeError) as error:
        load_official("case_a", weights, **about["config"])
    wrong = ("generator.weights_head.bias", "stray", "language_model.model.norm.weight", "blocks.1.linear1.weight")
    assert all(name in str(error.value) for name in wrong)


def test_load_official_names_the_variants():
    with pytest.raises(UserError, match=r"no variant 'vlora_70b'.*vlora_7b.*generator, llm, vision"):
        load_official("vlora_70b", {})
