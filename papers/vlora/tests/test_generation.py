"""Generation: caches, padding, beams, and weights merged or beside give what recomputing every token gives."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import Gemma3TextConfig, GenerationConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from papers.vlora.tests.models import IMAGE, PAD, TEXT, tokens, vlora


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


# The image is the call's ------------------------------------------------------------------------------------


def _checksum(model):
    return [parameter.double().sum().item() for parameter in model.parameters()]


def test_threads_do_not_see_each_others_images(batch):
    """8 threads, 6 with an image of their own and 2 with text alone, 20 requests each, as one after the other."""
    ids, _, mask = batch
    model, options = vlora(), dict(max_new_tokens=3, do_sample=False, eos_token_id=None)
    before = _checksum(model)
    torch.manual_seed(5)
    images = torch.randn(6, 1, 3, 24, 24)
    requests = [(ids[:1], image) for image in images] + [(ids[1:2, : mask[1].sum()], None), (ids[:1, 2:], None)]

    def answer(request):
        with torch.no_grad():
            return model(*request).logits, model.generate(*request, **options)

    alone = [answer(request) for request in requests]
    for (first, _), (second, _) in itertools.combinations(alone[:6], 2):
        assert (first - second).abs().max() > 1e-3, "the images must matter"
    start = threading.Barrier(len(requests))

    def client(request):
        start.wait()
        return [answer(request) for _ in range(20)]

    with ThreadPoolExecutor(len(requests)) as pool:
        for expected, found in zip(alone, pool.map(client, requests)):
            for logits, tokens in found:
                assert torch.equal(tokens, expected[1])
                torch.testing.assert_close(logits, expected[0], rtol=1e-5, atol=1e-5)
    assert _checksum(model) == before


@torch.no_grad()
def test_a_merged_image_has_the_model_to_itself(batch):
    ids, pixels, _ = batch
    model, options = vlora(), dict(max_new_tokens=3, do_sample=False, eos_token_id=None)
    weights, before = model.perceive(ids[:1], pixels[:1]), _checksum(model)
    expected = model.generate(ids[:1], pixels[:1], **options)
    text = ids[1:2, :5]
    with ThreadPoolExecutor(1) as pool:
        with model.merged(weights):
            assert torch.equal(model.generate(ids[:1], **options), expected)
            for second in ({"pixel_values": pixels[1:]}, {"perceptual_weights": weights}):
                with pytest.raises(ValueError, match="an image is merged into this model"):
                    model(ids[:1], **second)
                for apply in ("side", "merge"):
                    with pytest.raises(ValueError, match="an image is merged into this model"):
                        model.generate(ids[:1], apply=apply, **second, **options)
            for call in (model, model.generate):
                with pytest.raises(ValueError, match="another image is merged into this model"):
                    pool.submit(call, text).result()
        with model.guard.call(), pytest.raises(ValueError, match="the model is in use"):
            model.generate(ids[:1], pixels[:1], apply="merge", **options)
        pool.submit(model, text).result()
    with pytest.raises(RuntimeError, match="stop"), model.merged(weights):
        raise RuntimeError("stop")
    assert _checksum(model) == before
    assert torch.equal(model.generate(ids[:1], pixels[:1], **options), expected), "nothing stays merged"


@torch.no_grad()
def test_what_cannot_be_meant_is_refused(batch):
    ids, pixels, _ = batch
    model = vlora()
    weights = model.perceive(ids[:1], pixels[:1])
    with pytest.raises(ValueError, match="apply='auto'"):
        model.generate(ids[:1], pixels[:1], apply="auto")
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="both pixel_values and perceptual_weights"):
            call(ids[:1], pixels[:1], perceptual_weights=weights)
        with pytest.raises(ValueError, match="placeholders in the text, but neither"):
            call(ids[:1])
        with pytest.raises(ValueError, match=r"perceptual_weights of"):
            call(ids, perceptual_weights=weights.expand(2, -1, -1, -1, -1))
    with pytest.raises(ValueError, match=r"expected \(1 or 1, 5, 2, 48, 3\)"):
        model(ids[:1], perceptual_weights=weights[:, :, :1])
    out = model.generate(ids[:1], pixels[:1], max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="the image is in the weights, not in a cache"):
        model.generate(out.sequences, past_key_values=out.past_key_values, max_new_tokens=2)
    with pytest.raises(ValueError, match="not those of 2 rows"), model.merged(weights.repeat(2, 1, 1, 1, 1)):
        pass


@torch.no_grad()
def test_a_mask_without_the_placeholder_moves_nothing(batch):
    ids, pixels, _ = batch
    model, options = vlora(), dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    mask = (~model.placeholders(ids[:1])).long()
    expected = model(ids[:1], pixels[:1]).logits
    torch.testing.assert_close(model(ids[:1], pixels[:1], mask).logits, expected)
    assert torch.equal(model.generate(ids[:1], pixels[:1], mask, **options),
                       model.generate(ids[:1], pixels[:1], **options))


@torch.no_grad()
def test_the_placeholder_is_not_generated(batch):
    ids, pixels, _ = batch
    model = vlora()
    free = model.generate(ids[:1], pixels[:1], max_new_tokens=1, do_sample=False)[0, -1].item()
    model.config.image_token_id = free  # within the vocabulary, and what the model would say
    prompt = ids[:1].masked_fill(ids[:1] == 70, free)
    assert free not in model.generate(prompt, pixels[:1], max_new_tokens=5, do_sample=False)[0, 9:].tolist()


@pytest.mark.parametrize("kind", [MistralConfig, Gemma3TextConfig])
@torch.no_grad()
def test_a_window_shorter_than_the_text(batch, kind):
    ids, pixels, _ = batch
    model = vlora(kind(**TEXT | {"head_dim": 12, "sliding_window": 5}))
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(ids[:1], pixels[:1], **options), _by_hand(model, ids[:1], pixels[:1], 6))


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config, Gemma3TextConfig])
@torch.no_grad()
def test_a_static_cache(batch, kind):
    ids, pixels, _ = batch
    model = vlora(kind(**TEXT | {"head_dim": 12}))
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    expected = _by_hand(model, ids[:1], pixels[:1], 5)
    assert torch.equal(model.generate(ids[:1], pixels[:1], cache_implementation="static", **options), expected)


@torch.no_grad()
def test_from_embeddings(batch):
    ids, pixels, mask = batch
    model, options = vlora(), dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    embeds = model.get_input_embeddings()(ids.masked_fill(ids == IMAGE, 0))
    torch.testing.assert_close(model(ids, pixels, mask, inputs_embeds=embeds).logits, model(ids, pixels, mask).logits)
    expected = model.generate(ids[:1], pixels[:1], **options)
    assert torch.equal(model.generate(ids[:1], pixels[:1], inputs_embeds=embeds[:1], **options), expected)
    text = ids[1:2, :5]
    alone = model.generate(inputs_embeds=embeds[1:2, :5], **options)
    assert torch.equal(alone, model.generate(text, **options)[:, 5:])
    assert torch.equal(model.generate(inputs=text, **options), model.generate(text, **options))
    assert model.generate(**options).shape == (1, 5), "from the beginning token"
    with pytest.raises(ValueError, match="pixel_values need input_ids"):
        model.generate(pixel_values=pixels[:1], inputs_embeds=embeds[:1])
