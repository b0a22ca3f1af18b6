"""VLoRA's model: what holds for any batch, any LLaMA-like language model, and any way of applying the weights."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
)

from common.run import UserError
from papers.vlora import (
    VisualTokensConfig,
    VisualTokensForConditionalGeneration,
    VLoRAConfig,
    VLoRAForConditionalGeneration,
    application,
)
from papers.vlora.model import PerceptualWeightsGenerator, Site

IMAGE, PAD = 70, 0
VISION = CLIPVisionConfig(
    hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=8
)
TEXT = dict(
    vocab_size=61, hidden_size=48, intermediate_size=72, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
)
SHARED = dict(vision_config=VISION, num_features=9, visual_width=24, image_token_id=IMAGE)


def _vlora(text=None, zero=False, **config):
    torch.manual_seed(0)
    config = dict(width=32, blocks=2, rank=3, alpha=6, every=2) | config
    model = VLoRAForConditionalGeneration(VLoRAConfig(text_config=text or LlamaConfig(**TEXT), **SHARED, **config))
    if not zero:
        for letter in model.config.weight_types:
            nn.init.normal_(getattr(model.generator, f"B_{letter}"), std=0.3)
    return model.eval()


def _tokens():
    torch.manual_seed(0)
    return VisualTokensForConditionalGeneration(VisualTokensConfig(text_config=LlamaConfig(**TEXT), **SHARED)).eval()


@pytest.fixture
def batch():
    """Rows of unequal length: image, text only, image."""
    torch.manual_seed(1)
    ids = torch.full((3, 9), PAD)
    ids[0, :9] = torch.tensor([1, IMAGE, 5, 6, 7, 8, 9, 10, 11])
    ids[1, :5] = torch.tensor([1, 12, 13, 14, 15])
    ids[2, :7] = torch.tensor([1, 16, 17, IMAGE, 18, 19, 20])
    return ids, torch.randn(2, 3, 24, 24), (ids != PAD).long()


def _plain(model, ids, mask):
    """The language model alone, the placeholder masked."""
    marks = ids == IMAGE
    position = (mask.cumsum(1) - 1).clamp(min=0)
    return model.language_model(ids.masked_fill(marks, 0), mask.masked_fill(marks, 0), position_ids=position).logits


# The generator --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separate", [True, False])
@torch.no_grad()
def test_sub_generators_equal_stacks_of_torchs_decoder_layers(separate):
    """Independent oracle: one `nn.TransformerDecoderLayer` after the other, for one sub-generator after the other."""
    model = _vlora(separate=separate)
    generator, config = model.generator, model.config
    features = torch.randn(3, 9, 24)
    image = generator.visual_proj(features) + generator.pos_embed
    made = []
    for g, queries in enumerate(generator.queries):
        x = queries.expand(3, -1, -1)
        for block in generator.blocks:
            layer = nn.TransformerDecoderLayer(
                32, 16, 128, dropout=0, activation="gelu", batch_first=True, norm_first=True
            )
            pairs = [
                (block.self_out, layer.self_attn.out_proj), (block.cross_out, layer.multihead_attn.out_proj),
                (block.linear1, layer.linear1), (block.linear2, layer.linear2),
            ]
            for ours, theirs in pairs:
                theirs.weight.copy_(ours.weight[g])
                theirs.bias.copy_(ours.bias[g])
            layer.self_attn.in_proj_weight.copy_(block.self_qkv.weight[g])
            layer.self_attn.in_proj_bias.copy_(block.self_qkv.bias[g])
            for name in ("weight", "bias"):
                joined = torch.cat([getattr(block.cross_q, name)[g], getattr(block.cross_kv, name)[g]])
                getattr(layer.multihead_attn, f"in_proj_{name}").copy_(joined)
                for norm in ("norm1", "norm2", "norm3"):
                    getattr(getattr(layer, norm), name).copy_(getattr(getattr(block, norm), name)[g].flatten())
            x = layer(x, image)
        x = nn.functional.layer_norm(x, (32,), generator.norm.weight[g].flatten(), generator.norm.bias[g].flatten())
        made.append(x @ generator.weights_head.weight[g].mT + generator.weights_head.bias[g])
    expected = torch.stack(made, 1).reshape(3, 5, 2, 48, config.rank)
    torch.testing.assert_close(generator(features)[0], expected, rtol=1e-4, atol=1e-5)


def test_initial_weights():
    generator = _vlora(zero=True, width=64, blocks=3).generator
    assert all(not getattr(generator, f"B_{letter}").any() for letter in "qkvom")
    assert generator.queries.std().item() == pytest.approx(1, abs=0.1)
    assert generator.pos_embed.std().item() == pytest.approx(1, abs=0.1)
    block = generator.blocks[0]
    for layer in (generator.visual_proj, generator.weights_head, block.linear1, block.self_out):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1) and not layer.bias.any()
    bound = (6 / (64 + 3 * 64)) ** 0.5  # Xavier-uniform of the joint matrix of query, key and value
    for layer in (block.self_qkv, block.cross_q, block.cross_kv):
        assert 0.98 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()


def test_few_launches(monkeypatch):
    """The sub-generators are batched: as many products for five as for one."""
    def count(config):
        calls = []
        real = torch.baddbmm
        monkeypatch.setattr(torch, "baddbmm", lambda *a, **k: calls.append(1) or real(*a, **k))
        PerceptualWeightsGenerator(config, dict.fromkeys("qkvom", 48))(torch.randn(1, 9, 24))
        monkeypatch.setattr(torch, "baddbmm", real)
        return len(calls)

    config = _vlora().config
    one = copy.copy(config)
    one.weight_types = "q"
    assert count(config) == count(one) == 6 * 2 + 1


# Applying the weights ---------------------------------------------------------------------------------------


def test_a_fresh_model_is_the_plain_llm_and_learns_b_first(batch):
    ids, pixels, mask = batch
    model = _vlora(zero=True)
    assert torch.equal(model(ids, pixels, mask).logits, _plain(model, ids, mask))
    model.train()(ids, pixels, mask, labels=ids.masked_fill(ids == IMAGE, -100)).loss.backward()
    for name, parameter in model.generator.named_parameters():
        assert parameter.grad.any() == name.startswith("B_"), name
    assert not any(p.requires_grad for p in model.vision_tower.parameters())


@torch.no_grad()
def test_rows_do_not_meet(batch):
    ids, pixels, mask = batch
    for model in (_vlora(), _tokens()):
        together = model(ids, pixels, mask).logits
        for row, image in ((0, pixels[:1]), (1, None), (2, pixels[1:])):
            length = mask[row].sum()
            alone = model(ids[row : row + 1, :length], image).logits
            torch.testing.assert_close(together[row : row + 1, :length], alone, rtol=1e-4, atol=1e-5)
        order = torch.tensor([2, 0, 1])
        moved = model(ids[order], pixels.flip(0), mask[order]).logits
        real = mask[order].bool()
        torch.testing.assert_close(moved[real], together[order][real], rtol=1e-4, atol=1e-5)
        other = model(ids, pixels.flip(0), mask).logits
        assert not torch.allclose(other[0, 2:], together[0, 2:], atol=1e-3), "the image must matter"


@torch.no_grad()
def test_text_alone_is_the_plain_llm(batch):
    ids, pixels, mask = batch
    model = _vlora()
    assert torch.equal(model(ids, pixels, mask).logits[1], _plain(model, ids, mask)[1])
    text, text_mask = ids[1:2], mask[1:2]
    assert torch.equal(model(text, None, text_mask).logits, _plain(model, text, text_mask))
    model(ids, pixels, mask)
    assert torch.equal(_plain(model, text, text_mask), model(text, None, text_mask).logits), "an image stayed behind"


def test_a_training_step_on_text_alone_reaches_every_parameter(batch):
    """DDP and ZeRO wait for all of them."""
    ids, _, mask = batch
    for model in (_vlora(), _tokens()):
        model.train()(ids[1:2], None, mask[1:2], labels=ids[1:2]).loss.backward()
        connection = model.generator if hasattr(model, "generator") else model.projector
        assert all(p.grad is not None and not p.grad.any() for p in connection.parameters())


@torch.no_grad()
def test_an_image_adds_no_tokens(batch):
    ids, pixels, mask = batch
    seen = []
    for model in (_vlora(), _tokens()):
        model.language_model.get_decoder().layers[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
        assert model(ids, pixels, mask).logits.shape == (3, 9, 61)
    assert seen == [9, 9 + 9 - 1]


@torch.no_grad()
def test_merged_weights_equal_those_beside(batch):
    ids, pixels, _ = batch
    model, ids = _vlora(), ids[:1]
    beside = model(ids, pixels[:1]).logits
    weights = model.perceive(ids, pixels[:1])
    originals = {name: p.data_ptr() for name, p in model.language_model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    with model.merged(weights):
        torch.testing.assert_close(model(ids).logits, beside, rtol=1e-4, atol=1e-5)
        two = model(ids.repeat(2, 1)).logits  # one image for all rows
        torch.testing.assert_close(two, beside.expand(2, -1, -1), rtol=1e-4, atol=1e-5)
    assert originals == {name: p.data_ptr() for name, p in model.language_model.named_parameters()}
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    torch.testing.assert_close(model(ids).logits, _plain(model, ids, torch.ones_like(ids)), rtol=0, atol=0)

    # The same with dense matrices written into a plain language model, m beside its MLP.
    plain = copy.deepcopy(model.language_model)
    layers = plain.get_decoder().layers
    for site in model.sites:
        layer = layers[model.config.sites[site.index[1]]]
        delta = model.delta(weights, site)
        if site.letter == "m":
            layer.mlp.register_forward_hook(lambda _, x, y, delta=delta: y + x[0] @ delta.mT)
        else:
            getattr(layer.self_attn, f"{site.letter}_proj").weight += delta
    for layer in layers:
        hooks = [key for m in layer.modules() for key, hook in m._forward_hooks.items() if isinstance(hook, Site)]
        for module in layer.modules():
            for key in hooks:
                module._forward_hooks.pop(key, None)
    dense = plain(ids.masked_fill(ids == IMAGE, 0), (ids != IMAGE).long(), position_ids=torch.arange(9)[None]).logits
    torch.testing.assert_close(dense, beside, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [VLoRAForConditionalGeneration, VisualTokensForConditionalGeneration])
@torch.no_grad()
def test_a_given_language_model_stays_causal(kind, batch):
    """A config that is shared with the model in use, and reset, would cost it its causal mask without a word."""
    ids, pixels, mask = batch
    llm = LlamaForCausalLM(LlamaConfig(**TEXT))
    options = {"width": 32, "every": 2} if kind is VLoRAForConditionalGeneration else {}
    model = kind(kind.config_class(text_config=llm.config, **SHARED, **options), language_model=llm).eval()
    changed = ids.clone()
    changed[0, 6] += 1
    before, after = (model(each, pixels, mask).logits[0] for each in (ids, changed))
    torch.testing.assert_close(after[:6], before[:6], rtol=0, atol=1e-5)
    assert not torch.allclose(after[6:], before[6:], atol=1e-3)


def test_grouped_query_attention_widths():
    model = _vlora()
    shapes = {letter: tuple(getattr(model.generator, f"B_{letter}").shape) for letter in "qkvom"}
    assert shapes == {"q": (2, 48, 3), "k": (2, 24, 3), "v": (2, 24, 3), "o": (2, 48, 3), "m": (2, 48, 3)}
    full = _vlora(LlamaConfig(**TEXT | {"num_key_value_heads": 4}))
    assert {tuple(getattr(full.generator, f"B_{letter}").shape) for letter in "qkvom"} == {(2, 48, 3)}


@pytest.mark.parametrize("kind", [MistralConfig, Qwen2Config])
@torch.no_grad()
def test_other_language_models_of_the_family(kind, batch):
    ids, pixels, mask = batch
    model = _vlora(kind(**TEXT))
    logits = model(ids, pixels, mask).logits
    plain = _plain(model, ids, mask)
    assert torch.equal(logits[1], plain[1]) and not torch.allclose(logits[0], plain[0], atol=1e-3)


@torch.no_grad()
def test_several_images_of_a_row_add_up(batch):
    _, pixels, _ = batch
    row = torch.tensor([[1, IMAGE, 5, IMAGE, 6]])
    with pytest.raises(UserError, match="2 images in one row"):
        _vlora()(row, pixels)
    model = _vlora(several_images=True)
    one = torch.tensor([[1, IMAGE, 5, 4, 6]])
    both = model.perceive(row, pixels)
    torch.testing.assert_close(both, model.perceive(one, pixels[:1]) + model.perceive(one, pixels[1:]))
    with pytest.raises(UserError, match="takes one"):
        _tokens()(row, pixels)


def test_gradient_checkpointing(batch):
    ids, pixels, mask = batch
    labels = ids.masked_fill((ids == IMAGE) | (ids == PAD), -100)
    gradients = []
    model = _vlora().train()
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, pixels, mask, labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)
    with pytest.raises(UserError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@torch.no_grad()
def test_bf16(batch):
    ids, pixels, mask = batch
    model = _vlora()
    exact = model(ids, pixels, mask).logits
    half = copy.deepcopy(model).bfloat16()(ids, pixels, mask).logits
    assert half.dtype == torch.bfloat16 and (half.float() - exact).norm() < 0.05 * exact.norm()
    model.language_model.bfloat16()  # a frozen LLM in bf16, the generator in float32
    mixed = model(ids, pixels, mask).logits
    assert (mixed.float() - exact).norm() < 0.05 * exact.norm()


@torch.no_grad()
def test_a_copy_is_independent(batch):
    ids, pixels, mask = batch
    model = _vlora()
    expected = model(ids, pixels, mask).logits
    twin = copy.deepcopy(model)
    assert twin.factors.A is None and twin.factors is not model.factors
    torch.testing.assert_close(twin(ids, pixels, mask).logits, expected)
    model(ids, pixels.flip(0), mask)
    torch.testing.assert_close(twin(ids, pixels, mask).logits, expected)


# Generation -------------------------------------------------------------------------------------------------


def _by_hand(model, ids, pixels, steps):
    for _ in range(steps):
        logits = model(ids, pixels).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("build", [_vlora, _tokens])
@torch.no_grad()
def test_generation_with_and_without_cache_equals_recomputation(batch, build):
    ids, pixels, _ = batch
    model = build()
    prompt, options = ids[:1], dict(max_new_tokens=7, do_sample=False, eos_token_id=None)
    expected = _by_hand(model, prompt, pixels[:1], 7).tolist()
    assert model.generate(prompt, pixels[:1], **options).tolist() == expected
    assert model.generate(prompt, pixels[:1], use_cache=False, **options).tolist() == expected
    if build is _vlora:
        for apply in ("merge", "side"):
            assert model.generate(prompt, pixels[:1], apply=apply, **options).tolist() == expected


@pytest.mark.parametrize("build", [_vlora, _tokens])
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
    model = _vlora()
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
    model, options = _vlora(), dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
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
    model, options = _vlora(), dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
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
    model, calls = _vlora(), []
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
    model = _vlora()
    monkeypatch.setattr(application, "merge_seconds", lambda *_: merge)
    monkeypatch.setattr(application, "side_seconds", lambda *_: side)
    weights = model.perceive(ids[:1], pixels[:1])
    assert application.cheaper(model, weights, ids[:1], {"max_new_tokens": 5}) == expected
    several = weights.repeat(2, 1, 1, 1, 1)
    assert application.cheaper(model, several, ids[:2], {"max_new_tokens": 5}) == "side", "only one image can be merged"


def test_costs_are_measured():
    shape = (torch.device("cpu"), torch.float32, 64, 4)
    assert 0 < application.merge_seconds(*shape) < 1 and 0 < application.side_seconds(*shape, 8) < 1


# Saving, loading, mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [_vlora, _tokens])
@torch.no_grad()
def test_save_and_load(tmp_path, batch, build):
    ids, pixels, mask = batch
    model = build()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")) and (tmp_path / "model.safetensors").exists()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(again) is type(model) and again.generation_config.eos_token_id == 2
    torch.testing.assert_close(again(ids, pixels, mask).logits, model(ids, pixels, mask).logits, rtol=0, atol=0)


@torch.no_grad()
def test_tied_embeddings_stay_tied(tmp_path, batch):
    ids, pixels, mask = batch
    model = _vlora(LlamaConfig(**TEXT, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    torch.testing.assert_close(again.eval()(ids, pixels, mask).logits, model(ids, pixels, mask).logits, rtol=0, atol=0)


@pytest.mark.parametrize("config, message", [
    ({"every": 3}, "4 layers are not a multiple of every=3"),
    ({"weight_types": "qx"}, "weight_types='qx'"),
    ({"weight_types": "qq"}, "weight_types='qq'"),
    ({"weight_types": ""}, "weight_types=''"),
    ({"width": 40}, "width=40 is not a multiple of its 16 heads"),
])
def test_wrong_configs(config, message):
    with pytest.raises(UserError, match=message):
        _vlora(**config)


def test_wrong_inputs(batch):
    ids, pixels, mask = batch
    for model in (_vlora(), _tokens()):
        with pytest.raises(UserError, match="2 image placeholders in the text, but 1 images"):
            model(ids, pixels[:1], mask)
        with pytest.raises(UserError, match="0 image placeholders in the text, but 2 images"):
            model(ids[1:2], pixels)
        wrong = CLIPVisionConfig(**VISION.to_dict() | {"image_size": 32})
        model.vision_tower = type(model.vision_tower)(wrong)
        with pytest.raises(UserError, match=r"\(16, 24\), not \(9, 24\)"):
            model(ids, torch.randn(2, 3, 32, 32), mask)


def test_a_language_model_that_does_not_fit():
    from transformers import GPT2Config

    with pytest.raises((UserError, AttributeError)):
        VLoRAForConditionalGeneration(
            VLoRAConfig(text_config=GPT2Config(n_layer=2, n_embd=32, n_head=2), width=32, every=2, **SHARED)
        )
    wide = LlamaConfig(**TEXT | {"head_dim": 16})  # o takes 64 where the LLM is 48 wide
    with pytest.raises(UserError, match="o_proj takes width 64, not 48"):
        _vlora(wide)
