"""Offsets that lie cannot make a kernel leave its buffers. The last file: an illegal address would end the others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpu_cases

torch = pytest.importorskip("torch")
gpu_cases.need_cuda()

pytestmark = pytest.mark.gpu

HERE = Path(__file__).parent


def test_offsets_that_lie():
    source = str(HERE.parent.parent / "src")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(HERE / "hostile.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout[-400:] + done.stderr[-3000:]
