"""How long a user waits, in seconds of the processor: those of the clock on a machine with nothing else to do."""

import os
import resource
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, TINY


def processor_seconds(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / "scripts/train.py"), *arguments]
    # With several threads, those that wait for the others count as well.
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_comes_at_once() -> None:
    assert processor_seconds("--help") < 4  # about 2 on two slow cores


def test_the_first_steps_come_soon(tmp_path: Path) -> None:
    """From nothing to the end of a run of eight steps, the evaluation included."""
    options = f"runs_dir={tmp_path}", "norm=l2bn", "recipe.epochs=1", *TINY
    assert processor_seconds(*options) < 20  # about 10 on two slow cores


def test_threads_that_wait_for_each_other_sleep_soon_unless_the_user_decides() -> None:
    """`OMP_WAIT_POLICY` is the standard's variable for it, and libgomp's own would overrule it."""
    program = "import os, l2bn.training; print(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    found = []
    for own in ({}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}):
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment | own, capture_output=True, text=True
        )
        found.append(done.stdout.strip())
    assert found == ["1000", "7", "None"]
