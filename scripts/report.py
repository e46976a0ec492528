"""Make tables, figures and verdicts from the records of runs.

Without --runs, each command reads the published records in results/records and writes to results/. With --runs DIR
it reads the runs under DIR and leaves results/ as it is.

python scripts/report.py tables --runs runs    compare the norms of your runs in the terminal
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from l2bn.errors import UserError
from l2bn.failures import exit_with_message
from l2bn.records import Problem, write_durably

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
RECORDS = RESULTS / "records"
SETS = RESULTS / "reference/sets.yaml"
REFERENCE = RESULTS / "reference/baselines.yaml"
README = ROOT / "README.md"

Command = Callable[[argparse.Namespace], Sequence[Problem]]
"""Runs a sub-command; returns the records that had to be left out."""


def tables(arguments: argparse.Namespace) -> Sequence[Problem]:
    """Compare the norms of all runs: in the terminal, and as Markdown, CSV and LaTeX."""
    from rich.console import Console

    from l2bn.reporting.evidence import read_evidence
    from l2bn.reporting.readme import readme_with_block
    from l2bn.reporting.reference import read_reference, read_sets
    from l2bn.reporting.tables import documents, write_documents
    from l2bn.reporting.terminal import accuracy_overview

    published = arguments.runs.resolve() == RECORDS and arguments.out is None
    out = RESULTS / "tables" if published else arguments.out
    evidence, reference = read_evidence(arguments.runs, features=published), read_reference(REFERENCE)
    if published:
        text = README.read_text(encoding="utf-8")
        write_durably(README, readme_with_block(text, evidence, read_sets(SETS)[0]))
    # Before anything is printed, which ends the command where the reader of a pipe is gone.
    paths = write_documents(documents(evidence, reference), out) if out else []
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(accuracy_overview(evidence), crop=False)
    _print_paths(paths)
    return evidence.problems


def figures(arguments: argparse.Namespace) -> Sequence[Problem]:
    """Draw accuracy curves and paired differences of BN and L2BN in accuracy and compactness, as PNG and SVG."""
    from l2bn.reporting.evidence import read_evidence
    from l2bn.reporting.figures import write_figures
    from l2bn.reporting.reference import read_sets

    out = arguments.out or (RESULTS if arguments.runs.resolve() == RECORDS else arguments.runs) / "figures"
    evidence = read_evidence(arguments.runs, features=True)
    paths, broken = write_figures(evidence, out, read_sets(SETS))
    _print_paths(paths, "nothing to draw: no finished run of bn or l2bn here yet")
    _print_older(out, ("curves-", "differences"), paths)
    return [*evidence.problems, *broken]


def claims(arguments: argparse.Namespace) -> Sequence[Problem]:
    """Judge the paper's claims by the records."""
    from l2bn.reporting.claims import claims_markdown
    from l2bn.reporting.evidence import read_evidence
    from l2bn.reporting.reference import read_sets
    from l2bn.reporting.tables import write_documents

    published = (arguments.runs.resolve(), arguments.sets) == (RECORDS, SETS)
    out = arguments.out or (RESULTS / "claims.md" if published else None)
    evidence = read_evidence(arguments.runs, features=True)
    text = claims_markdown(evidence, read_sets(arguments.sets))
    paths = write_documents({out.name: text}, out.parent) if out else []
    print(text)
    _print_paths(paths)
    return evidence.problems


def mechanism(arguments: argparse.Namespace) -> Sequence[Problem]:
    """Compare features, controls and the studies of eps, running statistics and learning rate."""
    from l2bn.reporting.figures import write_mechanism_figures
    from l2bn.reporting.mechanism import mechanism_documents, read_mechanism
    from l2bn.reporting.studies import EPS, RATES, TRAP
    from l2bn.reporting.tables import write_documents

    published = arguments.runs.resolve() == RECORDS
    out = arguments.out or (RESULTS if published else arguments.runs / "mechanism")
    found = read_mechanism(arguments.runs, arguments.studies or (RESULTS / "studies" if published else None))
    problems = list(found.problems)
    if arguments.studies and not (any(found.studies) or problems):
        raise UserError(f"{arguments.studies} holds no records of studies, in {', '.join((EPS, RATES, TRAP))}")
    if arguments.what != "figures":
        reading = RESULTS / "reference/mechanism.md"
        text = reading.read_text(encoding="utf-8") if published and reading.exists() else ""
        _print_paths(write_documents(mechanism_documents(found, text), out))
    if arguments.what != "tables":
        paths, broken = write_mechanism_figures(found, out / "figures")
        _print_paths(paths, "nothing to draw: no features measured of both bn and l2bn")
        _print_older(out / "figures", ("norms-", "training-", "map-", "eps-", "rates-", "trap-"), paths)
        problems += broken
    return problems


def tensorboard(arguments: argparse.Namespace) -> Sequence[Problem]:
    """Show the mean curve of each norm and cell in TensorBoard, renewed every 30 seconds until Ctrl-C."""
    import signal
    import subprocess

    from l2bn.reporting.tensorboard import Board

    board = Board(arguments.runs)
    board.update()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # runs the `finally` below, as Ctrl-C does
    place = ["--host", "127.0.0.1", "--port", str(arguments.port)]
    server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", "--logdir", str(arguments.runs), *place])
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                sys.exit(server.wait(timeout=30))
            board.update()
    finally:
        server.terminate()
        server.wait()


def _print_paths(paths: Sequence[Path], nothing: str = "") -> None:
    for line in paths or filter(None, [nothing]):
        print(line)


def _print_older(folder: Path, names: tuple[str, ...], paths: Sequence[Path]) -> None:
    """Name the figures in a folder that a command drew before and not now."""
    for path in sorted({path for path in folder.glob("*") if path.name.startswith(names)} - set(paths)):
        print(f"{path} was not drawn now: if it is of older records, delete it")


def _add(commands: Any, command: Command, example: str, out: str = "") -> argparse.ArgumentParser:
    """Add a sub-command with --runs, and with --out and --strict if it writes files; `out` is the help of --out."""
    name = command.__name__
    one: argparse.ArgumentParser = commands.add_parser(
        name,
        help=command.__doc__,
        description=f"{command.__doc__}\n\npython scripts/report.py {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.set_defaults(command=command)
    one.add_argument("--runs", metavar="DIR", type=Path, default=RECORDS, help="folder of runs or records")
    if out:
        one.add_argument("--out", metavar="PATH", type=Path, help=out)
        one.add_argument("--strict", action="store_true", help="exit with 1 if a record had to be left out")
    return one


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    out = "folder for the files (default: results/tables; with --runs only the terminal)"
    _add(commands, tables, "--runs runs --out runs/tables", out)
    out = "folder for the figures (default: results/figures; with --runs DIR/figures)"
    _add(commands, figures, "--runs runs", out)
    out = "file to write (default: results/claims.md; with --runs or --sets only the terminal)"
    one = _add(commands, claims, "--runs runs", out)
    help_text = "the sets of runs that are judged (default: results/reference/sets.yaml)"
    one.add_argument("--sets", metavar="FILE", type=Path, default=SETS, help=help_text)
    out = "folder for documents and figures (default: results; with --runs DIR/mechanism)"
    one = _add(commands, mechanism, "tables --runs runs", out)
    one.add_argument("what", nargs="?", choices=["tables", "figures"], help="only these (default: both)")
    help_text = "records of studies (default: results/studies; with --runs none)"
    one.add_argument("--studies", metavar="DIR", type=Path, help=help_text)
    one = _add(commands, tensorboard, "--runs runs")
    one.add_argument("--port", type=int, default=6006, help="of TensorBoard, on this machine alone")
    return whole


def main() -> None:
    arguments = parser().parse_args()
    problems = arguments.command(arguments)
    for problem in problems:
        part = f"only its {problem.part}: " if problem.part else ""
        print(f"left out: {problem.folder}: {part}{problem.reason}", file=sys.stderr)
    if problems and arguments.strict:
        sys.exit(1)


if __name__ == "__main__":
    with exit_with_message():
        main()
