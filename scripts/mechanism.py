"""Does it work for the reason given? Features, controls and the studies of eps, statistics and learning rate.

python scripts/mechanism.py                        results/records and results/studies, into results/mechanism.md,
                                                   results/mechanism/, results/figures/ and the README
python scripts/mechanism.py --runs runs/controls   what is in a folder of runs, into its mechanism/
"""

import argparse
import sys
from pathlib import Path

from l2bn.errors import told_plainly
from l2bn.reporting.formatting import with_block
from l2bn.reporting.mechanism import (
    BEGIN,
    END,
    mechanism_documents,
    read_mechanism,
    readme_block,
)
from l2bn.reporting.mechanism_figures import write_mechanism_figures

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results/records"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["tables", "figures", []], help="either alone (default: both)")
    parser.add_argument("--runs", "--records", type=Path, default=RECORDS, help="folder of runs or records")
    parser.add_argument(
        "--studies", type=Path, default=ROOT / "results/studies", help="folder of the studies' records"
    )
    parser.add_argument("--out", type=Path, help="folder to write to (default: see above)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a record had to be left out")
    arguments = parser.parse_args()
    published = arguments.runs.resolve() == RECORDS
    out = arguments.out or (ROOT / "results" if published else arguments.runs / "mechanism")
    reading = ROOT / "results/reference/mechanism.md"

    mechanism = read_mechanism(arguments.runs, arguments.studies)
    problems = list(mechanism.problems)
    if "tables" in arguments.what or not arguments.what:
        text = reading.read_text(encoding="utf-8") if published and reading.exists() else ""
        for name, content in mechanism_documents(mechanism, text).items():
            path = out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
            print(path)
        if published and arguments.out is None:
            readme = ROOT / "README.md"
            text = with_block(readme.read_text(encoding="utf-8"), BEGIN, END, readme_block(mechanism))
            readme.write_text(text, encoding="utf-8")
    if "figures" in arguments.what or not arguments.what:
        paths, broken = write_mechanism_figures(mechanism, out / "figures")
        print("\n".join(map(str, paths)) or "nothing to draw: no features measured of both bn and l2bn")
        problems += broken
    for problem in problems:
        print(f"left out: {problem.folder}: {problem.reason}", file=sys.stderr)
    if problems and arguments.strict:
        sys.exit(1)


if __name__ == "__main__":
    with told_plainly():
        main()
