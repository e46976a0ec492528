"""What every test shares: the real images, and a way to train a run as the command line does, in process."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import settings
from omegaconf import OmegaConf

from l2bn.records import Record

ROOT = Path(__file__).parents[1]

Train = Callable[..., Record]

# The same examples on every machine and in every run; a busy machine is no failure. To search for new ones:
# pytest --hypothesis-profile=default
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

# Eight updates an epoch on real digits: enough to see an epoch end, and quick.
TINY = ("dataset.subset=256", "progress=false", "compute.workers=0")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sums are split among threads, so their number changes the last bits."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images (see CONTRIBUTING.md); without it the tests on real images are skipped."""
    folder = Path(os.environ.get("L2BN_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} does not exist; set L2BN_SHARED_DATA to their folder")
    return folder


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Compose a configuration from overrides, train it under `tmp_path / "runs"` and return its record."""

    from l2bn.training.command import train_from_hydra  # seconds of imports that few tests need

    def train(*overrides: str) -> Record:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            config = compose("train", [f"runs_dir={tmp_path / 'runs'}", *overrides], return_hydra_config=True)
            choices = config.hydra.runtime.choices
            own = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
            return train_from_hydra(own, choices)

    return train
