import pytest
import torch

from papers.vlora.tests.models import IMAGE, PAD


@pytest.fixture
def batch():
    """Rows of unequal length: image, text only, image."""
    torch.manual_seed(1)
    ids = torch.full((3, 9), PAD)
    ids[0, :9] = torch.tensor([1, IMAGE, 5, 6, 7, 8, 9, 10, 11])
    ids[1, :5] = torch.tensor([1, 12, 13, 14, 15])
    ids[2, :7] = torch.tensor([1, 16, 17, IMAGE, 18, 19, 20])
    return ids, torch.randn(2, 3, 24, 24), (ids != PAD).long()
