"""What a run is called, and what tells it from another."""

import copy
from typing import Any

import pytest

from l2bn.training.plan import differences, hash_identity, identity, run_key

CHOICES = {"dataset": "cifar10", "backbone": "resnet20", "norm": "l2bn", "recipe": "short"}
DEFAULTS: dict[str, Any] = {
    "dataset": {"_target_": "d", "root": "data", "download": True, "subset": None, "augmentation": {"flip": True}},
    "backbone": {"_target_": "b", "depth": 20},
    "norm": {"_target_": "n", "eps": None, "fused": "auto"},
    "recipe": {"lr": 0.1, "schedule": {"_target_": "s", "milestones": [1, 2]}},
    "compute": {"precision": "32-true", "devices": 1, "sync_bn": False, "threads": 2, "device": "cpu"},
    "seed": 0,
    "runs_dir": "runs",
}


def changed(*path: str, to: object) -> dict[str, Any]:
    config = copy.deepcopy(DEFAULTS)
    node = config
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = to
    return config


def test_a_cell_is_named_by_its_choices() -> None:
    assert run_key(DEFAULTS, DEFAULTS, CHOICES).path.as_posix() == "cifar10/resnet20/l2bn/short/seed0"


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        (("norm", "eps"), 0.001, "cifar10/resnet20/l2bn,eps=0.001/short/seed0"),
        (("dataset", "subset"), 500, "cifar10,subset=500/resnet20/l2bn/short/seed0"),
        (("dataset", "augmentation", "flip"), False, "cifar10,augmentation.flip=False/resnet20/l2bn/short/seed0"),
        (("recipe", "schedule", "milestones"), [3], "cifar10/resnet20/l2bn/short,schedule.milestones=[3]/seed0"),
        (("seed",), 7, "cifar10/resnet20/l2bn/short/seed7"),
    ],
)
def test_a_value_overridden_in_a_group_is_part_of_the_name(path: tuple[str, ...], value: object, name: str) -> None:
    config = changed(*path, to=value)
    assert str(run_key(config, DEFAULTS, CHOICES)) == name
    assert hash_identity(identity(config)) != hash_identity(identity(DEFAULTS))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("dataset", "root"), "/elsewhere"),
        (("dataset", "download"), False),
        (("norm", "fused"), "off"),
        (("compute", "threads"), 8),
        (("compute", "device"), "cuda"),
        (("runs_dir",), "other"),
    ],
)
def test_a_run_may_move_between_machines(path: tuple[str, ...], value: object) -> None:
    config = changed(*path, to=value)
    assert hash_identity(identity(config)) == hash_identity(identity(DEFAULTS))
    assert run_key(config, DEFAULTS, CHOICES) == run_key(DEFAULTS, DEFAULTS, CHOICES)


def test_an_option_of_the_users_own_is_no_key_of_the_machine() -> None:
    """Where the suite has no such key, the name of one may mean anything."""
    for group in ("backbone", "norm", "recipe"):
        for key in ("root", "cache", "workers", "download", "devkit"):
            config = changed(group, key, to=True)
            assert f"{key}=True" in str(run_key(config, DEFAULTS, CHOICES))
            assert hash_identity(identity(config)) != hash_identity(identity(DEFAULTS))


@pytest.mark.parametrize(("key", "value"), [("precision", "bf16-mixed"), ("devices", 2), ("sync_bn", True)])
def test_what_else_changes_the_result_is_in_the_hash(key: str, value: object) -> None:
    config = changed("compute", key, to=value)
    assert hash_identity(identity(config)) != hash_identity(identity(DEFAULTS))
    assert differences(identity(DEFAULTS), identity(config)) == [
        f"{key}: {DEFAULTS['compute'][key]} against {value}"
    ]


def test_equal_numbers_are_one_identity() -> None:
    assert hash_identity(identity(changed("recipe", "lr", to=1))) == hash_identity(
        identity(changed("recipe", "lr", to=1.0))
    )


def test_a_name_no_file_system_takes_is_shortened() -> None:
    name = run_key(changed("recipe", "schedule", "milestones", to=list(range(200))), DEFAULTS, CHOICES).recipe
    assert name.startswith("short,")
    assert len(name) < 255
