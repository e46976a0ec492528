"""What every test shares: the real images, and a way to train a run as the command line does, in process."""

import functools
import gc
import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose
from hypothesis import settings
from omegaconf import DictConfig, OmegaConf

from l2bn.records import Record
from l2bn.training.plan import PlannedRun, compose_sweep, composing, plan_sweep

ROOT = Path(__file__).parents[1]

Train = Callable[..., Record]
AtUpdate = Callable[[int, Callable[[Any], None]], None]

# The same examples on every machine and in every run; a busy machine is no failure. To search for new ones:
# pytest --hypothesis-profile=default
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

QUIET = ("progress=false", "compute.workers=0")
# Inductor's helper processes compile for GPUs alone, and are started on CPUs, too.
os.environ.setdefault("TORCH_WARM_POOL", "0")

# Eight updates an epoch on real digits: enough to see an epoch end, and quick.
TINY = ("dataset.subset=256", "dataset.image_size=8", *QUIET)
# Two updates an epoch.
TINIEST = ("dataset.subset=64", "dataset.image_size=8", "dataset.validation=0.05")


@pytest.fixture(autouse=True, scope="session")
def _default_signals() -> None:
    """Processes inherit ignored signals: tests in the background of a shell would pass theirs on to the runs."""
    for number in signal.valid_signals():
        if signal.getsignal(number) == signal.SIG_IGN and number not in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def _frozen() -> Iterator[None]:
    """Each run collects garbage: not among what the modules of all tests have made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sums are split among threads, so their number changes the last bits."""
    torch.set_num_threads(1)


def require(what: str, missing: object) -> None:
    """Skip a test where something it needs is missing; fail it where all is said to be there, as in CI."""
    if missing:
        say = pytest.fail if os.environ.get("L2BN_REQUIRE_SERVICES") else pytest.skip
        say(f"{what} is not to be had here; missing: {missing}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images (see CONTRIBUTING.md); without it the tests on real images are skipped."""
    folder = Path(os.environ.get("L2BN_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} does not exist; set L2BN_SHARED_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def photographs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 100 ImageNet photographs in `imagenet-samples`."""
    folder = tmp_path_factory.mktemp("photographs")
    with tarfile.open(shared_data / "imagenet-samples.tar") as tar:
        tar.extractall(folder, filter="data")
    return folder


def decoding(folder: Path) -> tuple[str, ...]:
    """A run on photographs that processes decode while it trains: 4 updates an epoch."""
    return (
        "dataset=imagenet_samples",
        f"dataset.root={folder}",
        "dataset.image_size=32",
        "dataset.validation=0.2",
        "dataset.subset=64",
        "recipe=short",
        "recipe.batch_size=16",
        "norm=bn",
        "progress=false",
    )


def composed(overrides: Sequence[str]) -> tuple[DictConfig, DictConfig]:
    """The configuration of a run as Hydra composes it, and its `hydra` node."""
    config = compose("train", list(overrides), return_hydra_config=True)
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]), config.hydra


def planned(*overrides: str, folders: Sequence[Path] = ()) -> list[PlannedRun]:
    """Plan the runs of a sweep, as the command line does."""
    with composing(overrides, folders) as (_, rest):
        return plan_sweep(compose_sweep(rest))


def train_in(runs: Path, *overrides: str, folders: Sequence[Path] = ()) -> Record:
    """Compose a configuration from overrides, as the command line does, train it in a folder, return its record."""
    from l2bn.training.run import train_composed  # seconds of imports that few tests need

    with composing([f"runs_dir={runs}", *overrides], folders) as (_, rest):
        return train_composed(*composed(rest))


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """`train_in` the folder `runs` of the test's own."""
    return functools.partial(train_in, tmp_path / "runs")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """`train` a run once for all tests, which only read it; each asks for it before it patches anything."""
    return functools.cache(lambda *overrides: train_in(tmp_path_factory.mktemp("trained"), *overrides))


@pytest.fixture
def copied(trained: Train, tmp_path: Path) -> Train:
    """A `trained` run, copied into the folder `runs` of the test's own."""

    def copied(*overrides: str) -> Record:
        folder = trained(*overrides).folder
        own = tmp_path.joinpath("runs", *folder.parts[-5:])
        shutil.copytree(folder, own)
        return Record.read(own)

    return copied


@pytest.fixture
def at_update(monkeypatch: pytest.MonkeyPatch) -> AtUpdate:
    """Have something happen to the trainer just before the n-th update from now, once."""
    from l2bn.training.loop import Trainer

    forward = Trainer.forward

    def arrange(number: int, happen: Callable[[Trainer], None]) -> None:
        left = [number]

        def spied(self: Trainer, *arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                happen(self)
            return forward(self, *arguments)

        monkeypatch.setattr(Trainer, "forward", spied)

    return arrange


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of headless Chromium."""
    browser = shutil.which("chromium")
    require("a browser (Debian's chromium)", [] if browser else ["chromium"])
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=browser, args=arguments) as chromium,
    ):
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        yield page
