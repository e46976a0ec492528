"""How a sweep stands, as the terminal shows it."""

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from conftest import ROOT, Issue, planned
from l2bn.failures import note_failure
from l2bn.records import CONFIG, METRICS, SUMMARY, Record
from l2bn.training.interruption import run_lock
from l2bn.training.plan import PlannedRun
from l2bn.training.status import duration, find_runs, read_status, status_grid
from synthetic_records import write_run

SWEEP = ("backbone=resnet20,vgg11", "norm=bn,l2bn", "seed=0,1,2", "recipe.epochs=10")


@pytest.fixture(scope="module")
def sweep() -> list[PlannedRun]:
    return planned(*SWEEP)


@pytest.fixture
def runs(sweep: list[PlannedRun], tmp_path: Path) -> dict[str, PlannedRun]:
    """A planned sweep, by "backbone/norm/seed"."""
    here = [replace(run, config={**run.config, "runs_dir": str(tmp_path)}) for run in sweep]
    return {f"{run.cell.backbone}/{run.cell.norm}/{run.cell.seed}": run for run in here}


def begin(run: PlannedRun, epochs: int, seconds: float = 6.0) -> None:
    """Leave in a run's folder what it has written after so many epochs."""
    run.folder.mkdir(parents=True)
    (run.folder / CONFIG).write_text(yaml.safe_dump({**run.config, "cell": vars(run.cell)}))
    rows = [json.dumps({"epoch": epoch + 1, "seconds": seconds}) for epoch in range(epochs)]
    (run.folder / METRICS).write_text("\n".join([*rows, '{"epoch": 99, "sec']))  # the next is just being written


def end(root: Path, run: PlannedRun, status: str = "finished", as_of: PlannedRun | None = None) -> None:
    cell = run.cell
    names = {"dataset": cell.dataset, "backbone": cell.backbone, "norm": cell.norm, "recipe": cell.recipe}
    record = write_run(root, **names, seed=cell.seed, epochs=10, status=status, identity=(as_of or run).identity)
    Record(**{**vars(record), "hash": (as_of or run).hash}).write()


def shown(runs: Sequence[PlannedRun], width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, record=True, highlight=False)
    console.print(status_grid([read_status(run) for run in runs], width))
    return console.export_text()


def test_every_way_a_run_may_stand_is_shown(runs: dict[str, PlannedRun], tmp_path: Path) -> None:
    end(tmp_path, runs["resnet20/bn/0"])
    end(tmp_path, runs["resnet20/bn/1"], "diverged")
    begin(runs["resnet20/bn/2"], 4)
    begin(runs["resnet20/l2bn/0"], 5, seconds=12.0)
    begin(runs["resnet20/l2bn/1"], 0)
    note_failure(runs["resnet20/l2bn/1"].folder, RuntimeError("first line\nsecond line\nthird\nfourth"))
    with run_lock(runs["resnet20/l2bn/0"].folder):
        text = shown(list(runs.values()))
    lines = [line.split() for line in text.splitlines()]
    assert ["digits", "resnet20", "bn", "done", "div", "cut", "40%", "2.7", "36", "s"] in lines
    assert ["l2bn", "run", "50%", "FAIL", "–", "12.0", "5", "min"] in lines
    assert ["vgg11", "bn", "–", "–", "–", "?"] in lines
    assert "1 finished, 1 running, 1 interrupted, 1 diverged, 1 failed, 7 missing" in text
    # 20 epochs of the ended, 4 and 5 under way; 36 s, 60 s and, by the pace of its like, 2 x 120 s are left.
    assert "24 % of 120 epochs; about 6 min of training left; 6 of unknown pace" in text
    assert "run  digits/resnet20/l2bn/short,epochs=10/seed0  epoch 5 of 10, 1 min left" in text
    assert "cut  digits/resnet20/bn/short,epochs=10/seed2  epoch 4 of 10, 36 s left" in text
    assert "FAIL digits/resnet20/l2bn/short,epochs=10/seed1\n     RuntimeError: first line\n" in text
    assert "     third\n     ...\n" in text
    assert "loss is nan in epoch 1, step 7" in text


def test_a_sweep_takes_at_least_as_long_as_its_longest_run(runs: dict[str, PlannedRun]) -> None:
    begin(runs["resnet20/bn/0"], 9, seconds=10.0)
    begin(runs["resnet20/bn/1"], 1, seconds=100.0)
    with run_lock(runs["resnet20/bn/0"].folder), run_lock(runs["resnet20/bn/1"].folder):
        text = shown([runs["resnet20/bn/0"], runs["resnet20/bn/1"]])
    assert "about 15 min of training left with 2 at a time" in text


def test_the_norms_of_a_pair_stand_below_each_other_whatever_the_sweep_goes_through_first(tmp_path: Path) -> None:
    runs = planned(f"runs_dir={tmp_path}", "norm=l2bn,bn", "backbone=vgg11,resnet20")
    rows = shown(runs).splitlines()[2:6]
    assert [row.split()[:3] for row in rows] == [
        ["digits", "vgg11", "l2bn"],
        ["bn", "–", "?"],
        ["resnet20", "l2bn", "–"],
        ["bn", "–", "?"],
    ]


def test_runs_that_have_begun_are_found_without_their_sweep(runs: dict[str, PlannedRun], tmp_path: Path) -> None:
    begin(runs["resnet20/bn/0"], 3)
    begin(runs["vgg11/l2bn/2"], 4)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / CONFIG).write_text("[1, 2]")
    found = find_runs(tmp_path)
    assert [(run.cell, run.folder, run.hash) for run in found] == [
        (run.cell, run.folder, run.hash) for run in (runs["resnet20/bn/0"], runs["vgg11/l2bn/2"])
    ]
    assert "2 interrupted" in shown(found)


def test_runs_are_found_from_within_their_folder(
    runs: dict[str, PlannedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs["resnet20/bn/0"]
    begin(run, 1)
    for depth in range(len(run.cell.path.parts) + 1):
        place = (run.folder / "x").parents[depth]
        monkeypatch.chdir(place)
        for root in (Path(), Path(".."))[: 2 if place != tmp_path else 1]:
            assert [found.folder.resolve() for found in find_runs(root)] == [run.folder]


def test_a_run_is_the_same_with_whole_numbers_in_a_list(runs: dict[str, PlannedRun], tmp_path: Path) -> None:
    run = runs["resnet20/bn/0"]
    end(tmp_path, run)
    record = Record.read(run.folder)
    asked = replace(run, config={**run.config, "dataset": {**run.config["dataset"], "std": [1.0, 1.0, 1.0]}})
    for std, same in (([1, 1, 1], True), ([2, 1, 1], False)):
        own = {**run.identity, "dataset": {**run.identity["dataset"], "std": std}}
        Record(**{**vars(record), "identity": own}).write()
        assert (read_status(asked).standing == "finished") is same


def test_a_link_to_a_run_does_not_hide_it(runs: dict[str, PlannedRun], tmp_path: Path) -> None:
    run = runs["resnet20/bn/0"]
    begin(run, 3)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "best").symlink_to(run.folder)  # is found first
    assert [found.folder for found in find_runs(tmp_path)] == [run.folder]


def test_a_run_that_was_moved_away_does_not_count_as_the_one_in_its_place(
    runs: dict[str, PlannedRun], tmp_path: Path
) -> None:
    run = runs["resnet20/bn/0"]
    begin(run, 3)
    run.folder.rename(run.folder.with_name("seed0.old"))
    assert find_runs(tmp_path) == []
    begin(run, 4)
    assert [found.folder for found in find_runs(tmp_path)] == [run.folder]


def test_brackets_in_a_name_are_no_markup(tmp_path: Path) -> None:
    runs = planned("dataset.label='[bold]'", "norm=bn", f"runs_dir={tmp_path}")
    assert "digits,label=[bold] " in shown(runs)


def test_a_sweep_of_no_epochs_is_shown(tmp_path: Path) -> None:
    assert "1 missing" in shown(planned("recipe.epochs=0", f"runs_dir={tmp_path}"))


def test_a_configuration_in_too_few_folders_for_a_run_is_skipped(
    runs: dict[str, PlannedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("copied").mkdir()
    Path("copied", CONFIG).write_text(runs["resnet20/bn/0"].as_yaml())
    assert find_runs(Path("copied")) == []


def test_runs_of_one_cell_in_two_folders_stand_apart(runs: dict[str, PlannedRun], tmp_path: Path) -> None:
    run = runs["resnet20/bn/0"]
    demo = replace(run, config={**run.config, "runs_dir": str(tmp_path / "demo")})
    end(tmp_path / "demo", demo)
    begin(run, 4)
    text = shown([run, demo], width=400)
    assert text.startswith(f"{tmp_path} and {tmp_path}/demo, recipe short")
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:5] if line}
    assert lines["folder"] == ["data", "set", "backbone", "norm", "seed", "0", "s/epoch", "left"]
    assert lines[str(tmp_path)] == ["digits", "resnet20", "bn", "cut", "40%", "6.0", "36", "s"]
    assert lines[str(tmp_path / "demo")] == ["digits", "resnet20", "bn", "done", "1.0"]
    assert f"cut  {run.folder}  epoch 4 of 10" in text


def test_colour_says_nothing_that_a_word_does_not(runs: dict[str, PlannedRun], tmp_path: Path) -> None:
    end(tmp_path, runs["resnet20/bn/0"])
    console = Console(width=120, force_terminal=True, color_system="standard", highlight=False)
    with console.capture() as captured:
        console.print(status_grid([read_status(run) for run in runs.values()], 120))
    assert re.search(r"\x1b\[32mdone *\x1b\[0m", captured.get())


@pytest.mark.parametrize("ended", [True, False])
def test_a_folder_with_another_run_in_it_is_no_result(
    ended: bool, runs: dict[str, PlannedRun], tmp_path: Path
) -> None:
    run, other = runs["resnet20/bn/0"], runs["vgg11/bn/0"]
    begin(other, 3)
    run.folder.parent.mkdir(parents=True)
    other.folder.rename(run.folder)
    if ended:
        end(tmp_path, run, as_of=other)
        (run.folder / CONFIG).write_text(yaml.safe_dump({**other.config, "cell": vars(other.cell)}))
    outcome = read_status(run)
    assert outcome.standing == "failed"
    assert "another run, with another backbone._target_" in outcome.message


def test_a_damaged_record_is_no_result(runs: dict[str, PlannedRun], tmp_path: Path) -> None:
    run = runs["resnet20/bn/0"]
    end(tmp_path, run)
    (run.folder / SUMMARY).write_text("{")
    assert read_status(run).standing == "failed"
    assert "summary.json cannot be read" in read_status(run).message


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (math.nan, "?"),
        (42.2, "42 s"),
        (61, "1 min"),
        (3599, "1 h 00 min"),
        (11100, "3 h 05 min"),
        (190000, "2 d 4 h"),
    ],
)
def test_durations_are_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.slow
@pytest.mark.parametrize("experiment", sorted(path.stem for path in (ROOT / "configs/experiment").glob("*.yaml")))
def test_the_grid_of_any_experiment_is_readable_in_80_columns(experiment: str) -> None:
    choices = (ROOT / "configs/experiment" / f"{experiment}.yaml").read_text()
    root = ["dataset.root=X"] if re.search(r"dataset: (cifar|image)", choices) else []
    check_readable(planned(f"experiment={experiment}", *root))


@pytest.fixture(scope="module")
def four() -> list[PlannedRun]:
    return planned("norm=bn,l2bn", "backbone=resnet20,mobilenetv2_x0_5")


@pytest.mark.parametrize("seeds", [1, 5, 6, 7, 20, 101])
def test_the_grid_of_any_number_of_seeds_is_readable_in_80_columns(seeds: int, four: list[PlannedRun]) -> None:
    runs = [replace(run, cell=replace(run.cell, seed=seed)) for seed in range(seeds) for run in four]
    text = check_readable(runs)
    header = text.splitlines()[1]
    assert ("seed 0" in header) != ("missing" in header)
    if seeds >= 20:
        assert re.search(rf"^ +mobilenetv2_x0_5 +bn +{seeds} +\?$", text, re.MULTILINE)


def check_readable(runs: Sequence[PlannedRun]) -> str:
    """Every name, and the standing of every run, must be seen in 80 columns."""
    text = shown(runs, width=80)
    assert max(map(len, text.splitlines())) <= 80
    header = text.splitlines()[1]
    rows = {(run.folder.parent, run.cell.norm) for run in runs}
    backbone, norm = header.index("backbone"), header.index(" norm")
    behind = header.index("recipe") if "recipe" in header else norm
    names: list[tuple[str, str]] = []
    for line in takewhile(bool, text.splitlines()[2:]):
        found = line[backbone:behind].strip(), line[norm:].partition("  ")[0].strip()
        if line.endswith("?"):  # the first line of a row
            names.append(("", ""))
        names[-1] = names[-1][0] + found[0], names[-1][1] + found[1]
    assert {name for name, _ in names} - {""} == {run.cell.backbone for run in runs}
    assert sorted(name for _, name in names) == sorted(name for _, name in rows)
    assert text.count("–") == len(runs) if "seed" in header else header.count("missing") == 1
    assert text.count("?") == len(rows)
    return text


def test_many_runs_that_say_the_same_are_listed_in_part(tmp_path: Path) -> None:
    runs = planned("norm=bn", "seed=range(30)", f"runs_dir={tmp_path}")
    for run in runs:
        note_failure(run.folder, RuntimeError("the same"))
    text = shown(runs, width=80)
    assert text.count("FAIL digits") == 10
    assert "     and 20 more\n     RuntimeError: the same\n" in text


def test_the_command_shows_an_experiment(tmp_path: Path, issue: Issue) -> None:
    done = issue("status", "--experiment", "demo", f"runs_dir={tmp_path}", "recipe=step_164")
    assert done.code == 0, done.err
    assert "recipe step_164" in done.out
    assert "6 missing" in done.out
    assert max(map(len, done.out.splitlines())) <= 120


def test_the_command_takes_what_train_takes(tmp_path: Path, issue: Issue) -> None:
    runs = str(tmp_path / 'my "runs" \\ é')
    done = issue("status", "-m", "norm=bn,l2bn", "seed=range(0,3)", "--runs", runs)
    assert done.code == 0, done.err
    assert done.out.startswith(f"{runs}, recipe short")
    assert "6 missing" in done.out
    assert "No run here yet" in issue("status", "--runs", tmp_path).out
    assert "--runs=~nobodyhere/runs: no home folder is known" in issue("status", "--runs", "~nobodyhere/runs").err


def test_a_look_at_a_sweep_does_not_load_torch() -> None:
    code = "import sys, l2bn.training.status, l2bn.training.sweep\n"
    assert subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"]).returncode == 0
