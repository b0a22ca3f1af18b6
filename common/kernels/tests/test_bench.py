"""What the benchmark times agrees with the authors' formulations."""

import pytest
import torch

from common.kernels import bench
from common.run.bench import check_parity


@pytest.mark.parametrize("subject", ["shift", "sparse_mlp"])
def test_operators_agree(subject):
    cases = {"shift": bench.shift_cases, "sparse_mlp": bench.sparse_mlp_cases}[subject]
    for case in cases("cpu", torch.float32, 1):
        case.ways = {name: way for name, way in case.ways.items() if name != bench.COMPILED}
        check_parity(case)
