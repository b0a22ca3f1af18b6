"""The benchmarks' engine refuses to time what disagrees, and what it writes is whole."""

import json

import pytest
import torch

from common.run import UserError, bench

FIRST, OURS = "authors", "ours"


def ways(**more):
    return {FIRST: lambda: torch.arange(8.0), OURS: lambda: torch.arange(8.0)} | more


@pytest.mark.parametrize("wrong", [torch.arange(8.0) + 1e-6, torch.full((8,), torch.nan), torch.arange(8.0).roll(1)])
def test_a_way_that_differs_is_not_timed(wrong):
    assert bench.check_parity(bench.Case("copying", ways())) == {FIRST: 0, OURS: 0}
    with pytest.raises(UserError, match="copying: wrong, tensor 0 is off by"):
        bench.check_parity(bench.Case("copying", ways(wrong=lambda: wrong)))


def test_a_tolerance_is_of_the_largest_value():
    case = bench.Case("rounding", ways(half=lambda: torch.arange(8.0) + 0.07), tolerance=0.0101)
    assert bench.check_parity(case)["half"] == pytest.approx(0.01, rel=1e-4)
    case.tolerance = 0.009
    with pytest.raises(UserError, match="rounding: half"):
        bench.check_parity(case)


def test_rounding_is_measured_against_the_first():
    exact = torch.linspace(0, 1, 1000, dtype=torch.float64)
    noise = 1e-4 * torch.randn(1000)
    case = bench.Case("sum", {FIRST: lambda: exact.float() + noise}, exact=lambda: exact)
    case.ways["as good"] = lambda: exact.float() - 3 * noise
    bench.check_parity(case)
    case.ways["worse"] = lambda: exact.float() + 5 * noise
    with pytest.raises(UserError, match="sum: worse"):
        bench.check_parity(case)


def test_the_record(monkeypatch, tmp_path):
    def cases(device, dtype, batch):
        x = torch.randn(batch, 4)
        yield bench.Case("doubling", {FIRST: lambda x: x + x, OURS: lambda x: 2 * x}, (x,), copied=x, bytes=32 * batch)

    threads = str(torch.get_num_threads())
    monkeypatch.setattr("sys.argv", ["bench", "--device", "cpu", "--threads", threads, "--seconds", "0.01"])
    bench.main("bench", {"adding": cases}, tmp_path, {"adding": 3})
    (path,) = tmp_path.glob("adding_*.json")
    record = json.loads(path.read_text())
    (doubling,) = record["records"]
    low, middle, high = doubling["times_faster"][OURS]
    assert 0 < low <= middle <= high and doubling["seconds"][OURS] > 0 and doubling["bytes"] == 96
    assert record["environment"]["git"] in record["stamp"] and "load average" in record["stamp"]
    assert "| doubling |" in path.with_suffix(".md").read_text()
    monkeypatch.setattr("sys.argv", ["bench", "subtracting"])
    with pytest.raises(UserError, match="no subject subtracting; there are adding"):
        bench.main("bench", {"adding": cases}, tmp_path, {"adding": 3})
