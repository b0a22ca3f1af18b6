"""The norm that keeps channels last computes what PyTorch's does, in fewer passes over memory."""

import pytest
import timm
import torch
import torch.nn.functional as F

from common.kernels.check import passes
from papers.shiftvit import norm
from papers.shiftvit.norm import GroupNorm1, ImageNorm


@pytest.mark.parametrize("shape", [(1, 5, 7, 3), (3, 8, 1, 33), (2, 1, 5, 5)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_value_and_gradients(shape, layout):
    generator = torch.Generator().manual_seed(0)
    x = (3 + torch.randn(shape, generator=generator, dtype=torch.float64)).contiguous(memory_format=layout)
    weight, bias = torch.randn(2, shape[1], generator=generator, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    y = ImageNorm.apply(*inputs, 1e-5, torch.float64)
    torch.testing.assert_close(y, F.group_norm(x, 1, weight, bias))
    assert y.is_contiguous(memory_format=layout)
    assert torch.autograd.gradcheck(lambda *t: ImageNorm.apply(*t, 1e-5, torch.float64), inputs)


@pytest.mark.parametrize("before_convolution", [False, True])
def test_under_autocast(before_convolution, monkeypatch):
    """The result comes in the convolution's type where one follows, rounded once; gradients take no detour."""
    torch.manual_seed(0)
    x = torch.randn(4, 16, 9, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = GroupNorm1(16)
    layer.before_convolution = before_convolution
    torch.nn.init.normal_(layer.weight)
    g = torch.randn(4, 16, 9, 9)
    want = layer(x)
    (want_dx,) = torch.autograd.grad(want, x, g)
    monkeypatch.setattr(norm, "here", lambda x: True)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == (torch.bfloat16 if before_convolution else torch.float32)
    (dx,) = torch.autograd.grad(got, x, g.to(got))
    tolerance = dict(rtol=2**-8, atol=2e-3) if before_convolution else {}
    torch.testing.assert_close(got.float(), want, **tolerance)
    torch.testing.assert_close(dx, want_dx, **(dict(rtol=0.02, atol=0.02) if before_convolution else {}))


def test_passes_of_a_block(monkeypatch):
    """PyTorch's kernel: 34 forward and 49 backward, and 4 + 4 more where it copies into its layout and back. It reads
    what it normalises twice, which is not counted; here the same count is all there is."""
    block = timm.create_model("shiftvit_light_tiny", drop_path_rate=0.0).stages[0].blocks[0]
    before = [round(part.total) for part in passes.count(block, (16, 96, 56, 56), kernels=True)]
    monkeypatch.setattr(norm, "here", lambda x: True)
    now = [round(part.total) for part in passes.count(block, (16, 96, 56, 56), kernels=True)]
    assert before == [34, 49] and now == [33, 57]


@pytest.mark.gpu
def test_on_a_gpu_nothing_changes_its_layout():
    """Every operator of the network, forward and backward, keeps channels last."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Layouts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 4 and min(out.shape[1:]) > 1:
                kept.append(out.is_contiguous(memory_format=torch.channels_last) or str(function))
            return out

    kept = []
    net = timm.create_model("shiftvit_micro").cuda().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    with Layouts():
        with torch.autocast("cuda", torch.bfloat16):
            loss = net(x).square().sum()
        loss.backward()
    assert len(kept) > 50 and set(kept) == {True}
