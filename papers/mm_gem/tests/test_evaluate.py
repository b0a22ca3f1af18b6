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
from papers.mm_gem import compare, parts
from papers.mm_gem.data import Mixture, Rows, open_captions, open_regions
from papers.mm_gem.evaluate import Tools, named_classes, region_hits, retrieval, words_right, zero_shot
from papers.mm_gem.prompts import CLIP, SEVEN
from papers.mm_gem.recipes import RECIPES
from papers.mm_gem.search import Index, embed

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def definitions():
    return json.loads((FIXTURES / "definitions.json").read_text())


@pytest.fixture(scope="module")
def tools():
    torch.manual_seed(0)
    processor = parts.processor(RECIPES["tiny"])
    return Tools(parts.build(RECIPES["tiny"], processor).eval(), processor)


def test_retrieval_equals_the_fixture(definitions):
    spec = definitions["retrieval"]
    owner = torch.arange(100) // 5
    relevant = owner == torch.arange(20)[:, None]
    similarity = parity.probe(spec["similarity"]["probe"], (20, 100)) + 1.5 * relevant
    found = retrieval(torch.eye(20), similarity.mT, relevant)
    for k in (1, 5, 10):
        assert found[f"image -> text R@{k}"][0] == pytest.approx(spec["expected"][f"image_to_text_R@{k}"])
        assert found[f"text -> image R@{k}"][0] == pytest.approx(spec["expected"][f"text_to_image_R@{k}"])


def test_a_permuted_identity_is_perfect_retrieval():
    order = torch.randperm(7)
    relevant = torch.arange(7)[:, None] == order
    assert all(value == 100 for value, _ in retrieval(torch.eye(7), torch.eye(7)[order], relevant).values())


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


def test_boxes_follow_their_image_through_resizing(tools):
    image = Image.new("RGB", (128, 32))
    out = tools.processor(images=[image], boxes=[[(32, 8, 96, 24), (0, 0, 128, 32)]])
    assert out["boxes"].tolist() == [[0, 16, 16, 48, 48], [0, 0, 0, 64, 64]]
    with pytest.raises(UserError, match="holds nothing of the image of 128 x 32 px"):
        tools.processor(images=[image], boxes=[[(130, 0, 140, 9)]])
    with pytest.raises(UserError, match="1 lists of boxes for 0 images"):
        tools.processor(boxes=[[(0, 0, 1, 1)]])


def test_an_image_with_several_boxes_is_encoded_once(tools, tmp_path, monkeypatch):
    pictures = [Image.effect_noise((64, 48), 80), Image.effect_noise((40, 40), 80)]
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for picture, file in zip(pictures, files):
        picture.save(file)
    sources = [(files[0], (1, 2, 30, 40)), files[1], (files[0], (9, 9, 60, 48)), (files[1], (0, 5, 20, 20))]
    alone = torch.cat([tools.images([source]) for source in sources])
    told = [tools.describe([source], new_tokens=6)[0] for source in sources]
    seen, encode = [], tools.model.feature_map
    monkeypatch.setattr(tools.model, "feature_map", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    torch.testing.assert_close(tools.images(sources), alone, rtol=0, atol=1e-6)
    assert tools.describe(sources, new_tokens=6) == told and seen == [2, 2]
    again = [(pictures[0].convert("RGB"), (1, 2, 30, 40)), pictures[1].convert("RGB")]
    torch.testing.assert_close(tools.images(again), alone[:2], rtol=0, atol=1e-6)


def test_an_index_finds_its_own_pictures(tools, tmp_path):
    pytest.importorskip("faiss", reason="needs faiss-cpu")
    files = [row.image for row in open_captions(scenes(train=64, val=24, root=tmp_path / "scenes"), "val").rows]
    (broken := tmp_path / "broken.png").write_bytes(b"no picture")
    for kind in ("Flat", "HNSW8"):
        embed(tools, [*files, broken], kind).save(tmp_path / "index")
        index = Index.load(tmp_path / "index")
        assert index.names == [str(file) for file in files]
        for i in (0, 13):
            name, similarity = index.nearest(tools.images([files[i]])[0], 3)[0]
            assert similarity == pytest.approx(1, abs=1e-5) and name == str(files[i])
    exact = embed(tools, files)
    vectors = tools.images(files)
    found = [similarity for _, similarity in exact.nearest(vectors[5], 99)]
    assert found == pytest.approx((vectors @ vectors[5]).sort(descending=True).values.tolist(), abs=1e-5)
    with pytest.raises(UserError, match="FAISS makes no index of kind 'IVF64,Flat' of 24 pictures"):
        embed(tools, files, "IVF64,Flat")
    with pytest.raises(UserError, match="width 64, the model 3"):
        exact.nearest(vectors[0, :3], 1)
    with pytest.raises(UserError, match="is no index of this program"):
        Index.load(tmp_path)


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


def test_the_comparison_is_of_the_records(tmp_path):
    def record(recipe, seed, **metrics):
        rows = [{"name": name, "value": value, "unit": "%"} for name, value in metrics.items()]
        content = {"recipe": recipe, "data": "scenes", "seed": seed, "metrics": rows}
        (tmp_path / f"{recipe}-{seed}.json").write_text(json.dumps(content))

    record("objectives_both", 0, found=50.0, told=20.0)
    record("objectives_both", 1, found=60.0, told=40.0)
    record("objectives_embedding", 0, found=70.0)
    lines = compare.tables(tmp_path).splitlines()
    assert "| found | 55.0 ± 7.1 % | 70.0 % |" in lines and "| told | 30.0 ± 14.1 % |  |" in lines
