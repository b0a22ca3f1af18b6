"""Prints what a folder of tracking sequences holds: ``python -m common.data.tracking FOLDER``."""

import tyro

from common import run
from common.data.tracking.look import main

if __name__ == "__main__":
    run.main(lambda: tyro.cli(main))
