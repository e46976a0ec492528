"""What every test shares: where the real images are, and one thread, so that sums do not depend on the machine."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images (see CONTRIBUTING.md); without it the tests on real images are skipped."""
    folder = Path(os.environ.get("L2BN_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} does not exist; set L2BN_SHARED_DATA to their folder")
    return folder
