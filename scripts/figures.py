"""Draw accuracy curves and paired differences of BN and L2BN, as PNG and SVG.

python scripts/figures.py --runs runs    what is in runs/, into runs/figures/
python scripts/figures.py                results/records, into results/figures/
"""

import argparse
import sys
from pathlib import Path

from l2bn.errors import told_plainly
from l2bn.reporting.evidence import read_evidence
from l2bn.reporting.figures import write_figures

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results/records"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", "--records", type=Path, default=RECORDS, help="folder of runs or records")
    parser.add_argument("--out", type=Path, help="folder for the figures (default: see above)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a record had to be left out")
    arguments = parser.parse_args()
    published = arguments.runs.resolve() == RECORDS
    out = arguments.out or (ROOT / "results/figures" if published else arguments.runs / "figures")

    evidence = read_evidence(arguments.runs)
    paths, broken = write_figures(evidence, out)
    problems = [*evidence.problems, *broken]
    print("\n".join(map(str, paths)) or "nothing to draw: no finished run of bn or l2bn here yet")
    for problem in problems:
        print(f"left out: {problem.folder}: {problem.reason}", file=sys.stderr)
    if problems and arguments.strict:
        sys.exit(1)


if __name__ == "__main__":
    with told_plainly():
        main()
