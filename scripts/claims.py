"""Judge the paper's claims by the records.

python scripts/claims.py --runs runs    what is in runs/, in the terminal
python scripts/claims.py                results/records, into results/claims.md
"""

import argparse
import sys
from pathlib import Path

from l2bn.errors import told_plainly
from l2bn.reporting.claims import claims_markdown
from l2bn.reporting.evidence import read_evidence

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results/records"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", "--records", type=Path, default=RECORDS, help="folder of runs or records")
    parser.add_argument("--out", type=Path, help="file to write (default: see above)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a record had to be left out")
    arguments = parser.parse_args()
    published = arguments.runs.resolve() == RECORDS
    out = arguments.out or (ROOT / "results/claims.md" if published else None)

    evidence = read_evidence(arguments.runs, features=True)
    text = claims_markdown(evidence)
    print(text)
    if out:
        out.write_text(text, encoding="utf-8")
        print(out)
    for problem in evidence.problems:
        print(f"left out: {problem.folder}: {problem.reason}", file=sys.stderr)
    if evidence.problems and arguments.strict:
        sys.exit(1)


if __name__ == "__main__":
    with told_plainly():
        main()
