"""A linear probe: how well a linear classifier reads other classes from a network's features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from common.data import images, loader
from common.run import UserError, World

PENALTIES = np.logspace(-4, 1, 6)
"""Inverse strengths of the classifier's L2 penalty, of which five-fold validation on the training images takes one."""


def probe(
    networks: dict[str, torch.nn.Module], train: images.Images, val: images.Images, recipe: Any, world: World, *,
    workers: int = 0,
) -> dict[str, float]:
    """Top-1 in percent on `val` of a logistic regression on each network's pooled features of `train`."""
    # They take a second to import, and nothing else needs them.
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if world.size > 1:
        raise UserError("a probe runs in one process")
    scores = {}
    for name, network in networks.items():
        (x, y), (x_val, y_val) = (features(network, data, recipe, world, workers) for data in (train, val))
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        search = GridSearchCV(classifier, {"logisticregression__C": PENALTIES}, cv=int(min(5, np.bincount(y).min())))
        scores[name] = 100 * float(search.fit(x, y).score(x_val, y_val))
    return scores


def features(
    network: torch.nn.Module, data: images.Images, recipe: Any, world: World, workers: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """What the classifier of a timm network sees of each image, (N, C), prepared as the recipe says; labels (N)."""
    samples = loader.Plain(data, images.eval_transform(recipe.input_size_px, recipe.eval_crop))
    rows, network = [], network.eval()
    with torch.inference_mode():
        for pixels, labels, _ in loader.progress(loader.eval_loader(samples, 128, workers=workers), "features"):
            pixels = pixels.to(world.device, memory_format=torch.channels_last)
            with world.autocast():
                seen = network.forward_head(network.forward_features(pixels), pre_logits=True)
            rows.append((seen.float().cpu().numpy(), labels.numpy()))
    return np.concatenate([x for x, _ in rows]), np.concatenate([y for _, y in rows])
