"""The documents: links lead somewhere, commands exist, and each promise names the files of its tests."""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.types import RunMode
from PIL import Image

from conftest import ROOT, composed
from l2bn.reporting.readme import BEGIN, END
from l2bn.training.environment import OPTIONS
from l2bn.training.instantiate import Builder
from l2bn.training.plan import check_keys, check_settings, composing, resolve
from l2bn.training.sweep import compose_sweep, plan_sweep
from synthetic_records import write_pairs, write_run

DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "runs", ".pytest_cache"} & set(path.relative_to(ROOT).parts)
)
assert len(DOCUMENTS) >= 3


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(path: Path) -> None:
    """Those with a place in a document, to one of its headings; the reading's, from the page that holds it."""
    folder = path.parents[path.parent.name == "reference"]
    links = re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)", path.read_text())
    missing = []
    for file, place in links:
        target = folder / file if file else path
        if "://" not in file and not (target.exists() and (not place or place in places(target))):
            missing.append((file, place))
    assert missing == []


def places(document: Path) -> set[str]:
    """The names by which GitHub links to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_make_alone_prints_every_target_with_a_line() -> None:
    printed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in printed.splitlines()[1:]}
    assert set(phony[1].split()) - {"help"} <= shown.keys()
    assert all(shown.values())


@pytest.mark.parametrize("found", ["sys.exit(1)", "sys.modules['pip'] = None", "sys.version_info = (3, 11, 2)"])
def test_an_environment_that_cannot_be_used_is_told(found: str, tmp_path: Path) -> None:
    """As one that was made by a Python too old, or without pip."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable} -S\nimport sys\n{found}\nexec(sys.argv[2])\n")
    python.chmod(0o755)
    done = subprocess.run(["make", "setup", f"VENV={tmp_path / 'venv'}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "venv needs pip and Python 3.11.4 or newer" in done.stdout
    assert f"rm -r {tmp_path / 'venv'}; make setup PYTHON=python3.12" in done.stdout


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("cifar-resnet-l2bn", "dataset=cifar10 backbone=resnet20 norm=l2bn"),
        ("cifar10-resnet56-bn", "dataset=cifar10 backbone=resnet56 norm=bn"),
        ("digits-vgg-l2bn_rms", "dataset=digits backbone=vgg16 norm=l2bn_rms"),
    ],
)
def test_a_run_is_named_by_its_parts(target: str, command: str) -> None:
    make = ["make", "--dry-run", target, "ARGS=recipe=step_200 seed=3"]
    printed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"python scripts/train.py {command} recipe=step_200 seed=3" in printed


def test_a_target_that_is_none_says_so() -> None:
    done = subprocess.run(["make", "nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no target 'nonsense'" in done.stdout


# Every command that the documents name: of the scripts that compose a configuration, all runs are composed.

OWN = "Your own images, network and norm"
SOURCES = [*ROOT.glob("*.md"), *ROOT.glob("results/**/*.md"), *ROOT.glob("configs/**/*.yaml")]
SOURCES += [*ROOT.glob("scripts/*.py"), ROOT / "Makefile"]


def documented() -> dict[tuple[str, str], str]:
    """The script and the arguments of each command, and the document that names it."""
    found = {}
    for path in SOURCES:
        text = re.sub(r"\\\n#?\s*", "", path.read_text())
        text = re.sub(r"`python\s+scripts/[^`]*`", lambda code: " ".join(code[0].split()), text)  # where wrapped
        for script, line in re.findall(r"python scripts/(\w+)\.py([^`\n]*)", text):
            arguments = re.split(r" {2}| #| \(| \||\.?\"|\.$|, |: |\$", line)[0].strip()
            # make fills in $(...), and what follows on BENCH; report.py fills in {...}.
            whole = "$(" not in line and "{" not in arguments and (script, arguments) != ("benchmark", "")
            if whole and not {"mine", "-sc"} & set(arguments.split()):  # which have tests below
                found[script, arguments] = path.relative_to(ROOT).as_posix()
    return found


COMMANDS = documented()
assert sum(script == "train" for script, _ in COMMANDS) > 60


class Parsed(Exception):  # noqa: N818
    """Raised in the place of what a command would do."""


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        pytest.param(*command, marks=pytest.mark.slow if "experiment" in command[1] else (), id=" ".join(command))
        for command in COMMANDS
    ],
)
def test_a_documented_command_is_accepted(
    script: str, arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own parser; and of those that compose a configuration, all runs are composed."""
    words = [{"NAME": "norm", "FILE": "file.json"}.get(word, word) for word in shlex.split(arguments)]

    def stopping(parse: Any) -> Any:
        def parsed(*given: Any) -> None:
            parse(*given)
            raise Parsed

        return parsed

    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)  # where a benchmark tries whether its result can be written
        patch.setattr(sys, "argv", [f"{script}.py", *words])
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(ArgumentParser, name, stopping(getattr(ArgumentParser, name)))
        main = runpy.run_path(str(ROOT / "scripts" / f"{script}.py"))["main"]
        with pytest.raises(Parsed):
            main()
    if script not in ("train", "status", "fetch_data"):
        return  # composes no configuration
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    if script == "status" and "--experiment" in words:
        overrides.append(f"experiment={words[words.index('--experiment') + 1]}")
    if script == "fetch_data":
        overrides.append(f"dataset={words[0]}")
    with composing(overrides) as (composer, rest):
        sweep = script == "status" or "-m" in words or composer.get_mode("train", rest) == RunMode.MULTIRUN
        if script == "fetch_data":
            composed(rest)
        elif sweep:
            assert plan_sweep(compose_sweep(rest))
        else:
            config = resolve(composed(rest)[0])
            check_settings(config)
            check_keys(config, Builder())


# The blocks of the README that are there to be pasted, each run as it stands.


def paste(block: str, folder: Path) -> str:
    """Run a block in a folder with a link to the scripts, by this environment's Python; return what it prints."""
    (folder / "scripts").symlink_to(ROOT / "scripts")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    block = block.replace("PYTHONPATH=mine", "PYTHONPATH=mine:$PYTHONPATH")
    done = subprocess.run(
        ["bash", "-e", "-c", block], cwd=folder, capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_readmes_own_network_and_norm_train_from_outside_the_repository(tmp_path: Path) -> None:
    (block,) = re.findall(r"```sh\n(mkdir -p mine.*?)```", section(OWN), re.DOTALL)
    printed = paste(block, tmp_path)
    assert "sweep: 3 finished" in printed
    assert re.search(r"tiny\W+clipped_bn", printed)


@pytest.mark.slow
def test_the_readmes_own_images_train_a_pair(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 70), ("test", 5)):
        for shade, name in ((60, "dark"), (180, "light")):
            folder = tmp_path / "flowers" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(shade - 50, shade + 50, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    (block,) = re.findall(
        r"```sh\n(python scripts/train.py -m dataset=image_folder.*?)```", section(OWN), re.DOTALL
    )
    printed = paste(block.replace("FOLDER", "flowers"), tmp_path)
    assert "sweep: 6 finished" in printed
    assert re.search(r"flowers.*resnet20.*short", printed)
    assert re.search(r"^l2bn +\d+\.\d+ ", printed, re.MULTILINE)


def test_the_readmes_swap_replaces_the_layers_that_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", section("L2BN in your own model"), re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out == "20 layers swapped\n"


def test_names_are_completed_in_bash(tmp_path: Path) -> None:
    """The README's line, and what it offers for the beginning of a command."""
    (line,) = re.findall(r"`(eval .*?)`", section("A sweep, from start to table"))
    command = "python scripts/train.py norm=l2bn_r"
    pressed_tab = f'COMP_LINE="{command}" COMP_POINT={len(command)} COMP_CWORD=2; hydra_bash_completion'
    assert "norm=l2bn_rms" in paste(f'set +e; {line}; {pressed_tab}; echo "${{COMPREPLY[@]}}"', tmp_path)


# How each line of "What happens when..." and of "What happens with images when..." in results/README.md begins, and
# the files of the tests that show it: test_faults.py and so on.
PROMISES = {
    "SIGKILL, a power cut, a crash": "faults kill crash checkpoint training journal",
    "Ctrl-C, SIGTERM or another request": "interruption training",
    "stdout or stderr cannot be written": "faults sweep interruption",
    "a command is started as several copies": "interruption",
    "one of several runs side by side dies": "sweep",
    "a file of the run is damaged": "damage checkpoint journal",
    "a second process starts the same run": "interruption",
    "the disk is full, the folder read-only": "faults checkpoint interruption",
    "an image is damaged or gone": "faults",
    "the images of a run are other ones": "fingerprint",
    "the code changes between two starts": "environment own_parts tables",
    "loss, weights or running statistics": "divergence",
    "the folder holds a run of another": "damage",
    "a value, a key, a name is wrong": "bad_input commands plan",
    "a network, a norm or a data set of your own": "own_parts data_loader",
    "a YAML file is edited, broken or hidden": "plan",
    "the number of epochs of a finished run": "plan",
    "somebody's record is replayed": "replay security checkpoint data_cifar data_archive",
    "a folder of images holds hidden": "data_folder data_imagenet",
    "files change behind a cache": "data_cache data_folder",
    "a published data set is incomplete": "data_cifar data_fashion_mnist data_splits",
    "shards repeat a key": "data_imagenet_wds",
    "an image has more than 8 bits": "data_decode",
    "training and test folder are one": "data_folder data_imagenet data_imagenet_wds data_loader data_splits",
    "`subset` or `validation` leaves a class": "data_sets",
    "zeros stand for the rest of a download": "data_decode data_imagenet_wds",
    "a photograph is stored lying": "data_decode",
    "a folder of CIFAR-100 has other pixels": "fingerprint",
    "clips of one recording": "data_sound",
    "test images are copies of training images": "data_splits",
    "a sound file has another rate": "data_sound",
    "a sound file is silent": "data_sound",
}


def section(title: str, document: str = "README.md") -> str:
    return (ROOT / document).read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_readmes_notebook_block_pairs_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    (tmp_path / "results").symlink_to(ROOT / "results")
    (block,) = re.findall(r"```python\n(.*?)```", section("A sweep, from start to table"), re.DOTALL)
    assert len(block.splitlines()) <= 25
    exec(block, {})
    assert "cifar10_jpeg" in capsys.readouterr().out
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_readmes_notebook_block_pairs_finished_runs_of_one_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the tables do: neither a run that diverged nor one of another setting enters a difference or a curve."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cell: dict[str, Any] = {"dataset": "cifar10_jpeg", "recipe": "short", "epochs": 5}
    root = tmp_path / "results/records"
    write_pairs(root, [60.0, 61.0], [1.0, 2.0], curve=5, **cell)
    write_run(root, norm="bn", seed=2, accuracy=60.0, curve=5, **cell)
    write_run(root, norm="l2bn", seed=2, accuracy=10.0, status="diverged", curve=3, **cell)
    for name, other in (("half", {"precision": "bf16-mixed"}), ("many", {"identity": {"devices": 8}})):
        write_pairs(root / name, [20.0, 20.0], [9.0, 9.0], curve=5, **cell, **other)
    (block,) = re.findall(r"```python\n(.*?)```", section("A sweep, from start to table"), re.DOTALL)
    found: dict[str, Any] = {}
    exec(block, found)
    differences = found["difference"].groupby("setting").agg(list).to_dict()
    assert differences == {"32-true": [1.0, 2.0], "32-true, 8 devices": [9.0, 9.0], "bf16-mixed": [9.0, 9.0]}
    last = found["curves"].unstack().loc[5]
    assert last.to_dict() == {"bn": pytest.approx(181 / 3), "l2bn": 62.0}


def test_the_readme_is_short() -> None:
    """The order of a reader's questions, in 225 lines beside the answer that is made from records."""
    before, _, rest = (ROOT / "README.md").read_text().partition(BEGIN)
    assert len((before + rest.partition(END)[2]).splitlines()) <= 225


def test_each_promise_names_the_files_of_its_tests() -> None:
    titles = ("What happens when...", "What happens with images when...")
    text = "".join(section(title, "results/README.md") for title in titles)
    rows = [row for row in re.findall(r"^\| (.*?) \| .* \|$", text, re.MULTILINE) if row != "when..."]
    assert [row for row, start in zip(rows, PROMISES, strict=True) if not row.startswith(start)] == []
    files = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    assert {f"test_{name}" for names in PROMISES.values() for name in names.split()} <= files


# Part to the parts that it may import, and does.
IMPORTS: dict[str, set[str]] = {
    "kernels": set(),
    "backbones": set(),
    "data": set(),
    "norms": {"kernels"},
    "analysis": set(),
    "reporting": set(),
    "training": {"analysis", "backbones", "data", "kernels", "norms"},
}


def imports(path: Path) -> set[str]:
    """The modules that a file, or those of a folder, import, and the names that they take from them."""
    found: set[str] = set()
    for file in [path] if path.is_file() else path.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def needed(modules: Iterable[str]) -> set[Path]:
    """The files of the package that modules of it need, by the imports at the top of each file."""
    source = ROOT / "src" / "l2bn"
    found: set[Path] = set()
    left = {"__init__", *(module.removeprefix("l2bn.") for module in modules)}
    while left:
        name = left.pop().replace(".", "/")
        file = next((f for f in (source / f"{name}.py", source / name / "__init__.py") if f.is_file()), None)
        if file is None or file in found:
            continue
        found.add(file)
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("l2bn"):
                module = (node.module or "").partition(".")[2]
                left |= {module, *(f"{module}.{alias.name}".strip(".") for alias in node.names)}
    return found


OF_TRAIN = re.findall(r"from (l2bn\.\S+) import", (ROOT / "scripts/train.py").read_text())


def test_a_plain_run_is_read_in_few_files() -> None:
    """Neither norms beside the swap, nor kernels, measurements, devices and compilation are among them."""
    files = needed(OF_TRAIN)
    assert len(files) <= 28
    assert sum(len(path.read_text().splitlines()) for path in files) <= 5_500
    assert {path.parent.name for path in files} == {"l2bn", "training", "data", "norms", "backbones"}
    stems = {path.stem for path in files if path.parent.name in ("norms", "backbones")}
    assert stems <= {"swap", "cost", "__init__"}


def test_what_a_run_imports_late_is_imported_when_its_code_is_described() -> None:
    files = needed((*OF_TRAIN, *OPTIONS))
    for path in files:
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        for name in (f"{node.module}.{alias.name}" for node in imports for alias in node.names):
            assert not name.startswith("l2bn.") or needed([name, name.rpartition(".")[0]]) <= files, (
                f"{path}: {name}"
            )


def test_no_files_import_one_another() -> None:
    """Neither within functions nor for types."""
    source = ROOT / "src"
    names = {path: ".".join(path.relative_to(source).with_suffix("").parts) for path in source.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for path, name in names.items()}
    TopologicalSorter({name: imports(path) & files.keys() for name, path in files.items()}).prepare()


def test_imports_run_one_way() -> None:
    """As CONTRIBUTING.md says."""
    parts = {path.name for path in (ROOT / "src/l2bn").iterdir() if path.is_dir()}
    for part, others in IMPORTS.items():
        found = {name.split(".")[1] for name in imports(ROOT / "src/l2bn" / part) if name.startswith("l2bn.")}
        assert found & parts - {part} == others, part
    scripts = {"scripts", *(path.stem for path in (ROOT / "scripts").glob("*.py"))}
    assert not scripts & {name.split(".")[0] for name in imports(ROOT / "src")}
