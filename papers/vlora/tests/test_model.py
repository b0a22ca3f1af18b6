"""VLoRA's model: what holds for any batch, any LLaMA-like language model, and any way of applying the weights."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
)

from papers.vlora import VisualTokensForConditionalGeneration, VLoRAConfig, VLoRAForConditionalGeneration
from papers.vlora.generator import PerceptualWeightsGenerator
from papers.vlora.injection import Site, in_force
from papers.vlora.tests.models import IMAGE, PAD, SHARED, TEXT, VISION, tokens, vlora


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
    model = vlora(separate=separate)
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
    generator = vlora(zero=True, width=64, blocks=3).generator
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

    config = vlora().config
    one = copy.copy(config)
    one.weight_types = "q"
    assert count(config) == count(one) == 6 * 2 + 1


# Applying the weights ---------------------------------------------------------------------------------------


def test_a_fresh_model_is_the_plain_llm_and_learns_b_first(batch):
    ids, pixels, mask = batch
    model = vlora(zero=True)
    assert torch.equal(model(ids, pixels, mask).logits, _plain(model, ids, mask))
    model.train()(ids, pixels, mask, labels=ids.masked_fill(ids == IMAGE, -100)).loss.backward()
    for name, parameter in model.generator.named_parameters():
        assert parameter.grad.any() == name.startswith("B_"), name
    assert not any(p.requires_grad for p in model.vision_tower.parameters())


@torch.no_grad()
def test_rows_do_not_meet(batch):
    ids, pixels, mask = batch
    for model in (vlora(), tokens()):
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
    model = vlora()
    assert torch.equal(model(ids, pixels, mask).logits[1], _plain(model, ids, mask)[1])
    text, text_mask = ids[1:2], mask[1:2]
    assert torch.equal(model(text, None, text_mask).logits, _plain(model, text, text_mask))
    model(ids, pixels, mask)
    assert torch.equal(_plain(model, text, text_mask), model(text, None, text_mask).logits), "an image stayed behind"


def test_a_training_step_on_text_alone_reaches_every_parameter(batch):
    """DDP and ZeRO wait for all of them."""
    ids, _, mask = batch
    for model in (vlora(), tokens()):
        model.train()(ids[1:2], None, mask[1:2], labels=ids[1:2]).loss.backward()
        connection = model.generator if hasattr(model, "generator") else model.projector
        assert all(p.grad is not None and not p.grad.any() for p in connection.parameters())


@torch.no_grad()
def test_an_image_adds_no_tokens(batch):
    ids, pixels, mask = batch
    seen = []
    for model in (vlora(), tokens()):
        model.language_model.get_decoder().layers[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
        assert model(ids, pixels, mask).logits.shape == (3, 9, 61)
    assert seen == [9, 9 + 9 - 1]


@torch.no_grad()
def test_merged_weights_equal_those_beside(batch):
    ids, pixels, _ = batch
    model, ids = vlora(), ids[:1]
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
    text = ids.masked_fill(ids == IMAGE, 5)
    torch.testing.assert_close(model(text).logits, _plain(model, text, torch.ones_like(ids)), rtol=0, atol=0)

    # The same with dense matrices written into a plain language model, m beside its MLP.
    plain = copy.deepcopy(model.language_model)
    layers = plain.get_decoder().layers
    for site, delta in zip(model.places.sites, model.deltas(weights)):
        layer = layers[model.config.sites[site.site_index]]
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
    model = vlora()
    shapes = {letter: tuple(getattr(model.generator, f"B_{letter}").shape) for letter in "qkvom"}
    assert shapes == {"q": (2, 48, 3), "k": (2, 24, 3), "v": (2, 24, 3), "o": (2, 48, 3), "m": (2, 48, 3)}
    full = vlora(LlamaConfig(**TEXT | {"num_key_value_heads": 4}))
    assert {tuple(getattr(full.generator, f"B_{letter}").shape) for letter in "qkvom"} == {(2, 48, 3)}


@pytest.mark.parametrize("kind", [MistralConfig, Qwen2Config])
@torch.no_grad()
def test_other_language_models_of_the_family(kind, batch):
    ids, pixels, mask = batch
    model = vlora(kind(**TEXT))
    logits = model(ids, pixels, mask).logits
    plain = _plain(model, ids, mask)
    assert torch.equal(logits[1], plain[1]) and not torch.allclose(logits[0], plain[0], atol=1e-3)


def test_several_images_in_a_row_are_refused(batch):
    _, pixels, _ = batch
    row = torch.tensor([[1, IMAGE, 5, IMAGE, 6]])
    for model in (vlora(), tokens()):
        with pytest.raises(ValueError, match="2 images in one row: the model takes one"):
            model(row, pixels)


def test_gradient_checkpointing(batch):
    ids, pixels, mask = batch
    labels = ids.masked_fill((ids == IMAGE) | (ids == PAD), -100)
    gradients = []
    model = vlora().train()
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, pixels, mask, labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@torch.no_grad()
def test_bf16(batch):
    ids, pixels, mask = batch
    model = vlora()
    exact = model(ids, pixels, mask).logits
    half = copy.deepcopy(model).bfloat16()(ids, pixels, mask).logits
    assert half.dtype == torch.bfloat16 and (half.float() - exact).norm() < 0.05 * exact.norm()
    model.language_model.bfloat16()  # a frozen LLM in bf16, the generator in float32
    mixed = model(ids, pixels, mask).logits
    assert (mixed.float() - exact).norm() < 0.05 * exact.norm()


@torch.no_grad()
def test_a_copy_is_independent(batch):
    ids, pixels, mask = batch
    model = vlora()
    expected = model(ids, pixels, mask).logits
    twin = copy.deepcopy(model)
    assert in_force() is None and twin.guard is not model.guard and twin.places is not model.places
    torch.testing.assert_close(twin(ids, pixels, mask).logits, expected)
    model(ids, pixels.flip(0), mask)
    torch.testing.assert_close(twin(ids, pixels, mask).logits, expected)


# Saving, loading, mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [vlora, tokens])
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
    model = vlora(LlamaConfig(**TEXT, tie_word_embeddings=True))
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
    with pytest.raises(ValueError, match=message):
        vlora(**config)


def test_wrong_inputs(batch):
    ids, pixels, mask = batch
    for model in (vlora(), tokens()):
        with pytest.raises(ValueError, match="2 image placeholders in the text, but 1 images"):
            model(ids, pixels[:1], mask)
        with pytest.raises(ValueError, match="0 image placeholders in the text, but 2 images"):
            model(ids[1:2], pixels)
        wrong = CLIPVisionConfig(**VISION.to_dict() | {"image_size": 32})
        model.vision_tower = type(model.vision_tower)(wrong)
        with pytest.raises(ValueError, match=r"\(16, 24\), not \(9, 24\)"):
            model(ids, torch.randn(2, 3, 32, 32), mask)


def test_a_language_model_that_does_not_fit():
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no get_decoder"):
        VLoRAForConditionalGeneration(
            VLoRAConfig(text_config=GPT2Config(n_layer=2, n_embd=32, n_head=2), width=32, every=2, **SHARED)
        )
    wide = LlamaConfig(**TEXT | {"head_dim": 16})  # o takes 64 where the LLM is 48 wide
    with pytest.raises(ValueError, match="o_proj takes width 64, not 48"):
        vlora(wide)
