"""Every Python process with this folder on its path starts with a pretend GPU, if PRETEND_GPU is set."""

import os
import sys
from pathlib import Path

if os.environ.get("PRETEND_GPU"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from ci import pretend_gpu

    pretend_gpu.install()
