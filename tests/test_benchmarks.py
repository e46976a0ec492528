"""The benchmarks run, say what they measured, and their committed tables are those of their committed results."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conftest import ROOT
from l2bn.benchmarks import accuracy, data, evaluation, measure, norm, train, waiting
from l2bn.benchmarks.workload import CLASSES
from l2bn.reporting.formatting import interval, signed
from l2bn.reporting.statistics import estimate, paired_differences

RESULTS = ROOT / "results" / "benchmarks"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `scripts/benchmark.py`."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import benchmark

    return benchmark


def test_committed_pages_are_made_from_the_committed_results(command: Any) -> None:
    results = {path: json.loads(path.read_text()) for path in RESULTS.rglob("*.json")}
    assert {result["benchmark"] for result in results.values()} == set(command.BENCHMARKS)
    for path, result in results.items():
        assert path.with_suffix(".md").read_text() == command.page_of(result)


def test_the_readmes_costs_of_evaluation_and_its_accuracy_are_those_of_the_committed_results() -> None:
    """Against both forms of BN, and as a difference with its interval, which is no equality."""
    text = " ".join((ROOT / "README.md").read_text().split())
    speeds = [row["images_per_second"] for row in json.loads((RESULTS / "evaluation.json").read_text())["rows"]]
    trained, folded = (max(speed[kind] / speed["l2bn"] for speed in speeds) for kind in ("bn", "folded"))
    assert f"evaluation takes up to {trained:.1f} of BN's time, and up to {folded:.2f} of that of BN folded" in text
    runs = json.loads((RESULTS / "accuracy.json").read_text())["runs"]
    found = estimate(paired_differences(*(accuracy.of_path(runs, path) for path in ("plain", "ours"))))
    assert f"by {signed(found.mean)} points, 95 % interval {interval(found)}, n = {found.n}" in text


Measured = Callable[..., dict[str, Any]]


@pytest.fixture
def measured(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Run a benchmark's command and return what it wrote; its page must be there, too."""

    def measured(name: str, *options: str) -> dict[str, Any]:
        path = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", ["benchmark.py", name, *options, "--json", str(path)])
        command.main()
        result = json.loads(path.read_text())
        assert result["benchmark"] == name
        assert result["machine"]["packages"]["torch"]
        assert path.with_suffix(".md").read_text() == command.page_of(result)
        return result

    return measured


def check_norms(rows: list[dict[str, Any]]) -> None:
    assert rows
    for row in rows:
        assert min(row["seconds"].values()) > 0
        # What the plain composition costs shows whatever the machine is doing: it writes the features once more.
        assert row["peak_bytes"]["naive"] > row["peak_bytes"]["fused"]


def test_layers_are_measured(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert norm.maps_of("ResNet-20") == [(128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8)]
    monkeypatch.setattr(norm, "maps_of", lambda _: [(128, 16, 32, 32)])
    monkeypatch.setattr(norm, "CALLERS", ["eager"])
    check_norms(measured("norm", "--networks", "ResNet-20", "--seconds", "0.01")["cells"])


@pytest.mark.slow
def test_steps_are_measured(measured: Measured) -> None:
    check_norms(measured("step", *SHORT, "--callers", "eager", "--batch", "4")["rows"])


SHORT = ["--networks", "ResNet-20", "--seconds", "0.01"]


def test_training_is_measured_beside_the_plain_loops(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "NORMS", ["bn"])
    rows = {row["path"]: row for row in measured("train", *SHORT, "--callers", "eager", "--batch", "4")["rows"]}
    assert rows.keys() == {"ours", "plain", "timm"}
    assert all(row["images_per_second"] > 0 for row in rows.values())
    ours = rows["ours"]
    phases = [ours["seconds"][phase] for phase in train.PHASES]
    assert min(phases) > 0
    assert 0.8 * ours["seconds"]["step"] < sum(phases) < ours["seconds"]["step"]
    assert ours["seconds"]["data"] < ours["seconds"]["forward"]
    # The largest maps, of 4 x 16 x 32 x 32 float32, are kept for backward after each of 7 convolutions.
    assert ours["peak_bytes"] > 7 * 4 * 16 * 32 * 32 * 4


def test_peak_memory_is_above_what_was_held_before() -> None:
    """What an action releases of its last time was held before this one."""
    x, held = torch.ones(1000), [torch.ones(1000)]

    def replace() -> None:
        held[0] = x.neg()  # new while the old one is there
        held[0] = x.neg().neg()

    peaks = [measure.peak_memory(replace, torch.device("cpu")) for _ in range(3)]
    assert peaks == [3 * 4000] * 3


def test_arithmetic_is_what_torchvision_says_of_its_networks() -> None:
    from torchvision.models import ResNet18_Weights, ResNet50_Weights

    for network, weights in (("ResNet-18", ResNet18_Weights), ("ResNet-50", ResNet50_Weights)):
        products = 1e9 * weights.IMAGENET1K_V1.meta["_ops"]  # and their sums, of forward; at 1,000 classes
        counted = train.flops_of(network)
        assert counted == pytest.approx(3 * 2 * products, rel=2e-3)


def test_pipelines_are_measured(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.STEPS, "ResNet-20", 10)
    (row,) = measured("data", *SHORT)["rows"]
    assert min(row["images_per_second"].values()) > 0
    # In seconds of any machine, however busy: without a Python call for each image.
    assert row["images_per_second"]["ours"] > 3 * row["images_per_second"]["plain"]


def test_evaluation_is_measured(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "CALLERS", ["eager"])
    monkeypatch.setattr(evaluation, "BATCH", {32: 4})
    (row,) = measured("evaluation", *SHORT)["rows"]
    assert row["images_per_second"].keys() == {"bn", "folded", "l2bn"}
    assert min(row["images_per_second"].values()) > 0


def test_folding_leaves_no_batch_norm_and_the_same_outputs() -> None:
    plain, folded = (evaluation.network_of("ResNet-20", kind) for kind in ("bn", "folded"))
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.modules())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_runs_at_once_are_measured(measured: Measured) -> None:
    rows = measured("together", "--networks", "ResNet-20", "--batch", "4")["rows"]
    assert [row["runs"] for row in rows] == [1, 2]
    assert [len(row["images_per_second"]) for row in rows] == [1, 2]


@pytest.mark.slow
def test_waiting_threads_are_measured(measured: Measured) -> None:
    rows = measured("waiting", *SHORT, "--batches", "4")["rows"]
    assert [sorted(row["seconds"]) for row in rows] == [sorted(waiting.LOADS)]
    assert all(min(seconds.values()) > 0 for seconds in rows[0]["seconds"].values())


def test_accuracies_are_measured(measured: Measured, tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (CLASSES, 32, 32, 3), dtype=torch.uint8)
    for part, copies in (("train", 13), ("test", 1)):
        for label in range(CLASSES):
            folder = tmp_path / "images" / part / f"class{label}"
            folder.mkdir(parents=True)
            for copy in range(copies):
                Image.fromarray(pixels[label].numpy()).save(folder / f"{copy}.png")
    options = ["--root", str(tmp_path / "images"), "--images", "128", "--epochs", "1"]
    paths = ("ours", "plain", "bf16")
    runs = measured("accuracy", *options, "--seeds", "2", "--paths", *paths)["runs"]
    assert [(run["path"], run["seed"]) for run in runs] == [(path, seed) for seed in range(2) for path in paths]
    assert all(0 <= run["accuracy"] <= 100 for run in runs)
