"""Train the run of a record once more: python scripts/replay.py RECORD."""

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the run of a record once more.")
    parser.add_argument("record", type=Path, metavar="RECORD", help="a folder with a config.yaml")
    parser.add_argument("--runs-dir", default="runs/replay", help="where the new run goes (runs/replay)")
    parser.add_argument("--root", help="where the data set lies, if not where its YAML says")
    arguments = parser.parse_args()
    from l2bn.errors import UserError
    from l2bn.training.run import replay  # imported here: --help need not wait for torch

    try:
        record = replay(arguments.record, arguments.runs_dir, arguments.root)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(record.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
