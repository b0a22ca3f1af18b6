"""Loss and gradients of two processes with half a batch each against those of one with all: by common.run.launch."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.run import world
from papers.mm_gem import build, contrastive
from papers.mm_gem.recipes import RECIPES


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    processor = build.processor(RECIPES["tiny"])
    model = build.model(RECIPES["tiny"], processor).train()
    texts = ["a red circle .", "two blue squares .", "a green triangle left of a red square .", "a red circle ."]
    # Rows of all lengths: the processes' means over tokens are not means over equally many.
    whole = {"pixel_values": torch.randn(4, 3, 64, 64), **processor.texts(texts)}
    alone = model(**whole)  # before there is a group
    alone.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    model.zero_grad()

    world.join_group("gloo")
    mine = {key: value[2 * dist.get_rank() :][:2] for key, value in whole.items()}
    longest = int(mine["attention_mask"].sum(1).max())  # each process pads to its own longest text
    mine |= {key: mine[key][:, :longest] for key in ("input_ids", "attention_mask")}
    parallel = DistributedDataParallel(model)

    def run(chunk):
        parallel.zero_grad()
        out = parallel(**mine, chunk=chunk)
        out.loss.backward()
        worst = max((p.grad - expected[name]).abs().max().item() for name, p in model.named_parameters())
        return out, worst / largest

    differences = [run(chunk) for chunk in (0, 1)]
    out = differences[0][0]
    found = {"gradients": len(expected), "worst_gradient_difference": max(worst for _, worst in differences)}
    for name in ("loss", "loss_emb", "loss_gen"):
        mean = out[name].detach().clone()
        dist.all_reduce(mean)
        found[name] = [mean.item() / 2, alone[name].item()]
    contrastive._Gather.backward = staticmethod(lambda ctx, g: g.narrow(0, dist.get_rank() * ctx.rows, ctx.rows))
    found["worst_without_sum"] = run(0)[1]
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
