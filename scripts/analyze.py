"""Measure the features of existing runs; prints a table, and adds the measures to the run and to TensorBoard.

python scripts/analyze.py --run RUN                  its last checkpoint
python scripts/analyze.py --run RUN --checkpoints    every checkpoint that was kept

The measures are defined in src/l2bn/analysis/features.py.
"""

import argparse
import logging
import sys
from pathlib import Path

from l2bn.failures import exit_with_message, explain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", type=Path, required=True, metavar="RUN", help="folder of a run")
    parser.add_argument("--checkpoints", action="store_true", help="every checkpoint that was kept")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--config-dir", type=Path, action="append", default=[], help="your folder of YAML files")
    parser.add_argument("--root", help="folder of the data set, if it has moved since training")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
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
        except Exception as error:
            message = explain(error)
            if message is None:
                raise
            print(message if str(run) in message else f"{run}: {message}", file=sys.stderr)
            failures += 1
            continue
        for row in rows:
            console.print(layers_table(str(run), row))
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    with exit_with_message():
        main()
