"""A tracker as two ONNX graphs."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from common.metrics.trackers import export
from common.run import UserError, read_json


@dataclass(frozen=True)
class Crops:
    template_px: int = 16
    search_px: int = 32
    template_factor: float = 2.0
    search_factor: float = 4.0
    window: float = 0.4


class Network(nn.Module):
    """Compares by a product."""

    def __init__(self):
        super().__init__()
        self.body, self.box = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 4)

    def encode(self, image):
        return self.body(image)

    def predict(self, z, search):
        x = (self.encode(search) * z.mean((2, 3), keepdim=True)).flatten(2).mT
        return x[..., :2], self.box(x).sigmoid()


@pytest.fixture(autouse=True)
def packages():
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    torch.manual_seed(0)


def test_graphs_compute_what_the_network_does(tmp_path):
    import onnxruntime

    network = Network().eval()
    told = export.export(network, Crops(), tmp_path)
    template, search = (torch.randint(256, (1, 3, side, side), dtype=torch.uint8) for side in (16, 32))
    runs = {name: onnxruntime.InferenceSession(tmp_path / f"{name}.onnx") for name in ("template", "search")}
    (z,) = runs["template"].run(None, {"template": template.numpy()})
    score, box = runs["search"].run(None, {"z": z, "search": search.numpy()})
    with torch.no_grad():
        encoded = export.Template(network)(template)
        wanted = export.Search(network)(encoded, search)
    for got, expected in ((z, encoded), (score, wanted[0]), (box, wanted[1])):
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-5)
    assert read_json(tmp_path / "tracker.json")["search_px"] == 32 and told["search"]["onnx_ms"] > 0


def test_a_graph_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match=r"template\.onnx is .* off what PyTorch computes"):
        export.export(Network().eval(), Crops(), tmp_path)
    assert not list(tmp_path.glob("*.onnx"))
