"""Copy the records of ended runs to results/records, from which tables, figures and claims are made.

python scripts/publish.py RUN...
"""

import argparse
import sys
from pathlib import Path

from l2bn.failures import exit_with_message
from l2bn.publication import publish
from l2bn.records import InvalidRecordError

RECORDS = Path(__file__).resolve().parents[1] / "results/records"  # where scripts/report.py looks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of an ended run")
    parser.add_argument("--to", type=Path, default=RECORDS, help="default: results/records, of this suite")
    arguments = parser.parse_args()
    failures = 0
    for run in arguments.runs:
        try:
            print(publish(run, arguments.to))
        except (InvalidRecordError, OSError) as error:
            print(f"{run}: not published: {error}", file=sys.stderr)
            failures += 1
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    with exit_with_message():
        main()
