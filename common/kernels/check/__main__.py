"""Runs what the compiler makes of the CUDA kernels, without a GPU.

    python -m common.kernels.check              every instantiation, in three orders of threads, against the formula
    python -m common.kernels.check --mutants    known mistakes, each of which has to be seen
    python -m common.kernels.check --counts     instructions, sectors, registers: the committed table
    python -m common.kernels.check --passes papers.smlpnet:smlpnet_tiny     passes over memory, block by block
"""

import argparse
import sys
import time

from common.kernels.shift import op as shift_op
from common.kernels.sparse_mlp import op as sparse_mlp_op

from . import cases, counts, passes
from .device import COMPILER, Device, KernelError
from .mutants import MUTANTS, verdict

OPS = {"shift": shift_op, "sparse_mlp": sparse_mlp_op}


def check_all() -> bool:
    good = True
    for name, op in OPS.items():
        began = time.time()
        device = Device(op.KERNELS)
        try:
            with device.plugged_in():
                wrong = getattr(cases, name)(device)
        except KernelError as error:
            wrong = [str(error)]
        missing = set(op.KERNELS) - set(device.launched)
        for text in [*wrong[:10], *(f"not launched: {kernel}" for kernel in sorted(missing))]:
            print(f"{name}: {text}")
        good = good and not wrong and not missing
        print(
            f"{name}: {len(device.launched)} of {len(op.KERNELS)} instantiations, {sum(device.launched.values())} "
            f"launches, {len(wrong)} wrong, {time.time() - began:.0f} s"
        )
    return good


def check_mutants() -> bool:
    seen = 0
    for mutant in MUTANTS:
        found = verdict(mutant)
        seen += found is not None
        print(f"{mutant.name}: {found or 'NOT SEEN'}", flush=True)
    print(f"{seen} of {len(MUTANTS)} seen")
    return seen == len(MUTANTS)


def check_counts(write: bool) -> bool:
    table = counts.measure()
    print(counts.text(table))
    if write:
        counts.write(table)
        return True
    differences = counts.differences(table, counts.committed())
    print("\n".join(differences) or "equal to the committed table")
    return not differences


def main() -> int:
    parser = argparse.ArgumentParser("python -m common.kernels.check", description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", action="store_true", help="known mistakes, each of which has to be seen")
    parser.add_argument("--counts", action="store_true", help="compare with the committed table")
    parser.add_argument("--write", action="store_true", help="with --counts: write the table anew")
    parser.add_argument("--passes", metavar="PACKAGE:MODEL", help="passes over memory of a network's blocks")
    args = parser.parse_args()
    if args.passes:
        return passes.report(args.passes) or 0
    if COMPILER is None:
        parser.error("needs g++ to execute what NVRTC makes of the kernels; install it")
    if args.mutants:
        return not check_mutants()
    if args.counts:
        return not check_counts(args.write)
    return not check_all()


if __name__ == "__main__":
    sys.exit(main())
