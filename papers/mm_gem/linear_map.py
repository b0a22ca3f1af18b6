"""The floor under retrieval: a linear map from an image's features to the counts of its captions' words.

No language model: ridge regression from the mean of the frozen encoder's feature map to the words' tf-idf vector; a
text is near an image whose predicted vector has a high cosine with its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.metrics.captions import tokenize

RIDGE = 2.0
"""Penalty, as a multiple of the mean squared deviation of a feature times the number of images; of 0.001 to 10 the best
(text -> image) on 500 training images that were held out. The test images had no say in it."""


class Words:
    """A vocabulary and its inverse document frequencies, of training captions."""

    def __init__(self, texts: Sequence[str], least: int = 3):
        """Words that at least so many texts hold."""
        held = Counter(word for text in texts for word in set(tokenize(text).split()))
        self.place = {word: i for i, word in enumerate(sorted(w for w, count in held.items() if count >= least))}
        self.idf = torch.tensor([math.log(len(texts) / held[word]) for word in self.place])

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """(N, vocabulary), of length 1 where a word is known."""
        counts = torch.zeros(len(texts), len(self.place))
        for row, text in zip(counts, texts):
            for word in tokenize(text).split():
                if word in self.place:
                    row[self.place[word]] += 1
        return F.normalize(counts * self.idf, dim=1)


def ridge(x_NC: Tensor, y_NV: Tensor, penalty: float = RIDGE) -> tuple[Tensor, Tensor]:
    """(weights (C, V), offset (V,)) of the regression, in float64."""
    x, y = x_NC.double(), y_NV.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    gram = (x - mean_x).mT @ (x - mean_x)
    gram += penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram, (x - mean_x).mT @ (y - mean_y))
    return weights, mean_y - mean_x @ weights


def similarity(
    train_NC: Tensor, captions: Sequence[Sequence[str]], images_IC: Tensor, texts: Sequence[str],
    penalty: float = RIDGE,
) -> Tensor:
    """(I, T): cosines between the words predicted of images and the words of texts, after training on pairs."""
    words = Words([text for its in captions for text in its])
    targets = torch.stack([words.vectors(its).mean(0) for its in captions])
    weights, offset = ridge(train_NC, targets, penalty)
    predicted = F.normalize(images_IC.double() @ weights + offset - targets.double().mean(0), dim=1)
    return (predicted @ words.vectors(texts).double().mT).float()
