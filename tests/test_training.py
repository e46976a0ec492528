"""A run, from its configuration to its record."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.stats import beta, kstest

from conftest import (
    EPOCHS,
    QUIET,
    ROOT,
    TINIEST,
    TINY,
    Train,
    equal,
    interrupted,
    planned,
    same,
    weights,
)
from l2bn.backbones.resnet import cifar_resnet
from l2bn.kernels import compiler
from l2bn.records import METRIC_KEYS, METRICS, read_metrics
from l2bn.seeding import derive_seed
from l2bn.training import session
from l2bn.training.checkpoint import Checkpoints, RunState
from l2bn.training.loop import Position, Totals, Trainer, peak_memory
from l2bn.training.run import build_run


def test_a_run_that_is_short_for_its_norm_and_its_schedule_says_so(
    train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    train("norm=l2bn", "recipe.epochs=1", "recipe=step_200", "recipe.batch_size=16", *TINIEST, *QUIET)
    assert "a run of 4 updates is short for features of unit norm" in caplog.text
    assert "milestones 100, 150" in caplog.text


def test_both_arms_start_from_the_same_weights_and_see_the_same_batches(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a seed that both have, from which dropout and mixup follow too."""
    starts = []

    def noted(self: Trainer, _: Any) -> None:
        starts.append((self.seed, self.network.state_dict(), list(self.train.epoch(0)), list(self.train.epoch(1))))

    monkeypatch.setattr(Trainer, "fit", noted)
    monkeypatch.setattr(RunState, "save_weights", lambda *_: pytest.fail("far enough"))
    for norm in ("bn", "l2bn"):
        with pytest.raises(pytest.fail.Exception):
            train(f"norm={norm}", "seed=1", *TINY)
    torch.testing.assert_close(*starts, rtol=0, atol=0)
    assert starts[0][0] == 1
    torch.manual_seed(derive_seed(1, "weights"))
    assert equal(starts[0][1], cifar_resnet(10, 20).state_dict())


@pytest.mark.parametrize(
    ("stop", "norm"),
    [(3, []), (12, ["norm=l2bn_mean_norm"]), *(pytest.param(n, [], marks=pytest.mark.slow) for n in (8, 10))],
    ids=["in the first epoch", "in the second epoch", "before its evaluation", "after an epoch"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    stop: int, norm: list[str], train: Train, trained: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also in the buffers that l2bn_mean_norm has beside BN's."""
    options = (*norm, EPOCHS, *TINY)
    whole = trained(*options)
    interrupted(stop, train, *options)
    assert not list(tmp_path.rglob("summary.json"))
    with caplog.at_level("INFO"):
        resumed = train(*options)
    assert "resumed after" in caplog.text
    same(resumed, whole)


def test_the_record_of_a_run_that_was_resumed_with_other_kernels_names_both(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernels' formulas, computed uncompiled, stand for the compiled ones."""

    def fail(*_: object) -> None:
        raise OSError("nothing is compiled in this test")

    options = ("norm=l2bn", EPOCHS, *TINY)
    interrupted(9, train, *options)
    monkeypatch.setattr(compiler, "UPDATES_TO_REPAY", {})
    monkeypatch.setattr(compiler, "_compile", fail)
    monkeypatch.setattr(compiler, "_kernels", compiler.Kernels())
    for module in ("l2bn.kernels.compiler", "l2bn.norms.l2bn"):
        monkeypatch.setattr(f"{module}.compiler_works", lambda _: True)
    assert train(*options).kernels == "plain then fused"
    assert "resumed with other kernels" in caplog.text


def test_a_checkpoint_holds_all_that_changes(train: Train, tmp_path: Path) -> None:
    """Read as plain values. What is derived is not there: the schedule and every random number follow from the
    position, the best epoch from the rows, the hash from the identity."""
    interrupted(12, train, EPOCHS, *TINY)
    newest = sorted(tmp_path.rglob("*.pt"))[-1]
    state = torch.load(newest, weights_only=True)
    assert newest.name.startswith("epoch0001-step0000002.")
    assert state.keys() == {"identity", "images", "model", "optimizer", "precision", "position", "keep_epochs"}
    assert state["identity"]["seed"] == 0
    momentum = [values["momentum_buffer"] for values in state["optimizer"]["state"].values()]
    assert len(momentum) == len(list(cifar_resnet(10, 20).parameters()))
    position = state["position"]
    assert (position["epoch"], position["step"]) == (1, 2)
    assert [row["epoch"] for row in position["rows"]] == [1]
    assert position["totals"][:, 3].tolist() == [2 * 32]  # images of the epoch under way
    assert position["seconds"] > 0


def test_checkpoints_are_written_when_they_are_due(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = []
    save = Checkpoints.save

    def noted(self: Checkpoints, epoch: int, step: int, state: Any) -> None:
        written.append((epoch, step))
        save(self, epoch, step, state)

    monkeypatch.setattr(Checkpoints, "save", noted)
    record = train("recipe.epochs=3", "checkpoint.every_steps=3", "checkpoint.keep_epochs=[1]", *TINY)
    in_an_epoch = [(epoch, step) for epoch in range(3) for step in (3, 6)]
    assert written == sorted([*in_an_epoch, (1, 0), (2, 0), (3, 0)])
    kept = sorted(path.name.partition(".")[0] for path in record.folder.rglob("*.pt"))
    assert kept == ["epoch0001-step0000000", "epoch0002-step0000006", "epoch0003-step0000000"]


def test_the_final_weights_are_there_for_any_reader(trained: Train) -> None:
    record = trained("recipe.epochs=1", *TINY)
    path = record.folder / "weights.safetensors"
    assert equal(load_file(path), weights(record))
    with safe_open(path, "pt") as file:  # whose names and shapes are those of BN's weights, too
        run = json.loads(file.metadata()["run"])
    assert (run["norm"], run["hash"]) == ("l2bn", record.hash)


def test_a_layer_may_stand_in_two_places(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights then have two names and one memory, which safetensors refuses to write."""
    (tmp_path / "mine" / "backbone").mkdir(parents=True)
    (tmp_path / "mine" / "shared_parts.py").write_text(
        "from torch import nn\n"
        "def twice(num_classes: int) -> nn.Module:\n"
        "    layer = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))\n"
        "    body = nn.Sequential(nn.Conv2d(3, 8, 1), layer, nn.ReLU(), layer)\n"
        "    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))\n"
    )
    (tmp_path / "mine" / "backbone" / "twice.yaml").write_text("_target_: shared_parts.twice\n")
    monkeypatch.syspath_prepend(tmp_path / "mine")
    own = f"hydra.searchpath=[file://{tmp_path / 'mine'}]"
    record = train(own, "backbone=twice", "norm=l2bn", "recipe.epochs=1", *TINY)
    assert equal(load_file(record.folder / "weights.safetensors"), weights(record))


@pytest.mark.slow
def test_evaluation_agrees_with_batch_statistics_after_enough_updates(train: Train) -> None:
    """The running variance of a unit L2BN starts far off; by the end of the demo's recipe it must be there."""
    record = train("norm=l2bn", "progress=false")
    assert record.updates >= 200
    assert abs(record.last["test/top1"] - record.last["train/top1"]) < 3
    assert record.last["test/top1"] > 95


@pytest.mark.parametrize(
    ("training_batch", "image_size", "expected"),
    [(128, 32, 512), (1, 28, 512), (1024, 32, 512), (16, 64, 128), (256, 64, 256), (256, 224, 256), (8, 224, 10)],
)
def test_the_evaluation_takes_about_the_memory_of_small_images_or_of_training(
    training_batch: int, image_size: int, expected: int
) -> None:
    assert session.evaluation_batch(training_batch, image_size) == expected
    assert session.evaluation_batch(1, 100_000) == 1


def test_even_batches_leave_no_process_without_an_image() -> None:
    assert session.even_batch(201, 10, 1) == 10
    assert session.even_batch(201, 10, 2) == 11
    assert session.even_batch(10_000, 512, 1) == session.even_batch(10_000, 512, 8) == 500
    for images, most, least in itertools.product(range(8, 60), range(1, 12), range(1, 9)):
        size = session.even_batch(images, most, least)
        assert size <= most or least > 1
        assert (images - 1) % size + 1 >= least


def test_a_finished_run_is_left_alone(copied: Train, train: Train, caplog: pytest.LogCaptureFixture) -> None:
    record = copied("recipe.epochs=1", *TINY)
    before = {path: path.stat().st_mtime_ns for path in record.folder.rglob("*")}
    with caplog.at_level("INFO"):
        assert train("recipe.epochs=1", *TINY) == record
    assert caplog.messages[-1].startswith("ended before: digits,")
    assert {path: path.stat().st_mtime_ns for path in record.folder.rglob("*")} == before


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_a_stem_that_leaves_a_pixel_of_an_image_is_told(stem: str, caplog: pytest.LogCaptureFixture) -> None:
    (run,) = planned("backbone=timm", "backbone.name=resnet18", f"backbone.stem={stem}", "dataset.subset=64")
    with caplog.at_level("INFO"):
        build_run(run)
    said = "the last norm layer of this network sees one; backbone.stem=small keeps more"
    assert (said in caplog.text) == (stem == "imagenet")


def test_the_record_holds_what_the_run_was(train: Train) -> None:
    record = train("norm=l2bn", EPOCHS, *TINY, "seed=3")
    dataset = "digits,image_size=8,subset=256"
    assert record.folder.parts[-5:] == (dataset, "resnet20", "l2bn", "short,epochs=2", "seed3")
    assert (record.dataset, record.norm, record.seed) == (dataset, "l2bn", 3)
    assert record.parameters == 272_474
    assert record.norm_layers == 21
    assert record.train_images == 256
    assert record.updates == 16
    assert record.metrics()[-1] == record.last
    # Of an epoch's last step: 7/16 and 15/16 of the run, of which the last three quarters fall linearly to 0.
    assert [row["lr"] for row in record.metrics()] == pytest.approx([0.1 * 3 / 4, 0.1 / 12])
    assert len(read_metrics(record.folder / METRICS)) == 2
    facts = json.loads((record.folder / "env.json").read_text())["starts"]
    assert len(facts) == 1
    assert torch.__version__.startswith(facts[0]["packages"]["torch"])


def test_the_record_tells_the_last_epoch_from_the_best() -> None:
    (run,) = planned(EPOCHS, *TINIEST)
    row = dict.fromkeys(METRIC_KEYS, 1.0)
    rows = [{**row, "epoch": 1, "step": 2, "test/top1": 60.0}, {**row, "epoch": 2, "step": 4, "test/top1": 50.0}]
    record = session.make_record(build_run(run), Position(epoch=2, rows=rows), "stock", None)
    assert [record.best, record.last] == rows
    assert (record.updates, record.seconds) == (4, 2.0)


def test_accuracies_and_losses_are_means_over_images_not_over_batches() -> None:
    """Of eight images, in batches of five and three, whose labels have these places among the logits."""
    images, places = np.arange(8), [1, 0, 4, 9, 0, 3, 5, 2]
    logits = np.random.default_rng(0).normal(size=(8, 10))
    labels = np.argsort(-logits)[images, places]
    totals = Totals.zeros(torch.device("cpu"))
    for step, part in enumerate((slice(5), slice(5, 8))):
        batch = torch.tensor(logits[part]), torch.tensor(labels[part])
        totals.add(step, F.cross_entropy(*batch), *batch)
    losses = np.log(np.exp(logits).sum(1)) - logits[images, labels]
    assert totals.means(10) == pytest.approx((losses.mean(), 100 * 2 / 8, 100 * 6 / 8))


@pytest.mark.parametrize("terminal", [False, True], ids=["lines", "a bar"])
def test_whether_progress_is_shown_changes_nothing(
    terminal: bool, train: Train, trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = trained("recipe.epochs=1", *TINY)
    monkeypatch.setattr(Console, "is_terminal", terminal)
    shown = train("recipe.epochs=1", *TINY, "progress=true")
    same(shown, quiet)


@pytest.mark.slow
def test_checkpoints_cost_little(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the default, under 2 % of the time, even of epochs of no more than 1,408 images."""
    spent = []
    save = Checkpoints.save

    def timed(*arguments: Any) -> None:
        began = time.perf_counter()
        save(*arguments)
        spent.append(time.perf_counter() - began)

    monkeypatch.setattr(Checkpoints, "save", timed)
    record = train("recipe.epochs=3", "progress=false")
    assert len(spent) == 3
    assert sorted(spent)[1] < 0.02 * record.seconds / 3


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes_on_every_system(platform: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ru_maxrss` is in KiB on Linux and in bytes on macOS."""
    usage = SimpleNamespace(ru_maxrss=3 * 2**30 // unit)
    monkeypatch.setattr("resource.getrusage", lambda _: usage)
    monkeypatch.setattr(sys, "platform", platform)
    assert peak_memory(torch.device("cpu")) == 3 * 2**30


def test_without_a_posix_system_the_layer_works_and_training_says_what_it_needs(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "import torch, l2bn.data.loader; from l2bn import swap_norm\n"
        "model = torch.nn.Sequential(torch.nn.BatchNorm2d(4))\n"
        "assert swap_norm(model, 'l2bn') == 1\n"
        "model[0].fused = 'off'\n"
        "model(torch.randn(2, 4, 3, 3)).sum().backward()\n"
    )
    train = str(ROOT / "scripts" / "train.py")
    code += f"import runpy; sys.argv = ['train.py']; runpy.run_path({train!r}, None, '__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("training needs a POSIX system, Linux or macOS")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_the_loss_is_cross_entropy_with_mixed_and_smoothed_labels(mixup: float, smoothing: float) -> None:
    """Each image is the indicator of its own label, so that a mixture of images is that of their labels.

    A network that names the stronger image of every mixture has 100 percent.
    """
    settings = SimpleNamespace(
        recipe=SimpleNamespace(label_smoothing=smoothing, mixup=mixup), model=torch.nn.Identity(), seed=0
    )
    images, labels = torch.eye(8, dtype=torch.float64), torch.arange(8)
    shares = []
    for place in itertools.product(range(2), range(100)):
        loss, mixed, named = Trainer.forward(settings, images, labels, *place)  # type: ignore[arg-type]
        assert torch.equal(mixed.argmax(1), named)
        shares.append(mixed[0, 0].item())
        torch.testing.assert_close(mixed, shares[-1] * images + (1 - shares[-1]) * images.flip(0))
        targets = (1 - smoothing) * mixed + smoothing / 8
        torch.testing.assert_close(loss, -(targets * mixed.log_softmax(1)).sum(1).mean())
    if mixup == 0:
        assert set(shares) == {1.0}
    else:
        assert len(set(shares)) == 200, "two places have one share"
        assert kstest(shares, beta(mixup, mixup).cdf).pvalue > 0.01


def test_dropout_and_mixup_follow_from_seed_and_place(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run draws what the whole run draws there."""
    options = ("backbone=mobilenetv2_x0_5", "norm=bn", "recipe.mixup=0.2", EPOCHS, *TINIEST, *QUIET)
    interrupted(3, train, *options)
    resumed = train(*options)
    seeds, forward = [], Trainer.forward

    def noted(self: Trainer, *arguments: Any) -> Any:
        seeds.append(torch.initial_seed())
        return forward(self, *arguments)

    monkeypatch.setattr(Trainer, "forward", noted)
    same(resumed, train(*options, f"runs_dir={tmp_path / 'whole'}"))
    assert seeds == [derive_seed(0, "step", epoch, step, 0) for epoch in range(2) for step in range(2)]
