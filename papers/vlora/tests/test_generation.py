"""Generation: caches, padding, beams, and weights merged or beside give what recomputing every token gives."""

import pytest
import torch
from transformers import GenerationConfig

from papers.vlora import merging
from papers.vlora.tests.models import PAD, tokens, vlora


def _by_hand(model, ids, pixels, steps):
    for _ in range(steps):
        logits = model(ids, pixels).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("build", [vlora, tokens])
@torch.no_grad()
def test_generation_with_and_without_cache_equals_recomputation(batch, build):
    ids, pixels, _ = batch
    model = build()
    prompt, options = ids[:1], dict(max_new_tokens=7, do_sample=False, eos_token_id=None)
    expected = _by_hand(model, prompt, pixels[:1], 7).tolist()
    assert model.generate(prompt, pixels[:1], **options).tolist() == expected
    assert model.generate(prompt, pixels[:1], use_cache=False, **options).tolist() == expected
    if build is vlora:
        for apply in ("merge", "side"):
            assert model.generate(prompt, pixels[:1], apply=apply, **options).tolist() == expected


@pytest.mark.parametrize("build", [vlora, tokens])
@torch.no_grad()
def test_a_padded_batch_generates_as_its_rows_alone(batch, build):
    ids, pixels, mask = batch
    model, options = build(), dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    rows = [(ids[i, : mask[i].sum()][None], image) for i, image in ((0, pixels[:1]), (1, None), (2, pixels[1:]))]
    left = torch.full_like(ids, PAD)
    for i, (row, _) in enumerate(rows):
        left[i, -row.shape[1] :] = row
    out = model.generate(left, pixels, (left != PAD).long(), **options)
    for i, (row, image) in enumerate(rows):
        assert out[i, 9:].tolist() == model.generate(row, image, **options)[0, row.shape[1] :].tolist(), f"row {i}"
    assert torch.equal(out[:, :9], left)


@torch.no_grad()
def test_decoding_leaves_the_slot_of_an_image_out(batch):
    ids, pixels, _ = batch
    model = vlora()
    whole = torch.ones_like(ids[:1])
    short, mask, places = model.prompt(ids[:1], whole)
    mark = int(model.placeholders(ids[:1])[0].int().argmax())
    kept = [i for i in range(ids.shape[1]) if i != mark]
    assert torch.equal(short, ids[:1, kept]) and places.tolist() == [kept] and mask.shape == short.shape
    weights = model.perceive(ids[:1], pixels[:1])
    out = model(short, attention_mask=mask, position_ids=places, perceptual_weights=weights).logits
    torch.testing.assert_close(out, model(ids[:1], pixels[:1]).logits[:, kept], atol=1e-5, rtol=1e-5)

    last = torch.cat([ids[:1, kept], ids[:1, mark : mark + 1]], 1)  # the answer begins where the image stands
    same, mask, _ = model.prompt(last, whole)
    assert torch.equal(same[:, :-1], ids[:1, kept]) and mask[0, -1] == 0 and mask.shape == last.shape
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(last, pixels[:1], **options), _by_hand(model, last, pixels[:1], 4))
    longest = ids.shape[1] + 3
    for counted in ({"max_length": longest}, {"generation_config": GenerationConfig(max_length=longest)}):
        assert model.generate(ids[:1], pixels[:1], eos_token_id=None, **counted).shape[1] == longest
    assert model.prompt(ids[:1].repeat(2, 1), whole.repeat(2, 1), torch.arange(ids.shape[1])[None])[2].shape[0] == 2


@torch.no_grad()
def test_a_cache_handed_in_or_out_holds_the_slots(batch):
    ids, pixels, _ = batch
    model, options = vlora(), dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    expected = _by_hand(model, ids[:1], pixels[:1], 5)
    head = ids.shape[1] - 3
    cache = model(ids[:1, :head], pixels[:1], use_cache=True).past_key_values
    weights = model.perceive(ids[:1], pixels[:1])
    out = model.generate(ids[:1], perceptual_weights=weights, past_key_values=cache, **options)
    assert torch.equal(out, expected)
    out = model.generate(ids[:1], pixels[:1], return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, expected) and out.past_key_values.get_seq_length() == expected.shape[1] - 1


@torch.no_grad()
def test_beams_and_several_sequences(batch):
    ids, pixels, _ = batch
    model, options = vlora(), dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    prompts, images = ids[[0, 0]], pixels
    beams = [model.generate(prompts, images, num_beams=3, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*beams)
    one = torch.cat([model.generate(prompts[:1], image[None], num_beams=3, **options) for image in images])
    assert torch.equal(beams[0], one)
    several = model.generate(prompts, images, num_beams=3, num_return_sequences=2, **options)
    assert several.shape == (4, 14) and torch.equal(several[::2], beams[0])
    merged = model.generate(prompts[:1], images[:1], num_beams=3, apply="merge", **options)
    assert torch.equal(merged, beams[0][:1])


@torch.no_grad()
def test_the_image_is_perceived_once(batch, monkeypatch):
    ids, pixels, _ = batch
    model, calls = vlora(), []
    model.generator.register_forward_hook(lambda *_: calls.append(1))
    model.generate(ids[:1], pixels[:1], max_new_tokens=5, do_sample=False)
    assert len(calls) == 1
    weights = model.perceive(ids[:1], pixels[:1])
    two, options = ids[:1].repeat(2, 1), dict(max_new_tokens=3, do_sample=False, apply="side")
    out = model.generate(two, perceptual_weights=weights, **options)
    assert torch.equal(out[0], out[1]) and len(calls) == 2


@pytest.mark.parametrize("merge, side, expected", [(1.0, 0.001, "side"), (0.001, 1.0, "merge"), (0.5, 0.1, "merge")])
def test_the_cheaper_way_is_taken(batch, monkeypatch, merge, side, expected):
    ids, pixels, _ = batch
    model = vlora()
    monkeypatch.setattr(merging, "merge_seconds", lambda *_: merge)
    monkeypatch.setattr(merging, "side_seconds", lambda *_: side)
    weights = model.perceive(ids[:1], pixels[:1])
    assert merging.cheaper(model, weights, ids[:1], {"max_new_tokens": 5}) == expected
    several = weights.repeat(2, 1, 1, 1, 1)
    assert merging.cheaper(model, several, ids[:2], {"max_new_tokens": 5}) == "side", "only one image can be merged"


def test_costs_are_measured():
    shape = (torch.device("cpu"), torch.float32, 64, 4)
    assert 0 < merging.merge_seconds(*shape) < 1 and 0 < merging.side_seconds(*shape, 8) < 1
