"""Evaluate the last weights of a run on its test images.

python scripts/evaluate.py RUN
"""

import argparse
import logging
from pathlib import Path

from l2bn.failures import exit_with_message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--config-dir", type=Path, action="append", default=[], help="your folder of YAML files")
    parser.add_argument("--root", help="folder of the data set, if it has moved since training")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from l2bn.training.existing import evaluate_run  # imported here: --help need not wait for torch

    loss, top1, top5 = evaluate_run(arguments.run, arguments.device, arguments.root, arguments.config_dir)
    print(f"test loss {loss:.4f}  top-1 {top1:.2f} %" + (f"  top-5 {top5:.2f} %" if top5 is not None else ""))


if __name__ == "__main__":
    with exit_with_message():
        main()
