"""What a correct MaskCo must do, on any weights: masking, geometry, gradients, contrast, queue and momentum."""

import math

import pytest
import torch
import torch.nn.functional as F

from papers.maskco.model import MaskCo, MaskPredictionHead, MoCoV2, unit

NET = dict(backbone="resnet10_narrow", output_stride=8, mph_width=16, queue=13)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _inputs(B=3, N=1, J=2, S=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    size = torch.randint(16, 25, (B, N, 2), generator=g)
    corner = (torch.rand(B, N, 2, generator=g) * (S - size)).floor()
    query_boxes = torch.cat([corner, corner + size], -1)
    key_corner = torch.rand(B, N, 2, generator=g) * (S - size)
    key_boxes = torch.cat([key_corner, key_corner + size], -1)
    other = torch.rand(B, N, J, 2, generator=g) * (S - size)[:, :, None]
    return dict(
        query=torch.randn(B, 3, S, S, generator=g), key=torch.randn(B, 3, S, S, generator=g), query_boxes=query_boxes,
        key_boxes=key_boxes, negatives=torch.cat([other, other + size[:, :, None]], -1),
        present=torch.ones(B, N, J, dtype=torch.bool),
    )


def _inside(inputs, i=0):
    x1, y1, x2, y2 = inputs["query_boxes"][i, 0].int().tolist()
    return slice(y1, y2), slice(x1, x2)


def _loss(logits):
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


# Masking and leakage --------------------------------------------------------------------------------------


def _changed(inputs, where):
    query = inputs["query"].clone()
    query[(0, slice(None), *where)] += 3.0
    return inputs | {"query": query}


@pytest.mark.parametrize("mask", ["mean", "noise", "learned"])
def test_masked_pixels_do_not_matter(mask):
    model, inputs = MaskCo(**NET, mask=mask).eval(), _inputs()
    noise = torch.randn(3, 3, 64, 64) if mask == "noise" else None
    rows, columns = _inside(inputs)
    results = []
    for given in (inputs, _changed(inputs, (rows, columns)), _changed(inputs, (rows.start - 1, columns.start))):
        model.zero_grad()
        q = model.queries(given["query"], given["query_boxes"], noise)
        loss = _loss(model(**given, noise=noise)[0])
        loss.backward()
        results.append((q, loss, [p.grad.clone() for p in model.backbone.parameters()]))
    same, outside = results[1], results[2]
    torch.testing.assert_close(same, results[0], rtol=0, atol=0)
    assert not torch.equal(outside[0][0], results[0][0][0])


def test_no_gradient_comes_back_to_masked_pixels():
    model, inputs = MaskCo(**NET).eval(), _inputs()
    query = inputs["query"].requires_grad_()
    _loss(model(**inputs)[0]).backward()
    rows, columns = _inside(inputs)
    assert (query.grad[0, :, rows, columns] == 0).all()
    query.grad[0, :, rows, columns] = 0
    assert query.grad[0].abs().sum() > 0


@pytest.mark.parametrize("N", [0, 1, 3])
def test_the_mask_is_exact(N):
    inputs = _inputs(N=N)
    query, masked = inputs["query"], MaskCo(**NET).masked(inputs["query"], inputs["query_boxes"])
    expected = torch.zeros(3, 64, 64, dtype=torch.bool)
    for i, boxes in enumerate(inputs["query_boxes"].int().tolist()):
        for x1, y1, x2, y2 in boxes:
            expected[i, y1:y2, x1:x2] = True
    where = expected[:, None].expand_as(query)
    assert (masked[where] == 0).all() and torch.equal(masked[~where], query[~where])
    if N == 1:
        sides = inputs["query_boxes"][:, 0, 2:] - inputs["query_boxes"][:, 0, :2]
        assert expected.sum() == sides.prod(1).sum()
    assert torch.equal(MaskCo(**NET, mask="off").masked(query, inputs["query_boxes"]), query)
    noise = torch.randn_like(query)
    seen = MaskCo(**NET, mask="noise").masked(query, inputs["query_boxes"], noise)
    assert torch.equal(seen, torch.where(where, noise, query))


def test_the_key_sees_what_the_query_does_not():
    model, inputs = MaskCo(**NET).eval(), _inputs()
    before = model(**inputs)[1]
    x1, y1, x2, y2 = inputs["key_boxes"][0, 0].round().int().tolist()
    key = inputs["key"].clone()
    key[0, :, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2] += 1
    after = model(**inputs | {"key": key})[1]
    assert not torch.allclose(after[0], before[0]) and torch.equal(after[1:], before[1:])


@pytest.mark.parametrize("N", [0, 1, 3])
def test_pictures_do_not_mix(N):
    """Another second picture, with other boxes, leaves the first and third alone: RoIs belong to the right picture."""
    model, inputs, other = MaskCo(**NET).eval(), _inputs(N=N), _inputs(N=N, seed=1)
    mixed = {name: torch.stack([value[0], other[name][1], value[2]]) for name, value in inputs.items()}
    for encode, view in ((model.queries, "query"), (model.keys, "key")):
        one, two = (encode(x[view], x[f"{view}_boxes"]) for x in (inputs, mixed))
        assert one.shape == (3, N, 128)
        torch.testing.assert_close(two[[0, 2]], one[[0, 2]], rtol=0, atol=1e-6)
        assert N == 0 or (one[1] - two[1]).norm(dim=-1).min() > 1e-4


def test_permuting_the_batch_permutes_the_losses():
    model, inputs = MaskCo(**NET).eval(), _inputs()
    order = torch.tensor([2, 0, 1])
    one, two = (model(**x)[0] for x in (inputs, {k: v[order] for k, v in inputs.items()}))
    torch.testing.assert_close(two, one[order], rtol=1e-4, atol=1e-4)


# Heads and gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [
    lambda: MaskCo(**NET), lambda: MaskCo(**NET, mph="conv1x1", mask="learned"), lambda: MaskCo(**NET, mph_on_key=True),
])
def test_gradients_reach_the_query_and_nothing_else(build):
    model = build().train()
    _loss(model(**_inputs())[0]).backward()
    for name, p in model.named_parameters():
        if name.startswith("key_"):
            assert not p.requires_grad and p.grad is None, name
        else:
            assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert not model.queue.requires_grad and model.queue.grad is None


def test_the_head_is_the_querys_alone():
    model, inputs = MaskCo(**NET).eval(), _inputs()
    q, k = model.queries(inputs["query"], inputs["query_boxes"]), model.keys(inputs["key"], inputs["key_boxes"])
    with torch.no_grad():
        for p in model.mph.parameters():
            p += 0.1 * torch.randn_like(p)
    assert not torch.allclose(model.queries(inputs["query"], inputs["query_boxes"]), q)
    assert torch.equal(model.keys(inputs["key"], inputs["key_boxes"]), k)

    none = MaskCo(**NET, mph="none").eval()
    maps = none.backbone(none.masked(inputs["query"], inputs["query_boxes"]))
    expected = unit(none.projection(none.pooled(maps, inputs["query_boxes"], 64)))
    assert torch.equal(none.queries(inputs["query"], inputs["query_boxes"]), expected)


@pytest.mark.parametrize("kind, depth, reach", [("bottleneck", 2, 2), ("bottleneck", 1, 1), ("conv1x1", 2, 0)])
def test_the_head_looks_as_far_as_it_says(kind, depth, reach):
    head = MaskPredictionHead(8, kind, 6, depth).eval()
    for layer in head.layers:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.constant_(layer.weight, 0.1)  # positive: no ReLU swallows it
    x = torch.zeros(1, 8, 9, 9)
    x[:, :, 4, 4] = 1
    seen = head(x)[0].abs().sum(0) > 0
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[4 - reach : 5 + reach, 4 - reach : 5 + reach] = True
    assert torch.equal(seen, expected)


# Contrast -------------------------------------------------------------------------------------------------


def test_everything_compared_has_unit_length():
    model, inputs = MaskCo(**NET).eval(), _inputs()
    q = model.queries(inputs["query"], inputs["query_boxes"])
    k = model.keys(inputs["key"], inputs["negatives"].flatten(1, 2))
    for vectors in (q, k, model.queue.T):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(vectors.shape[:-1]))
    model.enqueue(k.half())
    torch.testing.assert_close(model.queue.norm(dim=0), torch.ones(13), rtol=0, atol=1e-3)


def test_layout_of_the_logits():
    model, inputs = MaskCo(**NET).eval(), _inputs(N=2, J=3)
    logits, k = model(**inputs)
    assert logits.shape == (6, 1 + 3 + 13) and logits.abs().max() <= 1 / 0.2 + 1e-5
    q = model.queries(inputs["query"], inputs["query_boxes"])
    others = model.keys(inputs["key"], inputs["negatives"].flatten(1, 2)).unflatten(1, (2, 3))
    for r, (i, n) in enumerate([(i, n) for i in range(3) for n in range(2)]):  # written out
        row = [q[i, n] @ k[i, n], *(q[i, n] @ others[i, n, j] for j in range(3)), *(q[i, n] @ model.queue)]
        torch.testing.assert_close(logits[r], torch.stack(row) / 0.2, rtol=1e-4, atol=1e-5)


def test_losses_known_by_hand():
    model = MoCoV2("resnet10_narrow", queue=4, features=8)
    e = torch.eye(8)
    model.queue.copy_(e[:, 1:5])
    others, there = e[None, 5:7], torch.ones(1, 2, dtype=torch.bool)
    loss = _loss(model.logits(e[:1], e[:1], others, there)).item()
    assert loss == pytest.approx(math.log(1 + 6 * math.exp(-5)), abs=1e-6)

    large = MoCoV2("resnet10_narrow", queue=65_536)
    q, k = unit(torch.randn(256, 128)), unit(torch.randn(256, 128))
    assert _loss(large.logits(q, k)).item() == pytest.approx(11.19, abs=0.1)  # ln(1 + N) + 1 / (2 * 128 * T^2)


def test_absent_negatives_are_as_if_not_there():
    model, inputs = MaskCo(**NET).eval(), _inputs()
    fewer = inputs | {"negatives": inputs["negatives"][:, :, :1], "present": inputs["present"][:, :, :1]}
    padded = inputs | {"present": torch.tensor([True, False]).expand(3, 1, 2)}
    torch.testing.assert_close(_loss(model(**padded)[0]), _loss(model(**fewer)[0]))
    assert not torch.isclose(_loss(model(**inputs)[0]), _loss(model(**fewer)[0]), atol=1e-6)


def test_negatives_come_from_the_key_view():
    model, inputs = MaskCo(**NET).eval(), _inputs()
    before = model(**inputs)[0][:, 1:3]
    with torch.no_grad():
        for p in model.key_projection.parameters():
            p.mul_(1.5).add_(0.05 * torch.randn_like(p))
    assert not torch.allclose(model(**inputs)[0][:, 1:3], before), "the key encoder makes them"
    # the same boxes give the positive's own logit
    own = model(**inputs | {"negatives": inputs["key_boxes"][:, :, None].expand(3, 1, 2, 4)})[0]
    torch.testing.assert_close(own[:, 1], own[:, 0])


def test_regions_are_read_in_float32_under_autocast():
    """bf16 would move edges by up to half a pixel, and read the 258th picture from its neighbour."""
    model, boxes = MaskCo(**NET), torch.tensor([200.7, 130.3, 216.7, 146.3]).expand(258, 1, 4)
    maps = torch.arange(32.0).expand(258, 1, 32, 32) + 100 * (torch.arange(258) % 2).view(-1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.pooled(maps.bfloat16(), boxes, 256).flatten()  # numbers that are exact in bf16
    torch.testing.assert_close(found, model.pooled(maps, boxes, 256).flatten(), rtol=0, atol=1e-4)
    assert found[-2:].tolist() == pytest.approx([25.5875, 125.5875], abs=1e-3)  # (200.7 + 216.7) / 2 / 8 - 0.5


# Queue and momentum ---------------------------------------------------------------------------------------


def test_the_queue_is_first_in_first_out():
    model = MoCoV2("resnet10_narrow", queue=10, features=4)
    steps = unit(torch.randn(3, 4, 4))
    for step, keys in enumerate(steps, 1):
        model.enqueue(keys)
        assert model.queue_ptr == 4 * step % 10 and model.queue.shape == (4, 10)
    everything = steps.flatten(0, 1)
    expected = torch.cat([everything[10:], everything[2:10]])  # the last two wrapped round to the oldest places
    assert torch.equal(model.queue.T, expected)
    model.enqueue(unit(torch.randn(25, 4)))  # more than it holds: the newest stay
    assert model.queue.shape == (4, 10)


@pytest.mark.parametrize("kind", [MaskCo, MoCoV2])
def test_a_steps_keys_are_not_its_negatives(kind):
    model = MaskCo(**NET) if kind is MaskCo else MoCoV2("resnet10_narrow", queue=13)
    inputs = _inputs(N=2) if kind is MaskCo else {k: _inputs()[k] for k in ("query", "key")}
    before = model.queue.clone()
    _, keys = model(**inputs)
    assert torch.equal(model.queue, before), "forward does not enqueue"
    model.enqueue(keys)
    positives = keys.flatten(0, -2)
    assert positives.shape == ((6 if kind is MaskCo else 3), 128)  # and no same-image negatives
    assert torch.equal(model.queue[:, : len(positives)].T, positives)
    assert torch.equal(model.queue[:, len(positives) :], before[:, len(positives) :])


def test_momentum():
    model = MaskCo(**NET, momentum=0.9).double()
    for query, key in model.pairs:
        torch.testing.assert_close(dict(query.named_parameters()), dict(key.named_parameters()), rtol=0, atol=0)
    old = {name: p.clone() for name, p in model.key_backbone.named_parameters()}
    with torch.no_grad():
        for p in model.backbone.parameters():
            p += torch.randn_like(p)
    model.update_keys()
    for (name, p), k in zip(model.backbone.named_parameters(), model.key_backbone.parameters()):
        torch.testing.assert_close(k, 0.9 * old[name] + 0.1 * p, rtol=0, atol=1e-7)
    # running statistics are those of the key encoder's own passes
    assert not model.key_backbone.bn1.running_mean.any()
    model.float().train()(**_inputs())
    assert not torch.equal(model.key_backbone.bn1.running_mean, model.backbone.bn1.running_mean)
    assert model.key_backbone.bn1.num_batches_tracked == 1


def test_moco_compares_whole_views():
    model, inputs = MoCoV2("resnet10_narrow", queue=13).eval(), _inputs()
    logits, k = model(inputs["query"], inputs["key"])
    q = unit(model.projection(model.backbone(inputs["query"]).mean((2, 3))))
    torch.testing.assert_close(logits, torch.cat([(q * k).sum(1, keepdim=True), q @ model.queue], 1) / 0.2)

