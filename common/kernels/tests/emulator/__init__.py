"""Runs the .cu files on the CPU: the same source through g++, the same launch code, no GPU.

What it shows is arithmetic: indices, borders, races between barriers. It says nothing about speed.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")


class Emulator:
    """Stands in for common.kernels.cuda. order of the threads: 0 ascending, 1 descending, else shuffled."""

    def __init__(self, source: Path, names: Sequence[str], folder: Path):
        runs = "\n".join(
            f'extern "C" void run{k}(int count, int grid, int block, const long long* args, int order) '
            f"{{ emulator::run({name}, count, grid, block, args, order); }}"
            for k, name in enumerate(names)
        )
        program, library = folder / f"{source.stem}.cpp", folder / f"{source.stem}.so"
        program.write_text(f'#include "cuda_on_cpu.h"\n#include "{source}"\n{runs}\n')
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{HERE}"]
        subprocess.run([COMPILER, *flags, "-o", library, program], check=True)
        self.library = ctypes.CDLL(str(library))
        self.symbols = {name: f"run{k}" for k, name in enumerate(names)}
        self.order = 0
        self.launched = []

    def wanted(self, device):
        return True

    def load(self, source, name, device):
        return name

    def launch(self, kernel, grid, block, args, device):
        self.launched.append(kernel)
        packed = (ctypes.c_longlong * len(args))(*args)
        getattr(self.library, self.symbols[kernel])(len(args), grid, block, packed, self.order)
