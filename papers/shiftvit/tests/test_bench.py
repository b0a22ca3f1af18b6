"""What the benchmark times gives the authors' outputs and gradients."""

import torch

from common.run.bench import check_parity
from papers.shiftvit.bench import cases


def test_all_forms_agree():
    names = set()
    for case in cases("cpu", torch.float32, 2, "shiftvit_micro"):
        case.ways = {name: way for name, way in case.ways.items() if "torch.compile" not in name}
        check_parity(case)
        names.add(case.name)
    assert len(names) == 5 * 2 * 2  # four blocks and the network, training and inference, two layouts
