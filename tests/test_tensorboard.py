"""Runs compared in TensorBoard: the events they write, and what a browser shows."""

import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import QUIET, TINIEST, Train
from l2bn.records import Record
from l2bn.training.journal import TITLE, comparison, layout
from l2bn.training.plan import Cell
from local_slurm import free_port

SMALL = (*TINIEST, "recipe.epochs=2", *QUIET)
DATASET = "digits,image_size=8,subset=64,validation=0.05"


def events(record: Record) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(record.folder / "tb"))
    found.Reload()
    return found


def test_both_norms_of_a_pair_write_one_tag_and_one_layout(trained: Train) -> None:
    bn, l2bn = (trained(f"norm={norm}", *SMALL) for norm in ("bn", "l2bn"))
    tag = f"compare/{DATASET}/resnet20/short,epochs=2/test_top1"
    for record in (bn, l2bn):
        drawn = [(event.step, event.value) for event in events(record).Scalars(tag)]
        assert drawn == [(row["epoch"], pytest.approx(row["test/top1"])) for row in record.metrics()]
    layouts = [events(record).Tensors("custom_scalars__config__")[0].tensor_proto for record in (bn, l2bn)]
    assert layouts[0] == layouts[1]
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    ((category,),) = (Layout.FromString(layouts[0].string_val[0]).category,)
    (pattern,) = category.chart[0].multiline.tag
    assert re.match(pattern, tag)
    assert not re.match(pattern, tag.replace("resnet20", "resnet200"))


def test_runs_of_another_cell_have_a_chart_of_their_own() -> None:
    """Any name that differs between two cells, with the values overridden in it, leads to another chart and tag."""
    cell = Cell("digits", "resnet20", "bn", "short", 0)
    one = layout(cell)
    assert layout(replace(cell, norm="l2bn", seed=1)) == one
    for group in ("dataset", "backbone", "recipe"):
        other = layout(replace(cell, **{group: f"{getattr(cell, group)},epochs=2"}))
        assert other.keys() == one.keys(), "one category"
        charts, more = one[TITLE], other[TITLE]
        assert not charts.keys() & more.keys()
        for (_, (pattern,)), (_, (another,)) in zip(charts.values(), more.values(), strict=True):
            assert pattern != another
    row = {"test/top1": 90.0, "train/loss": 0.5}
    for tag in comparison(cell, row):  # type: ignore[arg-type]
        assert sum(bool(re.match(pattern, tag)) for _, (pattern,) in one[TITLE].values()) == 1


def test_the_hparams_are_the_runs_own(trained: Train) -> None:
    record = trained("norm=l2bn", *SMALL)
    found = events(record)
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


def test_a_diverged_run_has_no_final_accuracy(train: Train) -> None:
    record = train("norm=bn", "recipe.lr=1e30", *SMALL)
    assert record.status == "diverged"
    assert "final/test_top1" not in events(record).Tags()["scalars"]


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


def wait_for_runs(address: str, count: int) -> None:
    """Until TensorBoard has read so many runs."""
    deadline = time.monotonic() + 120
    while True:
        assert time.monotonic() < deadline
        try:
            with urllib.request.urlopen(f"{address}/data/runs", timeout=10) as answer:
                if answer.read().count(b"seed") == count:
                    return
        except OSError:
            pass
        time.sleep(0.5)


@pytest.mark.services
@pytest.mark.slow
def test_a_browser_shows_the_pairs_of_a_sweep(train: Train, page: Any, tensorboard: str) -> None:
    records = [
        train(f"norm={norm}", f"backbone={backbone}", *SMALL)
        for backbone in ("resnet20", "shufflenetv2_x0_5")
        for norm in ("bn", "l2bn")
    ]
    wait_for_runs(tensorboard, len(records))

    page.goto(f"{tensorboard}/#timeseries")
    for record in records:  # by name, in the list of runs
        page.get_by_text(f"{DATASET}/{record.backbone}/{record.norm}/short,epochs=2/seed0").first.wait_for()
    for backbone in ("resnet20", "shufflenetv2_x0_5"):
        page.get_by_title(f"compare/{DATASET}/{backbone}/short,epochs=2/test_top1").first.wait_for()

    page.goto(f"{tensorboard}/#custom_scalars")
    page.reload()
    for backbone in ("resnet20", "shufflenetv2_x0_5"):
        page.get_by_text(f"{DATASET}, {backbone}, short,epochs=2: test top-1 (%)").wait_for()
    page.get_by_text("Matches (2)").nth(3).wait_for()  # each of the four charts shows BN and L2BN, and no other
    assert page.get_by_text("Matches (2)").count() == 4

    page.goto(f"{tensorboard}/#hparams")
    page.reload()
    table = page.locator("vaadin-grid")
    for record in records:
        table.get_by_text(f"{record.last['test/top1']:#.5g}").first.wait_for()  # its five digits
    for norm in ("bn", "l2bn"):
        assert table.get_by_text(norm, exact=True).count() == 2
