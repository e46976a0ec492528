"""Measure speed and memory; prints a table, and with --json also writes result, table and plot.

python scripts/benchmark.py norm --json results/benchmarks/norm.json    the layer alone
python scripts/benchmark.py step --json results/benchmarks/step.json    whole training steps
python scripts/benchmark.py tables --json results/benchmarks/tables.json    tables of up to 10,000 records
"""

import argparse

from l2bn.benchmarks import norm, step, tables
from l2bn.errors import told_plainly

BENCHMARKS = {"norm": norm, "step": step, "tables": tables}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, description=benchmark.__doc__)
        benchmark.add_arguments(command)
        command.set_defaults(run=benchmark.run)
    arguments = parser.parse_args()
    if getattr(arguments, "json", None):  # now, not after the hour that a measurement may take
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.open("a").close()
    arguments.run(arguments)


if __name__ == "__main__":
    with told_plainly():
        main()
