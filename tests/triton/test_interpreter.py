"""The Triton kernels in Triton's interpreter, in a separate process: it is chosen at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CELLS = Path(__file__).with_name("cells.py")
# Hypothesis, which no cell needs, would be imported at the end.
PYTEST = "-m pytest -q -p no:cacheprovider -p no:hypothesispytest".split()


def run(*arguments: str) -> str:
    """The output of pytest on the cells; fails, showing it, if a cell fails."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, *PYTEST, str(CELLS), *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    return done.stdout


def test_the_kernels_agree_with_the_equation():
    assert " passed" in run("-m", "not large")


@pytest.mark.large
def test_the_kernels_agree_with_the_equation_in_every_cell():
    assert " passed" in run("-m", "large", "-n", "2")
