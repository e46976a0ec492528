"""Compare the norms of all runs: in the terminal, and from the published records the tables in results/.

python scripts/tables.py --runs runs    what is in runs/, in the terminal
python scripts/tables.py                results/records: also results/tables/ and the README's block
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from l2bn.errors import told_plainly
from l2bn.reporting.evidence import read_evidence
from l2bn.reporting.published import read_reference
from l2bn.reporting.tables import documents, readme_with_block, write_documents
from l2bn.reporting.terminal import norms_table

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results/records"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", "--records", type=Path, default=RECORDS, help="folder of runs or records")
    parser.add_argument("--out", type=Path, help="folder for Markdown, CSV and LaTeX (default: see above)")
    parser.add_argument("--readme", type=Path, help="file whose block between the markers is replaced")
    parser.add_argument("--reference", type=Path, default=ROOT / "results/reference/baselines.yaml")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a record had to be left out")
    arguments = parser.parse_args()
    if arguments.runs.resolve() == RECORDS and arguments.out is None:
        arguments.out, arguments.readme = ROOT / "results/tables", arguments.readme or ROOT / "README.md"

    evidence = read_evidence(arguments.runs)
    reference = read_reference(arguments.reference)
    Console(width=None if sys.stdout.isatty() else 100, highlight=False).print(norms_table(evidence), crop=False)
    if arguments.readme:
        text = arguments.readme.read_text(encoding="utf-8")
        text = readme_with_block(text, evidence, reference)
        arguments.readme.write_text(text, encoding="utf-8")
    if arguments.out:
        for path in write_documents(documents(evidence, reference), arguments.out):
            print(path)
    if evidence.problems and arguments.strict:
        sys.exit(1)


if __name__ == "__main__":
    with told_plainly():
        main()
