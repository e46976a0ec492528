"""How a command ends on its user's mistake: one message, exit code not 0, no traceback; and on one of ours."""

import errno
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

import l2bn.training
from conftest import ROOT, TINY, TRAIN, Issue, finish, start, train_in
from l2bn.errors import UserError
from l2bn.failures import exit_with_message, explain
from l2bn.records import read_metrics, read_records

RUN = "runs/digits,image_size=8,subset=256/resnet20/bn/short,epochs=1/seed0"
CONFIG, SUMMARY, METRICS = (f"{RUN}/{name}" for name in ("config.yaml", "summary.json", "metrics.jsonl"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in `runs`."""
    folder = tmp_path_factory.mktemp("finished")
    train_in(folder / "runs", "norm=bn", "recipe.epochs=1", *TINY)
    return folder


# The command, what is written before it (file: content), and what the message must name.
WRONG: list[tuple[list[str], dict[str, str], list[str]]] = [
    (["evaluate.py", "nowhere"], {}, ["nowhere", "not the folder of a run"]),
    (["evaluate.py", CONFIG], {}, [CONFIG, "Not a directory"]),
    (["evaluate.py", RUN], {CONFIG: "{"}, [CONFIG, "not the configuration of a run"]),
    (["evaluate.py", RUN], {CONFIG: "- 1"}, [CONFIG, "not the configuration of a run"]),
    (["evaluate.py", RUN, "--device", "tpu"], {}, ["--device", "tpu", "cuda"]),
    (["evaluate.py", RUN, "--root", "x"], {}, ["dataset.root"]),
    (["evaluate.py"], {}, ["required: RUN"]),
    (["replay.py", "nowhere"], {}, ["nowhere", "not the folder of a run"]),
    (["replay.py", RUN], {CONFIG: "cell: {}\nseed: 0"}, [CONFIG, "missing"]),
    (["replay.py", RUN, "--runs-dir", "/proc/x"], {}, ["runs_dir", "/proc/x"]),
    (["publish.py", "nowhere"], {}, ["nowhere", "not published"]),
    (["publish.py", RUN, "--to", CONFIG], {}, [CONFIG, "Not a directory"]),
    (["publish.py", RUN, "--to", "out"], {CONFIG: "{"}, [RUN, "cannot be read"]),
    (["publish.py", RUN, "--to", "out"], {CONFIG: "- 1"}, [RUN, "config.yaml"]),
    (["publish.py", RUN, "--to", "out"], {METRICS: ""}, [RUN, "metrics.jsonl"]),
    (["publish.py", RUN, "--to", "out"], {SUMMARY: "{"}, [RUN, "summary.json"]),
    (["report.py", "tables", "--runs", "nowhere"], {}, ["nowhere", "no folder of records"]),
    (["report.py", "tables", "--runs", "runs", "--out", CONFIG], {}, [CONFIG, "File exists"]),
    (["report.py", "tables", "--runs", "runs", "--out", "/proc/x"], {}, ["/proc/x", "No such file"]),
    (["report.py", "tensorboard", "--runs", "nowhere"], {}, ["nowhere", "no folder of records"]),
    (["report.py", "tables", "--runs", "runs", "--strict"], {SUMMARY: "{"}, [RUN, "summary.json"]),
    (["report.py", "figures", "--runs", "runs", "--out", CONFIG], {}, [CONFIG, "File exists"]),
    (["report.py", "claims", "--runs", "runs", "--out", "/proc/x"], {}, ["/proc/x", "No such file"]),
    (["report.py", "mechanism", "nets"], {}, ["nets", "tables"]),
    (["analyze.py", "--run", "nowhere"], {}, ["nowhere", "not the folder of a run"]),
    (["analyze.py", "--run", RUN, "--root", "x"], {}, ["dataset.root"]),
    (["status.py", "--runs", "nowhere"], {}, ["--runs: there is no folder nowhere"]),
    (["status.py", "--experiment", "cifar_table", "backbone=resnet21"], {}, ["backbone/resnet21", "resnet20"]),
    (["list.py", "nets"], {}, ["nets", "backbone"]),
    (["list.py", "norm", "--hours"], {}, ["--hours", "norm", "backbone"]),
    (["fetch_data.py", "digits", "--classes", "1"], {}, ["--classes", "--figure"]),
    (["fetch_data.py", "digits", "--pack", "x"], {}, ["--pack", "imagenet_wds", "digits"]),
    (["fetch_data.py", "digits", "dataset.image_size=0"], {}, ["dataset.image_size", "0", "from 1 to 4096"]),
    (["fetch_data.py", "null"], {}, ["null", "list.py"]),
    (["fetch_data.py", "nonsense"], {}, ["nonsense", "cifar10"]),
    (["fetch_data.py", "image_folder"], {}, ["dataset.root"]),
    (["fetch_data.py", "cifar10", "dataset.rot=x"], {}, ["Key 'rot' is not"]),
    (["fetch_data.py", "image_folder", "dataset.root=~/x"], {}, ["""'dataset.root="~/x"'"""]),
    (["fetch_data.py", "image_folder", "dataset.root=/data/Übung"], {}, ["""'dataset.root="/data/Übung"'"""]),
    (["fetch_data.py", "image_folder", "dataset.root=a,b"], {}, ["root", "quote the value"]),
    (["fetch_data.py", "imagenet", "dataset.root='~nobodyhere/x'"], {}, ["dataset.root=~nobodyhere/x", "no home"]),
    (
        ["fetch_data.py", "imagenet_wds", "dataset.root=x", "dataset.train=/data/none-*.tar"],
        {},
        ["no shards", "/data/none-*.tar", "dataset.root=FOLDER"],
    ),
    (["fetch_data.py", "imagenet_wds", "--pack", "~nobodyhere/x"], {}, ["--pack=~nobodyhere/x", "no home folder"]),
    (["fetch_data.py", "imagenet_wds", "--pack", "nowhere"], {}, ["nowhere", "by --pack FOLDER"]),
    (["benchmark.py", "norm", "--json", "/proc/x.json"], {}, ["/proc/x.json", "No such file"]),
    (["benchmark.py", "step", "--batch", "0"], {}, ["--batch", "number from 1", "0"]),
    (["benchmark.py", "waiting", "--batches", "128", "-8"], {}, ["--batches", "number from 1", "-8"]),
    (["benchmark.py", "train", "--callers", "lazy"], {}, ["--callers", "lazy", "compiled"]),
    (["train.py", "--config-dir", ".", "--config-dir", "..", "--cfg", "job"], {}, ["--config-dir", "only one"]),
    (["benchmark.py", "nets"], {}, ["nets", "norm"]),
]


def test_each_row_names_more_than_was_typed() -> None:
    for command, _, named in WRONG:
        assert not all(word in " ".join(command) for word in named), command


@pytest.mark.parametrize(
    ("command", "files", "named"), WRONG, ids=[" ".join(command) + str(files or "") for command, files, _ in WRONG]
)
def test_a_wrong_argument_is_named(
    command: list[str],
    files: dict[str, str],
    named: list[str],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    issue: Issue,
) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    monkeypatch.chdir(tmp_path)
    script, *arguments = command
    done = issue(script.removesuffix(".py"), *arguments)
    assert done.code
    assert "Traceback" not in done.printed
    for word in named:
        assert word in " ".join(done.printed.split()), done.printed


def test_ended_runs_are_published_also_beside_one_that_is_not(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, issue: Issue
) -> None:
    monkeypatch.chdir(finished)
    for runs, code in (([RUN], 0), (["nowhere", RUN], 1)):
        to = tmp_path / str(code)
        done = issue("publish", *runs, "--to", to)
        (record,) = read_records(to)[0]
        assert (done.code, done.out) == (code, f"{record.folder}\n")


# What goes wrong before any code of ours runs: only the real command shows it.
BEFORE_US = {
    "norm=null": ["norm=null", "list.py"],
    "--config-dir . recipe=mine": ["recipe/mine.yaml", "line 1", "correct"],
}


@pytest.mark.parametrize("given", BEFORE_US)
def test_a_mistake_that_hydra_meets_is_one_message_too(given: str, tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("epochs: [1\n")
    printed = finish(start(TRAIN, *given.split(), cwd=tmp_path), 1)
    assert "Traceback" not in printed
    for word in BEFORE_US[given]:
        assert word in printed


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("seed must be 0 or more, not -1"), "seed must be 0 or more, not -1"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs"), "runs: No space left on device; make room"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), "runs"), "out of memory: "),
        (yaml.YAMLError("no YAML in x.yaml"), "no YAML in x.yaml\ncorrect this file"),
        (BrokenPipeError(errno.EPIPE, "of another pipe"), "[Errno 32] of another pipe"),
        (ValueError("of a library"), "of a library\ngiven: seed=-1"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_mend_is_told_plainly(error: Exception, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=-1"])
    with pytest.raises(SystemExit) as left, exit_with_message():
        raise error
    assert str(left.value.code).startswith(told)


@pytest.mark.parametrize(
    ("override", "reason", "quotes"),
    [
        ("seed=range(x", "no viable alternative", False),
        ("dataset.root=Bilder(1)", "Unknown function 'Bilder'", True),
        ("norm=bn,", "mismatched input '<EOF>'", False),  # of norm=bn, l2bn without quotes
        ("l2bn", "missing EQUAL", False),
        ("dataset.root=Läufe", "LexerNoViableAltException", True),
        ("dataset.root=/data (1)", "mismatched input ' ('", True),
    ],
)
def test_why_an_override_cannot_be_read_is_told(override: str, reason: str, quotes: bool) -> None:
    with pytest.raises(OverrideParseException) as raised:
        OverridesParser.create().parse_overrides([override])
    told = explain(raised.value) or ""
    assert f"{override} cannot be read: " in told
    assert reason in told.splitlines()[0]
    assert ("needs quotes" in told) == quotes


def test_make_refuses_a_setting_that_it_would_not_pass_on(tmp_path: Path) -> None:
    for setting in ("seed=1", "recipe.epochs=5"):
        make = ["make", "cifar-resnet-l2bn", setting, f"VENV={tmp_path}", "PYTHON=false"]  # which installs nothing
        alone = {name: value for name, value in os.environ.items() if "MAKE" not in name}  # not within `make test`
        done = subprocess.run(make, cwd=ROOT, env=alone, capture_output=True, text=True)
        key = setting.partition("=")[0]
        assert (done.returncode, done.stdout) == (2, f"make: give {key} within ARGS, as in ARGS='{key}=...'\n")


def test_an_error_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(AttributeError), exit_with_message():
        read_metrics(None)  # type: ignore[arg-type]


def test_ctrl_c_before_the_run_is_no_traceback() -> None:
    with pytest.raises(SystemExit) as left, exit_with_message():
        raise KeyboardInterrupt
    assert left.value.code == 130


def test_a_reader_may_stop_reading() -> None:
    """As in `claims.py | head`."""
    code = "from l2bn.failures import exit_with_message\nwith exit_with_message():\n    print('much', *range({}))"
    for size in (1, 100_000):  # written at the end, and before
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-c", code.format(size)]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
        os.close(writer)
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_command_may_begin_without_stdout(tmp_path: Path) -> None:
    status = [sys.executable, str(ROOT / "scripts/status.py"), "--runs", str(tmp_path)]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *status], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_user_who_asks_for_tracebacks_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError), exit_with_message():
        raise UserError("seed must be 0 or more, not -1")


# How long a user waits, in seconds of the processor: those of the clock on a machine with nothing else to do.


def processor_seconds(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, TRAIN, *arguments]
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
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for own, set_to in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)):
        with mock.patch.dict(os.environ, environment | own, clear=True):
            runpy.run_path(str(l2bn.training.__file__))
            assert os.environ.get("GOMP_SPINCOUNT") == set_to
