"""Train the run of a record again, by its config.yaml.

python scripts/replay.py RECORD
"""

import argparse
import logging
from pathlib import Path

from l2bn.errors import optional_output
from l2bn.failures import exit_with_message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, metavar="RECORD", help="folder with a config.yaml")
    parser.add_argument("--runs-dir", default="replay", help="folder of the new run (default: replay)")
    parser.add_argument("--config-dir", type=Path, action="append", default=[], help="your folder of YAML files")
    parser.add_argument("--root", help="folder of the data set, if it is not the one of its YAML file")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from l2bn.training.existing import replay  # imported here: --help need not wait for torch
    from l2bn.training.interruption import refuse_copies

    refuse_copies()
    with optional_output():
        record = replay(arguments.record, arguments.runs_dir, arguments.root, arguments.config_dir)
    print(record.folder)


if __name__ == "__main__":
    with exit_with_message():
        main()
