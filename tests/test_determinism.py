"""The same seed gives the same bits, whatever the number of devices and other settings.

That progress shown or not changes nothing, and that a stop changes nothing, is in `test_training.py`; that
the number of workers changes nothing, in `test_data_loader.py` and, from photographs to weights, `test_faults.py`.
"""

import functools
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import EPOCHS, QUIET, TINY, Train, equal, interrupted, same
from l2bn.seeding import derive_seed, seed_global
from l2bn.training import run
from l2bn.training.session import BuiltRun


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_two_threads_give_the_same_bits_twice(train: Train, tmp_path: Path) -> None:
    """Sums that threads share are split alike each time."""
    few = ("recipe.epochs=1", "dataset.subset=64", "dataset.validation=0.05")
    options = ("compute.threads=2", *few, *QUIET)
    one, other = (train(*options, f"runs_dir={tmp_path / name}") for name in ("one", "other"))
    assert torch.get_num_threads() == 2
    same(one, other)


def test_a_seed_governs_the_generators_of_a_users_own_network_too() -> None:
    def drawn(seed: int) -> tuple[float, float, float]:
        seed_global(seed, torch.device("cpu"))
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first, again, other = drawn(derive_seed(0, "weights")), drawn(derive_seed(0, "weights")), drawn(1)
    assert first == again
    assert not set(first) & set(other)


def test_a_place_in_the_run_has_a_seed_of_its_own() -> None:
    """(seed, epoch, step, rank), of which no two share one: among 10,000 places no seed comes twice."""
    places = [
        (seed, epoch, step, rank)
        for seed in range(10)
        for epoch in range(5)
        for step in range(50)
        for rank in range(4)
    ]
    assert len({derive_seed(seed, "step", *place) for seed, *place in places}) == len(places) == 10_000
    assert derive_seed(0, "step", 1, 2, 3) == derive_seed(0, "step", 1, 2, 3)


def test_a_seed_of_a_place_is_the_one_that_published_records_have() -> None:
    digest = hashlib.blake2b(b"3:augmentation:1:20", digest_size=8).hexdigest()
    assert derive_seed(3, "augmentation", 1, 20) == int(digest, 16) // 2


def keep_mask(module: nn.Module, inputs: tuple[Tensor], output: Tensor, *, folder: Path) -> None:
    """Keep which features a dropout has let through, a file an update, under the rank of this process."""
    if module.training:
        rank = torch.distributed.get_rank()
        number = len(list(folder.glob(f"{rank}-*")))
        torch.save(output != 0, folder / f"{rank}-{number}.pt")


@pytest.mark.slow
def test_ranks_drop_out_features_of_their_own(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two processes: masks differ from rank to rank and update to update, and a second run's are the same."""
    options = ("backbone=mobilenetv2_x0_5", "norm=bn", "compute.device=cpu", "compute.devices=2", "recipe.epochs=1")
    made = run.build_run

    def masks(name: str) -> dict[str, Tensor]:
        folder = tmp_path / f"masks{name}"
        folder.mkdir()

        def watched(*arguments: Any) -> BuiltRun:
            built = made(*arguments)
            for module in built.model.modules():
                if isinstance(module, nn.Dropout):
                    module.register_forward_hook(functools.partial(keep_mask, folder=folder))
            return built

        monkeypatch.setattr(run, "build_run", watched)
        train(*options, "dataset.subset=96", *QUIET, f"runs_dir={tmp_path / name}")
        return {path.stem: torch.load(path) for path in sorted(folder.iterdir())}

    first, again = masks("first"), masks("again")
    assert sorted(first) == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
    assert equal(first, again)
    names = sorted(first)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            assert not torch.equal(first[name], first[other]), f"{name} and {other}"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("norm", "compiler"), [("bn", "false"), ("l2bn", "false"), ("l2bn", "graphs")])
def test_cuda_gives_the_same_bits_with_the_deterministic_switch(
    norm: str, compiler: str, train: Train, tmp_path: Path
) -> None:
    """Twice, and once more after a stop in the second epoch."""
    options = (f"norm={norm}", "compute.device=cuda", f"compute.compile={compiler}", "compute.deterministic=true")
    options = (*options, EPOCHS, *TINY)
    one = train(*options)
    other = train(*options, f"runs_dir={tmp_path / 'again'}")
    interrupted(12, train, *options, f"runs_dir={tmp_path / 'stopped'}")
    resumed = train(*options, f"runs_dir={tmp_path / 'stopped'}")
    for record in (other, resumed):
        same(record, one)
