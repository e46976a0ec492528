"""Train the run of a record once more: python scripts/replay.py RECORD."""

import argparse
from pathlib import Path

from l2bn.errors import optional_output, told_plainly


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the run of a record once more.")
    parser.add_argument("record", type=Path, metavar="RECORD", help="a folder with a config.yaml")
    parser.add_argument("--runs-dir", default="runs/replay", help="where the new run goes (runs/replay)")
    parser.add_argument("--root", help="where the data set lies, if not where its YAML in configs/ says")
    arguments = parser.parse_args()
    from l2bn.training.interruption import refuse_copies
    from l2bn.training.run import replay  # imported here: --help need not wait for torch

    refuse_copies()
    with optional_output():
        record = replay(arguments.record, arguments.runs_dir, arguments.root)
    print(record.folder)


if __name__ == "__main__":
    with told_plainly():
        main()
