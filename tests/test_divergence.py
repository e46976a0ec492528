"""NaN and infinity, wherever they occur: the run ends and is recorded as diverged, never as finished."""

import json
import math
from typing import Any

import pytest
import torch

from conftest import EPOCHS, TINY, AtUpdate, Train, events_of, weights
from l2bn.records import Record
from l2bn.training import loop

NAN, INFINITY = math.nan, math.inf


def diverged(record: Record, divergence: str, epochs: int) -> None:
    """What a record says of a run that diverged after so many epochs."""
    assert record.status == json.loads((record.folder / "summary.json").read_text())["status"] == "diverged"
    assert record.divergence == divergence
    assert len(record.metrics()) == epochs
    assert record.last == (record.metrics()[-1] if epochs else {})
    assert "final/test_top1" not in events_of(record.folder / "tb").Tags()["scalars"]


@pytest.mark.parametrize(("update", "place", "epochs"), [(3, "epoch 1, step 3", 0), (11, "epoch 2, step 3", 1)])
def test_weights_that_are_not_finite(
    update: int, place: str, epochs: int, train: Train, at_update: AtUpdate
) -> None:
    def poison(trainer: Any) -> None:
        with torch.no_grad():
            next(trainer.network.parameters()).fill_(INFINITY)

    at_update(update, poison)
    diverged(train(EPOCHS, *TINY), f"the loss is not finite in {place}", epochs)


def test_a_running_statistic_that_training_does_not_read(train: Train, at_update: AtUpdate) -> None:
    """The losses of the epoch are finite; evaluation reads it."""

    def poison(trainer: Any) -> None:
        trainer.network.get_buffer("layer1.0.bn1.running_var")[0] = NAN

    at_update(11, poison)
    diverged(train("norm=bn", EPOCHS, *TINY), "layer1.0.bn1.running_var is not finite after epoch 2", 1)


def test_a_weight_that_reaches_no_loss(train: Train, at_update: AtUpdate) -> None:
    """Minus infinity before a ReLU silences a channel: every loss is finite, and the network is broken."""

    def poison(trainer: Any) -> None:
        with torch.no_grad():
            trainer.network.get_parameter("layer1.0.bn1.bias")[0] = -INFINITY

    at_update(11, poison)
    record = train("norm=bn", "recipe.weight_decay=0.0", EPOCHS, *TINY)
    diverged(record, "layer1.0.bn1.bias is not finite after epoch 2", 1)


def test_infinities_that_belong_to_a_network(train: Train, at_update: AtUpdate) -> None:
    """Such as those of an attention's mask."""
    at_update(1, lambda trainer: trainer.network.register_buffer("mask", torch.full((2, 2), -INFINITY)))
    assert train(EPOCHS, *TINY).status == "finished"


def test_the_last_update_of_a_run(train: Train, at_update: AtUpdate) -> None:
    """No loss follows on it that could tell."""

    def poison(trainer: Any) -> None:
        next(trainer.network.parameters()).register_hook(lambda gradient: gradient * NAN)

    at_update(16, poison)
    diverged(train(EPOCHS, *TINY), "conv1.weight is not finite after epoch 2", 1)


def test_a_test_loss_that_overflows(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights and training losses that are finite all along."""
    evaluate = loop.evaluate
    epochs = iter([1, 2])

    def overflow(*arguments: Any) -> Any:
        _, *accuracies = evaluate(*arguments)
        return (2.3 if next(epochs) == 1 else INFINITY, *accuracies)

    monkeypatch.setattr(loop, "evaluate", overflow)
    record = train(EPOCHS, *TINY)
    diverged(record, "the test loss is not finite after epoch 2", 1)
    assert all(tensor.isfinite().all() for tensor in weights(record).values())
