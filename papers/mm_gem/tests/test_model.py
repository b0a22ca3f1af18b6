"""What must hold for MM-GEM's model by its description; no reference code is public."""

import copy
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor

from common.run import ROOT
from common.tests import parity
from papers.mm_gem import build
from papers.mm_gem.configuration import InputError, MMGEMConfig
from papers.mm_gem.contrastive import contrastive, text_keys
from papers.mm_gem.model import MMGEMModel
from papers.mm_gem.pooling import PoolAggregator, whole_images
from papers.mm_gem.recipes import RECIPES

FIXTURES = Path(__file__).parent / "fixtures"
TEXTS = ["a red circle .", "two blue squares .", "a green triangle left of a red square .", "three yellow circles ."]


@pytest.fixture(scope="module")
def processor():
    return build.processor(RECIPES["tiny"])


@pytest.fixture
def model(processor):
    torch.manual_seed(0)
    return build.model(RECIPES["tiny"], processor).eval()


@pytest.fixture
def batch(processor):
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(4, 3, 64, 64), **processor.texts(TEXTS)}


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


# Embedding -------------------------------------------------------------------------------------------------


def test_embeddings_are_unit_vectors_of_the_joint_width(model, batch):
    out = model(**batch)
    for x in (out.image_embeds, out.text_embeds):
        assert x.shape == (4, 64)
        close(x.norm(dim=1), torch.ones(4), 1e-6)
    close(out.logits_per_image, model.log_scale.exp() * out.image_embeds @ out.text_embeds.mT)
    close(out.logits_per_text, out.logits_per_image.mT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_neighbours_do_not_change_a_text(model, processor, side):
    together = model.encode_text(**processor.texts(TEXTS, side))
    for text, row in zip(TEXTS, together):
        close(model.encode_text(**processor.texts([text]))[0], row)


def test_every_word_counts_and_nothing_after_emb(model, processor):
    ids = processor.texts(TEXTS[2:3])["input_ids"]
    before = model.encode_text(ids)
    for i in range(ids.shape[1] - 1):
        other = ids.clone()
        other[0, i] = 7 if ids[0, i] != 7 else 8
        assert (model.encode_text(other) - before).abs().max() > 1e-5, i
    tail = torch.cat([ids, torch.tensor([[5, 9, 11]])], 1)
    close(model.encode_text(tail), before, 1e-6)


def test_long_texts_are_read_to_their_end_or_cut_with_a_warning(model, processor):
    first = "a red circle . " * 30  # 120 tokens
    longer = type(processor)(processor.image_processor, processor.tokenizer, max_text_length=200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = longer.texts([first + "a blue square .", first + "a green square ."])["input_ids"]
    a, b = model.encode_text(ids)
    assert ids.shape[1] == 125 and (a - b).abs().max() > 1e-5
    with pytest.warns(UserWarning, match="120 tokens is cut to 64"):
        cut = processor.texts([first])["input_ids"]
    assert cut.shape[1] == 64 and cut[0, -1] == processor.emb_token_id


def test_emb_is_a_token_that_no_text_makes(model, processor):
    ids = processor.texts(["a [EMB] red [CAP] circle ."])["input_ids"][0].tolist()
    assert ids.count(processor.emb_token_id) == 1 and ids[-1] == processor.emb_token_id
    assert processor.cap_token_id not in ids
    assert min(processor.emb_token_id, processor.cap_token_id) >= build.CONFIGS["tiny"].vocab_size
    with pytest.raises(InputError, match="1 of 1 texts do not hold"):
        model.encode_text(torch.tensor([[4, 5, 6]]))


# Losses ----------------------------------------------------------------------------------------------------


def test_contrastive_loss_equals_the_fixture():
    spec = json.loads((FIXTURES / "definitions.json").read_text())["info_nce"]
    v = parity.probe(spec["v"]["probe"], spec["v"]["shape"]).double()
    t = parity.probe(spec["t"]["probe"], spec["t"]["shape"]).double() + 0.7 * v
    v2t, t2v = contrastive(F.normalize(v), F.normalize(t), torch.tensor(1 / spec["temperature"]))
    assert v2t.item() == pytest.approx(spec["expected"]["image_to_text"], abs=1e-5)
    assert t2v.item() == pytest.approx(spec["expected"]["text_to_image"], abs=1e-5)
    order = torch.randperm(len(v))
    shuffled = contrastive(F.normalize(v[order]), F.normalize(t[order]), torch.tensor(1 / 0.07))
    close(torch.stack(shuffled), torch.stack((v2t, t2v)).float(), 1e-4)


def test_equal_embeddings_lose_ln_b():
    x = F.normalize(torch.ones(7, 5))
    for loss in contrastive(x, x, torch.tensor(14.0)):
        assert loss.item() == pytest.approx(math.log(7), abs=1e-5)


def test_duplicates_are_positives(processor):
    rows = processor.texts(["a red circle .", "a blue square .", "a red circle ."])
    end = rows["attention_mask"].sum(1) - 1
    keys = text_keys(rows["input_ids"], end)
    assert keys[0] == keys[2] != keys[1]
    padded = F.pad(rows["input_ids"], (0, 2), value=9)  # whatever stands in the padding
    padded[0, -1] = 8
    assert torch.equal(text_keys(padded, end), keys)
    v = F.normalize(torch.tensor([[1.0, 0], [0, 1], [1, 0]]))
    best = sum(contrastive(v, v, torch.tensor(100.0), keys))
    assert best.item() == pytest.approx(4 / 3 * math.log(2), abs=1e-4)  # the two share their probability: the optimum
    turned = F.normalize(torch.tensor([[1.0, 0], [0, 1], [0.9, 0.4]]))
    assert sum(contrastive(turned, turned, torch.tensor(100.0), keys)) > best


def test_the_loss_is_the_sum_of_two_that_start_at_chance(model, batch):
    out = model(**batch)
    close(out.loss, out.loss_emb + out.loss_gen, 0)
    assert out.loss_emb.item() == pytest.approx(2 * math.log(4), abs=0.5)
    assert out.loss_gen.item() == pytest.approx(math.log(46), abs=0.3)


@pytest.mark.parametrize(("objective", "silent"), [("embedding", {"h2"}), ("generation", {"h1", "h3", "log_scale"})])
def test_each_loss_can_be_switched_off(model, batch, objective, silent):
    model.config.objectives = objective
    model(**batch).loss.backward()
    quiet = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert quiet == silent
    assert all(part.weight.grad.abs().sum() > 0 for part in (
        model.get_input_embeddings(), model.vision_tower.post_layernorm))


def test_caption_loss_is_that_of_the_words_alone(model, processor, batch):
    mine = model(**batch).loss_gen
    padded = {k: F.pad(x, (0, 3), value=v) for k, v in (("input_ids", 9), ("attention_mask", 0)) for x in [batch[k]]}
    close(model(pixel_values=batch["pixel_values"], **padded).loss_gen, mine)
    image, text = batch["pixel_values"][:1], processor.texts(["red"])
    prefix = model._prefix(model.cells(image))
    first = model.language_model(inputs_embeds=prefix).logits[0, -1].log_softmax(0)
    word = text["input_ids"][0, 0]
    embeds = torch.cat([prefix, model.get_input_embeddings()(text["input_ids"][:, :1])], 1)
    then = model.language_model(inputs_embeds=embeds).logits[0, -1].log_softmax(0)
    close(model(pixel_values=image, **text).loss_gen, -(first[word] + then[model.config.end_token_id]) / 2)


@pytest.mark.parametrize(("rate", "tau"), [(1e4, 0.01), (-1e4, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperature_stays_within_its_clamp(model, batch, rate, tau, dtype):
    """A step with a huge rate; and what trains it may be a float32 copy, of which the model's is cast, as in ZeRO."""
    master = model.log_scale.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([master], lr=abs(rate))
    master.grad = torch.full_like(master, -rate)
    optimizer.step()
    model.to(dtype).log_scale.data.copy_(master)
    out = model.train()(**batch)
    assert out.loss.isfinite() and model.temperature == pytest.approx(tau)
    cosines = out.image_embeds @ out.text_embeds.mT
    close(out.logits_per_image, cosines / tau, 1e-4)
    out.loss.backward()
    assert model.log_scale.grad.item() == 0, "no gradient, so no drift"


def test_chunks_give_the_same_loss_and_gradients(model, batch):
    def gradients(chunk):
        model.zero_grad()
        loss = model.train()(**batch, chunk=chunk).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    whole, grads = gradients(0)
    for chunk in (1, 3):
        loss, found = gradients(chunk)
        close(loss, whole)
        for name, gradient in found.items():
            close(gradient, grads[name], 2e-5)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    command = [sys.executable, "-m", "common.run.launch", "2", "papers.mm_gem.tests.two_processes", str(tmp_path)]
    command += ["--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["gradients"] > 50
    for name in ("loss", "loss_emb", "loss_gen"):
        assert abs(found[name][0] - found[name][1]) < 1e-5, name
    assert found["worst_gradient_difference"] < 1e-5  # of the largest entry
    assert found["worst_without_sum"] > 1e-3  # a gather without gradient would be seen


# Generation ------------------------------------------------------------------------------------------------


def test_captions_depend_on_the_image(model):
    images = torch.randn(2, 3, 64, 64)
    a, b = model.language_model(inputs_embeds=model._prefix(model.cells(images))).logits[:, -1]
    assert (a - b).abs().max() > 1e-4


def test_without_an_image_the_llm_is_the_base_llm(model, batch):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(copy.deepcopy(build.CONFIGS["tiny"])).eval()  # as `build.model` begins
    ids = batch["input_ids"][:, :-1].clamp(max=base.config.vocab_size - 1)
    model(**batch).loss.backward()
    model.generate(batch["pixel_values"], max_new_tokens=3)
    found = model.language_model(ids).logits
    assert found.shape[-1] == base.config.vocab_size + 2
    torch.testing.assert_close(found[..., : base.config.vocab_size], base(ids).logits)


def test_greedy_generation_equals_a_loop_with_and_without_cache(model, batch):
    images, steps = batch["pixel_values"][:2], 5
    embeds = model._prefix(model.cells(images))
    forbidden, manual = [model.config.emb_token_id, model.config.cap_token_id], []
    for _ in range(steps):
        logits = model.language_model(inputs_embeds=embeds).logits[:, -1]
        logits[:, forbidden] = -torch.inf
        manual.append(logits.argmax(-1))
        embeds = torch.cat([embeds, model.get_input_embeddings()(manual[-1][:, None])], 1)
    manual = torch.stack(manual, 1)
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "eos_token_id": None}
    for cache in (True, False):
        assert model.generate(images, use_cache=cache, **options).tolist() == manual.tolist()
    for image, row in zip(images, manual):
        assert model.generate(image[None], **options)[0].tolist() == row.tolist()


def test_generation_leaves_nothing_behind(model, batch):
    texts = {k: batch[k] for k in ("input_ids", "attention_mask")}
    before = model.encode_text(**texts)
    model.generate(batch["pixel_values"], max_new_tokens=3, num_beams=2)
    assert torch.equal(model.encode_text(**texts), before)


# PoolAggregator --------------------------------------------------------------------------------------------


def test_the_whole_image_is_a_box(model, batch):
    images = batch["pixel_values"]
    boxes = whole_images(4, (64, 64))
    close(model.encode_region(images, boxes), model.encode_image(images), 1e-6)
    close(model._prefix(model.cells(images, boxes)), model._prefix(model.cells(images)), 1e-6)


def test_pooling_is_linear_and_keeps_constants():
    pool, boxes = PoolAggregator(4), torch.tensor([[0, 3.0, 5, 40, 61], [1, 10, 0, 12, 64]])
    a, b = torch.randn(2, 2, 5, 8, 8)
    close(pool(2 * a - 3 * b, boxes, (64, 64)), 2 * pool(a, boxes, (64, 64)) - 3 * pool(b, boxes, (64, 64)))
    close(pool(torch.full((2, 5, 8, 8), 1.7), boxes, (64, 64)), torch.full((2, 5, 4, 4), 1.7))


def test_means_of_blocks_and_values_of_planes():
    pool, maps = PoolAggregator(4), torch.randn(1, 3, 8, 8)
    whole = pool(maps, torch.tensor([[0.0, 0, 0, 64, 64]]), (64, 64))
    close(whole[0], F.avg_pool2d(maps, 2)[0])  # 8 x 8 to 4 x 4: every cell is the mean of its block
    y, x = torch.meshgrid(torch.arange(8.0) + 0.5, torch.arange(8.0) + 0.5, indexing="ij")
    plane = (2 * x - y)[None, None]
    box = torch.tensor([[0, 13.0, 20, 47, 50]])
    close(pool(plane, box, (64, 64)).mean(), torch.tensor(2 * 30 / 8 - 35 / 8))


def test_translation_and_scale():
    pool, maps = PoolAggregator(2), torch.randn(1, 3, 12, 12)
    box = torch.tensor([[0, 24.0, 32, 56, 64]])
    shift = torch.tensor([0, 16.0, 16, 16, 16])
    close(pool(maps.roll((2, 2), (2, 3)), box + shift, (96, 96)), pool(maps, box, (96, 96)))
    close(pool(maps, torch.cat([box[:, :1], 3 * box[:, 1:]], 1), (288, 288)), pool(maps, box, (96, 96)))


def test_as_many_tokens_whatever_the_resolution(model):
    for side in (64, 96):
        cells = model.cells(torch.randn(1, 3, side, side), torch.tensor([[0, 5.0, 5, 11, 50]]))
        assert model._prefix(cells).shape == (1, 17, 64)
    full = PoolAggregator(0)(torch.randn(1, 3, 5, 7), whole_images(1, (40, 56)), (40, 56))
    assert full.shape == (1, 3, 5, 7)


def test_boxes_are_clipped_and_empty_ones_refused(model):
    images = torch.randn(1, 3, 64, 64)
    outside, inside = torch.tensor([[0, -9.0, 8, 32, 99]]), torch.tensor([[0, 0.0, 8, 32, 64]])
    close(model.encode_region(images, outside), model.encode_region(images, inside))
    with pytest.raises(InputError, match=r"box 0, .* is empty in the image of 64 x 64 px"):
        model.encode_region(images, torch.tensor([[0, 70.0, 8, 90, 60]]))


def test_regions_do_not_see_each_other(model, batch):
    images = batch["pixel_values"]
    boxes = torch.tensor([[2, 0.0, 0, 30, 30], [0, 10, 10, 60, 40], [2, 5, 20, 64, 64], [3, 0, 0, 64, 9]])
    together = model.encode_region(images, boxes)
    order = torch.tensor([3, 0, 2, 1])
    close(model.encode_region(images, boxes[order]), together[order])
    for box, row in zip(boxes, together):
        alone = box.clone()
        alone[0] = 0
        close(model.encode_region(images[int(box[0])][None], alone[None])[0], row)


SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize(("vision", "images", "before", "last_norm"), [
    (transformers.CLIPVisionConfig, transformers.CLIPImageProcessor(crop_size=32), 1, "post_layernorm"),
    (transformers.ViTConfig, transformers.ViTImageProcessor(size={"height": 32, "width": 32}), 1, None),
    (transformers.DeiTConfig, transformers.DeiTImageProcessor(crop_size=32), 2, None),
    (transformers.Dinov2Config, transformers.BitImageProcessor(crop_size=32), 1, None),
    (transformers.Dinov2WithRegistersConfig, transformers.BitImageProcessor(crop_size=32), 5, None),
    (transformers.SiglipVisionConfig, transformers.SiglipImageProcessor(size={"height": 32, "width": 32}), 0, None),
])
def test_vision_encoders(processor, vision, images, before, last_norm):
    """The map holds the patches in their grid, without the tokens before them, at the encoder's size and at others."""
    reader = type(processor)(images, processor.tokenizer, max_text_length=64)
    pixels = reader.pixels([Image.effect_noise((50, 20), 80), Image.effect_noise((32, 32), 80)])
    assert pixels.shape == (2, 3, 32, 32)
    config = MMGEMConfig(
        text_config=build.CONFIGS["tiny"], vision_config=vision(**SHAPE), visual_width=32, max_text_length=64,
    )
    model = MMGEMModel(config).eval()
    tokens = model.vision_tower(pixels).last_hidden_state
    assert tokens.shape[1] == before + 16
    tokens = model.vision_tower.get_submodule(last_norm)(tokens) if last_norm else tokens
    maps = model.feature_map(pixels)
    close(maps[:, :, 2, 1], tokens[:, before + 4 * 2 + 1])
    assert model.encode_image(pixels).shape == (2, 768)
    assert model.feature_map(torch.randn(1, 3, 48, 40)).shape == (1, 32, 6, 5)


def test_an_image_processor_without_a_size_is_refused(processor):
    free = transformers.CLIPImageProcessor(do_center_crop=False, crop_size=None, size={"shortest_edge": 32})
    with pytest.raises(InputError, match="CLIPImageProcessor has neither a crop_size nor a size with height and width"):
        type(processor)(free, processor.tokenizer)


# Use -------------------------------------------------------------------------------------------------------


def test_saving_and_loading(model, processor, batch, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    close(again.encode_image(batch["pixel_values"]), model.encode_image(batch["pixel_values"]), 1e-6)
    texts = reader.texts(TEXTS)
    close(again.encode_text(**texts), model.encode_text(**processor.texts(TEXTS)), 1e-6)
    images = batch["pixel_values"]
    assert again.generate(images, max_new_tokens=5).tolist() == model.generate(images, max_new_tokens=5).tolist()
    assert (reader.emb_token_id, reader.cap_token_id) == (again.config.emb_token_id, again.config.cap_token_id)


def test_bad_settings_are_refused(model, batch):
    with pytest.raises(InputError, match="objectives='all'"):
        MMGEMConfig(objectives="all")
    with pytest.raises(InputError, match="exceeds the LLM's 2048 positions"):
        MMGEMConfig(max_text_length=2048)
    for training, asked in ((True, None), (False, True)):
        with pytest.raises(InputError, match="4 texts, but 2 images or regions"):
            model.train(training)(batch["input_ids"], batch["pixel_values"][:2], batch["attention_mask"],
                                  return_loss=asked)
