"""The plan of a command: what each job of a sweep is composed of, and that this is what is trained."""

import contextlib
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from conftest import ROOT, Issue, planned
from l2bn.errors import DECODED_AS_READ, UserError
from l2bn.training import instantiate, plan
from l2bn.training.plan import PlannedRun, composing, differences
from l2bn.training.sweep import PlannedJobs, compose_sweep, plan_sweep, read_planned

SMALL = ("dataset.subset=64", "dataset.image_size=8", "recipe.epochs=1", "recipe.batch_size=32", "progress=false")


def mode(*overrides: str) -> RunMode | None:
    """The mode in which `train.py` without -m issues these overrides."""
    with composing(overrides) as (composer, rest):
        return composer.get_mode("train", rest)


# A value needs to fit each job, not the default choices.


def test_an_experiment_takes_the_values_of_its_own_choices() -> None:
    command = ("experiment=cifar_subset", "dataset.root=X")
    assert mode(*command) == RunMode.MULTIRUN
    found = planned(*command)
    assert len(found) == 6
    assert {run.config["dataset"]["root"] for run in found} == {"X"}


@pytest.mark.parametrize(
    "command",
    ["dataset=cifar10,cifar100 dataset.root=X", "backbone=timm,torchvision backbone.name=resnet18"],
)
def test_a_sweep_takes_the_values_of_its_own_choices(command: str) -> None:
    assert len(planned(*command.split())) == 2


def test_the_options_that_decode_images_as_they_are_read_compose() -> None:
    """Two messages give them to who lacks memory."""
    (run,) = planned(*DECODED_AS_READ.partition(",")[0].split())
    assert run.config["dataset"]["upright"] is True


def test_a_value_that_does_not_fit_a_job_is_refused_with_the_job() -> None:
    with pytest.raises(UserError) as error:
        planned("dataset=cifar10,digits", "dataset.root=X")
    assert "Could not override 'dataset.root'" in str(error.value)
    assert "in the run dataset=digits dataset.root=X" in str(error.value)


# Each job is composed as by Hydra's own sweeper.


def test_an_interpolation_on_the_command_line_is_each_jobs_own() -> None:
    runs = planned("recipe.batch_size=32,64", "dataset.subset=${recipe.batch_size}")
    assert [run.config["dataset"]["subset"] for run in runs] == [32, 64]


SWEEPS = [
    ["norm=bn,l2bn", "recipe.lr=choice(0.1,0.2)", "seed=range(3)"],
    ["norm=glob(l2bn*)", "norm.eps=1e-3"],
    ["recipe.batch_size=32,64", "dataset.subset=${recipe.batch_size}"],
    ["experiment=demo", "seed=3,4"],
    ["dataset=cifar10,cifar100", "dataset.root=X", "+compute.threads=2", "~dataset.label", "+dataset.label='a, b'"],
    ["dataset.label='${recipe.epochs} epochs, ${seed}'", "seed=1,2"],
]


@pytest.mark.parametrize("overrides", SWEEPS, ids=lambda overrides: overrides[0])
def test_each_job_equals_the_one_of_hydras_own_sweeper(overrides: list[str]) -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with composing(overrides) as (_, rest):
        sweep = compose_sweep(rest)
        loader = GlobalHydra.instance().config_loader()
        parameters = [f"{key}={value}" for key, value in (sweep.hydra.sweeper.params or {}).items()]
        parsed = OverridesParser.create(config_loader=loader).parse_overrides([*parameters, *rest])
        (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        expected = []
        for job in jobs:
            config = loader.load_sweep_config(sweep, job)
            config = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
            expected.append(OmegaConf.to_container(config, resolve=True))
        assert [dict(run.config) for run in plan_sweep(sweep)] == expected
    assert len(expected) > 1


def test_a_range_has_the_numbers_that_a_user_reads() -> None:
    runs = planned("recipe.lr=range(0.1,0.5,0.1)")
    assert [run.config["recipe"]["lr"] for run in runs] == [0.1, 0.2, 0.3, 0.4]
    assert [run.cell.recipe for run in runs] == ["short", "short,lr=0.2", "short,lr=0.3", "short,lr=0.4"]
    assert [run.config["seed"] for run in planned("seed=range(1,4)")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("seed=interval(0,3)", ["seed=interval(0,3)", "range("]),
        ("seed=range(3,0)", ["seed=range(3,0)", "no value"]),
        ("norm=bn backbone=glob(restnet*)", ["backbone=glob(restnet*)", "no value", "list.py"]),
        ("norm=bn dataset.label='${oc.env:UNSET}'", ["dataset.label", "UNSET", "in the run norm=bn"]),
        ("norm=bn,l2bn dataset.label='${nothing}'", ["dataset.label", "nothing"]),
        ("norm=null,bn", ["norm", "list.py"]),
        ("launcher=basic,joblib", ["one launcher"]),
        ("hydra.job.name=a,b", ["hydra.job.name=a,b"]),
        ("~recipe.epochs", ["missing recipe.epochs"]),
        ("hydra.searchpath=[file:///nowhere]", ["hydra.searchpath", "/nowhere"]),
        ("hydra.searchpath=/nowhere", ["hydra.searchpath", "list"]),
    ],
)
def test_what_hydra_refuses_is_one_message(given: str, named: list[str]) -> None:
    with pytest.raises(CompactHydraException) as error:
        planned(*given.split())
    for word in named:
        assert word in str(error.value)


@pytest.mark.parametrize("given", ["seed=null", "seed=0,null"])
def test_a_sweep_takes_no_seed_for_another(given: str) -> None:
    with pytest.raises(UserError, match="seed must be a whole number, not None"):
        planned(given)


# Sweeps over experiments.


def test_each_experiment_of_a_sweep_is_expanded() -> None:
    alone = [*planned("experiment=demo"), *planned("experiment=variance_trap")]
    together = planned("experiment=demo,variance_trap")
    assert [(run.folder, run.hash) for run in together] == [(run.folder, run.hash) for run in alone]
    assert len(together) == 6 + 9


def test_a_value_on_the_command_line_holds_in_each_experiment() -> None:
    assert [run.config["seed"] for run in planned("experiment=demo,eps_study", "seed=5", "norm=bn")] == 5 * [5]


# A job is handed what was planned.


def handed_over(run: PlannedRun, jobs: PlannedJobs, sweep: object) -> PlannedRun:
    config = jobs.load_sweep_config(sweep, list(run.overrides))
    return read_planned(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))


def test_a_job_gets_its_planned_run(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["norm=bn,l2bn", "seed=0,1", "recipe.lr=0.2", "compute.threads='${oc.decode:${oc.env:CORES,null}}'"]
    with composing(overrides) as (_, rest):
        sweep = compose_sweep(rest)
        runs, jobs = plan_sweep(sweep), PlannedJobs(plan_sweep(sweep))
    monkeypatch.setenv("CORES", "3")  # of the job's machine
    for run in runs:
        got = handed_over(run, jobs, sweep)
        assert (got.cell, got.hash, got.folder) == (run.cell, run.hash, run.folder)
        assert got.config == {**run.config, "compute": {**run.config["compute"], "threads": 3}}


@contextlib.contextmanager
def checkout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of configs/ in the place of the project's own."""
    configs = folder / "configs"
    subprocess.run(["cp", "-r", str(ROOT / "configs"), str(configs)], check=True)
    for module in (instantiate, plan):
        monkeypatch.setattr(module, "CONFIGS", configs)
    yield configs


def test_an_edit_of_a_yaml_file_reaches_no_job_of_a_planned_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with checkout(tmp_path, monkeypatch) as configs, composing(["norm=bn,l2bn"]) as (_, rest):
        sweep = compose_sweep(rest)
        runs = plan_sweep(sweep)
        jobs = PlannedJobs(runs)
        (configs / "norm/l2bn.yaml").write_text("scale: [")
        (configs / "train.yaml").unlink()
        assert handed_over(runs[1], jobs, sweep).hash == runs[1].hash


def test_hidden_and_unfinished_files_stop_no_run_that_does_not_use_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with checkout(tmp_path, monkeypatch) as configs:
        (configs / "norm/._bn.yaml").write_bytes(b"\x00\x05\x16\x07\xff\xfe")
        (configs / "norm/wip.yaml").write_text("scale: [")
        assert [run.cell.norm for run in planned("norm=glob(*bn)")] == ["bn", "l2bn"]
        assert instantiate.Builder((configs,)).build(
            {"_target_": "l2bn.norms.bn.convert", "_partial_": True}, "norm"
        )
        with pytest.raises(yaml.YAMLError, match=r"norm/wip\.yaml"):
            planned("norm=wip")
        (configs / "norm/wip.yaml").write_bytes(b"scale: \xff")
        with pytest.raises(UserError, match=r"norm/wip\.yaml is not UTF-8"):
            planned("norm=wip")


@pytest.mark.parametrize("experiment", ["cpu_grid", "eps_study", "controls"])
def test_the_command_line_decides_whether_features_are_measured(experiment: str) -> None:
    command = (f"experiment={experiment}", "seed=0", "norm=l2bn", "backbone=resnet20")
    for choice, every in ((), {1000, None}), (("analysis=off",), {0}):
        assert {run.config["analysis"]["every"] for run in planned(*command, *choice)} <= every


def test_no_experiment_has_its_runs_within_those_of_another() -> None:
    """They may have the same cells: reports on runs/ would find two results of one seed."""
    files = (ROOT / "configs/experiment").glob("*.yaml")
    folders = {Path(yaml.safe_load(path.read_text()).get("runs_dir", "runs")) for path in files}
    assert len(folders) > 4
    assert not [(one, other) for one in folders for other in folders if one in other.parents]


@pytest.mark.parametrize(
    "given", ["analysis=off,on", "norm.fused=off,on", "dataset=image_folder dataset.root=one,other dataset.label=x"]
)
def test_jobs_that_would_share_a_folder_are_refused(given: str) -> None:
    """One of them would not be trained, and nobody would see it."""
    said = r"two runs of this sweep would have one folder[\s\S]*'runs_dir=runs/\$\{[a-z.]+\}'"
    with pytest.raises(UserError, match=said):
        planned(*given.split())


@pytest.mark.parametrize(("whole", "number", "boolean"), [("1", "1.0", "true"), ("[0]", "[0.0]", "[false]")])
def test_true_is_another_value_than_1(whole: str, number: str, boolean: str, tmp_path: Path) -> None:
    """To Python they are equal; a norm of the user's own may take either."""
    (tmp_path / "norm").mkdir()
    (tmp_path / "norm/mine.yaml").write_text(f"_target_: mine.convert\n_partial_: true\nsign: {whole}\n")
    one, other = planned("norm=mine", f"norm.sign={whole},{number},{boolean}", folders=[tmp_path])
    assert (one.cell.norm, other.cell.norm) == ("mine", f"mine,sign={boolean.replace('t', 'T').replace('f', 'F')}")
    assert [line.partition(":")[0] for line in differences(one.identity, other.identity)] == ["norm.sign"]


def test_a_user_file_with_the_name_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "norm").mkdir()
    (tmp_path / "norm/bn.yaml").write_text((ROOT / "configs/norm/bn.yaml").read_text())
    with pytest.raises(UserError, match=r"norm/bn\.yaml is in .* and in .*; give your own another name"):
        planned("norm=bn", folders=[tmp_path])
    assert len(planned("norm=l2bn", folders=[tmp_path])) == 1
    (tmp_path / "train.yaml").write_text((ROOT / "configs/train.yaml").read_text().replace("seed: 0", "seed: 7"))
    with pytest.raises(UserError, match=r"^train\.yaml is in .* and in "):
        planned("norm=l2bn", folders=[tmp_path])


# The command.


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, issue: Issue) -> Issue:
    """Issue `train.py` in the test's own folder."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(issue, "train")


@pytest.mark.parametrize("mode", [["-m"], []], ids=["sweep", "run"])
def test_runs_lie_where_the_command_was_issued(mode: list[str], command: Issue, tmp_path: Path) -> None:
    done = command(*mode, *SMALL, "norm=bn", "runs_dir=rel", "hydra.job.chdir=true", "hydra.run.dir=elsewhere")
    assert ("sweep: 1 finished" in done.printed) == bool(mode)
    (record,) = (tmp_path / "rel").rglob("summary.json")
    assert record.relative_to(tmp_path / "rel").parts[1] == "resnet20"


def test_a_tilde_is_the_home_folder(command: Issue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for arguments in (("norm=bn",), ("-m", "norm=bn,l2bn")):
        command(*SMALL, 'runs_dir="~/x"', *arguments)
    assert len(list((tmp_path / "home/x").rglob("summary.json"))) == 2
    assert not (tmp_path / "~").exists()


def test_another_sweeper_is_refused(command: Issue) -> None:
    done = command("-m", "norm=bn", "+hydra.sweeper.n_trials=3")
    assert done.code == 1
    assert "Traceback" not in done.printed
    assert "cannot be used here" in done.err


def test_a_longer_run_says_that_it_starts_again(command: Issue) -> None:
    command(*SMALL, "norm=bn")
    longer = (*SMALL, "norm=bn", "recipe.epochs=2")
    assert "short,epochs=1/seed0 is an equal run with another number of epochs" in command(*longer).printed
    for others in ((), ("recipe.lr=0.2",)):
        done = command(*longer, *others)
        assert done.code == 0
        assert "equal run" not in done.printed
