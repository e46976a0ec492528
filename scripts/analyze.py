"""Measure the features of existing runs: python scripts/analyze.py --run RUN [RUN...].

The measures (defined in src/l2bn/analysis/features.py) go to the runs' features.jsonl and to TensorBoard, and a
table of each run is printed. With --checkpoints every kept checkpoint is measured, without it the last one.
"""

import argparse
import sys
from pathlib import Path

from l2bn.errors import UserError
from l2bn.failures import told_plainly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", type=Path, required=True, metavar="RUN", help="the folder of a run")
    parser.add_argument("--checkpoints", action="store_true", help="every kept checkpoint")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument(
        "--config-dir", type=Path, action="append", default=[], help="your own folder of YAML files"
    )
    parser.add_argument("--root", help="the folder of the data set, if it has moved since training")
    arguments = parser.parse_args()
    from rich.console import Console  # imported here: --help need not wait for torch

    from l2bn.reporting.terminal import layers_table
    from l2bn.training.existing import analyze

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    failures = 0
    for run in arguments.run:
        try:
            rows = analyze(
                run,
                every_checkpoint=arguments.checkpoints,
                device=arguments.device,
                root=arguments.root,
                config_dirs=arguments.config_dir,
            )
        except UserError as error:
            print(error, file=sys.stderr)
            failures += 1
            continue
        for row in rows:
            console.print(layers_table(str(run), row))
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    with told_plainly():
        main()
