"""Names and texts are drawn as they are, whatever signs they hold."""

import numpy as np
import pytest
from PIL import Image

from common.run import drawing

ODD = [
    "$$", "$#$", "$x^2^3$", "under_$10_or_$20_each", " ($10 & 50% or $20)", "costs $5 or $6", "$\\frac$", "a\\nb",
    "caf\\xe9", "日本", "%s {x} \\", "_^&~#",
]


@pytest.mark.filterwarnings("ignore:Glyph .* missing from:UserWarning")
@pytest.mark.parametrize("text", ODD)
def test_no_text_is_mathematics(tmp_path, text):
    picture = Image.new("RGB", (8, 8))
    drawing.gallery(tmp_path / "gallery.png", [np.asarray(picture)], [text], ["red"])
    drawing.answer(tmp_path / "answer.png", picture, {text: 0.75, f"{text} 2": 0.25})
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    drawing.curves(tmp_path, [["loss", text]])
    for name in ("gallery", "answer", "curves"):
        with Image.open(tmp_path / f"{name}.png") as drawn:
            assert drawn.width > 100


def test_a_text_with_two_dollar_signs_is_as_wide_as_its_signs():
    """Read as mathematics it would lose them."""
    figure = drawing.plt.figure()
    widths = [figure.text(0, 0, text).get_window_extent().width for text in ("costs $5 or $6", "costs 5 or 6")]
    drawing.plt.close(figure)
    assert widths[0] > widths[1] + 5
