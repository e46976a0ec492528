"""Arms in TensorBoard: one curve per norm and cell, the spread over seeds, and the paired difference."""

import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest import mock

import pytest

from conftest import ROOT, Issue, answer_of, events_of, wait_for
from l2bn.records import CONFIG, METRICS, SUMMARY, read_metrics, write_lines
from l2bn.reporting.evidence import read_evidence
from l2bn.reporting.tensorboard import SPREAD, Board, curves_of, read_runs, texts_of
from local_slurm import free_port
from synthetic_records import write_run

SCRIPT = ROOT / "scripts/report.py"
CELL = "cifar10, resnet20, short"
TAG = f"{CELL}/test top-1, percent"
ACCURACIES = {"bn": (90.0, 91.0, 92.5), "l2bn": (91.0, 91.5, 94.0)}


def pairs(root: Path, **options: Any) -> None:
    for norm, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            write_run(
                root, norm=norm, seed=seed, accuracy=accuracy, epochs=5, curve=5, **{"recipe": "short", **options}
            )


def drawn(arm: Path) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """The scalars and the texts that TensorBoard reads of an arm, by tag."""
    events = events_of(arm)
    scalars = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    texts = {
        tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode(errors="ignore")
        for tag in events.Tags()["tensors"]
    }
    return scalars, texts


def test_an_arm_is_the_mean_and_spread_of_its_seeds_at_each_epoch(tmp_path: Path) -> None:
    pairs(tmp_path / "runs")
    Board(tmp_path / "runs").update()
    for norm in ACCURACIES:
        scalars, _ = drawn(tmp_path / "runs/arms" / norm)
        rows = [read_metrics(path) for path in sorted((tmp_path / "runs").rglob(f"{norm}/short/*/{METRICS}"))]
        for epoch in range(5):
            values = [run[epoch]["test/top1"] or 0.0 for run in rows]
            mean, std = fmean(values), stdev(values)
            assert scalars[TAG][epoch + 1] == pytest.approx(mean)
            assert scalars[f"spread/{TAG}, low"][epoch + 1] == pytest.approx(mean - std)
            assert scalars[f"spread/{TAG}, high"][epoch + 1] == pytest.approx(mean + std)


def test_the_difference_is_the_paired_one_with_its_interval(tmp_path: Path) -> None:
    pairs(tmp_path / "runs")
    Board(tmp_path / "runs").update()
    _, texts = drawn(tmp_path / "runs/arms/l2bn")
    text = texts[f"{CELL}/difference to bn/text_summary"]
    assert "l2bn − bn: +1.00 points [−0.24, +2.24]" in text  # 1, 0.5, 1.5: 4.303 x 0.5 / sqrt(3)
    assert "3 pairs" in text
    assert not any("difference" in tag for tag in drawn(tmp_path / "runs/arms/bn")[1])


def test_cells_have_charts_of_their_own_in_one_layout(tmp_path: Path) -> None:
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    for options in ({}, {"recipe": "short,epochs=2"}, {"precision": "bf16-mixed"}, {"backbone": "vgg11"}):
        pairs(tmp_path / "runs", **options)
    pairs(tmp_path / "runs", dataset="cifar10,mean=[0.5, 0.5]")
    Board(tmp_path / "runs").update()
    scalars, texts = drawn(tmp_path / "runs/arms/l2bn")
    cells = (
        "cifar10, resnet20, short,epochs=2",
        "cifar10, resnet20, short, bf16-mixed",  # in the place of the first one's folder
        "cifar10, vgg11, short",
        "cifar10,mean=_0.5, 0.5_, resnet20, short",
    )
    tags = product(cells, ("test top-1, percent", "training loss"))
    titles = {f"{cell}/{quantity}": f"{cell}: {quantity}" for cell, quantity in tags}
    assert {tag for tag in scalars if not tag.startswith("spread")} == titles.keys()
    assert SPREAD in texts["custom_scalars__config__"]
    proto = events_of(tmp_path / "runs/arms/l2bn").Tensors("custom_scalars__config__")[0].tensor_proto
    ((category,),) = (Layout.FromString(proto.string_val[0]).category,)
    assert len(category.chart) == len(titles)
    for chart in category.chart:
        (series,) = chart.margin.series
        assert chart.title == titles[series.value]
        assert {series.value, series.lower, series.upper} <= scalars.keys()


@pytest.mark.parametrize(
    ("identity", "setting"), [({"devices": 8}, "8 devices"), ({"sync_bn": True}, "synchronised")], ids=str
)
def test_runs_on_several_devices_have_a_curve_of_their_own(
    identity: dict[str, object], setting: str, tmp_path: Path
) -> None:
    """They take batch statistics over other images."""
    pairs(tmp_path / "runs/one")
    before = curves_of(read_runs(tmp_path / "runs"))
    pairs(tmp_path / "runs/several", identity=identity)
    after = curves_of(read_runs(tmp_path / "runs"))
    assert before.items() < after.items()
    assert {cell for _, cell, _ in after} == {CELL, f"{CELL}, {setting}"}
    assert {cell for _, cell, _ in after} == {
        tag.rpartition("/")[0] for _, tag in texts_of(read_evidence(tmp_path / "runs"))
    }


@pytest.mark.parametrize("epochs", [2, 5])
def test_a_run_that_lies_there_twice_counts_once(epochs: int, tmp_path: Path) -> None:
    """A replay of a run lies under `runs`, too, and may not have come to its end."""
    pairs(tmp_path / "runs")
    before = curves_of(read_runs(tmp_path / "runs"))
    pairs(tmp_path / "runs/replay")
    for path in (tmp_path / "runs/replay").rglob(METRICS):
        write_lines(path, read_metrics(path)[:epochs])
        (path.parent / SUMMARY).unlink()
    assert curves_of(read_runs(tmp_path / "runs")) == before


NAMES = b"compute: {precision: 32-true}\ncell: {dataset: %b, recipe: short, backbone: net, norm: %b, seed: %b}"


@pytest.mark.parametrize(
    "content",
    [
        *(b"\xff", b"seed: 2026-99-99", b"[" * 10_000),
        *(
            NAMES % names
            for names in ((b"10", b"bn", b"3"), (b"cifar10", b"[bn]", b"3"), (b"cifar10", b"bn", b"x"))
        ),
    ],
)
def test_a_folder_whose_configuration_names_no_run_is_passed_over(content: bytes, tmp_path: Path) -> None:
    pairs(tmp_path / "runs")
    before = curves_of(read_runs(tmp_path / "runs"))
    other = write_run(tmp_path / "runs/other", recipe="short", seed=3, accuracy=10.0, epochs=5, curve=5)
    (other.folder / CONFIG).write_bytes(content)
    assert curves_of(read_runs(tmp_path / "runs")) == before


def test_a_diverged_run_cuts_no_curve_and_is_named(tmp_path: Path) -> None:
    pairs(tmp_path / "runs")
    before = curves_of(read_runs(tmp_path / "runs"))
    options: Any = {"recipe": "short", "epochs": 5, "status": "diverged"}
    for norm, seed in (("bn", 3), ("bn", 4), ("l2bn", 4)):
        write_run(tmp_path / "runs", norm=norm, seed=seed, accuracy=10.0, curve=seed - 2, **options)
    write_run(tmp_path / "runs", norm="group_norm", curve=2, **options)
    assert curves_of(read_runs(tmp_path / "runs")) == before
    Board(tmp_path / "runs").update()
    tag = f"{CELL}/diverged/text_summary"
    for norm, text in (
        ("bn", "2 runs of bn diverged**, left out of its curves: seed 3, 4"),
        ("l2bn", "1 run of l2bn diverged**, left out of its curves: seed 4"),
        ("group_norm", "1 run of group_norm diverged**, left out of its curves: seed 0"),
    ):
        assert text in drawn(tmp_path / "runs/arms" / norm)[1][tag]


def test_records_that_contradict_each_other_close_no_board(tmp_path: Path) -> None:
    """A replay on another processor, within the folder, may differ by rounding."""
    pairs(tmp_path / "runs")
    before = curves_of(read_runs(tmp_path / "runs"))
    write_run(tmp_path / "runs/replay", recipe="short", accuracy=11.0, epochs=5, curve=2)
    assert curves_of(read_runs(tmp_path / "runs")) == before
    assert Board(tmp_path / "runs").update()
    scalars, texts = drawn(tmp_path / "runs/arms/bn")
    assert len(scalars[TAG]) == 5
    assert "two records of one cell and seed hold different results" in texts["no differences/text_summary"]


def test_what_changes_is_written_anew_and_runs_that_have_not_ended_count(tmp_path: Path) -> None:
    pairs(tmp_path / "runs")
    board = Board(tmp_path / "runs")
    assert board.update()
    assert not board.update()
    time.sleep(1.1)  # names of event files hold seconds
    late = write_run(tmp_path / "runs", recipe="short", seed=3, accuracy=10.0, epochs=5, curve=5).folder
    rows = read_metrics(late / METRICS)
    (late / SUMMARY).unlink()
    write_lines(late / METRICS, rows[:2])
    assert board.update()
    scalars, _ = drawn(tmp_path / "runs/arms/bn")
    assert list(scalars[TAG]) == [1, 2]  # the epochs that all four runs have
    _, texts = drawn(tmp_path / "runs/arms/bn")
    said = "the curve of **bn** ends at epoch 2, where its shortest run does: seed 3"
    assert said in texts[f"{CELL}/shortest run/text_summary"]
    _, texts = drawn(tmp_path / "runs/arms/l2bn")
    assert f"{CELL}/shortest run/text_summary" not in texts
    assert "3 pairs" in texts[f"{CELL}/difference to bn/text_summary"]
    (late / CONFIG).write_text("{")  # no run's folder
    assert board.update()
    for folder in (tmp_path / "runs").glob("*/*/l2bn"):
        shutil.rmtree(folder)
    assert board.update()
    assert {path.parent.name for path in (tmp_path / "runs/arms").rglob("events*")} == ACCURACIES.keys() - {"l2bn"}


def test_what_earlier_updates_wrote_does_not_pile_up(tmp_path: Path) -> None:
    """Left open for a week, it would fill the disk with the same curves: one file stays that may be being read."""
    pairs(tmp_path / "runs")
    for _ in range(4):
        assert Board(tmp_path / "runs").update()
    for norm in ACCURACIES:
        assert len(list((tmp_path / "runs/arms" / norm).iterdir())) == 2
        assert len(drawn(tmp_path / "runs/arms" / norm)[0][TAG]) == 5


def test_the_board_is_renewed_every_30_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, issue: Issue
) -> None:
    runs, waits = tmp_path / "runs", list[float | None]()
    pairs(runs)

    def wait(timeout: float | None = None) -> int:
        waits.append(timeout)
        if len(waits) == 1:
            write_run(runs, norm="group_norm", recipe="short", epochs=5, curve=5)
            raise subprocess.TimeoutExpired("tensorboard", 30)
        return 0

    monkeypatch.setattr(subprocess, "Popen", lambda _: mock.Mock(wait=wait))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert issue("report", "tensorboard", "--runs", runs).code == 0
    assert waits == [30, 30, None]
    assert {path.name for path in (runs / "arms").iterdir()} == {*ACCURACIES, "group_norm"}


@pytest.mark.slow
def test_a_tensorboard_that_cannot_start_ends_the_command(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, SCRIPT, "tensorboard", "--runs", tmp_path, "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"could not bind to port {port}" in done.stderr


# In a browser.


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address of the TensorBoard that `report.py tensorboard` starts."""
    pairs(tmp_path / "runs")
    port = free_port()
    command = [sys.executable, str(SCRIPT), "tensorboard", "--runs", str(tmp_path / "runs")]
    process = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: b"arms/l2bn" in answer_of(f"http://127.0.0.1:{port}/data/runs"))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
        with pytest.raises(OSError, match="refused"):  # the server has ended with the command
            urllib.request.urlopen(f"http://127.0.0.1:{port}")


@pytest.mark.services
@pytest.mark.slow
def test_a_browser_shows_both_arms_apart_and_their_difference(page: Any, address: str) -> None:
    page.goto(f"{address}/#timeseries")
    for norm in ACCURACIES:
        page.get_by_text(f"arms/{norm}").first.wait_for()
    page.get_by_title(TAG).first.wait_for()
    page.goto(f"{address}/#custom_scalars")
    page.reload()
    page.get_by_text(f"{CELL}: test top-1, percent").wait_for()
    page.get_by_text("Matches (2)").first.wait_for()
    titles = [page.get_by_text(f"{CELL}: {name}") for name in ("test top-1, percent", "training loss")]
    boxes = [title.bounding_box() for title in titles]
    assert (boxes[0]["y"], boxes[0]["x"]) < (boxes[1]["y"], boxes[1]["x"]), "accuracy first"
    page.goto(f"{address}/#text")
    page.reload()
    page.get_by_text("l2bn − bn: +1.00 points [−0.24, +2.24]").first.wait_for()
