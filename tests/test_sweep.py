"""Sweeps: which runs are launched, the summary, exit codes, and processes that are killed or asked to stop."""

import contextlib
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.config_store import ConfigStore
from joblib import cpu_count
from omegaconf import OmegaConf

from conftest import (
    ROOT,
    TINIEST,
    TINY,
    TRAIN,
    Issue,
    Process,
    children,
    finish,
    planned,
    start,
    stop_after,
    wait_for,
)
from l2bn.errors import UserError
from l2bn.failures import FAILURE, note_failure, read_failure
from l2bn.records import CONFIG, ENVIRONMENT, SUMMARY, read_records
from l2bn.training import session, sweep
from l2bn.training.interruption import EXIT_CODE, LOCK, is_locked, run_lock
from l2bn.training.loop import Position
from l2bn.training.run import run as train_planned

Sweep = Callable[..., tuple[int, str]]


@pytest.fixture
def multirun(tmp_path: Path, issue: Issue) -> Sweep:
    """Issue `train.py -m` under `tmp_path / "runs"`; its exit code and all that it printed."""

    def multirun(*overrides: str) -> tuple[int, str]:
        done = issue("train", "-m", f"runs_dir={tmp_path / 'runs'}", *TINY, *overrides)
        return done.code, done.printed

    return multirun


def ended(runs: Path) -> dict[str, int]:
    """The runs that have ended, and when."""
    return {path.parent.name: path.stat().st_mtime_ns for path in runs.rglob(SUMMARY)}


# What a sweep is made of.


def test_an_experiment_is_planned_as_it_is_run() -> None:
    runs = planned("experiment=cifar_table", "backbone=resnet20,vgg16", "seed=1,0")
    assert [str(run.cell) for run in runs] == [
        f"{dataset}/{backbone}/{norm}/cosine_200/seed{seed}"
        for seed in (1, 0)
        for dataset in ("cifar10", "cifar100")
        for backbone in ("resnet20", "vgg16")
        for norm in ("bn", "l2bn")
    ]


def test_overridden_values_are_in_the_names_and_equal_runs_are_planned_once() -> None:
    cells = [str(run.cell) for run in planned("norm=l2bn", "norm.eps=0.1,0.001", "seed=7,7")]
    assert cells == [f"digits/resnet20/l2bn,eps={eps}/short/seed7" for eps in (0.1, 0.001)]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("backbone=resnet20,resnet21", "resnet110"),  # one of the valid names
        ("experiment=cifar_table backbone=resnet21", "resnet110"),
        ("recipe.epochs=2,0", "epochs=0/seed0: recipe: epochs: must be greater than or equal to 1, not 0"),
        ("backbone.depth=20,21", "backbone: depth"),
        ("compute.devices=0", "compute: devices must be at least 1, not 0"),
        ("launcher=joblib compute.workers=-2", "compute: workers must be from 0 to"),
        ("+backbone.width=1,2", "unknown key backbone.width"),
        ("launcher=slurm hydra.launcher.nodes=2", "Key 'nodes' not in 'SlurmConfig'"),
        ("compute.precision=32-true,bf16-mixed", "precision: 32-true against bf16-mixed"),
    ],
)
def test_a_mistake_in_any_run_is_reported_before_the_first(
    given: str, named: str, multirun: Sweep, tmp_path: Path
) -> None:
    code, printed = multirun(*given.split())
    assert code == 1
    assert named in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "runs").exists()


def test_a_runs_dir_that_cannot_be_made_is_reported_as_for_a_single_run(multirun: Sweep, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, printed = multirun(*TWO, f"runs_dir={tmp_path}/file/runs")
    assert code == 1
    assert f"runs_dir: cannot make the folder {tmp_path}/file/runs: Not a directory; name another by" in printed
    assert "launcher stopped" not in printed
    assert "sweep: " not in printed


# What becomes of the runs.

TWO = ("norm=bn", "seed=0,1", "recipe.epochs=1", *TINIEST)
CELL = "digits,image_size=8,subset=64,validation=0.05/resnet20/bn/short,epochs=1"


def test_issued_again_a_sweep_has_nothing_to_do(multirun: Sweep, tmp_path: Path) -> None:
    code, printed = multirun(*TWO)
    assert code == 0
    assert "sweep: 2 finished\n" in printed
    before = ended(tmp_path / "runs")
    assert before.keys() == {"seed0", "seed1"}
    code, printed = multirun(*TWO)
    assert code == 0
    assert "sweep: 2 skipped (ended before)\n" in printed
    assert ended(tmp_path / "runs") == before
    code, printed = multirun(*TWO, "seed=1,2")
    assert code == 0
    assert "sweep: 1 finished, 1 skipped (ended before)\n" in printed


@pytest.mark.parametrize(
    ("jobs", "cores", "gpus", "said"),
    [(2, 2, [], True), (1, 2, [], False), (2, 1, [], False), (2, 2, ["0"], False)],
)
def test_runs_side_by_side_are_hinted_at_where_they_are_faster(
    jobs: int,
    cores: int,
    gpus: list[str],
    said: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sweep, "available_cores", lambda: cores)
    monkeypatch.setattr(sweep, "visible_gpus", lambda: gpus)
    with caplog.at_level("INFO"):
        sweep.hint_at_processes(jobs)
    assert ("launcher=joblib trains them side by side" in caplog.text) is said


def test_a_failing_run_stops_no_other_and_is_reported(
    multirun: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = session.make_record

    def fail(built: session.BuiltRun, position: Position, *arguments: Any) -> Any:
        if built.run.cell.seed == 0 and position.rows:  # at its end
            raise ZeroDivisionError("one of these days\nand a second line")
        return record(built, position, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(session, "make_record", fail)
        code, printed = multirun(*TWO)
    assert code == 1
    before = ended(tmp_path / "runs")
    assert before.keys() == {"seed1"}
    summary = printed.partition("sweep: ")[2]
    assert summary.startswith(f"1 finished, 1 failed\nFAIL {CELL}/seed0\n")
    assert "     ZeroDivisionError: one of these days\n     and a second line\n" in summary
    (note,) = tmp_path.rglob(FAILURE)
    assert "in fail\n" in note.read_text()  # the traceback
    code, printed = multirun(*TWO)
    assert code == 0
    assert "sweep: 1 finished, 1 skipped (ended before)\n" in printed
    assert not note.exists()
    assert {name: time for name, time in ended(tmp_path / "runs").items() if name != "seed0"} == before


def test_a_failure_keeps_nothing_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra keeps it until the sweep ends; a network and images that it held would take the room of later runs."""
    held: list[weakref.ref[torch.Tensor]] = []

    def fails(*_: object, **options: object) -> None:
        network = torch.zeros(3)
        held.append(weakref.ref(network))
        raise RuntimeError(f"no room for {len(network)} values")

    monkeypatch.setattr("l2bn.training.run.run", fails)
    monkeypatch.setattr(sweep, "read_planned", lambda _: planned("norm=bn")[0])
    with pytest.raises(UserError, match="no room for 3 values") as caught:
        sweep.train_job(OmegaConf.create({}))
    assert caught.value.__context__ is None
    assert [one() for one in held] == [None]


def test_what_fails_without_a_folder_is_noted_too(multirun: Sweep, tmp_path: Path) -> None:
    code, printed = multirun(
        "norm=bn", "dataset.subset=64,16", "dataset.validation=0.05", "recipe.epochs=1", "seed=0,1"
    )
    assert code == 1
    summary = printed.partition("sweep: ")[2]
    assert summary.startswith("2 finished, 2 failed\n")
    assert summary.count("FAIL ") == 2
    assert summary.count("there are 16 training images") == 1  # once for the two that say the same
    assert len(list(tmp_path.rglob(FAILURE))) == 2


def test_a_failure_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    """Also before the run's folder is locked, unless another process has it."""
    (run,) = planned("dataset=image_folder", "dataset.root=nowhere", f"runs_dir={tmp_path}")
    run.folder.mkdir(parents=True)
    (run.folder / CONFIG).write_text(run.as_yaml())
    for owner, told in ((run_lock(run.folder), "the old one"), (contextlib.nullcontext(), "nowhere")):
        note_failure(run.folder, UserError("the old one"))
        with owner, pytest.raises(UserError, match="nowhere"):
            train_planned(run)
        assert told in (read_failure(run.folder) or "")


def test_a_run_that_another_process_has_is_no_failure(multirun: Sweep, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / CELL / "seed0"
    folder.mkdir(parents=True)
    with run_lock(folder):
        assert is_locked(folder)
        code, printed = multirun(*TWO)
    assert not is_locked(folder)
    assert code == 1
    assert "sweep: 1 finished, 1 running\n" in printed
    assert not list(tmp_path.rglob(FAILURE))


def test_a_diverged_run_has_ended(multirun: Sweep) -> None:
    options = ("norm=bn", "recipe.lr=1e6", "recipe.weight_decay=1e6", "seed=0,1", "recipe.epochs=1")
    for words in ("sweep: 2 diverged\n", "sweep: 2 skipped (ended before)\n"):
        code, printed = multirun(*options)
        assert code == 0
        assert words in printed


def test_a_sweep_that_is_asked_to_stop_reports_what_is_left(
    multirun: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        code, printed = multirun(*TWO, "recipe.epochs=2")
    assert code == EXIT_CODE
    assert "sweep: 1 interrupted, 1 missing\n" in printed
    assert f"cut  {CELL.replace('epochs=1', 'epochs=2')}/seed0  epoch 1 of 2" in printed
    code, printed = multirun(*TWO, "recipe.epochs=2")
    assert code == 0
    assert printed.count("resumed after epoch 1") == 1
    assert "sweep: 2 finished\n" in printed


def test_a_launcher_that_breaks_down_hides_nothing(multirun: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra._internal.core_plugins import basic_launcher

    monkeypatch.setattr(basic_launcher, "configure_log", lambda *_: 1 / 0)
    code, printed = multirun(*TWO)
    assert code == 1
    assert "the launcher stopped: ZeroDivisionError" in printed
    assert "sweep: 2 missing\n" in printed


# Real processes.


def start_sweep(runs: Path, *overrides: str) -> Process:
    return start(TRAIN, "-m", f"runs_dir={runs}", *overrides)


TABLE = ("backbone=resnet20,shufflenetv2_x0_5", "norm=bn,l2bn", "seed=0,1,2")
QUICK = (*TINIEST, "recipe.epochs=1", "progress=false", "compute.threads=1")


def tables(runs: Path, out: Path) -> dict[str, bytes]:
    finish(start(ROOT / "scripts/report.py", "tables", "--runs", runs, "--out", out))
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.slow
def test_a_killed_sweep_finishes_what_is_missing_and_its_table_is_the_same(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start_sweep(killed, *TABLE, *QUICK)
    wait_for(lambda: len(ended_folders(killed)) >= 5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = ended_folders(killed)
    assert 5 <= len(before) < 12
    printed = finish(start_sweep(killed, *TABLE, *QUICK))
    assert f"sweep: {12 - len(before)} finished, {len(before)} skipped (ended before)\n" in printed
    assert ended_folders(killed).items() >= before.items()
    assert "sweep: 12 finished\n" in finish(start_sweep(whole, *TABLE, *QUICK))
    assert tables(killed, tmp_path / "a") == tables(whole, tmp_path / "b")
    assert (tmp_path / "a/grid.md").read_text().count("(3)") == 8  # of two rows, in two tables


def ended_folders(runs: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in runs.rglob(SUMMARY)}


# Side by side on one machine.

SIDE_BY_SIDE = ("launcher=joblib", "hydra.launcher.n_jobs=2", "norm=bn", "seed=0,1,2,3", *QUICK)


def workers(process: Process) -> list[int]:
    """The processes that train the runs of this sweep."""
    found = []
    for pid in children(process.pid):
        with contextlib.suppress(OSError):
            if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    return found


def trained_side_by_side(runs: Path, process: Process) -> set[Path]:
    """The folders of two runs, once each has a checkpoint."""
    wait_for(lambda: len({path.parents[1] for path in runs.rglob("*.pt")}) == 2, process)
    return {path.parents[1] for path in runs.rglob("*.pt")}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_runs_side_by_side_share_the_cores_and_leave_in_good_order(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C reaches all processes, SIGTERM the first one alone."""
    process = start_sweep(tmp_path, *SIDE_BY_SIDE, "recipe.epochs=500", "compute.threads=null")
    folders = trained_side_by_side(tmp_path, process)
    share = int(os.environ.get("OMP_NUM_THREADS", max(1, cpu_count() // 2)))
    for folder in folders:
        (facts,) = json.loads((folder / ENVIRONMENT).read_text())["starts"]
        assert facts["threads"] == share
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    printed = finish(process, EXIT_CODE)
    assert "sweep: 2 interrupted, 2 missing\n" in printed
    assert "launcher stopped" not in printed
    assert not any(is_locked(folder) for folder in folders)


@pytest.mark.slow
def test_ctrl_c_while_the_processes_start_leaves_no_traceback(tmp_path: Path) -> None:
    process = start_sweep(tmp_path, *SIDE_BY_SIDE, "recipe.epochs=500")
    wait_for(lambda: len(workers(process)) == 2, process)
    os.killpg(process.pid, signal.SIGINT)
    printed = finish(process, EXIT_CODE)
    assert "Traceback" not in printed
    assert "sweep: " in printed


def test_how_each_process_has_ended_is_told() -> None:
    jobs = [functools.partial(bool, 1), functools.partial(bool, 0), functools.partial(signal.raise_signal, 9)]
    done, failed, killed = sweep.run_processes(jobs, 3)
    assert done is None
    assert failed == "its process ended with exit code 1; see what it printed above"
    assert str(killed).startswith("its process was ended by SIGKILL; ")


@pytest.mark.slow
def test_a_run_that_is_killed_takes_no_other_with_it(tmp_path: Path) -> None:
    """It alone has failed, and the same command resumes it."""
    process = start_sweep(tmp_path, *SIDE_BY_SIDE, "recipe.epochs=12")
    trained_side_by_side(tmp_path, process)
    others = workers(process)
    assert len(others) == 2
    os.kill(others.pop(0), signal.SIGKILL)
    now: list[int] = []  # as looked at once: runs are short, and one may end between two looks

    def two() -> bool:
        now[:] = workers(process)
        return len(now) == 2

    wait_for(two, process)
    assert set(others) < set(now), "another run was started again"
    printed = finish(process, code=1)
    summary = printed.partition("sweep: ")[2]
    assert summary.startswith("3 finished, 1 failed\nFAIL ")
    assert "its process was ended by SIGKILL; the same command resumes from the last checkpoint" in summary
    printed = finish(start_sweep(tmp_path, *SIDE_BY_SIDE, "recipe.epochs=12"))
    assert "sweep: 1 finished, 3 skipped (ended before)\n" in printed
    assert printed.count("resumed after epoch") == 1
    records, problems = read_records(tmp_path)
    assert len(records) == 4
    assert problems == []


def owner(folder: Path) -> int:
    """The process that trains the run in a folder: it has the lock open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if link.readlink() == folder / LOCK:
                return int(link.parts[2])
    raise LookupError(folder)


@pytest.mark.slow
def test_a_cluster_job_that_dies_fails_alone(tmp_path: Path) -> None:
    """The jobs of launcher=slurm as processes of this machine; the result of the first one is asked for first."""
    process = start_sweep(
        tmp_path,
        *("hydra/launcher=l2bn_slurm", "hydra.launcher.cluster=local", "norm=bn", "seed=0,1"),
        *(*QUICK, "recipe.epochs=30"),
    )
    folders = trained_side_by_side(tmp_path, process)
    os.kill(owner(min(folders)), signal.SIGKILL)
    printed = finish(process, code=1)
    assert "the launcher stopped" not in printed
    summary = printed.partition("sweep: ")[2]
    assert summary.startswith("1 finished, 1 failed\nFAIL ")
    assert "/seed0\n     its job was ended: Job " in summary


@pytest.mark.slow
def test_runs_side_by_side_die_with_their_sweep(tmp_path: Path) -> None:
    process = start_sweep(tmp_path, *SIDE_BY_SIDE, "recipe.epochs=500")
    folders = trained_side_by_side(tmp_path, process)
    assert all(is_locked(folder) for folder in folders)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(is_locked, folders)), seconds=10)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_process_begins_with_requests_to_stop_blocked() -> None:
    """The first one, too, with which Python starts a process of its own."""
    code = (
        "from pathlib import Path\nfrom l2bn.training import sweep\nif __name__ == '__main__':\n"
        "    process = sweep._start(bool, {})\n"
        "    print(Path(f'/proc/{process.pid}/status').read_text().partition('SigBlk:')[2].split()[0])\n"
        "    process.kill()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    blocked = int(done.stdout, 16)
    assert all(blocked >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM))


def environment_after(seconds: float, path: Path) -> Callable[[], Any]:
    """A job that writes its GPU, its threads and when it began and ended."""
    code = "[now.append(time.time()), time.sleep({}), now.append(time.time()), path.write_text(json.dumps([*map("
    code += "os.environ.get, ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS')), *now]))][-1]"
    scope = {"now": [], "path": path}
    run = f"exec('import json, os, time') or {code.format(seconds)}"
    return functools.partial(eval, run, scope)


def test_processes_share_gpus_and_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU for each process at a time, on the two that this one may use."""
    monkeypatch.setenv(sweep.VISIBLE, "4,7,-1,2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep, "available_cores", lambda: 6)
    jobs = [environment_after(0.5, tmp_path / str(number)) for number in range(4)]
    assert sweep.run_processes(jobs, -1) == [None] * 4
    seen = sorted(json.loads(path.read_text()) for path in tmp_path.iterdir())
    assert [(gpu, threads) for gpu, threads, *_ in seen] == [("4", "3")] * 2 + [("7", "3")] * 2
    for (_, _, _, ended), (_, _, began, _) in (seen[:2], seen[2:]):
        assert ended <= began
    assert os.environ.get("OMP_NUM_THREADS") is None


def test_processes_of_several_devices_share_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sweep.VISIBLE, "4,7,2,1,5")
    jobs = [environment_after(0.5, tmp_path / str(number)) for number in range(2)]
    assert sweep.run_processes(jobs, -1, devices=2) == [None] * 2
    assert sorted(json.loads(path.read_text())[0] for path in tmp_path.iterdir()) == ["2,1", "4,7"]


def test_fewer_processes_than_cores_leave_none_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sweep.VISIBLE, "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep, "available_cores", lambda: 6)
    jobs = [environment_after(0, tmp_path / str(number)) for number in range(2)]
    assert sweep.run_processes(jobs, -1) == [None] * 2
    assert [json.loads(path.read_text())[1] for path in tmp_path.iterdir()] == ["3", "3"]


@pytest.mark.parametrize(
    ("visible", "gpus"), [("", []), ("-1", []), ("0,-1,1", ["0"]), ("GPU-8a, 3", ["GPU-8a", "3"])]
)
def test_the_gpus_of_this_process_are_those_that_cuda_sees(
    visible: str, gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sweep.VISIBLE, visible)
    assert sweep.visible_gpus() == gpus


def test_a_number_of_jobs_that_is_none_is_refused(multirun: Sweep) -> None:
    code, printed = multirun(*TWO, "launcher=joblib", "hydra.launcher.n_jobs=0")
    assert code == 1
    assert "hydra.launcher.n_jobs must be at least 1, or -1" in printed
    assert "Traceback" not in printed


def test_a_missing_package_of_a_launcher_is_named(multirun: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, printed = multirun(*TWO, "launcher=slurm")
    assert code == 1
    assert "launcher=slurm needs the package submitit, which is not installed; pip install" in printed
    assert "Traceback" not in printed


def test_launchers_of_other_packages_are_not_pretended() -> None:
    """In another Hydra program `hydra/launcher=joblib` without its package is "not found"."""
    stored = ConfigStore.instance().repo["hydra"]["launcher"]
    runpy.run_path(str(ROOT / "src" / "hydra_plugins" / "l2bn_launchers.py"))
    ours = {name for name, node in stored.items() if node.provider == "l2bn"}
    assert ours == {"l2bn_processes.yaml", "l2bn_slurm.yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_whose_output_nobody_reads_goes_on(launcher: str, tmp_path: Path) -> None:
    sweep = f"{sys.executable} {ROOT}/scripts/train.py -m launcher={launcher} runs_dir={tmp_path} {' '.join(TWO)}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sweep} 2>&1 | head -n 1"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert len(ended(tmp_path)) == 2
