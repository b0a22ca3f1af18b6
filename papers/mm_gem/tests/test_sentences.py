"""sentence-transformers encodes pictures and texts, and saves and loads what it encodes with."""

import pytest
import torch
from PIL import Image

from papers.mm_gem import build
from papers.mm_gem.recipes import RECIPES

library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")

TEXTS = ["two blue squares .", "a red circle .", "a green triangle left of a red square ."]


def test_it_encodes_pictures_and_texts(tmp_path):
    from papers.mm_gem.sentences import open_model

    torch.manual_seed(0)
    processor = build.processor(RECIPES["tiny"])
    model = build.model(RECIPES["tiny"], processor).eval()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    pictures = [Image.effect_noise((50, 40), 80).convert("RGB"), Image.radial_gradient("L").convert("RGB")]
    with torch.no_grad():
        t = model.encode_text(**processor(text=TEXTS))
        v = model.encode_image(processor(images=pictures)["pixel_values"])
    wrapped = open_model(tmp_path / "model", "cpu")
    options = {"convert_to_tensor": True, "show_progress_bar": False}
    torch.testing.assert_close(wrapped.encode(TEXTS, **options), t, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wrapped.encode(pictures, **options), v, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wrapped.similarity(v, t), v @ t.mT, rtol=1e-4, atol=1e-5)
    wrapped.save(str(tmp_path / "saved"))
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    torch.testing.assert_close(again.encode(TEXTS, **options), t, rtol=1e-4, atol=1e-5)
    assert again.get_embedding_dimension() == 64
