"""The benchmark refuses to time what disagrees, and what it writes is whole."""

import json

import pytest
import torch

from common.kernels import bench


def rows(**forms):
    return {bench.AUTHORS: lambda: torch.arange(8.0), bench.OURS: lambda: torch.arange(8.0)} | forms


@pytest.mark.parametrize("wrong", [torch.arange(8.0) + 1e-6, torch.full((8,), torch.nan), torch.arange(8.0).roll(1)])
def test_a_row_that_differs_is_not_timed(wrong):
    bench.check_parity(bench.Case("copying", rows()))
    with pytest.raises(SystemExit, match="copying: wrong, tensor 0 is off by"):
        bench.check_parity(bench.Case("copying", rows(wrong=lambda: wrong)))


def test_rounding_is_measured_against_the_authors():
    exact = torch.linspace(0, 1, 1000, dtype=torch.float64)
    noise = 1e-4 * torch.randn(1000)
    case = bench.Case("sum", {bench.AUTHORS: lambda: exact.float() + noise}, exact=lambda: exact)
    case.rows["as good"] = lambda: exact.float() - 3 * noise
    bench.check_parity(case)
    case.rows["worse"] = lambda: exact.float() + 5 * noise
    with pytest.raises(SystemExit, match="sum: worse"):
        bench.check_parity(case)


@pytest.mark.parametrize("subject", ["shift", "sparse_mlp"])
def test_operators_agree(subject):
    cases = {"shift": bench.shift_cases, "sparse_mlp": bench.sparse_mlp_cases}[subject]
    for case in cases("cpu", torch.float32, 1):
        case.rows = {name: row for name, row in case.rows.items() if name != bench.COMPILED}
        bench.check_parity(case)


def test_the_record(monkeypatch, tmp_path, capsys):
    def cases(device, dtype, batch):
        x = torch.randn(batch, 4)
        yield bench.Case("doubling", {bench.AUTHORS: lambda: x + x, bench.OURS: lambda: 2 * x}, x=x, bytes=32 * batch)

    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    threads = str(torch.get_num_threads())
    monkeypatch.setattr("sys.argv", ["bench", "--device", "cpu", "--threads", threads, "--seconds", "0.01"])
    bench.main({"adding": cases}, {"adding": 3})
    (path,) = tmp_path.glob("adding_*.json")
    record = json.loads(path.read_text())
    (doubling,) = record["records"]
    low, middle, high = doubling["times_faster_than_authors"]["ours"]
    assert 0 < low <= middle <= high and doubling["seconds"]["ours"] > 0 and doubling["bytes"] == 96
    assert record["environment"]["git"] in record["stamp"] and "load average" in record["stamp"]
    assert "| doubling |" in path.with_suffix(".md").read_text()
    monkeypatch.setattr("sys.argv", ["bench", "subtracting"])
    with pytest.raises(SystemExit):
        bench.main({"adding": cases}, {"adding": 3})
    assert "no subtracting; there are adding" in capsys.readouterr().err
