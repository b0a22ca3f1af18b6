"""Retrieval, zero-shot classification and captions are measured as they are defined; the index finds what it holds."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.data.captions import Region
from common.data.tiny.scenes import scenes
from common.run import UserError
from common.tests import parity
from papers.mm_gem import build, compare
from papers.mm_gem.configuration import InputError
from papers.mm_gem.data import Mixture, Rows, describe, open_captions, open_regions, regions_if_there
from papers.mm_gem.embedder import BATCH, Embedder, Files, Prepared
from papers.mm_gem.evaluate import (
    classify_folder,
    named_classes,
    read_names,
    region_hits,
    relevant,
    retrieval,
    words_right,
    zero_shot,
)
from papers.mm_gem.prompts import CLIP, SEVEN
from papers.mm_gem.recipes import RECIPES

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def definitions():
    return json.loads((FIXTURES / "definitions.json").read_text())


@pytest.fixture(scope="module")
def embedder():
    torch.manual_seed(0)
    processor = build.processor(RECIPES["tiny"])
    return Embedder(build.model(RECIPES["tiny"], processor).eval(), processor)


def test_retrieval_equals_the_fixture(definitions):
    spec = definitions["retrieval"]
    owner = torch.arange(100) // 5
    own = owner == torch.arange(20)[:, None]
    similarity = parity.probe(spec["similarity"]["probe"], (20, 100)) + 1.5 * own
    found = retrieval(similarity, own)
    for k in (1, 5, 10):
        assert found[f"image -> text R@{k}"][0] == pytest.approx(spec["expected"][f"image_to_text_R@{k}"])
        assert found[f"text -> image R@{k}"][0] == pytest.approx(spec["expected"][f"text_to_image_R@{k}"])


def test_a_permuted_identity_is_perfect_retrieval():
    order = torch.randperm(7)
    own = torch.arange(7)[:, None] == order
    assert all(value == 100 for value, _ in retrieval(torch.eye(7)[order].mT, own).values())


def test_a_text_that_says_of_another_image_what_its_own_caption_says_is_right_too():
    texts, owner = ["red", "blue", "red"], torch.tensor([0, 0, 1])
    tiny, plain = RECIPES["tiny"], RECIPES["smollm2"]
    assert relevant(texts, owner, tiny).tolist() == [[True, True, True], [True, False, True]]
    assert relevant(texts, owner, plain).tolist() == [[True, True, False], [False, False, True]]


def test_prompt_ensembles_equal_the_fixture(definitions):
    spec = definitions["zero_shot"]
    prompts = F.normalize(parity.probe(spec["prompts"]["probe"], spec["prompts"]["shape"]).double(), dim=-1)
    labels = torch.arange(60) % 12
    images = parity.probe(spec["images"]["probe"], spec["images"]["shape"]).double()
    images = F.normalize(images + 4.8 * prompts.mean(1)[labels], dim=-1)

    class Prompts:  # stands for a model that embeds the prompts so
        def texts(self, texts, what):
            assert texts[:2] == ["one 0", "two 0"] and len(texts) == 36
            return prompts.flatten(0, 1)

    vectors = named_classes(Prompts(), [str(i) for i in range(12)], ["one {}", "two {}", "three {}"])
    assert 100 * zero_shot(images, labels, vectors).double().mean().item() == pytest.approx(spec["expected"]["top1"])
    top5 = (images @ vectors.mT).topk(5).indices
    assert 100 * (top5 == labels[:, None]).any(1).double().mean() == pytest.approx(spec["expected"]["top5"])
    assert len(set(CLIP)) == 80 and set(SEVEN) < set(CLIP) and all(prompt.count("{}") == 1 for prompt in CLIP)


def test_region_retrieval_by_hand():
    def region(image, phrase):
        return Region(Path(image), (0, 0, 1, 1), phrase, 0, (9, 9))

    regions = [region("a", "dog"), region("a", "cat"), region("b", "dog"), region("b", "dog"), region("a", "cat")]
    v = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0], [0.9, 0.1]])
    hits, chance = region_hits(v, torch.tensor([[0.0, 1], [1, 0]]), regions, ["cat", "dog"])
    assert hits == [True, True] and chance == pytest.approx((1 / 3 + 2 / 3) / 2)  # "b" has one phrase alone
    hits, _ = region_hits(v, torch.tensor([[1.0, 0], [0, 1]]), regions, ["cat", "dog"])
    assert hits == [False, False]


def test_words_right():
    said = ["two red circles .", "a red circle left of a blue square .", "a red circle ."]
    truths = [["a red circle ."], ["a red circle left of a green square ."], ["a blue circle ."]]
    assert words_right(said, truths, ["red", "blue", "green"]) == pytest.approx(100 / 3)
    assert words_right(said, truths, ["circle", "square"]) == 100


def test_boxes_follow_their_image_through_resizing(embedder):
    image = Image.new("RGB", (128, 32))
    out = embedder.processor(images=[image], boxes=[[(32, 8, 96, 24), (0, 0, 128, 32)]])
    assert out["boxes"].tolist() == [[0, 16, 16, 48, 48], [0, 0, 0, 64, 64]]
    with pytest.raises(InputError, match="holds nothing of the image of 128 x 32 px"):
        embedder.processor(images=[image], boxes=[[(130, 0, 140, 9)]])
    with pytest.raises(InputError, match="1 lists of boxes for 0 images"):
        embedder.processor(boxes=[[(0, 0, 1, 1)]])


def test_an_image_with_several_boxes_is_encoded_once(embedder, tmp_path, monkeypatch):
    pictures = [Image.effect_noise((64, 48), 80).convert("RGB"), Image.effect_noise((40, 40), 80).convert("RGB")]
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for picture, file in zip(pictures, files):
        picture.save(file)
    boxes = [[(1, 2, 30, 40), (9, 9, 60, 48)], [(0, 0, 40, 40), (0, 5, 20, 20)]]
    pairs = [([picture], [[box]]) for picture, its in zip(pictures, boxes) for box in its]
    alone = torch.cat([embedder.regions(*pair) for pair in pairs])
    captions = [embedder.describe(*pair, new_tokens=6)[0] for pair in pairs]
    seen, encode = [], embedder.model.feature_map
    monkeypatch.setattr(embedder.model, "feature_map", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    torch.testing.assert_close(embedder.regions(Files(files), boxes), alone, rtol=0, atol=1e-6)
    assert embedder.describe(pictures, boxes, new_tokens=6) == captions and seen == [2, 2]
    torch.testing.assert_close(embedder.images(pictures)[1], alone[2], rtol=0, atol=1e-6)  # a box of all of it
    with_workers = Embedder(embedder.model, embedder.processor, workers=1)
    torch.testing.assert_close(with_workers.regions(Files(files), boxes), alone, rtol=0, atol=1e-6)
    files[1].write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1.png is unreadable"):
        embedder.images(Files(files))


def test_batches_hold_so_many_boxes(embedder):
    counts = [BATCH - 1, 1, 1, 0, BATCH + 5, 2]
    boxes = [[(0, 0, 9, 9)] * count for count in counts]
    found = Prepared(embedder.processor, [Image.new("RGB", (9, 9))] * 6, boxes)
    assert found.batches == [[0, 1], [2, 3], [4], [5]]
    assert [len(batch["boxes"]) for batch in (found[i] for i in range(4))] == [BATCH, 1, BATCH + 5, 2]
    assert Prepared(embedder.processor, [None] * (BATCH + 1), None).batches == [list(range(BATCH)), [BATCH]]


def test_batches_are_a_function_of_the_seed_and_shared_out(tmp_path):
    root = scenes(train=64, val=24, root=tmp_path / "scenes")
    rows = Rows(open_captions(root, "train"), open_regions(root, "train"))
    recipe = RECIPES["smoke"]

    def batches(**ranks):
        return list(Mixture(64, len(rows.regions), recipe, recipe.steps, seed=3, **ranks))

    whole, halves = batches(), [batches(rank=r, world=2) for r in (0, 1)]
    assert len(whole) == recipe.steps and batches() == whole
    for step, batch in enumerate(whole):
        assert len(batch) == len(set(batch)) == recipe.batch
        assert sum(row >= 64 for row, _ in batch) == (0 if step < recipe.image_steps else recipe.batch // 2)
        assert sorted(halves[0][step] + halves[1][step]) == sorted(batch)
    (image, box, phrase), _ = rows[64]
    assert image.size == (64, 64) and phrase.startswith("a ") and 0 <= box[0] < box[2] <= 65
    with pytest.raises(UserError, match="a batch takes 16 regions, but there are 5"):
        Mixture(64, 5, recipe, recipe.steps, seed=0)


def test_a_folder_without_boxes_is_told_from_a_wrong_one(tmp_path):
    root = scenes(train=4, val=4, root=tmp_path / "scenes")
    file = root / "annotations" / "instances_val.json"
    file.write_text("{}")
    with pytest.raises(UserError, match="no COCO annotation file"):
        regions_if_there(root, "val")
    file.unlink()
    assert regions_if_there(root, "val") == []


def test_results_name_the_data_that_were_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    coco = RECIPES["smollm2"]
    assert describe(RECIPES["tiny"], None, 2000, 400) == "scenes: 2,000 training, 400 validation images"
    assert describe(coco, tmp_path, 239, 60) == "COCO captions: 239 training, 60 validation images"
    for recipe, folder, train in ((coco, Path(), 1000), (RECIPES["tiny"], tmp_path, 2000)):
        assert describe(recipe, folder, train, 9).startswith(f"{tmp_path.name}: {train:,} training")


def test_the_comparison_is_of_the_records():
    def record(recipe, seed, **metrics):
        rows = [{"name": name, "value": value, "unit": "%"} for name, value in metrics.items()]
        return {"recipe": recipe, "data": "scenes", "seed": seed, "metrics": rows}

    records = [
        record("objectives_both", 1, found=60.0, told=40.0), record("objectives_embedding", 0, found=70.0),
        record("objectives_both", 0, found=50.0, told=20.0),
    ]
    lines = compare.README_PARTS["compare"](records).splitlines()
    assert "scenes. Seeds: objectives_both 0, 1; objectives_embedding 0." in lines
    assert "| found | 55.0 ± 7.1 % | 70.0 % |" in lines and "| told | 30.0 ± 14.1 % |  |" in lines


def test_folders_of_classes_are_scored_as_clips_benchmark_does(embedder, tmp_path):
    class Pictures:
        classes, labels = ["n1", "n2", "n3"], [0, 0, 0, 1, 2, 2]

        def __len__(self):
            return 6

    class Axes:
        """Names lie on axes of their own; pictures of n1 on its axis, all others on that of n2."""

        def texts(self, texts, _=""):
            return F.one_hot(torch.tensor([["a dog", "a cat", "a fox"].index(text[-5:]) for text in texts]), 3).float()

        def images(self, _):
            return torch.eye(3)[[0, 0, 1, 1, 1, 1]] + torch.tensor([0.0, 0.0, 0.1])

    (tmp_path / "words.txt").write_text("n3 fox, red fox\nn1\tdog\nn2 cat\nn9 none\n")
    names = read_names(tmp_path / "words.txt", Pictures.classes)
    assert names == ["dog", "cat", "fox"] and read_names(None, ["gas_pump"]) == ["gas pump"]
    scores = classify_folder(Axes(), Pictures(), names, ["a {}", "not a {}"])
    assert scores["zero-shot, 3 classes"][0] == pytest.approx(50)
    assert scores["zero-shot, 3 classes, mean over classes"][0] == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)
    assert scores["zero-shot, 3 classes, top-5"][0] == 100
    with pytest.raises(UserError, match="names no class 'n4'"):
        read_names(tmp_path / "words.txt", ["n4"])
    with pytest.raises(UserError, match="is no list of names"):
        read_names(tmp_path / "none.txt", ["n4"])
