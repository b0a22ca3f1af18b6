"""sMLPNet-T with the sparse MLP in several forms: `python -m papers.smlpnet.bench --help`."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import run
from common.kernels import bench
from common.kernels.sparse_mlp import reference
from common.run.bench import Case, main
from papers.smlpnet.model import SparseMLP


def cases(device: str, dtype: torch.dtype, batch: int, model: str = "smlpnet_tiny") -> Iterator[Case]:
    """A block of each stage, and the network."""
    torch.manual_seed(0)
    net = timm.create_model(model, drop_path_rate=0.0)  # its random masks would differ between the forms
    image = net.patch_embed.img_size[0]
    for s, stage in enumerate(net.stages):
        channels, side = net.feature_info[s]["num_chs"], image // net.feature_info[s]["reduction"]
        shape = (batch, channels, side, side)
        yield from bench.module_cases(f"block of stage {s + 1}", forms(stage.blocks[0]), shape, device, dtype)
    yield from bench.module_cases(model, forms(net), (batch, 3, image, image), device, dtype)


def forms(module: nn.Module) -> dict[str, nn.Module]:
    return {
        bench.AUTHORS: with_mixing(module, bench.mixing_by_permutation),
        bench.EAGER: with_mixing(module, reference.sparse_mlp),
        bench.OURS: module,
    }


def with_mixing(module: nn.Module, function: Callable[..., Tensor]) -> nn.Module:
    """A copy whose blocks mix tokens by `function`."""

    class Mixing(SparseMLP):
        def forward(self, x):
            z = F.gelu(self.norm(x))
            row, col = self.mix_row, self.mix_col
            return function(z, row.weight, row.bias, col.weight, col.bias, self.proj.weight.flatten(1))

    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, SparseMLP):
            part.__class__ = Mixing
    return module


if __name__ == "__main__":
    records = Path(__file__).parent / "results" / "bench"
    run.main(lambda: main("papers.smlpnet.bench", {"smlpnet": cases}, records, {"smlpnet": 4}))
