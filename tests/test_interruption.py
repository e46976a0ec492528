"""Requests to stop, locks and killed processes, with real processes on real images."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import (
    EPOCHS,
    TINY,
    TRAIN,
    AtUpdate,
    Process,
    Train,
    children,
    decoding,
    finish,
    kill,
    planned,
    same,
    start,
    wait_for,
)
from l2bn.errors import UserError
from l2bn.processes import SIGNALS
from l2bn.records import Record, read_records
from l2bn.training import loop, session
from l2bn.training.checkpoint import Checkpoints
from l2bn.training.interruption import (
    EXIT_CODE,
    LOCK,
    RANKS,
    Interruption,
    is_locked,
    refuse_copies,
    run_lock,
)
from l2bn.training.run import run
from l2bn.training.session import Session

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
LONG = ("norm=bn", "recipe.epochs=500")


def start_run(runs: Path, *overrides: str, before: str = "") -> Process:
    """The command, in a group of its own; `before` is Python that runs first in its process."""
    # What a shell starts in the background ignores SIGINT, and so does all that is started from there.
    before = f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{before}"
    code = f"import runpy, sys\n{before}\nsys.argv[0] = {TRAIN!r}\nrunpy.run_path({TRAIN!r}, run_name='__main__')"
    return start("-c", code, f"runs_dir={runs}", *TINY, *overrides, env=ONE_THREAD)


@contextlib.contextmanager
def started(runs: Path, *overrides: str, before: str = "") -> Iterator[Process]:
    """The command, once its first checkpoint is there; ended at the latest when the test is."""
    process = start_run(runs, *overrides, before=before)
    try:
        wait_for(lambda: any(runs.rglob("*.pt")), process)
        yield process
    finally:
        kill(process)


def trained(runs: Path, *overrides: str) -> Record:
    finish(start_run(runs, *overrides))
    (record,), problems = read_records(runs)
    assert problems == []
    return record


def newest(runs: Path) -> tuple[str, dict[str, Any]]:
    """Name and state of the last checkpoint, which must be whole."""
    (folder,) = runs.rglob("checkpoints")
    checkpoints = Checkpoints(folder, [])
    state = checkpoints.load(torch.device("cpu"))
    assert state is not None
    return checkpoints.paths()[-1].name, state


def ranks(process: Process) -> list[int]:
    """The processes of a run on several devices."""
    return [pid for pid in children(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_in_good_order(number: signal.Signals, tmp_path: Path) -> None:
    """The checkpoint is of the update that was under way, and no epoch of it lacks its line; the user is told."""
    with started(tmp_path, *LONG) as process:
        process.send_signal(number)
        printed = "".join(filter(None, process.communicate(timeout=120)))
        assert process.returncode == EXIT_CODE
    assert "seed0: stopped on request; the same command resumes it" in printed
    assert not any(tmp_path.rglob("summary.json"))
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    epochs = [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()]
    assert epochs == list(range(1, len(epochs) + 1))
    assert newest(tmp_path)[0].startswith(f"epoch{len(epochs):04d}-")


def test_every_signal_that_asks_a_process_to_stop_is_noted() -> None:
    """All that end a process by default are noted, but SIGKILL and those of a crash, and nothing else is."""
    crashes = {"ILL", "TRAP", "ABRT", "BUS", "FPE", "SEGV", "SYS", "STKFLT"}
    others = {signal.Signals[f"SIG{name}"] for name in crashes | {"KILL", "PIPE", "XFSZ"}}
    for number in sorted(signal.valid_signals() - {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}):
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if number != signal.SIGKILL:
                signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            os._exit(0)
        ends = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert (number in SIGNALS) == (ends and number not in others), number
    for number in SIGNALS:
        with Interruption() as interruption:
            os.kill(os.getpid(), number)
            assert interruption.signal == number


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    """As `nohup` has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "sweep",
    [("hydra.mode=MULTIRUN", "seed=0,1"), pytest.param((), marks=pytest.mark.slow)],
    ids=["a sweep", "a run"],
)
def test_ctrl_c_ends_a_command_whose_reader_it_has_ended_too(sweep: tuple[str, ...], tmp_path: Path) -> None:
    """As in `train.py | tee log`: the terminal sends SIGINT to both, and nobody reads what is then printed."""
    with started(tmp_path, *sweep, *LONG, "progress=true") as process:
        assert process.stdout
        process.stdout.close()
        process.stdout = None  # for `communicate`, which else reads on
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == EXIT_CODE


@pytest.mark.slow
def test_copies_of_a_command_are_refused_with_one_hint(tmp_path: Path) -> None:
    """As `torchrun --nproc_per_node=2` starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", TRAIN, f"runs_dir={tmp_path}"]
    done = subprocess.run([*command, *TINY], env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("compute.devices=N trains one run on N devices") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script that asked for tasks and starts none
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, UserError),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, SystemExit),
    ],
)
def test_which_commands_are_copies(
    environment: dict[str, str], expected: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (name for pair in RANKS for name in pair):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with contextlib.nullcontext() if expected is None else pytest.raises(expected):
        refuse_copies()


def test_a_run_that_was_trained_meanwhile_is_not_concluded_again(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process that found no record before the first one ended."""
    record = train("recipe.epochs=1", *TINY)
    before = {path: path.stat().st_mtime_ns for path in record.folder.rglob("*")}
    with monkeypatch.context() as patch:
        patch.setattr("l2bn.training.run.find_record", lambda *_: None)
        assert train("recipe.epochs=1", *TINY) == record
    assert {path: path.stat().st_mtime_ns for path in record.folder.rglob("*")} == before


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    """In the middle of an update that would take ten minutes more."""
    asleep = tmp_path / "asleep"
    hang = (
        "import time, pathlib\n"
        "from l2bn.training.loop import Trainer\n"
        "forward, count = Trainer.forward, iter(range(10**6))\n"
        f"sleep = lambda: (pathlib.Path({str(asleep)!r}).touch(), time.sleep(600))\n"
        "Trainer.forward = lambda *given: (next(count) == 11 and sleep(), forward(*given))[1]\n"
    )
    with started(tmp_path / "runs", *LONG, before=hang) as process:
        wait_for(asleep.exists, process)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == -signal.SIGTERM
    assert newest(tmp_path / "runs")[0].startswith("epoch0001-")


@pytest.mark.parametrize("exits", [True, False], ids=["and exits", "and returns"])
def test_a_handler_that_was_there_before_is_called_after_the_checkpoint(
    exits: bool, train: Train, at_update: AtUpdate, tmp_path: Path
) -> None:
    """submitit's on SIGUSR2 requeues a Slurm job and exits. That on SIGTERM returns, and the run goes on: Slurm
    sends it when it begins to preempt a job, and requeues the job if it still runs later."""
    found = []

    def handler(*_: object) -> None:
        found.append(newest(tmp_path / "runs")[0].partition(".")[0])
        if exits:
            raise SystemExit(-1)

    at_update(11, lambda _: os.kill(os.getpid(), signal.SIGUSR2))
    before = signal.signal(signal.SIGUSR2, handler)
    try:
        with pytest.raises(SystemExit, match="-1") if exits else contextlib.nullcontext():
            train(EPOCHS, *TINY)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert found == ["epoch0001-step0000003"]
    assert any(tmp_path.rglob("summary.json")) is not exits


@pytest.mark.parametrize("analysis", ["off", "on"])
def test_a_signal_in_an_evaluation_stops_the_run_there(
    analysis: str, train: Train, trained: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler may grant less time than an evaluation takes; the run then goes on with the evaluation."""
    command = (f"analysis={analysis}", "norm=l2bn", "recipe.epochs=2", *TINY)
    whole = trained(*command)
    with monkeypatch.context() as patch:
        patch.setattr(session, "EVALUATION_BATCH", 8)  # images, of 128
        evaluation, left = Session.evaluation, iter(range(20))

        def told(*given: Any) -> Iterator[Any]:
            for batch in evaluation(*given):
                if next(left) == 9:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        patch.setattr(Session, "evaluation", told)
        with pytest.raises(SystemExit) as stopped:
            train(*command)
    assert stopped.value.code == EXIT_CODE
    assert next(left) == 10
    assert newest(tmp_path / "runs")[0].startswith("epoch0000-step0000008.")
    resumed = train(*command)
    same(resumed, whole)


@pytest.mark.parametrize("alone", [True, False], ids=["a run", "a run of a sweep"])
def test_a_signal_at_the_end_of_the_last_evaluation_stops_the_sweep_behind_it(
    alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has only its record left to write; the next one must not begin."""
    evaluate = loop.evaluate

    def tell(*given: Any) -> Any:
        found = evaluate(*given)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(loop, "evaluate", tell)
    (planning,) = planned(f"runs_dir={tmp_path}", "norm=bn", "recipe.epochs=1", *TINY)
    with contextlib.nullcontext() if alone else pytest.raises(SystemExit, match=str(EXIT_CODE)):
        run(planning, alone=alone)
    assert len(read_records(tmp_path)[0]) == 1


def test_a_scheduler_may_tell_all_processes_of_a_run(photographs: Path, tmp_path: Path) -> None:
    """The signal comes while the run waits for an image of its second epoch, in a process that gets it, too: it is
    still needed, for the update to be made."""
    told = (
        "import os, signal\nfrom pathlib import Path\n"
        "from l2bn.data.imagenet import ImageFiles\n"
        "get = ImageFiles.__getitem__\n"
        "def tell(self, index):\n"
        f"    once = Path({str(tmp_path)!r}, 'told')\n"
        "    if any(once.parent.rglob('*.pt')):\n"
        "        try:\n"
        "            once.open('x').close()\n"
        "            os.killpg(0, signal.SIGTERM)\n"
        "        except FileExistsError:\n"
        "            pass\n"
        "    return get(self, index)\n"
        "ImageFiles.__getitem__ = tell\n"
    )
    options = (*decoding(photographs), "recipe.epochs=500", "compute.workers=2")
    finish(start_run(tmp_path, *options, before=told), EXIT_CODE)
    assert (tmp_path / "told").exists()
    assert newest(tmp_path)[0].startswith("epoch0001-step0000001")


def lives(pid: int) -> bool:
    """A process that has ended may still wait for its parent to ask how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_processes_of_a_run_die_with_it(photographs: Path, tmp_path: Path) -> None:
    """They hold its lock: left behind by SIGKILL they would keep the next start out."""
    options = (*decoding(photographs), "recipe.epochs=500", "compute.workers=2")
    with started(tmp_path, *options) as process:
        workers = children(process.pid)
        assert len(workers) >= 2
        process.kill()
        process.wait()
        wait_for(lambda: not any(map(lives, workers)), seconds=4)  # torch's own watchdog looks every 5 seconds
        (folder,) = tmp_path.rglob("checkpoints")
        with run_lock(folder.parent):
            pass


def test_the_processes_of_a_run_end_with_it(photographs: Path, tmp_path: Path) -> None:
    """Not when garbage is collected: at exit Python waits for its children, and they ignore its signal to end."""
    options = (*decoding(photographs), "recipe.epochs=1", "compute.workers=1")
    with started(tmp_path, *options, before="import gc\ngc.disable()") as process:
        finish(process)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_processes_of_a_run_need_not_be_forked(method: str, photographs: Path, tmp_path: Path) -> None:
    """As on macOS, and by Python 3.14's default."""
    spawning = f"import multiprocessing; multiprocessing.set_start_method('{method}')\n"
    options = (*decoding(photographs), "recipe.epochs=1", "compute.workers=1")
    finish(start_run(tmp_path, *options, before=spawning))
    assert len(read_records(tmp_path)[0]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("told", ["its first process", "all of its processes"])
def test_all_processes_of_a_run_stop_at_one_update(told: str, tmp_path: Path) -> None:
    """Two devices: the checkpoint holds as many images of the epoch from either, and the run goes on to the bits
    of one that was left alone."""
    options = ("compute.device=cpu", "compute.devices=2", "norm=l2bn", "dataset.subset=960", "recipe.epochs=5")
    whole = trained(tmp_path / "whole", *options)
    runs = tmp_path / "stopped"
    with started(runs, *options) as process:
        if told == "its first process":
            process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGTERM)
        finish(process, EXIT_CODE)
    assert not any(runs.rglob("summary.json"))
    position = newest(runs)[1]["position"]
    assert position["step"] in (10, 20, 30), "left at an update of the epoch at which the processes agree"
    assert position["totals"][:, 3].tolist() == [position["step"] * 16] * 2
    resumed = trained(runs, *options)
    same(resumed, whole)


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_before_its_processes_are_ready_stops(tmp_path: Path) -> None:
    """They die of the signal, having no handler yet; the run is one to go on with all the same."""
    process = start_run(tmp_path, "compute.device=cpu", "compute.devices=2", "norm=bn", "recipe.epochs=1")
    try:
        wait_for(lambda: len(ranks(process)) == 2, process)
        process.send_signal(signal.SIGTERM)
        assert "Traceback" not in finish(process, EXIT_CODE)
    finally:
        kill(process)
    assert trained(tmp_path, "compute.device=cpu", "compute.devices=2", "norm=bn", "recipe.epochs=1").epochs == 1


@pytest.mark.slow
def test_a_process_of_a_run_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    options = ("compute.device=cpu", "compute.devices=2", "norm=bn", "recipe.epochs=8")
    whole = trained(tmp_path / "whole", *options)
    runs = tmp_path / "killed"
    with started(runs, *options) as process:
        _, second = ranks(process)
        os.kill(second, signal.SIGKILL)
        printed = finish(process, 1)
        assert "Traceback" not in printed
        assert "the same command" in printed
    assert not any(runs.rglob("summary.json"))
    resumed = trained(runs, *options)
    same(resumed, whole)


def test_a_second_process_leaves_the_run_to_the_first(train: Train, tmp_path: Path) -> None:
    (planning,) = planned(f"runs_dir={tmp_path / 'runs'}", *TINY)
    planning.folder.mkdir(parents=True)
    message = "another process is training the run in"
    with run_lock(planning.folder), pytest.raises(UserError, match=message):
        train(*TINY)
    assert {path.name for path in planning.folder.iterdir()} == {LOCK}


def test_a_lock_that_cannot_be_written_is_one_message(train: Train, tmp_path: Path) -> None:
    """As on a disk that is read-only at the next start."""
    (planning,) = planned(f"runs_dir={tmp_path / 'runs'}", *TINY)
    (planning.folder / LOCK).mkdir(parents=True)
    with pytest.raises(UserError, match="Is a directory; once that is corrected"):
        train(*TINY)


def test_a_look_at_a_run_does_not_refuse_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK).touch()
    with (tmp_path / LOCK).open() as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(look, fcntl.LOCK_UN))
        with run_lock(tmp_path):
            assert is_locked(tmp_path)


def test_what_is_locked_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of folders NFS has no locks that other machines see, and of files exclusive ones only where they are opened
    for writing."""
    locked = []
    flock = fcntl.flock

    def noted(descriptor: int, kind: int) -> None:
        exclusive = bool(kind & fcntl.LOCK_EX)
        writable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        if kind != fcntl.LOCK_UN:
            locked.append((Path(f"/proc/self/fd/{descriptor}").readlink(), exclusive, writable))
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", noted)
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == [], "a look writes nothing"
    with run_lock(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    path = tmp_path / LOCK
    assert path.is_file()
    assert locked == [(path, True, True), (path, False, False), (path, False, False)]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of Python 3.12 on, that it forks
def test_a_process_of_the_run_that_lingers_holds_no_lock(tmp_path: Path) -> None:
    """A worker that decodes images may be forked, and then has the file open too."""
    with run_lock(tmp_path):
        lingering = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        lingering.start()
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    lingering.kill()
    lingering.join()


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_lock(tmp_path):
        assert f"{tmp_path}: no locks here" in caplog.text


def test_a_process_that_follows_another_ends_on_no_second_signal() -> None:
    """A scheduler may tell it, and the process that it follows tells it, too."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_signalled_twice)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 7


def _signalled_twice() -> None:
    with Interruption() as interruption:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(7 if interruption.signal == signal.SIGTERM else 8)
