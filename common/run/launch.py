"""Several processes on this machine, one for each GPU: ``python -m common.run.launch 8 papers.vlora RECIPE ...``

It is torchrun's launcher, asked for less: processes find each other through a file that belongs to the user, so that no
port is opened which anybody on the network could talk to; and a mistake ends in the one line of the process that found
it, with its status. For several machines use torchrun itself, on a network of one's own.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def launch(processes: int, module: str, arguments: list[str]) -> int:
    """Runs ``python -m module arguments`` in so many processes; returns the status of the first that failed, or 0."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun has it
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="vision-reproductions-") as folder:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, max_restarts=0,
            rdzv_backend="c10d", rdzv_endpoint=str(Path(folder) / "rendezvous"), rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1", logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
        except ChildFailedError as error:
            status = error.get_first_failure()[1].exitcode
            return status if status > 0 else 128 - status
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


def main() -> None:
    usage = "usage: python -m common.run.launch PROCESSES MODULE [ARGUMENTS ...]"
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal():
        sys.exit(print(usage, file=sys.stderr) or 2)
    processes, module, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    on_cpu = "--device cpu" in " ".join(arguments).replace("=", " ")
    if not on_cpu and processes > torch.cuda.device_count():
        print(
            f"error: {processes} GPUs were asked for, torch sees {torch.cuda.device_count()}; ask for as many as there "
            "are, or for processes on the CPU with --device cpu", file=sys.stderr,
        )
        sys.exit(2)
    sys.exit(launch(processes, module, arguments))


if __name__ == "__main__":
    main()
