"""Processor, templates, the order of samples, and evaluation's bookkeeping."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessor, CLIPVisionModel

from common import run
from common.data import conversations
from common.data.loader import Augmented
from common.data.picture import Unreadable
from common.data.tiny.scenes import scenes, word_tokenizer
from common.run import UserError
from papers.vlora import VLoRAConfig, build, evaluate, features
from papers.vlora.data import Encoded, TrainingBatches, describe, kinds, open_dataset, open_if_there
from papers.vlora.processing import IGNORED, SYSTEM, TEMPLATES, VLoRAProcessor
from papers.vlora.recipes import RECIPES


def _processor(template="short", **kwargs):
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return VLoRAProcessor(images, word_tokenizer(), chat_template=TEMPLATES[template], **kwargs)


def _talk(*turns, image=True):
    messages = []
    for i, text in enumerate(turns):
        content = [{"type": "image"}] * (image and i == 0) + [{"type": "text", "text": text}]
        messages.append({"role": "assistant" if i % 2 else "user", "content": content})
    return messages


# Processor ------------------------------------------------------------------------------------------------


def test_templates():
    talk = _talk("What color is it?", "red", "What shape is it?", "circle")
    said = {name: _processor(name).apply_chat_template(talk) for name in ("vicuna_v1", "short", "chatml")}
    dialogue = "USER: <image>\nWhat color is it? ASSISTANT: red</s>USER: What shape is it? ASSISTANT: circle</s>"
    assert said["vicuna_v1"] == f"<s>{SYSTEM} {dialogue}" and said["short"] == f"<s>{dialogue}"
    assert said["chatml"] == (
        "<|im_start|>user\n<image>\nWhat color is it?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nWhat shape is it?<|im_end|>\n<|im_start|>assistant\ncircle<|im_end|>\n"
    )
    caption = _talk("thrown away", "a red circle .")
    assert _processor("plain").apply_chat_template(caption) == "<s><image>a red circle .\n"
    assert _processor("prompted").apply_chat_template(caption) == "<s><image>\nthrown away a red circle .\n"
    for name, end in (("vicuna_v1", "ASSISTANT:"), ("chatml", "<|im_start|>assistant\n"), ("prompted", "away")):
        prompt = _processor(name).apply_chat_template(caption[:1], add_generation_prompt=True)
        assert prompt.endswith(end) and _processor(name).apply_chat_template(caption).startswith(prompt)


def test_a_system_message_and_the_generation_prompt():
    system = {"role": "system", "content": [{"type": "text", "text": "Be terse."}]}
    talk = _talk("What color is it?", "red", "Sure?")
    vicuna = _processor("vicuna_v1")
    begun = "<s>Be terse. USER: <image>\nWhat color is it? ASSISTANT: red</s>USER: Sure?"
    assert vicuna.apply_chat_template([system, *talk]) == begun
    assert vicuna.apply_chat_template([system, *talk], add_generation_prompt=True) == f"{begun} ASSISTANT:"
    chat = _processor("chatml").apply_chat_template([system, *talk[:1]])
    assert chat.startswith("<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\n<image>\nWhat")
    for name in ("plain", "prompted", "short"):
        with pytest.raises(Exception, match="no place for a system message"):
            _processor(name).apply_chat_template([system, *talk])
    learned = vicuna.encode([system, *_talk("What color is it?", "red")])
    assert vicuna.tokenizer.decode(learned["input_ids"][learned["labels"] != IGNORED]) == "red </s>"


def test_options_reach_tokenizer_and_image_processor():
    processor, picture = _processor(), Image.new("RGB", (40, 20), "red")
    short = processor([picture], "<image> a red circle .", truncation=True, max_length=3)
    assert short["input_ids"].shape == (1, 3)
    wide = processor([picture], "<image> red", padding="max_length", max_length=9)
    assert wide["attention_mask"].tolist() == [[0] * 7 + [1, 1]], "padded on the left"
    right = processor(None, ["red", "a red circle ."], padding_side="right")
    assert right["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    raw = processor([picture], do_normalize=False)["pixel_values"]
    assert raw.min() >= 0 and not torch.equal(raw, processor([picture])["pixel_values"])
    assert isinstance(processor(text="red", return_tensors=None)["input_ids"], list)
    with pytest.raises(ValueError, match="neither images nor text"):
        processor()
    square = _processor(pad_to_square=True)
    array = np.asarray(picture)
    assert torch.equal(square([array])["pixel_values"], square([picture])["pixel_values"])


def test_the_assistants_words_are_learned_and_nothing_else():
    processor = _processor()
    row = processor.encode(_talk("What color is it?", "red", "Describe the image.", "a red circle ."))
    learned = row["input_ids"][row["labels"] != IGNORED]
    assert processor.tokenizer.decode(learned) == "red </s> a red circle . </s>"
    assert torch.equal(row["labels"][row["labels"] != IGNORED], learned)
    assert (row["input_ids"] == processor.image_token_id).sum() == 1
    assert len(processor.encode(_talk("What color is it?", "red"), max_length=5)["input_ids"]) == 5


def test_a_batch():
    processor = _processor()
    picture = Image.new("RGB", (40, 20), "red")
    samples = [([picture], processor.encode(_talk("What color is it?", "red"))),
               ([], processor.encode(_talk("What shape is it?", "two red circles .", image=False)))]
    batch = processor.collate(samples)
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    for i, (_, row) in enumerate(samples):
        length = len(row["input_ids"])
        assert torch.equal(batch["input_ids"][i, :length], row["input_ids"])
        assert batch["attention_mask"][i].sum() == length and (batch["labels"][i, length:] == IGNORED).all()
    assert "pixel_values" not in processor.collate(samples[1:])
    prompts = processor([picture], ["<image> red", "a red circle ."])
    assert prompts["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]], "prompts are padded on the left"


def test_padding_to_a_square():
    picture = Image.new("RGB", (64, 32), "white")
    padded, cropped = (_processor(pad_to_square=pad).pixels([picture])[0] for pad in (True, False))
    mean = (0 - torch.tensor([0.0])).item()
    assert torch.allclose(padded[:, 0, :], torch.full((3, 32), mean), atol=0.05), "the bars have the mean colour"
    assert padded[:, 16, :].min() > 1 and cropped.min() > 1


def test_image_marks_are_counted():
    processor, picture = _processor(), Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="1 marks <image> in the text, but 2 images"):
        processor([picture, picture], "<image> red")
    with pytest.raises(ValueError, match="2 images in one row: the model takes one"):
        processor([picture, picture], "<image> <image> red")
    cut = processor.encode(_talk("What color is it?", "red"), max_length=2)
    with pytest.raises(ValueError, match="1 images, but 0 placeholders"):
        processor.collate([([picture], cut)])


def test_processor_is_saved(tmp_path):
    processor = _processor("plain", pad_to_square=False)
    processor.save_pretrained(tmp_path)
    build.blueprint(RECIPES["tiny"]).save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, VLoRAProcessor) and VLoRAConfig.model_type == "vlora"
    assert (again.pad_to_square, again.chat_template) == (False, processor.chat_template)
    assert again.image_token_id == processor.image_token_id == len(processor.tokenizer) - 1
    picture = Image.new("RGB", (50, 30), "blue")
    assert torch.equal(again.pixels([picture]), processor.pixels([picture]))


# The order of samples ------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(8, 40), st.booleans(), st.integers(0, 3))
def test_the_global_batches_do_not_depend_on_ranks_or_chunks(world, chunks, samples, grouped, seed):
    batch = 6
    about = [(i % 3 > 0, i % 7) for i in range(samples)] if grouped else None
    steps = 2 * (samples // batch) + 1

    def global_batches(world, chunks):
        options = dict(seed=seed, world=world, chunks=chunks, kinds=about)
        ranks = [list(TrainingBatches(samples, batch, steps, rank=r, **options)) for r in range(world)]
        assert all(len(rank) == steps * chunks for rank in ranks)
        return [
            sorted(row for rank in ranks for micro in rank[s * chunks : (s + 1) * chunks] for row in micro)
            for s in range(steps)
        ]

    whole = global_batches(1, 1)
    assert global_batches(world, chunks) == whole
    per_epoch = samples // batch
    first = [index for rows in whole[:per_epoch] for index, _ in rows]
    assert len(set(first)) == len(first) == per_epoch * batch, "a sample at most once an epoch"


def test_grouped_batches_hold_images_or_text():
    about = [(i < 20, i % 9) for i in range(32)]  # 20 with an image, 12 of text alone
    batches = [[row for row, _ in rows] for rows in TrainingBatches(32, 4, 8, seed=0, kinds=about)]
    assert Counter(sum(about[row][0] for row in rows) for rows in batches) == {4: 5, 0: 3}
    chunked = list(TrainingBatches(32, 4, 8, seed=0, chunks=2, kinds=about))
    for a, b in zip(chunked[::2], chunked[1::2]):
        assert max(about[row][1] for row, _ in a) <= min(about[row][1] for row, _ in b), "like lengths together"
    mixed = [(i < 18, 0) for i in range(32)]
    shares = Counter(sum(mixed[row][0] for row, _ in rows) for rows in TrainingBatches(32, 4, 8, seed=0, kinds=mixed))
    assert shares == {4: 4, 0: 3, 2: 1}, "the rest of both shares a batch"


def test_whole_batches_of_one_length():
    """With length_groups, as in the authors' trainer: sorted within so many global batches, their order random."""
    rng = np.random.default_rng(0)
    about = [(True, int(length)) for length in rng.integers(1, 60, 96)]
    options = dict(seed=0, kinds=about)
    spreads = []
    for groups in (1, 4, 12):
        batches = [[row for row, _ in rows] for rows in TrainingBatches(96, 8, 12, length_groups=groups, **options)]
        assert sorted(row for rows in batches for row in rows) == list(range(96)), "every sample once"
        lengths = [[about[row][1] for row in rows] for rows in batches]
        spreads.append(np.mean([max(rows) - min(rows) for rows in lengths]))
        firsts = [min(rows) for rows in lengths]
        assert firsts != sorted(firsts), "but the batches come in any order"
    assert spreads[0] > 2 * spreads[1] and spreads[1] > 1.5 * spreads[2]


# Folders ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return scenes(20, 8, 32, root=tmp_path_factory.mktemp("scenes") / "scenes")


def test_both_stages_read_the_scenes(root):
    chats, captions = (open_dataset(root, "train", RECIPES[name]) for name in ("tiny", "tiny_pretrain"))
    assert len(chats) == 40 and len(captions) == 20
    images, messages = captions[3]
    assert len(images) == 1 and messages[0]["content"][0] == {"type": "image"}
    assert kinds(chats)[0][0] and kinds(captions) == [(True, 1)] * 20
    assert open_if_there(root, "val", RECIPES["tiny"])


def test_what_is_missing_is_named(tmp_path, root):
    with pytest.raises(UserError, match="no data folder"):
        open_dataset(tmp_path / "none", "train", RECIPES["tiny"])
    with pytest.raises(UserError, match="has no conversations for 'train': expected one of"):
        open_dataset(tmp_path, "train", RECIPES["tiny"])
    mixture = tmp_path / "llava_v1_5_mix665k.json"
    mixture.write_text((root / "conversations_train.json").read_text())
    assert len(open_dataset(tmp_path, "train", RECIPES["finetune_7b"])) == 40
    (tmp_path / "train-000000.tar").touch()
    for stage in ("finetune_7b", "pretrain_7b"):
        assert not open_if_there(tmp_path, "val", RECIPES[stage])
    (tmp_path / "conversations_val.json").write_text("[]")
    mixture.unlink()
    assert not open_if_there(tmp_path, "train", RECIPES["finetune_7b"]), "what is held out trains nothing"
    with pytest.raises(UserError, match="expected a list of conversations, found an empty one"):
        open_if_there(tmp_path, "val", RECIPES["finetune_7b"])
    entry = {"id": "has no", "conversations": [{"from": "gpt", "value": "x"}]}
    (tmp_path / "conversations_val.json").write_text(json.dumps([entry]))
    with pytest.raises(UserError, match="id has no: 0 turns"):  # a wrong file is no missing one, whatever it says
        open_if_there(tmp_path, "val", RECIPES["finetune_7b"])


def test_results_name_the_data_that_were_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny, full = RECIPES["tiny"], RECIPES["finetune_7b"]
    assert describe(tiny, None, 4000, 600) == "scenes: 4,000 training, 600 validation samples"
    assert describe(full, tmp_path, 665_298, 0).startswith("LLaVA-1.5 mixture: 665,298 training")
    for recipe, folder in ((full, tmp_path), (full, Path()), (tiny, tmp_path)):
        assert describe(recipe, folder, 1000, 0) == f"{tmp_path.name}: 1,000 training, 0 validation samples"


def test_what_nothing_can_be_learned_from_is_a_bad_sample(tmp_path):
    """A mark or an answer that max_length cuts off, an empty caption: named and passed over, in evaluation an error."""
    root = scenes(3, 2, 32, root=tmp_path / "scenes")
    long = {"id": "late", "image": "train/000001.png", "conversations": [
        {"from": "human", "value": "What color is it?"}, {"from": "gpt", "value": "red"},
        {"from": "human", "value": "<image>\nWhat shape is it?"}, {"from": "gpt", "value": "circle"},
    ]}
    talks = json.loads((root / "conversations_train.json").read_text())
    (root / "conversations_train.json").write_text(json.dumps([long, *talks]))
    data, processor = open_dataset(root, "train", RECIPES["tiny"]), _processor()
    whole = Encoded(data, processor, 128)
    assert len(whole) == 1 + len(talks) and len(whole[0][0]) == 1
    with pytest.raises(Unreadable, match="1 images, but 0 marks within 12 tokens"):
        Encoded(data, processor, 12)[0]
    with pytest.raises(Unreadable, match="no word of an answer within 4 tokens"):
        Encoded(data, processor, 4)[1]
    with pytest.raises(UserError, match=r"cannot evaluate: late \(.*000001.png\) is unreadable \(1 images, but"):
        Encoded(data, processor, 12, strict=True)[0]
    passed = Augmented(Encoded(data, processor, 12), list, report=tmp_path / "unreadable.txt")
    assert torch.equal(passed[0, 1][1]["input_ids"], Encoded(data, processor, 12)[1][1]["input_ids"])
    assert (tmp_path / "unreadable.txt").read_text().startswith("late (")

    path = root / "annotations" / "captions_val.json"
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        if entry["image_id"] == content["images"][1]["id"]:
            entry["caption"] = " <image> "
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"cannot evaluate: .*val/\d+.png has an empty caption"):
        evaluate.questions(open_dataset(root, "val", RECIPES["tiny_pretrain"]), 100)


def test_a_row_of_two_images_is_left_out_and_named(tmp_path, root):
    talks = json.loads((root / "conversations_train.json").read_text())
    talks[5] |= {"image": ["train/000001.png", "train/000002.png"]}
    talks[5]["conversations"][0]["value"] = "<image><image>\nSame?"
    (tmp_path / "conversations_train.json").write_text(json.dumps(talks))
    data = open_dataset(tmp_path, "train", RECIPES["tiny"], report=tmp_path / "unreadable.txt")
    assert len(data) == len(talks) - 1
    assert (tmp_path / "unreadable.txt").read_text().startswith("entry 5: id ")
    (tmp_path / "conversations_train.json").rename(tmp_path / "conversations_val.json")
    with pytest.raises(UserError, match=r"1 of 40 conversations cannot be read, the first entry 5: .*2 images"):
        open_dataset(tmp_path, "val", RECIPES["tiny"])


# Features ---------------------------------------------------------------------------------------------------


def test_features_are_computed_once(root, tmp_path, monkeypatch):
    recipe = replace(RECIPES["tiny_pretrain"], features=True)
    torch.manual_seed(0)
    tower = CLIPVisionModel(build.TOWERS["tiny"]).eval()
    monkeypatch.setattr(build, "load_vision_tower", lambda *_: tower)
    monkeypatch.setattr(features, "cache_dir", lambda name: tmp_path)
    processor = build.processor(recipe)
    data = open_dataset(root, "train", recipe)
    kept = features.featured(data, recipe, processor, train=True)
    (path,) = tmp_path.glob("*.npy")
    monkeypatch.setattr(features, "_compute", None)
    again = features.featured(data, recipe, processor, train=False)
    assert list(tmp_path.iterdir()) == [path] and len(again) == len(data) == 20
    texts = [text for i in range(20) for text in data.captions(i)]
    assert [kept.captions(i)[0] for i in range(len(kept))] == texts, "every caption is a sample"
    (found,), messages = again[3]
    model = build.model(replace(recipe, stage="finetune"), processor.image_token_id)
    model.vision_tower = tower
    expected = model.visual_features(processor.pixels(data[3][0]))[0]
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)
    assert messages[1]["content"][0]["text"] == again.captions(3)[0]
    batch = processor.collate([([found], processor.encode(messages))] * 2)
    assert batch["pixel_values"].shape == (2, *expected.shape)
    blind = features.featured(data, replace(recipe, blind=True), processor, train=True)
    assert torch.equal(blind[0][0][0], blind[7][0][0]) and not torch.equal(kept[0][0][0], kept[7][0][0])
    assert kinds(kept)[0] == (True, len(texts[0].split()))
    with pytest.raises(UserError, match="features are kept for COCO's caption annotations"):
        features.featured(open_dataset(root, "train", RECIPES["tiny"]), recipe, processor, train=True)


# Evaluation -----------------------------------------------------------------------------------------------


def test_exchanged_images_are_others(root):
    asked = evaluate.questions(open_dataset(root, "val", RECIPES["tiny"]), 100)
    other = evaluate.exchanged(asked)
    for i, j in enumerate(other):
        assert asked[j].category == asked[i].category
        alone = len({q.images for q in asked if q.category == asked[i].category}) == 1
        assert asked[j].images != asked[i].images or alone


def test_exchanged_images_are_as_many():
    kinds = [("a",), (), ("a", "b"), ("c",), (), ("d", "a")]
    asked = [evaluate.Question(images, (), "all", ("x",)) for images in kinds]
    assert [kinds[j] for j in evaluate.exchanged(asked)] == [("c",), (), ("d", "a"), ("a",), (), ("a", "b")]


def test_scores_of_worked_out_answers():
    def sample(category, truth, answer, exchanged, loss, other):
        return {"question": category, "category": category, "answer": answer, "exchanged": exchanged,
                "truths": [truth], "loss": loss, "loss_exchanged": other}

    samples = [
        sample("colour", "red", "Red.", "blue", 0.1, 0.2), sample("colour", "blue", "red", "blue", 0.4, 0.3),
        sample("colour", "red", "red", "red", 0.1, 0.5), sample("count", "two", "two", "one", 0.2, 0.6),
    ]
    training = {"colour": Counter(blue=5, red=3), "count": Counter(one=2, two=4)}
    found = {name: value for name, (value, _) in evaluate.score(samples, training).items()}
    assert found["accuracy"] == 75 and found["accuracy, images exchanged"] == 50
    assert found["colour"] == pytest.approx(200 / 3) and found["colour, prior"] == pytest.approx(100 / 3)
    assert found["count, prior"] == 100 and found["accuracy, prior"] == 50
    assert found["right image preferred"] == 75 and found["loss, images exchanged"] == pytest.approx(0.4)
    assert next(iter(found)) == "accuracy"
    tried = [s | {"category": "caption", "losses_others": [0.3, 0.05]} for s in samples]
    found = {name: value for name, (value, _) in evaluate.score(tried).items()}
    assert found["right image preferred"] == 100 * 3 / 8 and found["right image first of all"] == 0
    captions = [s | {"category": "caption"} for s in samples]
    assert next(iter(evaluate.score(captions))) == "right image preferred" and "cider_d" in evaluate.score(captions)


def test_ranks_share_the_questions(monkeypatch):
    parts = [["a", "c", "e"], ["b", "d"]]
    gather = "torch.distributed.all_gather_object"
    monkeypatch.setattr(gather, lambda out, rows: out.__setitem__(slice(None), parts))
    monkeypatch.setattr("common.run.world.processes", lambda: 2)
    assert run.gather_objects(["a", "c", "e"]) == list("abcde")


def test_answers_end_where_the_template_ends():
    short, plain = _processor("short"), _processor("plain")
    assert evaluate.stops(short) == [2]
    assert evaluate.stops(plain)[0] == 2 and len(evaluate.stops(plain)) in (1, 2)


def test_the_category_travels(root):
    rows = conversations.read_conversations(root / "conversations_val.json", strict=True)
    assert {row.category for row in rows} <= {"describe", "colour", "shape", "count", "relation"}
    assert json.loads((root / "conversations_val.json").read_text())[0]["category"] == rows[0].category
    assert np.mean([row.category == "describe" for row in rows]) > 0
