"""Signals, owners and death, with real processes on real digits."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, TINY
from l2bn.errors import UserError
from l2bn.training.interruption import EXIT_CODE, sole_owner

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(runs: Path, *overrides: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), f"runs_dir={runs}", *TINY, *overrides]
    return subprocess.Popen(command, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_epoch(runs: Path, timeout: float = 120) -> None:
    """Until the first checkpoint is there."""
    deadline = time.monotonic() + timeout
    while not any(runs.rglob("*.pt")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processor_seconds(pid: int) -> float:
    """What a running process has used, its threads included."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def processor_seconds_of_children() -> float:
    """What the processes started here have used that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_ends_the_run_in_good_order(number: signal.Signals, tmp_path: Path) -> None:
    before = processor_seconds_of_children()
    process = start(tmp_path, "norm=bn", "recipe.epochs=500")
    wait_for_epoch(tmp_path)
    told = before + processor_seconds(process.pid)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE
    # In seconds of the processor, which are those of the clock on a machine with nothing else to do.
    assert processor_seconds_of_children() - told < 5
    assert not any(tmp_path.rglob("summary.json"))
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    newest = sorted(tmp_path.rglob("*.pt"))[-1].name
    epochs = [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()]
    assert epochs == list(range(1, len(epochs) + 1))
    assert newest.startswith(f"epoch{len(epochs):04d}-")


@pytest.mark.slow
def test_all_processes_of_a_run_stop_at_one_update(tmp_path: Path) -> None:
    """Two devices, told through the process that started them; the checkpoint is whole and the run goes on."""
    options = ("compute.device=cpu", "compute.devices=2", "recipe.epochs=40")
    process = start(tmp_path, *options)
    wait_for_epoch(tmp_path)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE, output
    assert not any(tmp_path.rglob("summary.json"))
    again = start(tmp_path, *options)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    assert [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()] == list(range(1, 41))


def test_a_second_process_leaves_the_run_to_the_first(tmp_path: Path) -> None:
    first = start(tmp_path, "norm=bn", "recipe.epochs=500")
    try:
        wait_for_epoch(tmp_path)
        second = start(tmp_path, "norm=bn", "recipe.epochs=500")
        output, _ = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "another process is at work on" in output
        assert "Traceback" not in output
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = "from pathlib import Path; import time; from l2bn.training.interruption import sole_owner\n"
    code += f"with sole_owner(Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process"), sole_owner(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with sole_owner(tmp_path):
        pass
