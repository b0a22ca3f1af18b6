"""Fixtures for all tests."""

import os
import random
import socket

import pytest
import torch

if os.environ.get("PRETEND_GPU"):
    from ci import pretend_gpu

    pretend_gpu.install()

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # `make test`: the workers share the cores
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start

for name in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS"):  # a make that a test starts is not part of `make test`
    os.environ.pop(name, None)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests that take minutes, and no others")
    parser.addoption("--kill-seed", type=int, default=random.randrange(10**6), help="of the moments at which runs die")
    parser.addoption("--fuzz-seed", type=int, default=random.randrange(10**6), help="of the damage done to files")


def pytest_report_header(config):
    seeds = (f"--{name}-seed {config.getoption(f'--{name}-seed')}" for name in ("kill", "fuzz"))
    return f"again: {' '.join(seeds)}" if config.getoption("--long") else None


def pytest_collection_modifyitems(config, items):
    long = [item for item in items if "long" in item.keywords]
    others = [item for item in items if "long" not in item.keywords]
    items[:], left_out = (long, others) if config.getoption("--long") else (others, long)
    config.hook.pytest_deselected(items=left_out)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
