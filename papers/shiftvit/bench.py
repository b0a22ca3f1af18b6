"""ShiftViT-T/light with the shift in several forms: `python -m papers.shiftvit.bench --help`."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from common import run
from common.kernels import bench
from common.kernels.shift import reference, shift, shift_add
from common.run.bench import Case, main
from papers.shiftvit.model import ShiftBlock, ShiftStage


def cases(device: str, dtype: torch.dtype, batch: int, model: str = "shiftvit_light_tiny") -> Iterator[Case]:
    """A block of each stage, and the network."""
    torch.manual_seed(0)
    net = timm.create_model(model, drop_path_rate=0.0)  # its random masks would differ between the forms
    for s, stage in enumerate(net.stages):
        channels, side = net.feature_info[s]["num_chs"], 224 // net.feature_info[s]["reduction"]
        shape = (batch, channels, side, side)
        yield from bench.module_cases(f"block of stage {s + 1}", forms(stage.blocks[0]), shape, device, dtype)
    fused = copy.deepcopy(net)
    for stage in fused.stages:
        stage.__class__ = FusedStage
    every = forms(net) | {"ours, shift_add": fused}
    yield from bench.module_cases(model, every, (batch, 3, 224, 224), device, dtype)


def forms(module: nn.Module) -> dict[str, nn.Module]:
    return {
        bench.AUTHORS: with_shift(module, bench.shift_by_slices),
        bench.EAGER: with_shift(module, best_eager),
        bench.OURS: module,
    }


def best_eager(x: Tensor, n_div: int) -> Tensor:
    # a copy with parts written over is fastest, but its gradient is not
    return (reference.shift_by_padding if torch.is_grad_enabled() else reference.shift)(x, n_div)


def with_shift(module: nn.Module, function: Callable[[Tensor, int], Tensor]) -> nn.Module:
    """A copy whose blocks shift by `function`."""

    class Block(ShiftBlock):
        def forward(self, x):
            x = function(x, self.n_div)
            return x + self.drop_path(self.mlp(self.norm(x)))

    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, ShiftBlock):
            part.__class__ = Block
    return module


class FusedStage(ShiftStage):
    """Each residual addition in one pass with the shift of the next block. The network does not do so: README."""

    def forward(self, x):
        x = self.downsample(x)
        *blocks, last = self.blocks
        x = shift(x, last.n_div)
        for block in blocks:
            x = shift_add(x, block.mlp(block.norm(x)), block.n_div)
        return x + last.mlp(last.norm(x))


if __name__ == "__main__":
    records = Path(__file__).parent / "results" / "bench"
    run.main(lambda: main("papers.shiftvit.bench", {"shiftvit": cases}, records, {"shiftvit": 4}))
