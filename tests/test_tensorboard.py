"""Runs compared in TensorBoard: the events they write, and what a browser shows."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import QUIET, TINIEST, Train, answer_of, events_of, wait_for
from local_slurm import free_port

SMALL = (*TINIEST, "recipe.epochs=2", *QUIET)
DATASET = "digits,image_size=8,subset=64,validation=0.05"


def test_the_hparams_are_the_runs_own(trained: Train) -> None:
    record = trained("norm=l2bn", *SMALL)
    found = events_of(record.folder / "tb")
    assert [child.name for child in (record.folder / "tb").iterdir() if child.is_dir()] == []  # no run beside it
    assert [(event.step, event.value) for event in found.Scalars("final/test_top1")] == [
        (2, pytest.approx(record.last["test/top1"]))
    ]
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {name: hparams[name].string_value or hparams[name].number_value for name in hparams} == {
        "dataset": DATASET,
        "backbone": "resnet20",
        "norm": "l2bn",
        "recipe": "short,epochs=2",
        "seed": 0,
        "lr": 0.1,
        "batch": 32,
        "epochs": 2,
        "precision": "32-true",
    }


# In a browser.


@pytest.fixture
def tensorboard(tmp_path: Path) -> Iterator[str]:
    """The address of a TensorBoard on loopback that shows what is in `tmp_path / "runs"`."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "runs")]
    process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.mark.services
@pytest.mark.slow
def test_a_browser_shows_the_pairs_of_a_sweep(train: Train, page: Any, tensorboard: str) -> None:
    records = [train(f"norm={norm}", *SMALL) for norm in ("bn", "l2bn")]
    wait_for(lambda: answer_of(f"{tensorboard}/data/runs").count(b"seed") == len(records))

    page.goto(f"{tensorboard}/#timeseries")
    for record in records:  # by name, in the list of runs
        page.get_by_text(f"{DATASET}/{record.backbone}/{record.norm}/short,epochs=2/seed0").first.wait_for()
    page.get_by_title("final/test_top1").first.wait_for()

    page.goto(f"{tensorboard}/#hparams")
    page.reload()
    table = page.locator("vaadin-grid")
    for record in records:
        table.get_by_text(f"{record.last['test/top1']:#.5g}").first.wait_for()  # its five digits
    for norm in ("bn", "l2bn"):
        assert table.get_by_text(norm, exact=True).count() == 1
