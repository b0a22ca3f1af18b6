"""The tiny recipe of every paper starts as it always has (tools/golden.py)."""

import json

import numpy as np
import pytest

from tools import golden
from tools.list import papers


@pytest.mark.slow
@pytest.mark.parametrize("paper", papers())
def test_first_losses(paper):
    recorded = json.loads(golden.path(paper).read_text())
    assert len(recorded) == golden.STEPS
    # Other processors and thread counts sum in another order; a wrong learning rate or seed is far beyond this.
    np.testing.assert_allclose(golden.first_losses(paper), recorded, rtol=2e-3)
