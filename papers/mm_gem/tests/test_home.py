"""MM-GEM where others expect a model of transformers: CLIP's names, pipelines, generate, folders without us."""

import copy
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, GenerationConfig, pipeline

from common.tests.transformers_suite import environment, run_suite
from papers.mm_gem import build
from papers.mm_gem.configuration import InputError, MMGEMConfig, part
from papers.mm_gem.recipes import RECIPES

TEXTS = ["a red circle .", "two blue squares ."]


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    processor = build.processor(RECIPES["tiny"])
    return build.model(RECIPES["tiny"], processor).eval(), processor


@pytest.fixture
def picture():
    return Image.radial_gradient("L").convert("RGB").resize((50, 40))


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for part_ in parts:
        part_.save_pretrained(folder)
    return folder


def test_features_have_clips_names(parts, picture):
    model, processor = parts
    image, texts = processor(images=[picture], boxes=[[(3, 3, 30, 30)]]), processor(text=TEXTS)
    pixels = image["pixel_values"]
    assert torch.equal(model.get_image_features(pixels), model.encode_image(pixels))
    assert torch.equal(model.get_image_features(**image), model.encode_region(pixels, image["boxes"]))
    assert torch.equal(model.get_text_features(**texts), model.encode_text(**texts))


def test_forward_takes_either_modality_and_unequal_numbers(parts, picture):
    model, processor = parts
    image, texts = processor(images=picture), processor(text=TEXTS)
    both = model(**processor(images=picture, text=TEXTS))
    assert both.loss is None and both.logits_per_image.shape == (1, 2)
    alone = model(**image), model(**texts)
    assert alone[0].text_embeds is None and torch.equal(alone[0].image_embeds, both.image_embeds)
    assert alone[1].image_embeds is None and torch.equal(alone[1].text_embeds, both.text_embeds)
    expected = model.log_scale.exp() * both.image_embeds @ both.text_embeds.mT
    torch.testing.assert_close(both.logits_per_image, expected)
    pairs = processor(images=[picture, picture], text=TEXTS)
    assert model(**pairs).loss is not None and model(**pairs, return_loss=False).loss is None
    with pytest.raises(InputError, match="give input_ids, pixel_values, or both"):
        model()


def test_states_are_given_when_asked_for(parts, picture):
    model, processor = parts
    inputs = processor(images=[picture], text=TEXTS[:1])
    out = model(**inputs, output_hidden_states=True, return_loss=False)
    assert len(out.text_model_output.hidden_states) == 3 and len(out.vision_model_output.hidden_states) == 3
    assert model(**inputs).text_model_output is None
    found = model(**inputs, return_dict=False)
    assert isinstance(found, tuple) and torch.equal(found[0], model(**inputs).loss)


def test_pipelines(parts, picture):
    model, processor = parts
    classify = pipeline(
        "zero-shot-image-classification", model=model, image_processor=processor.image_processor,
        tokenizer=processor.tokenizer, device="cpu",
    )
    labels = ["red circle", "blue square", "green triangle"]
    found = classify(picture, candidate_labels=labels, hypothesis_template="a {} .")
    texts = model.encode_text(**processor(text=[f"a {label} ." for label in labels]))
    cosines = model.encode_image(processor(images=picture)["pixel_values"]) @ texts.mT
    expected = dict(zip(labels, (cosines[0] / model.temperature).softmax(0).tolist()))
    assert {row["label"]: row["score"] for row in found} == pytest.approx(expected, rel=1e-4)

    describe = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    caption = processor.captions(model.generate(processor(images=picture)["pixel_values"], max_new_tokens=6))[0]
    (plain,) = describe(images=picture, text="", max_new_tokens=6)
    assert plain["generated_text"].strip() == caption
    (begun,) = describe(images=[picture], text=["a red"], max_new_tokens=6)
    assert begun["generated_text"].startswith("a red")
    talk = [{"role": "user", "content": [{"type": "image", "image": picture}]}]
    (told,) = describe(text=talk, max_new_tokens=6, return_full_text=False)
    assert told["generated_text"].strip() == caption
    talk[0]["content"].append({"type": "text", "text": "What is it?"})
    with pytest.raises(Exception, match="follows no instructions"):
        describe(text=talk)


def test_generate_takes_what_the_processor_makes(parts, picture):
    model, processor = parts
    other = Image.linear_gradient("L").convert("RGB")
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    inputs = processor(images=[picture, other], text=["a red circle", "two"])
    rows = model.generate(**inputs, **options)
    for i, (image, text) in enumerate(((picture, "a red circle"), (other, "two"))):
        alone = processor(images=image, text=text)
        assert model.generate(**alone, **options)[0].tolist() == rows[i].tolist(), "neighbors do not matter"
    # a caption goes on as it would have: its own beginning changes nothing
    whole = model.generate(inputs["pixel_values"][:1], **options)
    start = torch.cat([whole[:, :2], torch.tensor([[processor.emb_token_id]])], 1)
    rest = model.generate(inputs["pixel_values"][:1], input_ids=start, max_new_tokens=3, min_new_tokens=3)
    assert rest.tolist() == whole[:, 2:].tolist()
    empty = model.generate(**processor(images=picture, text=""), **options)
    assert empty.tolist() == whole.tolist()
    with pytest.raises(InputError, match="1 beginnings of captions for 2 images"):
        model.generate(inputs["pixel_values"], input_ids=start)
    with pytest.raises(InputError, match="needs pixel_values"):
        model.generate(input_ids=start)


def test_its_generation_settings_are_saved(parts, picture, tmp_path):
    model, processor = parts
    assert model.can_generate()
    pixels, before = processor(images=picture)["pixel_values"], model.generation_config.max_new_tokens
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    model.generation_config.max_new_tokens = before
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert again.generate(pixels, min_new_tokens=3).shape[1] == 3
    assert again.generate(pixels, generation_config=GenerationConfig(max_new_tokens=2)).shape[1] <= 2


def test_the_vocabulary_grows(parts):
    model, processor = parts
    model = type(model)(copy.deepcopy(model.config)).eval()
    texts, before = processor(text=TEXTS), model.get_input_embeddings().num_embeddings
    expected = model.encode_text(**texts)
    model.resize_token_embeddings(before + 7)
    assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == before + 7
    assert model.get_output_embeddings().out_features == before + 7
    torch.testing.assert_close(model.encode_text(**texts), expected)
    with pytest.raises(InputError, match=r"\[EMB\] or \[CAP\] would be none of them"):
        model.resize_token_embeddings(10)


def test_options_reach_the_tokenizer_and_the_image_processor(parts, picture):
    _, processor = parts
    emb = processor.emb_token_id
    padded = processor(text=TEXTS, padding="max_length", max_length=20)["input_ids"]
    assert padded.shape == (2, 20) and (padded == emb).sum(1).tolist() == [1, 1]
    cut = processor(text=TEXTS, truncation=True, max_length=3)["input_ids"]
    assert cut.shape == (2, 3) and (cut[:, -1] == emb).all()
    raw = processor(images=picture, do_rescale=False, do_normalize=False)["pixel_values"]
    assert raw.max() > 10
    assert isinstance(processor(text=TEXTS, return_tensors=None, padding=False)["input_ids"], list)
    with pytest.raises(InputError, match="neither images nor text"):
        processor()


def test_a_bare_tokenizer_appends_emb_too(saved):
    from transformers import AutoTokenizer

    processor, tokenizer = AutoProcessor.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    rows = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert set(rows) == {"input_ids", "attention_mask"}
    assert torch.equal(rows["input_ids"], processor.texts(TEXTS)["input_ids"])


@pytest.mark.parametrize("given, message", [
    ({"model_type": "timm_wrapper", "architecture": "local-dir:/tmp", "num_classes": 2}, "architecture 'local-dir:"),
    ({"model_type": "timm_wrapper", "architecture": "resnet18", "num_classes": 2,
      "model_args": {"checkpoint_path": "/x"}}, "checkpoint_path in model_args"),
    ({"model_type": "no_such"}, "model_type 'no_such'"),
])
def test_a_part_is_of_transformers_and_timms_own(given, message):
    with pytest.raises(InputError, match=message):
        MMGEMConfig(vision_config=given)
    own = part({"vocab_size": 8}, "llama")
    assert own.model_type == "llama" and part(own, "llama") is not own


ELSEWHERE = """
import importlib.util, json, sys
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
assert not importlib.util.find_spec("papers") and not importlib.util.find_spec("common"), sys.path
folder, picture = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == "MMGEMConfig"
inputs = processor(images=Image.open(picture), text="a red circle .")
other = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
ids = other.generate(inputs["pixel_values"], max_new_tokens=5, min_new_tokens=5)
out = model(**inputs)
print(json.dumps([ids.tolist(), out.image_embeds.tolist(), out.text_embeds.tolist()]))
"""


@pytest.mark.slow
def test_it_loads_where_the_repository_is_not(parts, saved, picture, tmp_path):
    about = json.loads((saved / "config.json").read_text())["auto_map"]
    assert about == {"AutoConfig": "configuration.MMGEMConfig"} | dict.fromkeys(
        ("AutoModel", "AutoModelForImageTextToText", "AutoModelForZeroShotImageClassification"), "model.MMGEMModel")
    for name in ("configuration", "pooling", "contrastive", "model", "processing"):
        text = (saved / f"{name}.py").read_text()
        assert "from papers" not in text and "from common" not in text, f"{name}.py must stand alone"
    picture.save(tmp_path / "a.png")
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE)
    variables = environment() | {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules"),
                                 "PYTHONPATH": sysconfig.get_path("purelib")}
    # -S: the repository may be installed in the environment by a .pth file
    command = [sys.executable, "-S", "-P", str(script), str(saved), str(tmp_path / "a.png")]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    ids, image, text = json.loads(done.stdout.splitlines()[-1])
    model, processor = parts
    inputs = processor(images=picture, text="a red circle .")
    out = model(**inputs)
    assert model.generate(inputs["pixel_values"], max_new_tokens=5, min_new_tokens=5).tolist() == ids
    torch.testing.assert_close(torch.tensor(image), out.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(text), out.text_embeds, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_transformers_own_tests():
    run_suite(Path(__file__).parent / "suite.py", least=70)
