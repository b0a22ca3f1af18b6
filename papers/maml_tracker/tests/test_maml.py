"""The method: closed forms, finite differences, and what must not change."""

import copy
import itertools

import pytest
import torch
from torch import nn

from papers.maml_tracker.bench import peak_bytes
from papers.maml_tracker.maml import MAML, multi_step_weights

SECOND, FIRST = True, False


class Scalar(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.t = nn.Parameter(torch.tensor(value, dtype=torch.float64))


def half_square(module, goal):
    return (module.t - goal) ** 2 / 2


def scalar_maml(rate=0.1, **options):
    return MAML(Scalar(0.0), half_square, ["t"], rate=rate, **options)


class Net(nn.Module):
    """An offline convolution, an online one, and a parameter no loss depends on."""

    def __init__(self):
        super().__init__()
        self.early = nn.Conv2d(2, 3, 3, padding=1)
        self.late = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1))
        self.idle = nn.Parameter(torch.ones(2))


def squared_error(net, data):
    x, y = data
    return (net.late(net.early(x).tanh()) - y).square().mean()


def early(net, data):
    return net.early(data[0]).tanh(), data[1]


def late_error(net, data):
    return (net.late(data[0]) - data[1]).square().mean()


ONLINE = [f"late.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]


def net_maml(prepare=False, dtype=torch.float64, rate=0.1, **options):
    torch.manual_seed(0)
    loss, first = (late_error, early) if prepare else (squared_error, None)
    return MAML(Net().to(dtype), loss, ONLINE, prepare=first, rate=rate, **options)


def some_sets(dtype=torch.float64, side=5):
    torch.manual_seed(1)
    return tuple(tuple(torch.randn(n, c, side, side, dtype=dtype) for c in (2, 1)) for n in (3, 1))


def gradients(maml, support, target, gamma):
    maml.zero_grad()
    losses = maml(support, target, gamma)
    (losses * gamma).sum().backward()
    return losses.detach(), {name: p.grad for name, p in maml.named_parameters() if p.grad is not None}


# Closed forms: t_k = a + (1 - r)^k (t_0 - a) -------------------------------------------------------------


def test_the_specified_values():
    a, b, k = torch.tensor(1.0).double(), torch.tensor(3.0).double(), 4
    maml = scalar_maml()
    assert maml.adapt(a, k)["t"].item() == pytest.approx(0.3439, abs=1e-12)
    _, grads = gradients(maml, a, b, multi_step_weights("last", k).double())
    assert grads["detector.t"].item() == pytest.approx(-1.74266721, abs=1e-12)
    assert grads["rates.t"].item() == pytest.approx(-7.7451876, abs=1e-12)
    _, grads = gradients(scalar_maml(second_order=False), a, b, multi_step_weights("last", k).double())
    assert grads["detector.t"].item() == pytest.approx(-2.6561, abs=1e-12)


@pytest.mark.parametrize("k, r, checkpointing", itertools.product((0, 1, 5), (0.1, 1.5), (False, True)))
def test_closed_form_of_the_multi_step_loss(k, r, checkpointing):
    a, b, t0 = 1.0, 3.0, -0.5
    maml = scalar_maml(r, checkpointing=checkpointing)
    nn.init.constant_(maml.detector.t, t0)
    gamma = torch.arange(1, k + 2, dtype=torch.float64)
    losses, grads = gradients(maml, torch.tensor(a).double(), torch.tensor(b).double(), gamma)
    t = [a + (1 - r) ** j * (t0 - a) for j in range(k + 1)]
    assert losses.tolist() == pytest.approx([(value - b) ** 2 / 2 for value in t])
    by_t0 = sum(g * (t[j] - b) * (1 - r) ** j for j, g in enumerate(gamma.tolist()))
    assert grads["detector.t"].item() == pytest.approx(by_t0)
    if k:
        by_r = sum(-g * (t[j] - b) * j * (1 - r) ** (j - 1) * (t0 - a) for j, g in enumerate(gamma.tolist()) if j)
        assert grads["rates.t"].item() == pytest.approx(by_r)


# A network -----------------------------------------------------------------------------------------------


def test_one_step_is_one_step_of_sgd():
    maml, (support, _) = net_maml(), some_sets()
    net = copy.deepcopy(maml.detector)
    optimizer = torch.optim.SGD([p for n, p in net.named_parameters() if n in ONLINE], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        squared_error(net, support).backward()
        optimizer.step()
    adapted = maml.adapt(support, 3)
    for name in ONLINE:
        torch.testing.assert_close(adapted[name], net.get_parameter(name).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("prepare", [False, True])
def test_finite_differences(prepare):
    maml, sets = net_maml(prepare), some_sets()
    gamma = multi_step_weights("uniform", 3).double()
    _, grads = gradients(maml, *sets, gamma)
    for name in ("rates.late/0/weight", "rates.late/2/bias", "detector.late.0.weight", "detector.early.weight"):
        parameter, step = maml.get_parameter(name), 1e-6
        flat, values = parameter.data.view(-1), []
        for sign in (1, -1):
            flat[0] += sign * step
            values.append((maml(*sets, gamma) * gamma).sum().item())
            flat[0] -= sign * step
        assert grads[name].view(-1)[0].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5), name


def test_the_first_order_gradient_is_that_at_the_adapted_parameters():
    maml, (support, target) = net_maml(second_order=False), some_sets()
    _, grads = gradients(maml, support, target, multi_step_weights("last", 2))
    net = copy.deepcopy(maml.detector)
    net.load_state_dict(maml.adapt(support, 2), strict=False)
    squared_error(net, target).backward()
    for name, parameter in net.named_parameters():
        if name != "idle":
            torch.testing.assert_close(grads[f"detector.{name}"], parameter.grad)


@pytest.mark.parametrize("second_order", [FIRST, SECOND])
def test_preparing_once_changes_nothing(second_order):
    gamma = multi_step_weights("uniform", 3).double()
    results = [gradients(net_maml(p, second_order=second_order), *some_sets(), gamma) for p in (False, True)]
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("second_order, kind", itertools.product((FIRST, SECOND), ("uniform", "last")))
def test_checkpointing_changes_nothing(second_order, kind):
    gamma = multi_step_weights(kind, 3).double()
    results = [
        gradients(net_maml(True, second_order=second_order, checkpointing=on), *some_sets(), gamma)
        for on in (False, True)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-15)


def test_checkpointed_memory_does_not_grow_with_the_steps():
    peaks = {}
    for checkpointing, k in itertools.product((False, True), (1, 6)):
        maml, sets = net_maml(prepare=True, checkpointing=checkpointing), some_sets(side=65)
        gamma = multi_step_weights("last", k)
        peaks[checkpointing, k] = peak_bytes(lambda: gradients(maml, *sets, gamma))  # noqa: B023
    assert peaks[False, 6] > 2 * peaks[False, 1]
    assert peaks[True, 6] < 1.05 * peaks[True, 1]


@pytest.mark.parametrize("second_order, checkpointing", [(FIRST, False), (SECOND, False), (SECOND, True)])
def test_in_bf16_the_gradients_are_nearly_the_same(second_order, checkpointing):
    """Autocast keeps casts of weights: one made where no graph was wanted must not serve where one is."""
    maml = net_maml(True, torch.float32, second_order=second_order, checkpointing=checkpointing)
    sets, gamma = some_sets(torch.float32), multi_step_weights("last", 2)
    _, exact = gradients(maml, *sets, gamma)
    exact = {name: grad.clone() for name, grad in exact.items()}
    with torch.autocast("cpu", torch.bfloat16):
        losses = maml(*sets, gamma)
    maml.zero_grad()
    (losses.float() @ gamma).backward()
    for name, grad in exact.items():
        assert (maml.get_parameter(name).grad - grad).norm() < 0.05 * grad.norm(), name


def test_without_rates_nothing_moves():
    maml, (support, target) = net_maml(rate=0.0), some_sets()
    theta = maml.adapt(support, 3)
    assert all(torch.equal(theta[name], p) for name, p in maml.theta_0().items())
    losses = maml(support, target, torch.ones(4))
    assert len(set(losses.tolist())) == 1


def test_adaptation_leaves_the_module_as_it_was():
    maml, (support, target) = net_maml(), some_sets()
    before = {name: p.detach().clone() for name, p in maml.named_parameters()}
    theta = maml.adapt(support, 4)
    with torch.no_grad():
        adapted = maml.objective(theta, target)
    assert adapted != squared_error(maml.detector, target)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in maml.named_parameters())
    assert theta.keys() == set(ONLINE) and not any(p.requires_grad for p in theta.values())
    assert not any(torch.equal(theta[name], before[f"detector.{name}"]) for name in ONLINE)


def test_adaptation_can_be_continued():
    maml, (support, _) = net_maml(), some_sets()
    torch.testing.assert_close(maml.adapt(support, 2, maml.adapt(support, 3)), maml.adapt(support, 5))
    with torch.no_grad():
        torch.testing.assert_close(maml.adapt(support, 5), maml.adapt(support, 5))


def test_a_parameter_that_the_loss_ignores_stays():
    torch.manual_seed(0)
    maml = MAML(Net(), squared_error, [*ONLINE, "idle"], rate=0.1)
    theta = maml.adapt(some_sets(torch.float32)[0], 2)
    assert torch.equal(theta["idle"], torch.ones(2))


def test_rates_for_each_filter():
    support, _ = some_sets()
    tensors, filters = net_maml(), net_maml(granularity="per_filter")
    torch.testing.assert_close(filters.adapt(support, 3), tensors.adapt(support, 3))
    assert {name: tuple(r.shape) for name, r in filters.rates.items()} == {
        "late/0/weight": (4, 1, 1, 1), "late/0/bias": (4,), "late/2/weight": (1, 1, 1, 1), "late/2/bias": (1,)}
    assert all(rate.shape == () for rate in tensors.rates.values())
    with torch.no_grad():
        filters.rates["late/0/weight"][1] = 0
    before, after = filters.theta_0()["late.0.weight"], filters.adapt(support, 3)["late.0.weight"]
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0])


def test_rates_are_clamped_at_zero():
    maml = net_maml()
    with torch.no_grad():
        maml.rates["late/0/weight"].fill_(-0.1)
    maml.clamp_rates()
    assert maml.rates["late/0/weight"].item() == 0 and maml.rates["late/2/weight"].item() == pytest.approx(0.1)


def test_weights_of_the_steps():
    assert multi_step_weights("uniform", 4).tolist() == pytest.approx([0.2] * 5)
    assert multi_step_weights("last", 4).tolist() == [0, 0, 0, 0, 1]
    assert multi_step_weights("annealed", 4).tolist() == pytest.approx([0.2] * 5)
    late = multi_step_weights("annealed", 4, progress=1.0)
    assert late.sum().item() == pytest.approx(1) and late[:4].tolist() == pytest.approx([0.006] * 4)
    assert all(multi_step_weights(kind, 0).tolist() == [1] for kind in ("uniform", "last", "annealed"))


def test_online_parameters_must_be_the_detectors():
    with pytest.raises(ValueError, match=r"late\.9\.weight"):
        MAML(Net(), squared_error, ["late.9.weight"])
    with pytest.raises(ValueError, match="nothing"):
        MAML(Net(), squared_error, [])
