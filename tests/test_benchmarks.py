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
from l2bn.benchmarks import accuracy, data, evaluation, measure, norm, step, together, train, waiting
from l2bn.benchmarks.workload import CLASSES
from l2bn.errors import UserError
from l2bn.reporting.formatting import interval, signed
from l2bn.reporting.statistics import estimate, paired_differences

RESULTS = ROOT / "results" / "benchmarks"
TABLES = {
    "norm": norm.norm_table,
    "step": step.step_table,
    "train": train.train_table,
    "data": data.data_table,
    "evaluation": evaluation.evaluation_table,
    "together": together.together_table,
    "waiting": waiting.waiting_table,
    "accuracy": accuracy.accuracy_table,
}
COMMITTED = sorted(str(path.relative_to(RESULTS).with_suffix("")) for path in RESULTS.glob("**/*.json"))
assert len(COMMITTED) >= 2


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_tables_are_made_from_the_committed_results(name: str) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert (RESULTS / f"{name}.md").read_text() == TABLES[Path(name).name](result)


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
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Run a benchmark's command and return what it wrote; its table must be there, too."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import benchmark

    def measured(name: str, *options: str, writes: str = "") -> dict[str, Any]:
        path = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", ["benchmark.py", name, *options, "--json", str(path)])
        benchmark.main()
        result = json.loads(path.read_text())
        assert result["benchmark"] == (writes or name)
        assert result["machine"]["packages"]["torch"]
        text = (tmp_path / f"{name}.md").read_text()
        assert text == TABLES[writes or name](result)
        return result

    return measured


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("norm", ["--networks", "ResNet-20", "--maps", "1", "--callers", "eager"]),
        pytest.param(
            *("step", ["--networks", "ResNet-20", "--callers", "eager", "--layouts", "contiguous", "--batch", "4"]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_norms_are_measured(name: str, options: list[str], measured: Measured) -> None:
    rows = measured(name, *options, "--seconds", "0.01")["cells" if name == "norm" else "rows"]
    assert rows
    for row in rows:
        assert min(row["seconds"].values()) > 0
        # What the plain composition costs shows whatever the machine is doing: it writes the features once more.
        assert row["peak_bytes"]["naive"] > row["peak_bytes"]["fused"]


SHORT = ["--networks", "ResNet-20", "--threads", "1", "--seconds", "0.01"]


def test_training_is_measured_beside_the_plain_loops(measured: Measured) -> None:
    options = [*SHORT, "--callers", "eager", "--norms", "bn", "--batch", "4", "--rounds", "1"]
    rows = {row["path"]: row for row in measured("train", *options)["rows"]}
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


def test_pipelines_are_measured(measured: Measured) -> None:
    (row,) = measured("data", *SHORT, "--rounds", "1")["rows"]
    assert min(row["images_per_second"].values()) > 0
    # In seconds of any machine, however busy: without a Python call for each image.
    assert row["images_per_second"]["ours"] > 3 * row["images_per_second"]["plain"]


def test_evaluation_is_measured(measured: Measured) -> None:
    (row,) = measured("evaluation", *SHORT, "--callers", "eager", "--batch", "4")["rows"]
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
    options = ["--together", "2", "--networks", "ResNet-20", "--batch", "4", "--rounds", "1"]
    rows = measured("train", *options, writes="together")["rows"]
    assert [row["runs"] for row in rows] == [1, 2]
    assert [len(row["images_per_second"]) for row in rows] == [1, 2]


@pytest.mark.slow
def test_waiting_threads_are_measured(measured: Measured) -> None:
    rows = measured("waiting", "--networks", "ResNet-20", "--batches", "4", "--seconds", "0.01")["rows"]
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
    options = ["--root", str(tmp_path / "images"), "--images", "128", "--epochs", "1", "--threads", "1"]
    runs = measured("accuracy", *options, "--seeds", "2")["runs"]
    assert [(run["path"], run["seed"]) for run in runs] == [("ours", 0), ("plain", 0), ("ours", 1), ("plain", 1)]
    assert all(0 <= run["accuracy"] <= 100 for run in runs)


NO_DEVICES = ["foo", "meta", *([] if torch.cuda.is_available() else ["cuda"])]
ON_A_DEVICE = [["norm"], ["step"], ["data"], ["evaluation"], ["train"], ["train", "--together", "2"]]


@pytest.mark.parametrize("device", NO_DEVICES)
@pytest.mark.parametrize("command", [*ON_A_DEVICE, ["accuracy", "--root", "nowhere"]], ids=" ".join)
def test_a_device_without_arithmetic_is_refused_before_anything_is_measured(
    command: list[str], device: str, measured: Measured
) -> None:
    with pytest.raises(UserError, match=f"--device is {device}, .* take cpu"):
        measured(*command, "--device", device)


@pytest.mark.parametrize(
    "options",
    [["--callers", "eager"], ["--callers", "eager", "--seconds", "1"]],
    ids=" ".join,
)
def test_what_runs_side_by_side_would_ignore_is_refused(options: list[str], measured: Measured) -> None:
    with pytest.raises(UserError, match="--together measures eager runs in float32") as error:
        measured("train", "--together", "2", *options)
    assert all(option in str(error.value) for option in options if option.startswith("--"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do it")
def test_what_this_device_cannot_do_is_refused(measured: Measured) -> None:
    with pytest.raises(UserError, match="graphs needs a CUDA device"):
        measured("train", "--callers", "graphs")
