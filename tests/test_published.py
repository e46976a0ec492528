"""Published records stay those of today's configurations: identities, hashes and cells; published recipes too."""

import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, planned
from l2bn.records import SUMMARY, Record
from l2bn.reporting.evidence import overrides
from l2bn.training.instantiate import CONFIGS, flatten
from l2bn.training.optim import Recipe
from l2bn.training.plan import GROUPS, composing, hash_identity
from l2bn.training.sweep import compose_sweep, plan_sweep

RECORDS = [Record.read(path.parent) for path in sorted((ROOT / "results").rglob(SUMMARY))]
assert len(RECORDS) > 100

CELLS: dict[Path, list[Record]] = defaultdict(list)
for _record in RECORDS:
    CELLS[_record.folder.parent.relative_to(ROOT / "results")].append(_record)


def command(record: Record) -> list[str] | None:
    """The overrides that the names of a record's cell stand for, without the seed; None if files here cannot tell.

    Those are of a user's own parts, and a name too long for its folder.
    """
    given = [f"compute.{key}={record.identity[key]}" for key in ("precision", "devices", "sync_bn")]
    given.append("++dataset.root=FOLDER")
    for group in GROUPS:
        choice, changed = getattr(record, group).partition(",")[0], overrides(getattr(record, group))
        values = dict(flatten(record.identity[group]))
        if not (CONFIGS / group / f"{choice}.yaml").is_file() or not changed.keys() <= values.keys():
            return None
        given.append(f"{group}={choice}")
        given += [f"++{group}.{key}={json.dumps(values[key], ensure_ascii=False)}" for key in changed]
    return given


def test_a_hash_is_that_of_the_records_identity() -> None:
    assert [record.folder for record in RECORDS if hash_identity(record.identity) != record.hash] == []


def test_no_published_cell_of_this_project_has_lost_its_files() -> None:
    assert sum(command(records[0]) is not None for records in CELLS.values()) >= 99


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_todays_configurations_give_the_published_hashes(cell: Path) -> None:
    records = CELLS[cell]
    given = command(records[0])
    if given is None:
        pytest.skip("of parts outside this project, or of a name too long for a folder")
    seeds = ",".join(str(record.seed) for record in records)
    with composing():
        runs = plan_sweep(compose_sweep([*given, f"seed={seeds}"]))
    assert [str(run.cell) for run in runs] == [
        f"{r.dataset}/{r.backbone}/{r.norm}/{r.recipe}/seed{r.seed}" for r in records
    ]
    assert [run.hash for run in runs] == [record.hash for record in records]


# What the sources of results/reference/baselines.yaml state of each recipe, by the comments there and in its
# YAML: values, and the learning rate after so many epochs. Images' sources name no label smoothing or mixup.
STATED = {
    "cosine_200": (
        {"epochs": 200, "batch_size": 256, "momentum": 0.9, "nesterov": True}
        | {"weight_decay": 5e-4, "decay_norm_and_bias": True},
        {epoch + 0.9: 0.1 * (1 + math.cos(math.pi * epoch / 200)) / 2 for epoch in range(200)},
    ),
    "step_200": (
        {"epochs": 200, "batch_size": 128, "momentum": 0.9, "nesterov": False}
        | {"weight_decay": 1e-4, "decay_norm_and_bias": True},
        {0: 0.1, 99.9: 0.1, 100: 0.01, 149.9: 0.01, 150: 0.001, 199.9: 0.001},
    ),
    "imagenet_90": (
        {"epochs": 90, "batch_size": 8 * 32, "momentum": 0.9, "weight_decay": 1e-4},
        {0: 0.1, 29.9: 0.1, 30: 0.01, 59.9: 0.01, 60: 0.001, 89.9: 0.001},
    ),
    "imagenet_mobilenet_300": (
        {"epochs": 300, "batch_size": 8 * 32, "momentum": 0.9, "weight_decay": 4e-5},
        {epoch + 0.9: 0.045 * 0.98**epoch for epoch in range(300)},
    ),
    "restarts_126": (
        {"epochs": 126, "batch_size": 32, "momentum": 0.9, "nesterov": False}
        | {"weight_decay": 2 * 1e-3, "decay_norm_and_bias": False, "mixup": 0.4},
        {
            length - 2 + part * length: 0.1 * (1 + math.cos(math.pi * part)) / 2
            for length in (2, 4, 8, 16, 32, 64)  # a cycle follows those before it
            for part in (0, 0.25, 0.5, 0.99)
        },
    ),
}


def test_the_recipes_behind_published_accuracies_are_all_compared() -> None:
    sources = yaml.safe_load((ROOT / "results/reference/baselines.yaml").read_text())["bn"]
    assert {source["recipe"] for source in sources} - {None} == STATED.keys() - {"restarts_126"}


@pytest.mark.parametrize("name", STATED)
def test_a_recipe_is_what_its_source_states(name: str) -> None:
    (run,) = planned(f"recipe={name}")
    stated, rates = STATED[name]
    stated = {"label_smoothing": 0.0, "mixup": 0.0} | stated
    assert {key: run.config["recipe"][key] for key in stated} == stated
    recipe = run.builder.call(Recipe, run.config["recipe"], "recipe")
    assert {epoch: recipe.learning_rate(epoch) for epoch in rates} == pytest.approx(rates)


def test_resnet110_begins_at_a_tenth_of_its_learning_rate() -> None:
    """For an epoch, as He et al. 2016 state (0.01 for about 400 updates)."""
    (run,) = planned("recipe=step_200", "backbone=resnet110")
    recipe = run.builder.call(Recipe, run.config["recipe"], "recipe")
    rates = {0: 0.01, 0.99: 0.01, 1: 0.1, 99.9: 0.1, 100: 0.01}
    assert {epoch: recipe.learning_rate(epoch) for epoch in rates} == pytest.approx(rates)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_published_augmentation_of_cifar_is_a_crop_padded_by_4_and_a_flip(name: str) -> None:
    (run,) = planned(f"dataset={name}")
    augmentation = {"_target_": "l2bn.data.augment.CropFlip", "padding": 4, "flip": True}
    assert run.config["dataset"]["augmentation"] == augmentation
