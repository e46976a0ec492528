"""Sweeps that finish themselves: what is left out, what is told, and what a killed one comes to."""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from conftest import ROOT, TINY
from l2bn.errors import UserError
from l2bn.records import ENVIRONMENT, SUMMARY, read_records
from l2bn.training import session, sweep, worker
from l2bn.training.failure import FAILURE
from l2bn.training.interruption import EXIT_CODE, is_owned
from l2bn.training.planning import compose_sweep, plan_sweep
from test_training import stop_after

Sweep = Callable[..., tuple[int, str]]


@pytest.fixture
def multirun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Sweep:
    """Issue `train.py -m` in this process, under `tmp_path / "runs"`; its exit code and all that it printed."""

    def multirun(*overrides: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", "-m", f"runs_dir={tmp_path / 'runs'}", *TINY, *overrides])
        code: Any = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
        except SystemExit as left:
            code = left.code
        out, err = capfd.readouterr()
        return (1, out + err + code) if isinstance(code, str) else (code, out + err)

    return multirun


def ended(runs: Path) -> dict[str, int]:
    """The runs that have ended, and when."""
    return {path.parent.name: path.stat().st_mtime_ns for path in runs.rglob(SUMMARY)}


def planned(*overrides: str) -> list[str]:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return [str(run.cell) for run in plan_sweep(compose_sweep(overrides))]


# What a sweep is made of.


def test_an_experiment_is_planned_as_it_is_run() -> None:
    cells = planned("experiment=cifar_table", "backbone=resnet20,vgg16", "seed=1,0")
    assert cells == [
        f"{dataset}/{backbone}/{norm}/cosine_200/seed{seed}"
        for seed in (1, 0)
        for dataset in ("cifar10", "cifar100")
        for backbone in ("resnet20", "vgg16")
        for norm in ("bn", "l2bn")
    ]


def test_overridden_values_are_in_the_names_and_what_changes_nothing_is_planned_once() -> None:
    cells = planned("norm=l2bn", "norm.eps=0.1,0.001", "compute.threads=1,2", "seed=7")
    assert cells == [f"digits/resnet20/l2bn,eps={eps}/short/seed7" for eps in (0.1, 0.001)]


def test_runs_that_would_share_a_folder_are_refused() -> None:
    with pytest.raises(UserError, match="precision: 32-true against bf16-mixed"):
        planned("compute.precision=32-true,bf16-mixed")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("backbone=resnet20,resnet21", "resnet110"),  # one of the valid names
        ("experiment=cifar_table backbone=resnet21", "resnet110"),
        ("recipe.epochs=2,0", "epochs=0/seed0: recipe: epochs must be at least 1, not 0"),
        ("norm.scale=max,rms norm=l2bn", "norm.scale must be unit or rms, not 'max'"),
        ("+dataset.path=data", "unknown key dataset.path"),
        ("+backbone.width=1,2", "unknown key backbone.width"),
        ("compute.threads=0.5", "compute.threads must be a whole number or null, not 0.5"),
        ("seed=one,2", "seed must be a whole number, not 'one'"),
        ("compute.precision=32-true,bf16-mixed", "would have one folder"),
    ],
)
def test_a_mistake_in_any_run_is_told_before_the_first(
    given: str, named: str, multirun: Sweep, tmp_path: Path
) -> None:
    code, printed = multirun(*given.split())
    assert code == 1
    assert named in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_runs_that_cannot_be_made_is_told_as_for_a_single_run(multirun: Sweep, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, printed = multirun(*FOUR, f"runs_dir={tmp_path}/file/runs")
    assert code == 1
    assert f"runs_dir: cannot make the folder {tmp_path}/file/runs: Not a directory; name another by" in printed
    assert "launcher stopped" not in printed
    assert "sweep: " not in printed


# What becomes of the runs.

FOUR = ("norm=bn", "seed=0,1,2,3", "recipe.epochs=1", "dataset.subset=64", "dataset.validation=0.05")
CELL = "digits,subset=64,validation=0.05/resnet20/bn/short,epochs=1"


def test_issued_again_a_sweep_has_nothing_to_do(multirun: Sweep, tmp_path: Path) -> None:
    code, printed = multirun(*FOUR)
    assert code == 0
    assert "sweep: 4 finished\n" in printed
    before = ended(tmp_path / "runs")
    assert before.keys() == {"seed0", "seed1", "seed2", "seed3"}
    code, printed = multirun(*FOUR)
    assert code == 0
    assert "sweep: 4 skipped (ended before)\n" in printed
    assert ended(tmp_path / "runs") == before
    code, printed = multirun(*FOUR, "seed=3,4")
    assert code == 0
    assert "sweep: 1 finished, 1 skipped (ended before)\n" in printed


def test_a_failing_run_stops_no_other_and_is_told(
    multirun: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = session.make_record

    def fail(job: session.Job, *arguments: Any) -> Any:
        if job.seed == 1:
            raise ZeroDivisionError("one of these days\nand a second line")
        return record(job, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(session, "make_record", fail)
        code, printed = multirun(*FOUR)
    assert code == 1
    before = ended(tmp_path / "runs")
    assert before.keys() == {"seed0", "seed2", "seed3"}
    summary = printed.partition("sweep: ")[2]
    assert summary.startswith(f"3 finished, 1 failed\nFAIL {CELL}/seed1\n")
    assert "     ZeroDivisionError: one of these days\n     and a second line\n" in summary
    (note,) = tmp_path.rglob(FAILURE)
    assert "in fail\n" in note.read_text()  # the traceback
    code, printed = multirun(*FOUR)
    assert code == 0
    assert "sweep: 1 finished, 3 skipped (ended before)\n" in printed
    assert not note.exists()
    assert {name: time for name, time in ended(tmp_path / "runs").items() if name != "seed1"} == before


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


def test_a_run_that_another_process_has_is_no_failure(multirun: Sweep, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / CELL / "seed1"
    folder.mkdir(parents=True)
    with session.sole_owner(folder):
        assert is_owned(folder)
        code, printed = multirun(*FOUR)
    assert not is_owned(folder)
    assert code == 1
    assert "sweep: 3 finished, 1 running\n" in printed
    assert not list(tmp_path.rglob(FAILURE))


def test_a_diverged_run_has_ended(multirun: Sweep) -> None:
    options = ("norm=bn", "recipe.lr=1e30", "seed=0,1", "recipe.epochs=1")
    for words in ("sweep: 2 diverged\n", "sweep: 2 skipped (ended before)\n"):
        code, printed = multirun(*options)
        assert code == 0
        assert words in printed


def test_a_sweep_that_is_told_to_leave_says_what_is_left(multirun: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        code, printed = multirun(*FOUR, "recipe.epochs=2")
    assert code == EXIT_CODE
    assert "sweep: 1 interrupted, 3 missing\n" in printed
    assert f"cut  {CELL.replace('epochs=1', 'epochs=2')}/seed0  epoch 1 of 2" in printed
    code, printed = multirun(*FOUR, "recipe.epochs=2")
    assert code == 0
    assert printed.count("resumed after epoch 1") == 1
    assert "sweep: 4 finished\n" in printed


def test_a_launcher_that_breaks_down_hides_nothing(multirun: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra._internal.core_plugins import basic_launcher

    monkeypatch.setattr(basic_launcher, "configure_log", lambda *_: 1 / 0)
    code, printed = multirun(*FOUR)
    assert code == 1
    assert "the launcher stopped: ZeroDivisionError" in printed
    assert "sweep: 4 missing\n" in printed


def test_a_run_whose_killed_process_is_still_leaving_is_started_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "PATIENCE", 1.5)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        runs = plan_sweep(compose_sweep([f"runs_dir={tmp_path}", "norm=bn", "seed=0,1,2"]))
    launched: list[list[str]] = []
    with contextlib.ExitStack() as mine, contextlib.ExitStack() as others:
        for stack, run in ((mine, runs[0]), (others, runs[1])):
            run.folder.mkdir(parents=True)
            stack.enter_context(session.sole_owner(run.folder))

        def launch(jobs: Sequence[Sequence[str]]) -> list[JobReturn]:
            launched.append([override for job in jobs for override in job if override.startswith("seed=")])
            Timer(0.5, mine.close).start()
            raise ZeroDivisionError

        assert sweep.run_sweep(runs, launch, parallel=True) == 1
    assert launched == [["seed=0", "seed=1", "seed=2"], ["seed=0", "seed=2"]]


# Real processes.


def start(runs: Path, *overrides: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "-m", f"runs_dir={runs}", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == code, printed
    return printed


TABLE = ("backbone=resnet20,shufflenetv2_x0_5", "norm=bn,l2bn", "seed=0,1,2")
QUICK = ("dataset.subset=64", "dataset.validation=0.05", "recipe.epochs=1", "progress=false", "compute.threads=1")


def tables(runs: Path, out: Path) -> dict[str, bytes]:
    command = [sys.executable, ROOT / "scripts/report.py", "tables", "--runs", runs, "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_killed_sweep_finishes_what_is_missing_and_its_table_is_the_same(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(killed, *TABLE, *QUICK)
    wait_for(lambda: len(ended_folders(killed)) >= 5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = ended_folders(killed)
    assert 5 <= len(before) < 12
    printed = finish(start(killed, *TABLE, *QUICK))
    assert f"sweep: {12 - len(before)} finished, {len(before)} skipped (ended before)\n" in printed
    assert ended_folders(killed).items() >= before.items()
    assert "sweep: 12 finished\n" in finish(start(whole, *TABLE, *QUICK))
    assert tables(killed, tmp_path / "a") == tables(whole, tmp_path / "b")
    assert (tmp_path / "a/grid.md").read_text().count("(3)") == 8  # of two rows, in two tables


def ended_folders(runs: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in runs.rglob(SUMMARY)}


# Side by side on one machine.

SIDE_BY_SIDE = ("launcher=joblib", "hydra.launcher.n_jobs=2", "norm=bn", "seed=0,1,2,3", *QUICK)


def workers(process: "subprocess.Popen[str]") -> list[int]:
    """The processes of joblib that make runs for this one."""
    found = []
    for line in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, fields = line.read_text().rpartition(")")
            command = line.with_name("cmdline").read_text()
        except OSError:
            continue
        if int(fields.split()[1]) == process.pid and "--process-name" in command:
            found.append(int(name.split()[0]))
    return found


def trained_side_by_side(runs: Path, process: "subprocess.Popen[str]") -> set[Path]:
    """The folders of two runs, once each has a checkpoint."""
    wait_for(lambda: len({path.parents[1] for path in runs.rglob("*.pt")}) == 2, process)
    return {path.parents[1] for path in runs.rglob("*.pt")}


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=lambda n: n.name
)
def test_runs_side_by_side_share_the_cores_and_leave_in_good_order(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, *SIDE_BY_SIDE, "recipe.epochs=500", "compute.threads=null")
    folders = trained_side_by_side(tmp_path, process)
    for folder in folders:
        (facts,) = json.loads((folder / ENVIRONMENT).read_text())["starts"]
        assert facts["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    process.send_signal(number)
    printed = finish(process, EXIT_CODE)
    assert "sweep: 2 interrupted, 2 missing\n" in printed
    assert "launcher stopped" not in printed
    assert not any(is_owned(folder) for folder in folders)


@pytest.mark.slow
def test_a_run_that_is_killed_takes_no_other_with_it(tmp_path: Path) -> None:
    process = start(tmp_path, *SIDE_BY_SIDE, "recipe.epochs=12")
    trained_side_by_side(tmp_path, process)
    assert len(workers(process)) == 2
    os.kill(workers(process)[0], signal.SIGKILL)
    printed = finish(process)
    assert "started once more" in printed
    assert "sweep: 4 finished\n" in printed
    records, problems = read_records(tmp_path)
    assert len(records) == 4
    assert problems == []


def owner(folder: Path) -> int:
    """The process that is at work on a run: it has the folder open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if link.readlink() == folder:
                return int(link.parts[2])
    raise LookupError(folder)


@pytest.mark.slow
def test_a_job_that_dies_is_told_when_the_others_have_ended(tmp_path: Path) -> None:
    """Jobs of submitit as Slurm has them, as processes of this machine; the launcher asks the first one first."""
    process = start(tmp_path, "hydra/launcher=submitit_local", "norm=bn", "seed=0,1", *QUICK, "recipe.epochs=30")
    folders = trained_side_by_side(tmp_path, process)
    os.kill(owner(min(folders)), signal.SIGKILL)
    printed = finish(process, code=1)
    assert "the launcher stopped" not in printed
    summary = printed.partition("sweep: ")[2]
    assert summary.startswith("1 finished, 1 failed\nFAIL ")
    assert "/seed0\n     UncompletedJobError: Job " in summary


@pytest.mark.slow
def test_runs_side_by_side_die_with_their_sweep(tmp_path: Path) -> None:
    process = start(tmp_path, *SIDE_BY_SIDE, "recipe.epochs=500")
    folders = trained_side_by_side(tmp_path, process)
    assert all(is_owned(folder) for folder in folders)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(is_owned(folder) for folder in folders):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from joblib import Parallel, delayed

    def gpu_of_this_process() -> tuple[int, str]:
        with worker.side_by_side():
            time.sleep(0.3)
            return os.getpid(), os.environ[worker.VISIBLE]

    monkeypatch.setenv(worker.VISIBLE, "4,7")
    launcher = OmegaConf.create({"_target_": JOBLIB, "n_jobs": -1})
    assert sweep.prepare_launcher(launcher)
    assert launcher.n_jobs == 2
    gpu_of_this_process.__module__ = "__main__"  # sent as it is: its process need not load this module
    seen = Parallel(n_jobs=2, backend="loky")(delayed(gpu_of_this_process)() for _ in range(6))
    assert {gpu for _, gpu in seen} == {"4", "7"}
    assert len(set(seen)) == 2  # a process keeps its own


JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"


def test_without_a_gpu_there_is_a_run_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(worker.VISIBLE, "")
    launcher = OmegaConf.create({"_target_": JOBLIB, "n_jobs": -1})
    sweep.prepare_launcher(launcher)
    assert launcher.n_jobs == len(os.sched_getaffinity(0))


def test_a_missing_launcher_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    import hydra_plugins.l2bn_sweeper as plugin

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "joblib" in name else found(name))
    before = dict(ConfigStore.instance().repo["hydra"]["launcher"])
    runpy.run_path(plugin.__file__)
    node = ConfigStore.instance().repo["hydra"]["launcher"]["joblib.yaml"].node
    ConfigStore.instance().repo["hydra"]["launcher"] = before
    monkeypatch.setattr(sweep, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"hydra-joblib-launcher, which is not installed; pip install"):
        sweep.prepare_launcher(OmegaConf.create({**node, "n_jobs": -1}))
