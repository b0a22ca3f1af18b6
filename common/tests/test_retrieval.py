"""Recall at k, against counting by hand."""

import pytest
import torch

from common.metrics.retrieval import recall_at


def test_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.7], [0.3, 0.2, 0.1]])
    relevant = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 0, 1]]).bool()
    found = recall_at(similarity, relevant, (1, 2, 3))
    assert found == pytest.approx({"R@1": 100 / 3, "R@2": 200 / 3, "R@3": 100})


def test_several_items_may_be_right():
    relevant = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]]).bool()
    similarity = torch.tensor([[0.1, 0.9, 0.8, 0.0], [0.9, 0.1, 0.8, 0.7]])
    assert recall_at(similarity, relevant, (1, 2, 3)) == {"R@1": 0.0, "R@2": 50.0, "R@3": 100.0}


def test_a_constant_similarity_scores_nothing():
    assert recall_at(torch.zeros(7, 7), torch.eye(7).bool(), (1, 5)) == {"R@1": 0.0, "R@5": 0.0}


def test_equals_sorting():
    torch.manual_seed(0)
    similarity, relevant = torch.randn(33, 57), torch.rand(33, 57) < 0.1
    relevant[:, 0] = True
    order = similarity.argsort(1, descending=True)
    for k, found in recall_at(similarity, relevant, (1, 5, 10)).items():
        expected = relevant.gather(1, order)[:, : int(k[2:])].any(1).float().mean() * 100
        assert found == pytest.approx(expected.item())


@pytest.mark.parametrize("similarity, relevant, message", [
    (torch.zeros(2, 3), torch.ones(3, 2).bool(), r"\(2, 3\), relevant \(3, 2\)"),
    (torch.full((2, 2), torch.nan), torch.eye(2).bool(), "2 of 2 queries have NaN"),
    (torch.zeros(2, 2), torch.tensor([[1, 0], [0, 0]]).bool(), "1 of 2 queries have no relevant item"),
])
def test_nonsense_is_refused(similarity, relevant, message):
    with pytest.raises(ValueError, match=message):
        recall_at(similarity, relevant)
