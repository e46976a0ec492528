"""Measurements during a run: they leave the run unchanged, and are in its record."""

import copy
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import (
    EPOCHS,
    QUIET,
    TINY,
    TRAIN,
    Issue,
    Train,
    equal,
    events_of,
    finish,
    interrupted,
    results,
    start,
    weights,
)
from l2bn.analysis.probe import Probe
from l2bn.errors import UserError
from l2bn.norms.swap import norm_layers, swap_norm
from l2bn.records import (
    FEATURES,
    METRICS,
    SAMPLE,
    STATISTICS,
    read_features,
    read_sample,
    read_statistics,
    write_lines,
)
from l2bn.training import session
from l2bn.training.checkpoint import Checkpoints
from l2bn.training.existing import analyze
from l2bn.training.journal import Journal
from l2bn.training.loop import Trainer
from l2bn.training.observation import AnalysisPolicy, compare_statistics

STATISTICS_OFTEN = ("analysis=statistics", "analysis.statistics_every=4")


@pytest.mark.parametrize("analysis", [("analysis=on",), STATISTICS_OFTEN], ids=lambda given: given[0])
def test_a_run_that_is_looked_into_is_the_same_run(analysis: tuple[str, ...], trained: Train) -> None:
    plain, watched = trained(EPOCHS, *TINY), trained(EPOCHS, *TINY, *analysis)
    assert results(watched) == results(plain)
    assert equal(weights(watched), weights(plain))
    assert watched.hash == plain.hash
    assert not [plain.folder / name for name in (FEATURES, STATISTICS, SAMPLE) if (plain.folder / name).exists()]


@pytest.mark.parametrize(
    ("analysis", "said"),
    [
        (
            "on",
            "has ended without features of its last epoch, and is not trained again: measure them by "
            "python scripts/analyze.py",
        ),
        ("statistics", "has ended without statistics of its first updates: only a new run"),
    ],
)
def test_measurements_that_an_ended_run_lacks_are_told(
    analysis: str, said: str, copied: Train, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    record = copied(EPOCHS, *TINY)
    assert train(EPOCHS, *TINY, f"analysis={analysis}") == record
    assert [said in message for message in caplog.messages if "has ended" in message] == [True]


def test_features_of_earlier_epochs_alone_are_told(
    copied: Train, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    record = copied(EPOCHS, *TINY, "analysis=on")
    rows = read_features(record.folder)
    for kept, told in ((rows, False), (rows[:1], True)):
        write_lines(record.folder / FEATURES, kept)
        caplog.clear()
        train(EPOCHS, *TINY, "analysis=on")
        assert ("without features of its last epoch" in caplog.text) is told


@pytest.mark.slow
def test_dropout_too_draws_what_it_drew(trained: Train) -> None:
    options = ("backbone=vgg11", "recipe.epochs=1", "dataset.subset=64", *QUIET)
    plain, watched = trained(*options), trained(*options, "analysis=statistics", "analysis.statistics_every=1")
    assert equal(weights(watched), weights(plain))


def test_features_go_to_the_record_and_to_tensorboard(trained: Train) -> None:
    record = trained(EPOCHS, *TINY, "analysis=on")
    rows = read_features(record.folder)
    assert [(row["epoch"], row["step"], row["images"]) for row in rows] == [(1, 8, 360), (2, 16, 360)]
    assert all(len(row["layers"]) == record.norm_layers for row in rows)
    sample = read_sample(record.folder)
    assert sample is not None
    assert sample.features.shape[1] == 64
    assert set(sample.labels) == set(range(10))

    events = events_of(record.folder / "tb", histograms=0)
    first = rows[0]["layers"][0]
    for tag, value in (
        ("penultimate/within_share", rows[0]["penultimate"]["within_share"]),
        (f"norm_cv input/{first['name']}", first["input"]["norm_cv"]),
        (f"nc1 output/{first['name']}", first["output"]["nc1"]),
        (f"shrink/{first['name']}", first["shrink"]),
    ):
        drawn = events.Scalars(tag)
        assert [event.step for event in drawn] == [1, 2]
        assert drawn[0].value == pytest.approx(value)
    histogram, _ = events.Histograms(f"norms/{first['name']}")
    assert histogram.histogram_value.num == 360
    assert histogram.histogram_value.sum == pytest.approx(360 * first["input"]["norm_mean"], rel=1e-3)


def test_how_often_follows_from_the_policy() -> None:
    def measured(epochs: int, every: int | None) -> list[int]:
        policy = AnalysisPolicy(every=every)
        return [epoch for epoch in range(1, epochs + 1) if policy.measures_after(epoch, epochs)]

    assert measured(5, 0) == []
    assert measured(5, 2) == [2, 4, 5]
    assert measured(5, None) == [1, 2, 3, 4, 5]
    assert measured(200, None) == list(range(10, 201, 10))
    assert AnalysisPolicy(every=None) != AnalysisPolicy()


@pytest.mark.parametrize(
    "stop", [pytest.param(5, marks=pytest.mark.slow), 12], ids=["in the first epoch", "in the second epoch"]
)
def test_a_resumed_run_has_no_line_twice_and_none_missing(stop: int, train: Train, trained: Train) -> None:
    options = (EPOCHS, *TINY, "analysis=on", "analysis.statistics_until=14", "analysis.statistics_every=3")
    whole = trained(*options)
    assert [row["step"] for row in read_statistics(whole.folder)] == [3, 6, 9, 12]
    interrupted(stop, train, *options)
    resumed = train(*options)
    for name in (FEATURES, STATISTICS, SAMPLE):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_run_cut_off_between_line_and_checkpoint_has_no_line_twice(
    train: Train, trained: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (EPOCHS, *TINY, "analysis=on")
    whole = trained(*options)
    save = Checkpoints.save

    def fail(self: Checkpoints, epoch: int, *arguments: Any) -> None:
        if epoch == 2:
            raise OSError(28, "No space left on device")
        save(self, epoch, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", fail)
        with pytest.raises(UserError):
            train(*options)
    (features,) = tmp_path.rglob(FEATURES)
    assert len(features.read_text().splitlines()) == 2, "a line that no checkpoint knows of"
    with features.open("a") as file:
        file.write('{"epoch": 3')
    resumed = train(*options)
    assert (resumed.folder / FEATURES).read_bytes() == (whole.folder / FEATURES).read_bytes()


def test_damaged_measurements_are_named_before_a_run_goes_on(train: Train, tmp_path: Path) -> None:
    interrupted(12, train, EPOCHS, *TINY, "analysis=on")
    (features,) = (tmp_path / "runs").rglob(FEATURES)
    features.write_text('{"epoch": 1}\n')
    with pytest.raises(UserError, match=r"features\.jsonl, line 1: step is missing.*\nmove this file away"):
        train(EPOCHS, *TINY, "analysis=on")


@pytest.mark.slow
def test_at_the_default_it_takes_under_five_percent_of_the_time(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the processor's time, which a busy machine does not stretch; every epoch of so short a run is measured."""
    spent = {"analysis": 0.0, "run": 0.0}

    def timed(cls: type, name: str, what: str) -> None:
        method = getattr(cls, name)

        def wrapper(*arguments: Any) -> Any:
            began = time.process_time()
            try:
                return method(*arguments)
            finally:
                spent[what] += time.process_time() - began

        monkeypatch.setattr(cls, name, wrapper)

    for name in ("_add", "_take_sample", "row", "sample"):
        timed(Probe, name, "analysis")
    timed(Journal, "append_features", "analysis")
    timed(Trainer, "fit", "run")
    record = train("recipe.epochs=2", "progress=false", "analysis=on")
    assert len(read_features(record.folder)) == 2
    assert 0 < spent["analysis"] < 0.05 * spent["run"]


# ---- Running and batch statistics ---------------------------------------------------------------------------


class OneBatch:
    """A loader of one batch."""

    batch_size = 64

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch = torch.randn(64, 3, 8, 8, generator=generator), torch.randint(5, (64,), generator=generator)

    def __len__(self) -> int:
        return 1

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.batch


@pytest.mark.parametrize("norm", ["bn", "l2bn", "l2bn_mean_norm", "group_norm"])
def test_by_batch_statistics_is_as_in_training_but_for_dropout_and_nothing_moves(norm: str) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(288, 5))
    model = nn.Sequential(*layers)
    names = norm_layers(model)
    swap_norm(model, norm)
    for layer in model.modules():
        if hasattr(layer, "fused"):
            layer.fused = "off"
    loader = OneBatch()
    images, labels = loader.batch
    accuracies = {}
    for kind in ("running", "batch"):
        other = copy.deepcopy(model).eval()
        other.get_submodule(names[0]).train(kind == "batch")
        with torch.no_grad():
            accuracies[kind] = 100 * (other(images).argmax(1) == labels).double().mean().item()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone: Any = SimpleNamespace(world_size=1, device=torch.device("cpu"), autocast=nullcontext)
    row = compare_statistics(model.train(), names, 5, loader, alone, 30)
    assert {"running": row["running/top1"], "batch": row["batch/top1"]} == pytest.approx(accuracies)
    assert row["step"] == 30
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_the_comparison_is_no_time_of_training(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, late = time.perf_counter, 0

    def slowly(*given: Any) -> Any:
        nonlocal late
        late += 100
        return compare_statistics(*given)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late)
    monkeypatch.setattr(session, "compare_statistics", slowly)
    record = train("recipe.epochs=1", *TINY, "analysis=statistics", "analysis.statistics_every=4")
    assert len(read_statistics(record.folder)) == 2
    assert 0 < record.seconds < 100  # the time of one of them


def test_at_the_start_evaluation_lags_behind_batch_statistics(train: Train) -> None:
    """The running variance of a unit L2BN starts far above that of its features."""
    options = ("norm=l2bn", "recipe.epochs=1", "progress=false", "dataset.subset=700", "dataset.image_size=16")
    record = train(*options, "analysis=statistics", "analysis.statistics_until=20")
    rows = read_statistics(record.folder)
    assert [row["step"] for row in rows] == [10, 20]
    assert rows[-1]["batch/top1"] > 2 * rows[-1]["running/top1"]


# ---- An existing run ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_finished_run_gives_what_it_would_have_given_in_training(copied: Train, trained: Train) -> None:
    plain, watched = copied(EPOCHS, *TINY), trained(EPOCHS, *TINY, "analysis=on")
    (row,) = analyze(plain.folder)
    assert [row] == read_features(plain.folder) == read_features(watched.folder)[1:]
    assert (plain.folder / SAMPLE).read_bytes() == (watched.folder / SAMPLE).read_bytes()
    assert results(plain) == results(watched)
    rows = analyze(plain.folder, every_checkpoint=True)
    assert rows == read_features(plain.folder) == read_features(watched.folder)


def test_the_script_prints_a_line_for_each_layer(copied: Train, issue: Issue, tmp_path: Path) -> None:
    record = copied("recipe.epochs=1", *TINY)
    done = issue("analyze", "--run", record.folder, tmp_path / "nowhere")
    assert done.code == 1
    assert "nowhere is not the folder of a run" in done.err
    (row,) = read_features(record.folder)
    for layer in row["layers"]:
        assert f"\n{layer['name']} " in done.out
        assert f" {layer['input']['norm_cv']:.3f} " in done.out
    assert f"{row['penultimate']['within_share']:.3f}" in done.out.split("penultimate")[1]
    assert max(map(len, done.out.splitlines())) <= 110


def test_an_epoch_that_a_crash_kept_out_of_the_metrics_is_analyzed_too(copied: Train) -> None:
    """The checkpoint of an epoch is written before its line."""
    record = copied(EPOCHS, *TINY)
    before = (record.folder / METRICS).read_text()
    (record.folder / METRICS).write_text(before.splitlines(keepends=True)[0])
    (record.folder / "summary.json").unlink()
    rows = analyze(record.folder)
    assert [row["epoch"] for row in rows] == [2]
    assert read_features(record.folder) == rows
    assert (record.folder / SAMPLE).exists()
    assert (record.folder / METRICS).read_text() == before


def test_what_cannot_be_analyzed_is_named(copied: Train) -> None:
    record = copied("recipe.epochs=1", *TINY)
    for path in (record.folder / "checkpoints").glob("*.pt"):
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="has no checkpoint after an epoch to analyze"):
        analyze(record.folder)
    assert not (record.folder / FEATURES).exists()
    assert json.loads((record.folder / "summary.json").read_text())["status"] == "finished"


def test_a_run_with_a_damaged_record_is_not_analyzed(copied: Train) -> None:
    record = copied("recipe.epochs=1", *TINY)
    (record.folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json"):
        analyze(record.folder)
    assert not (record.folder / FEATURES).exists()


@pytest.mark.slow
def test_two_devices_are_looked_into_as_one_and_the_run_is_the_same(tmp_path: Path) -> None:
    options = ["norm=l2bn", EPOCHS, *TINY, "compute.device=cpu", "compute.devices=2"]
    for analysis in ("off", "on", "statistics"):
        given = (f"runs_dir={tmp_path / analysis}", f"analysis={analysis}", "analysis.statistics_every=8")
        finish(start(TRAIN, *options, *given))
    folders = {name: next((tmp_path / name).rglob("summary.json")).parent for name in ("off", "on", "statistics")}
    contents = {name: (folder / "weights.safetensors").read_bytes() for name, folder in folders.items()}
    assert contents["on"] == contents["statistics"] == contents["off"]
    assert [row["images"] for row in read_features(folders["on"])] == [360, 360]
    assert [row["step"] for row in read_statistics(folders["statistics"])] == [8, 16]
    sample = read_sample(folders["on"])
    assert sample is not None
    assert len(sample.labels) == 360
