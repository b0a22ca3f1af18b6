"""timm's own tests of our models (ci/timm_suite.py): of some here, of all under make test-long."""

import subprocess
import sys
from pathlib import Path

import pytest

from ci import timm_suite
from common.run import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
# One of each kind: both stems, single stages and several, all mixers, a fixed size and any.
PICK = ("shiftvit_micro", "smlpnet_micro", "spach_ms_micro_*", "spach_xxs_patch16_224_attn", "*_mini*")


def suite(*argv: str) -> str:
    try:
        timm_suite.tests()
    except UserError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "ci.timm_suite", "--threads", "1", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_timms_tests_of_one_model_of_each_kind():
    assert suite("--names", *PICK).endswith("81 passed; 9 models of ours")


@pytest.mark.long
def test_timms_tests_of_all_models():
    assert suite().endswith("378 passed; 42 models of ours")
