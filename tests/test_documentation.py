"""The documents: their links lead somewhere, and the commands they name exist."""

import re
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT

DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "runs", ".pytest_cache"} & set(path.relative_to(ROOT).parts)
)
assert len(DOCUMENTS) >= 3


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text())
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert missing == []


def test_make_alone_prints_every_target_with_a_line() -> None:
    printed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in printed.splitlines()[1:]}
    assert set(phony[1].split()) - {"help"} <= shown.keys()
    assert all(shown.values())


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
