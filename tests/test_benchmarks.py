"""The benchmarks run, say what they measured, and their committed tables are those of their committed results."""

import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import pytest
import torch
from PIL import Image

from conftest import ROOT
from l2bn.benchmarks import accuracy, data, evaluation, measure, norm, together, train, waiting
from l2bn.benchmarks.workload import CLASSES
from l2bn.errors import UserError
from l2bn.reporting.formatting import interval, signed
from l2bn.reporting.statistics import estimate, paired_differences

RESULTS = ROOT / "results" / "benchmarks"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `scripts/benchmark.py`."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import benchmark

    return benchmark


def test_a_benchmark_of_kernels_needs_a_compiler(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it has measured for an hour, or measured something else."""
    monkeypatch.setattr(command, "compiler_works", lambda _: False)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "norm"])
    with pytest.raises(UserError, match="no compiler works here for cpu: install one"):
        command.main()


# The numbers of README.md and results/benchmarks/README.md, made anew from the committed results.

PAGES = "README.md", "results/benchmarks/README.md"
README = " ".join(word for name in PAGES for word in (ROOT / name).read_text().split())


def committed(name: str, rows: str = "rows") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())[rows]
    return found


def test_the_readmes_costs_of_layer_and_step_are_those_of_the_committed_results() -> None:
    """Training on maps of all formats, and steps called in the slowest way."""
    callers = "eager", "compiled"
    cells = [cell for cell in committed("norm", "cells") if cell["phase"] == "training"]
    ratios = {
        (caller, kind): [measure.ratio(cell, kind) for cell in cells if cell["caller"] == caller]
        for caller, kind in product(callers, ("naive", "fused"))
    }
    means = {key: f"{geometric_mean(found):.2f}" for key, found in ratios.items()}
    worst = [f"{max(ratios[caller, 'fused']):.2f}" for caller in callers]
    evaluated = [cell for cell in committed("norm", "cells") if cell["phase"] == "evaluation"]
    later = geometric_mean(measure.ratio(cell, "fused") for cell in evaluated if cell["caller"] == "eager")
    for text in (
        f"takes {means['eager', 'fused']} of batch norm's time in training in the geometric mean",
        f"over {len(ratios['eager', 'fused']) // 2} maps of five networks in two memory formats",
        f"(composed plainly: {means['eager', 'naive']}), and {later:.2f} in evaluation",
        f"{means['compiled', 'fused']} inside a compiled model (composed plainly: {means['compiled', 'naive']})",
        f"the worst map takes {' and '.join(worst)}",
    ):
        assert text in README
    rows = committed("step")
    costs: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        costs[row["network"]].append(measure.ratio(row, "fused"))
    slowest = {network: f"{max(found):.2f}" for network, found in costs.items()}
    memory = max(measure.ratio(row, "fused", "peak_bytes") for row in rows)
    assert (
        f"step takes at most {slowest['ResNet-20']} of BN's time in ResNet-20, {slowest['MobileNetV2']} in "
        f"MobileNetV2 and {slowest['ResNet-50']} in ResNet-50, with at most {100 * (memory - 1):.1f} % more memory"
    ) in README


def test_the_readmes_costs_of_evaluation_and_its_accuracy_are_those_of_the_committed_results() -> None:
    """Against both forms of BN, and as a difference with its interval, which is no equality."""
    speeds = [row["images_per_second"] for row in committed("evaluation")]
    trained, folded = (max(speed[kind] / speed["l2bn"] for speed in speeds) for kind in ("bn", "folded"))
    assert (
        f"evaluation takes up to {trained:.2f} of BN's time, and up to {folded:.2f} of that of BN folded" in README
    )
    runs = committed("accuracy", "runs")
    found = estimate(paired_differences(*(accuracy.of_path(runs, path) for path in ("plain", "ours"))))
    assert f"by {signed(found.mean)} points, 95 % interval {interval(found)}, n = {found.n}" in README


def chosen(name: str, norm: str) -> dict[str, float]:
    """Network to images/s against the plain loop's, of ours as `compute.compile=auto` calls it."""
    rows = committed(name)
    return {row["network"]: train.speed_up(row, rows) for row in rows if row.get("auto") and row["norm"] == norm}


def test_the_readmes_speeds_of_training_are_those_of_the_committed_results() -> None:
    cpu, gpu = chosen("train", "bn"), [chosen("gpu/train", kind)["ResNet-20"] for kind in train.NORMS]
    for text in (
        f"{cpu['ResNet-20']:.2f} times in ResNet-20, {cpu['ShuffleNetV2']:.2f} in ShuffleNetV2, ",
        f"{cpu['MobileNetV2']:.1f} in MobileNetV2, {cpu['VGG-16']:.2f} in VGG-16, ",
        f"at 224 pixels {cpu['ResNet-18']:.2f} in ResNet-18 and {cpu['ResNet-50']:.2f} in ResNet-50",
        "{:.1f} and {:.1f} times the plain loop's with BN".format(*gpu),
    ):
        assert text in README
    rates = [round(row["images_per_second"], -2) for row in committed("gpu/train") if row.get("auto")]
    assert "{:,.0f} images/s with BN and, in long runs, {:,.0f} with L2BN".format(*rates) in README


def test_the_readmes_speeds_in_bfloat16_are_those_of_the_committed_results() -> None:
    """The factor that both norms reach, called in one way."""
    speeds: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
    for row in committed("amx/train"):
        if row["path"] == "ours":
            speeds[row["network"]][row["norm"], row["precision"]] = row["images_per_second"]
    gains = {
        network: min(found[norm, "bf16-mixed"] / found[norm, "32-true"] for norm in train.NORMS)
        for network, found in speeds.items()
    }
    assert (
        f"trains {gains['ResNet-20']:.1f} times as many images/s as float32 in ResNet-20, "
        f"{gains['MobileNetV2']:.1f} in MobileNetV2, {gains['ShuffleNetV2']:.1f} in ShuffleNetV2, "
        f"{gains['VGG-16']:.1f} in VGG-16"
    ) in README


def span(values: list[float], digits: int = 1) -> str:
    """The least and the largest of some numbers, as a text has them."""
    return " to ".join(sorted({f"{value:.{digits}f}" for value in (min(values), max(values))}))


def test_the_readmes_speeds_beside_others_are_those_of_the_committed_results() -> None:
    """Of several runs at once, and of a run beside a busy process."""
    speeds = {(row["network"], row["runs"]): together.together(row) for row in committed("together")}
    gains = [speed / speeds[network, 1] for (network, runs), speed in speeds.items() if runs > 1]
    assert f"does {min(gains):.1f} to {max(gains):.1f} times as much as with all cores for one run" in README
    times = [row["seconds"] for row in committed("waiting") if row["batch"] == 128]
    slower = [time["busy"][waiting.SPINS_OF_A_RUN] / time["alone"][waiting.SPINS_OF_A_RUN] for time in times]
    assert f"128 images takes {span(slower)} times as long" in README
    longest = [time["busy"]["300000"] / time["alone"]["300000"] for time in times]
    assert f"a long spin, {span(longest)} times" in README
    quiet = [time["alone"][waiting.SPINS_OF_A_RUN] / time["alone"]["300000"] for time in times]
    assert f"On a quiet machine it takes {span(quiet, 2)} times as long" in README


Measured = Callable[..., dict[str, Any]]


def once_each(actions: dict[Any, Any], *_: float, **__: int) -> dict[Any, float]:
    """That all are measured, not how fast they are."""
    return measure.interleaved(actions, 0.0, fewest=1, warm_up=0)


@pytest.fixture
def measured(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Run a benchmark's command and return what it wrote; its page must be there, too."""

    for module in (data, evaluation, norm, train):
        monkeypatch.setattr(module, "interleaved", once_each)

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


@pytest.mark.parametrize("name", ["", "page.md", "result"], ids=["folder", "page", "no ending"])
def test_a_place_that_cannot_take_the_result_is_refused_before_anything_is_measured(
    name: str, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page would overwrite a result that ends as it does."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "waiting", "--json", str(tmp_path / name)])
    with pytest.raises(SystemExit):
        command.main()
    assert f"give a file whose name ends in .json, not {tmp_path / name}" in capsys.readouterr().err


def test_a_benchmark_that_fails_leaves_no_result(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one would be no result for `benchmark.py pages`."""
    options = ["--root", str(tmp_path / "nowhere"), "--json", str(tmp_path / "new/accuracy.json")]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "accuracy", *options])
    with pytest.raises(UserError, match="nowhere"):
        command.main()
    assert list((tmp_path / "new").iterdir()) == []


def test_pages_are_written_again_from_all_results(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From those of the project, whichever folder the command is called in; each benchmark has one."""
    assert command.RESULTS == RESULTS
    copies = shutil.copytree(RESULTS, tmp_path / "copies", ignore=shutil.ignore_patterns("*.md"))
    monkeypatch.setattr(command, "RESULTS", copies)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "pages"])
    command.main()
    results = list(RESULTS.rglob("*.json"))
    assert {json.loads(path.read_text())["benchmark"] for path in results} == set(command.BENCHMARKS)
    for path in results:
        page = path.with_suffix(".md")
        assert (copies / page.relative_to(RESULTS)).read_text() == page.read_text()


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
    assert sum(phases) < ours["seconds"]["step"]
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
    assert row["images_per_second"].keys() == {"ours", "evaluation", "plain", "timm"}
    assert min(row["images_per_second"].values()) > 0


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


@pytest.mark.slow
def test_first_calls_are_measured(measured: Measured) -> None:
    """One compilation serves another batch size, and another process by the cache on disk."""
    rows = measured("first", "--networks", "resnet18", "--batch", "4", "--pixels", "224")["rows"]
    assert [(row["norm"], row["cache"]) for row in rows] == [("bn", "–"), ("l2bn", "empty"), ("l2bn", "filled")]
    _, empty, filled = (row["seconds"] for row in rows)
    assert max(empty["another batch size"], filled["first step"]) < empty["first step"]
    with pytest.raises(UserError, match="vit_tiny_patch16_224 with bn cannot be measured"):
        measured("first", "--networks", "vit_tiny_patch16_224", "--batch", "4")


def test_accuracies_are_measured(measured: Measured, tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (CLASSES, 32, 32, 3), dtype=torch.uint8)
    for part, copies in (("train", 13), ("test", 1)):
        for label in range(CLASSES):
            folder = tmp_path / "images" / part / f"class{label}"
            folder.mkdir(parents=True)
            for copy in range(copies):
                Image.fromarray(pixels[label].numpy()).save(folder / f"{copy}.png")
    options = ["--root", str(tmp_path / "images"), "--epochs", "1"]
    paths = ("ours", "plain", "bf16")
    with pytest.raises(UserError, match="127 training images are fewer than one batch of 128"):
        measured("accuracy", *options, "--images", "127")
    runs = measured("accuracy", *options, "--images", "128", "--seeds", "2", "--paths", *paths)["runs"]
    assert [(run["path"], run["seed"]) for run in runs] == [(path, seed) for seed in range(2) for path in paths]
    assert all(0 <= run["accuracy"] <= 100 for run in runs)
