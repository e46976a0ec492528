"""What a run gives away, and what a foreign record can make it do.

Other files hold the rest: archives (`test_data_archive.py`), pickles of data (`test_data_cifar.py`) and of
checkpoints (`test_checkpoint.py`), targets, paths and objects in a record's YAML (`test_replay.py`).
"""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, TINY, children, kill, start, train_in, wait_for
from l2bn.publication import publish
from l2bn.records import SUMMARY, InvalidRecordError
from l2bn.training.existing import replay
from test_records import written

SECRET = "correct-horse-battery-staple"
FACTS = {
    *("time", "commit", "dirty", "source", "python", "packages", "system", "processor", "device", "cuda", "cudnn"),
    *("cpu_capability", "threads", "deterministic", "kernels", "own_source", "own_source_beside_norm"),
    "channels_last",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was made with a secret in its environment; to be read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L2BN_TOKEN", SECRET)
        return train_in(tmp_path_factory.mktemp("made"), "recipe.epochs=1", *TINY).folder


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run, with the secret still in the environment."""
    monkeypatch.setenv("L2BN_TOKEN", SECRET)
    return shutil.copytree(made, tmp_path / "run")


def test_nothing_of_the_environment_but_a_whitelist_enters_a_run(made: Path) -> None:
    """Not its record, nor its checkpoints, nor what TensorBoard shows."""
    (start,) = json.loads((made / "env.json").read_text())["starts"]
    assert start.keys() == FACTS
    files = [path for path in made.rglob("*") if path.is_file()]
    assert len(files) >= 7
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_a_published_record_says_nothing_of_the_machine(made: Path, tmp_path: Path) -> None:
    runs = str(made.parents[4])
    assert runs in (made / "config.yaml").read_text()
    record = publish(made, tmp_path / "records")
    text = "".join(path.read_text() for path in record.iterdir())
    for private in (SECRET, runs, str(tmp_path), str(Path.home())):
        assert private not in text


def test_a_record_cannot_ask_for_the_environment(run: Path, tmp_path: Path) -> None:
    """What its YAML says is taken as it stands: an interpolation is a text like any other."""
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["dataset"]["label"] = "${oc.env:L2BN_TOKEN}"
    path.write_text(yaml.safe_dump(config))
    record = replay(run, str(tmp_path / "replayed"))
    assert record.label.startswith("${oc.env:L2BN_TOKEN}")
    assert [p for p in record.folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()] == []


@pytest.mark.parametrize("name", ["../../elsewhere", "/elsewhere", "a/b", "..", "", "a\0b", "a\ud800b", 256 * "a"])
def test_a_record_cannot_say_where_it_is_published(name: str, tmp_path: Path) -> None:
    written(tmp_path / "run")
    path = tmp_path / "run" / SUMMARY
    summary = json.loads(path.read_text())
    for part in ("dataset", "backbone", "norm", "recipe"):
        path.write_text(json.dumps({**summary, part: name}))
        with pytest.raises(InvalidRecordError, match=f"{part}: must be a plain name"):
            publish(tmp_path / "run", tmp_path / "deep" / "records")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def listening(pid: int) -> set[str]:
    """The addresses, in the kernel's hexadecimal, at which a process and those it has started listen."""
    found = set().union(*(listening(child) for child in children(pid)))
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets |= set(re.findall(r"socket:\[(\d+)\]", str(descriptor.readlink())))
        except FileNotFoundError:
            continue
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in sockets:  # listens
                found.add(columns[1].partition(":")[0])
    return found


def test_tensorboard_is_there_for_this_machine_alone(tmp_path: Path) -> None:
    """The command of `make tensorboard` itself, on a free port, for a folder with a space in its name."""
    (tmp_path / "my runs").mkdir()
    make = ["make", "--dry-run", "--no-print-directory", "tensorboard", f"LOGDIR={tmp_path / 'my runs'}"]
    printed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    _, script, *arguments = shlex.split(printed.splitlines()[-1])
    assert [script, *arguments] == ["scripts/report.py", "tensorboard", "--runs", str(tmp_path / "my runs")]
    server = start(ROOT / script, *arguments, "--port", 0, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: listening(server.pid), server)
        assert listening(server.pid) == {"0100007F"}  # 127.0.0.1
    finally:
        kill(server)
