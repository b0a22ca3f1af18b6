"""Accuracy by hand, and over two processes."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common.metrics.classification import Accuracy

LOGITS = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [6.0, 5, 4, 3, 2, 1, 0]])
TARGET = torch.tensor([0, 1, 1])  # first; beaten by five; second


def test_by_hand():
    accuracy = Accuracy()
    accuracy.update(LOGITS, TARGET)
    scores = accuracy.compute(3)
    assert scores["top1"] == pytest.approx(100 / 3) and scores["top5"] == pytest.approx(200 / 3)
    loss = -LOGITS.log_softmax(1)[range(3), TARGET].mean().item()
    assert math.isclose(scores["loss"], loss, rel_tol=1e-6)


def test_outputs_that_are_not_finite_count_as_wrong():
    accuracy = Accuracy()
    accuracy.update(torch.full((2, 10), torch.nan), torch.tensor([0, 3]))
    assert accuracy.compute(2)["top1"] == accuracy.compute(2)["top5"] == 0


def test_fewer_than_five_classes():
    accuracy = Accuracy()
    accuracy.update(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    assert accuracy.compute(1)["top1"] == 0 and accuracy.compute(1)["top5"] == 100


def test_missing_samples_are_an_error():
    accuracy = Accuracy()
    accuracy.update(LOGITS, TARGET)
    with pytest.raises(RuntimeError, match="3 samples, but the data hold 4"):
        accuracy.compute(4)


def _process(rank, port, queue):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    accuracy = Accuracy()
    accuracy.update(LOGITS[rank::2], TARGET[rank::2])  # two samples and one: nothing is padded
    queue.put(accuracy.compute(3))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one(free_port):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_process, args=(free_port, queue), nprocs=2)
    accuracy = Accuracy()
    accuracy.update(LOGITS, TARGET)
    assert queue.get() == queue.get() == pytest.approx(accuracy.compute(3))
