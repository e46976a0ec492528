"""The package as it is installed, not as it stands in a checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT, TINY


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked; beside it the scripts, as a user who has no checkout might have copied them."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if name.startswith(("src/", "configs/", "pyproject.toml", "README.md", "LICENSE")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            target = source / name
            if (ROOT / name).is_symlink():
                target.symlink_to((ROOT / name).readlink())
            else:
                target.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", folder, source], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder / "site")
    (folder / "tools").mkdir()
    for script in (ROOT / "scripts").glob("*.py"):
        (folder / "tools" / script.name).write_text(script.read_text())
    return folder


def issue(installed: Path, name: str, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed / "site")}
    command = [sys.executable, installed / "tools" / f"{name}.py", *arguments]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, cwd=installed, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_package_trains_lists_and_replays(installed: Path) -> None:
    carried = sorted(
        path.relative_to(installed / "site/l2bn") for path in (installed / "site/l2bn").rglob("*.yaml")
    )
    assert carried == sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
    assert "resnet20" in issue(installed, "list", "backbone")
    assert "1,437 images to train on" in issue(installed, "fetch_data", "digits")
    options = [*TINY, "recipe.epochs=1", "runs_dir=runs"]
    assert "sweep: 2 finished" in issue(installed, "train", "-m", "norm=bn,l2bn", *options)
    assert "2 finished" in issue(installed, "status", "norm=bn,l2bn", *options)
    (run,) = installed.glob("runs/*/*/l2bn/*/*")
    evaluated = issue(installed, "evaluate", run)
    assert evaluated.startswith("test loss")
    replayed = installed / issue(installed, "replay", run, "--runs-dir", "again").splitlines()[-1]
    assert issue(installed, "evaluate", replayed) == evaluated


def test_a_script_of_a_checkout_reads_the_checkouts_configurations(tmp_path: Path) -> None:
    """Also where another copy of the package is installed, whose code runs: that is said."""
    code = "import sys; sys.argv[0] = sys.argv[1]; from l2bn.training.instantiate import CONFIGS; print(CONFIGS)"
    (tmp_path / "src/l2bn").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    (tmp_path / "src/l2bn/configs").symlink_to("../../configs")
    for script, configs in ((tmp_path / "scripts/train.py", tmp_path / "configs"), ("-c", ROOT / "configs")):
        done = subprocess.run([sys.executable, "-c", code, script], capture_output=True, text=True, check=True)
        assert Path(done.stdout.strip()) == configs.resolve()
        said = done.stderr.strip()
        assert not said if script == "-c" else f"of {tmp_path}, but the code is that in {ROOT}/src/l2bn" in said
