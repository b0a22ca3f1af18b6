"""A third detector, meta-trained: torchvision's SSDlite as it is. ``python -m papers.maml_tracker.any_detector``"""

from functools import partial

import torch
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.ops import box_iou

from common.data import pairs
from common.data.tiny.sequences import sequences
from papers.maml_tracker.data import VideoSets
from papers.maml_tracker.maml import MAML, multi_step_weights
from papers.maml_tracker.recipes import RECIPES


def loss(detector, data):
    """data: images (B, 3, S, S) in [0, 1], one box each (B, 4)."""
    targets = [{"boxes": box[None], "labels": torch.ones(1, dtype=torch.int64)} for box in data[1]]
    return sum(detector.train()(list(data[0]), targets).values())


def best_box(detector, image):
    return detector.eval()([image])[0]["boxes"][:1]


def meta_detector(**options) -> MAML:
    norm = partial(torch.nn.GroupNorm, 8)  # from random weights; pretrained ones come with batch norm, to be frozen
    detector = ssdlite320_mobilenet_v3_large(weights_backbone=None, num_classes=2, norm_layer=norm, score_thresh=0.0)
    online = [name for name, _ in detector.named_parameters() if name.startswith("head.")]
    return MAML(detector, loss, online, rate=0.01, **options)


def videos(split):
    """(Ds, Dt) of video after video."""
    recipe, data = RECIPES["tiny"], pairs.open_data(RECIPES["tiny"], sequences())
    samples = pairs.Pairs({"": data.test} if split == "val" else data.train, VideoSets(recipe), length=1, max_gap=30)
    for seed in range(2**31):
        made = samples[0, seed]
        yield ((made["support"] / 255, made["support_box"]), (made["target"][None] / 255, made["target_box"][None]))


def main(steps: int = 40, k: int = 2) -> None:
    torch.manual_seed(0)
    maml, train, gamma = meta_detector(), videos("train"), multi_step_weights("uniform", k)
    optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
    for step in range(steps):
        losses = maml(*next(train), gamma)
        optimizer.zero_grad()
        (losses * gamma).sum().backward()
        optimizer.step()
        print(f"outer step {step + 1}: losses after 0 to {k} gradient steps", losses.tolist())
    for (support, (images, boxes)), _ in zip(videos("val"), range(5)):
        found = maml.call(maml.adapt(support, 5), best_box, images[0])
        print(f"new video, 5 steps on its support set: overlap {box_iou(found, boxes).item():.2f}")


if __name__ == "__main__":
    main()
