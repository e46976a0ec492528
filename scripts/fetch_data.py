"""Prepare a data set: download and check its files, decode images that are kept decoded, print their numbers.

python scripts/fetch_data.py cifar10
python scripts/fetch_data.py esc50 dataset.root=FOLDER --figure spectrograms.png --classes dog,rain

Where a download needs an account, the steps to take by hand are printed.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from hydra import compose

from l2bn.data.imagenet_wds import pack_imagenet
from l2bn.data.splits import Splits
from l2bn.errors import UserError, expand
from l2bn.failures import exit_with_message
from l2bn.training.instantiate import Builder
from l2bn.training.plan import CONFIG_NAME, composing, config_folders, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a name in configs/dataset")
    parser.add_argument("overrides", nargs="*", help="as for train.py: dataset.root=FOLDER")
    parser.add_argument("--config-dir", type=Path, action="append", default=[], help="your folder of YAML files")
    parser.add_argument("--pack", metavar="FOLDER", help="first pack ImageNet's files in FOLDER into shards")
    parser.add_argument("--figure", metavar="FILE", type=Path, help="draw a training image of each of some classes")
    parser.add_argument("--classes", metavar="A,B", help="the classes of --figure (default: the first two)")
    options = parser.parse_intermixed_args()
    if options.classes and options.figure is None:
        parser.error(f"--classes={options.classes} chooses what --figure draws: give --figure FILE too")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with composing([f"dataset={options.dataset}", *options.overrides], options.config_dir) as (_, overrides):
        config, folders = compose(CONFIG_NAME, overrides), list(config_folders())
    node = resolve(config)["dataset"]
    if options.pack is not None:
        if options.dataset != "imagenet_wds":
            raise UserError(f"--pack makes the shards of imagenet_wds, not of {options.dataset}")
        pack_imagenet(expand(options.pack, "--pack"), expand(node["root"]))
    splits = Builder(folders).build(node, "dataset", Splits)
    print(
        f"{splits.label}: {len(splits.train):,} images to train on, {len(splits.test):,} to test on, "
        f"{splits.num_classes} classes"
    )
    if options.figure is not None:
        draw(splits, options.classes.split(",") if options.classes else splits.classes[:2], options.figure)
        print(options.figure)


def draw(splits: Splits, classes: Sequence[str], file: Path) -> None:
    """The first training image of each class, side by side. Raises `UserError` for a class that there is not."""
    from matplotlib.figure import Figure  # a second that preparing data does not need

    if not splits.classes:
        raise UserError(f"--figure: the classes of {splits.label} have no names to draw them by")
    figure = Figure(figsize=(2.6 * len(classes), 2.8), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(classes), squeeze=False)[0], classes, strict=True):
        if name not in splits.classes:
            known = ", ".join(splits.classes[:10]) + (", ..." if len(splits.classes) > 10 else "")
            raise UserError(f"--classes: {splits.label} has no class {name}; it has {known}")
        found = (splits.train.labels == splits.classes.index(name)).nonzero()
        if not len(found):
            raise UserError(f"--classes: {splits.label} has no training image of {name}")
        panel.imshow(splits.train[int(found[0])][0].permute(1, 2, 0).numpy())
        panel.set_title(name.replace("_", " "), fontsize=9)
        panel.set_axis_off()
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Software": None} if file.suffix == ".png" else None  # no version in the file
    figure.savefig(file, dpi=150, metadata=metadata)


if __name__ == "__main__":
    with exit_with_message():
        main()
