"""Prepare a data set: download and check its files, decode its images, print their numbers.

python scripts/fetch_data.py cifar10

Where a download needs an account, the steps to take by hand are printed.
"""

import argparse
import logging
from pathlib import Path

from hydra import compose

from l2bn.data.cache import expand
from l2bn.data.imagenet_wds import pack_imagenet
from l2bn.data.splits import Splits
from l2bn.errors import UserError, told_plainly
from l2bn.training.instantiate import Builder
from l2bn.training.plan import ROOT, composing, own_folders, resolve


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a name in configs/dataset")
    parser.add_argument("overrides", nargs="*", help="as for train.py: dataset.root=FOLDER")
    parser.add_argument("--config-dir", type=Path, action="append", default=[], help="your folder of YAML files")
    parser.add_argument("--pack", metavar="FOLDER", help="first pack ImageNet's files in FOLDER into shards")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with composing([f"dataset={options.dataset}", *options.overrides], options.config_dir) as (_, overrides):
        config, folders = compose(ROOT, overrides), own_folders()
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


if __name__ == "__main__":
    with told_plainly():
        main()
