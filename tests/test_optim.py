"""Schedules against the formulas of their papers, and the optimizer's parameter groups."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from l2bn.errors import UserError
from l2bn.records import first_fault
from l2bn.training.optim import Cosine, CosineRestarts, Exponential, MultiStep, OneCycle, Recipe, Schedule

SETTINGS = {
    "epochs": 10,
    "batch_size": 4,
    "lr": 0.1,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 5e-4,
    "decay_norm_and_bias": True,
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "schedule": Cosine(),
}

OUT_OF_RANGE = [
    ("batch_size", -32, "greater than or equal to 1"),
    ("lr", 0, "greater than 0"),
    ("lr", 1e300, "less than or equal to 1000000"),
    ("momentum", 1, "less than 1"),
    ("weight_decay", -0.1, "greater than or equal to 0"),
    ("weight_decay", 1e300, "less than or equal to 1000000"),
    ("label_smoothing", 1, "less than 1"),
    ("mixup", -1, "greater than or equal to 0"),
    ("mixup", 1e300, "less than or equal to 1000"),
]


def test_a_value_out_of_range_is_named_with_the_range() -> None:
    """By the text that a user reads; test_bad_input.py has the way there."""
    for key, value, accepted in OUT_OF_RANGE:
        with pytest.raises(ValidationError) as error:
            Recipe(**SETTINGS | {key: value})
        assert first_fault(error.value) == f"{key}: must be {accepted}, not {value}"


def test_a_schedule_of_the_users_own_gives_plain_numbers() -> None:
    """Of numpy's, a checkpoint could not be read again."""
    recipe = Recipe(**SETTINGS | {"schedule": lambda epoch, epochs: np.float32(0.5)})
    assert type(recipe.learning_rate(1.0)) is float
    for wrong in (None, "0.5", -0.1, math.inf, math.nan, torch.ones(2), 10**400):
        with pytest.raises(UserError, match=r"recipe\.schedule gives .* after 0 of 10 epochs"):
            Recipe(**SETTINGS | {"schedule": lambda epoch, epochs, wrong=wrong: wrong})


def test_cosine_stepped_per_epoch_is_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
    schedule = Cosine(per_epoch=True)
    for epoch in range(200):
        assert schedule(epoch + 0.7, 200) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_cosine_falls_smoothly_from_one_to_nought() -> None:
    assert Cosine()(0, 10) == 1
    assert Cosine()(5, 10) == pytest.approx(0.5)
    assert Cosine()(10, 10) == pytest.approx(0)
    assert Cosine()(3.3, 10) == pytest.approx((1 + math.cos(math.pi * 0.33)) / 2)


def test_cosine_after_a_warmup_starts_at_its_full_height() -> None:
    schedule = Cosine(warmup_epochs=2)
    assert [schedule(epoch, 10) for epoch in (0, 1, 2)] == [0, 0.5, 1]
    assert schedule(6, 10) == pytest.approx(0.5)


def test_cosine_with_restarts_is_torchs() -> None:
    """Cycles of 3, 6 and 12 epochs, four steps each."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=3, T_mult=2)
    schedule = CosineRestarts(restarts=[3, 9])
    optimizer.step()
    for step in range(4 * 21):
        scheduler.step(step / 4)
        assert schedule(step / 4, 21) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)


@pytest.mark.parametrize("epochs", [2, 3, 5, 9, 10, 30])
def test_a_cosine_with_restarts_ends_with_the_run_whatever_its_length(epochs: int) -> None:
    schedule = CosineRestarts(restarts=[3, 9])
    assert schedule(0, epochs) == 1
    assert schedule(epochs, epochs) == pytest.approx(0)
    factors = [schedule(step / 8, epochs) for step in range(8 * epochs)]
    assert sum(after > before for before, after in pairwise(factors)) == sum(r < epochs for r in (3, 9))


def test_steps_fall_at_their_milestones() -> None:
    schedule = MultiStep(milestones=[100, 150], gamma=0.1)
    assert [schedule(e, 200) for e in (0, 99.999, 100, 149.9, 150, 199)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_steps_after_a_low_start() -> None:
    schedule = MultiStep(milestones=[100], warmup_epochs=1, start_factor=0.1)
    assert [schedule(e, 200) for e in (0, 0.99, 1, 99.9, 100)] == pytest.approx([0.1, 0.1, 1, 1, 0.1])


def test_exponential_falls_by_its_factor_each_epoch() -> None:
    assert Exponential(gamma=0.98)(17.5, 300) == pytest.approx(0.98**17)


@pytest.mark.parametrize("peak", [0.25, 0.5])
def test_one_cycle_is_two_lines_that_meet_at_its_peak(peak: float) -> None:
    places = np.linspace(0, 1, 101)
    factors = [OneCycle(peak=peak)(8 * place, 8) for place in places]
    np.testing.assert_allclose(factors, np.interp(places, [0, peak, 1], [1 / 25, 1, 0]), atol=1e-12)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.7, False), (0.8, True)])
def test_the_optimizer_has_the_values_of_the_recipe(momentum: float, nesterov: bool) -> None:
    recipe = Recipe(
        **SETTINGS | {"lr": 0.3, "momentum": momentum, "nesterov": nesterov, "decay_norm_and_bias": False}
    )
    groups = recipe.optimizer(nn.Linear(4, 2)).param_groups
    values = [(group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) for group in groups]
    assert values == [(0.3, momentum, nesterov, 5e-4), (0.3, momentum, nesterov, 0)]


def test_weight_decay_may_spare_norms_and_biases() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    recipe = Recipe(**{**SETTINGS, "decay_norm_and_bias": False})
    decay = {
        id(p): group["weight_decay"] for group in recipe.optimizer(model).param_groups for p in group["params"]
    }
    assert len(decay) == 6
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (5e-4 if name in ("0.weight", "3.weight") else 0)
    (group,) = Recipe(**SETTINGS).optimizer(model).param_groups
    assert group["weight_decay"] == 5e-4
    assert len(group["params"]) == 6


class Own:
    """A schedule of the user's own, whose names mean what they like."""

    milestones = warmup_epochs = None

    def __call__(self, epoch: float, epochs: int) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("schedule", "epochs", "told"),
    [
        (MultiStep(milestones=[100, 150]), 50, "milestones 100, 150"),
        (MultiStep(milestones=[100, 150]), 120, "milestones 150"),
        (MultiStep(milestones=[100, 150]), 151, ""),
        (Cosine(warmup_epochs=5), 5, "still warming up"),
        (Cosine(warmup_epochs=5), 6, ""),
        (Cosine(), 1, ""),
        (Cosine(per_epoch=True), 2, "in the last epoch it is 0.5 of recipe.lr"),
        (Cosine(per_epoch=True), 1, "in the last epoch it is 1 of recipe.lr"),
        (Cosine(per_epoch=True), 5, ""),
        (CosineRestarts(restarts=[2, 6, 14, 30, 62]), 16, "from its restart after epoch 14 on it decays in fewer"),
        (CosineRestarts(restarts=[2, 6, 14, 30, 62]), 126, ""),
        (CosineRestarts(restarts=[3, 7]), 2, ""),
        (Exponential(gamma=0.98), 90, "in the last epoch it is 0.17 of recipe.lr"),
        (Exponential(gamma=0.98), 300, ""),
        (Exponential(gamma=1.0), 300, ""),
        (Exponential(gamma=0.9), 1, ""),
        (Own(), 1, ""),
    ],
)
def test_a_run_that_ends_before_its_learning_rate_has_fallen_says_so(
    schedule: Schedule, epochs: int, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    Recipe(**{**SETTINGS, "schedule": schedule, "epochs": epochs}).warn_if_cut_off()
    assert (told in caplog.text) if told else not caplog.text


@pytest.mark.parametrize("milestones", [[150, 100], [0, 10], [5, 5]])
def test_milestones_must_rise(milestones: list[int]) -> None:
    with pytest.raises(ValueError, match="milestones"):
        MultiStep(milestones=milestones)
    with pytest.raises(ValueError, match="restarts"):
        CosineRestarts(restarts=milestones)
