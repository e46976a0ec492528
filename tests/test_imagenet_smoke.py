"""The ImageNet path on 100 real photographs, from file to accuracy: whether it runs."""

import tarfile
from pathlib import Path

import pytest

from conftest import Train
from l2bn.data.folder import list_files
from l2bn.data.imagenet_wds import pack

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photographs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The overrides of both sources: files, and shards packed from them."""
    root = tmp_path_factory.mktemp("photographs")
    with tarfile.open(shared_data / "imagenet-samples.tar") as tar:
        tar.extractall(root, filter="data")
    for part in ("train", "val"):
        pack(list_files(root / "imagenet-samples"), root / "shards", part, samples=30)
    shards = ["dataset=imagenet_wds", f"dataset.root={root / 'shards'}", f"dataset.cache={root / 'cache'}"]
    return {"files": ["dataset=imagenet_samples", f"dataset.root={root}"], "shards": shards}


@pytest.mark.parametrize("norm", ["bn", "l2bn"])
@pytest.mark.parametrize("backbone", ["imagenet_resnet18", "imagenet_mobilenet_v2"])
@pytest.mark.parametrize("source", ["files", "shards"])
def test_real_photographs_go_from_file_to_accuracy(
    source: str, backbone: str, norm: str, photographs: dict[str, list[str]], train: Train
) -> None:
    record = train(
        *photographs[source],
        f"backbone={backbone}",
        f"norm={norm}",
        "recipe=short",
        "recipe.epochs=1",
        "recipe.batch_size=25",
        "recipe.lr=0.01",
        "compute.workers=2",
        "compute.device=cpu",
        "progress=false",
    )
    assert record.status == "finished"
    assert (record.updates, record.train_images, record.test_images) == (4, 100, 100)
    assert record.baseline is None
