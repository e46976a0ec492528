"""Measure speed and memory; prints a table, and with --json also writes result and table.

python scripts/benchmark.py norm --json results/benchmarks/norm.json        the layer alone
python scripts/benchmark.py step --json results/benchmarks/step.json        whole training steps
python scripts/benchmark.py train --json results/benchmarks/train.json      training as a run has it
python scripts/benchmark.py data --json results/benchmarks/data.json        making batches
python scripts/benchmark.py evaluation --json results/benchmarks/evaluation.json
python scripts/benchmark.py train --together 2 --json results/benchmarks/together.json    several runs at once
python scripts/benchmark.py waiting --json results/benchmarks/waiting.json  threads on a busy machine
python scripts/benchmark.py accuracy --root FOLDER --json results/benchmarks/accuracy.json
"""

import argparse

from l2bn.benchmarks import accuracy, data, evaluation, norm, step, train, waiting
from l2bn.failures import told_plainly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for benchmark in (norm, step, train, data, evaluation, waiting, accuracy):
        command = commands.add_parser(benchmark.__name__.rpartition(".")[2], description=benchmark.__doc__)
        benchmark.add_arguments(command)
        command.set_defaults(run=benchmark.run)
    arguments = parser.parse_args()
    if arguments.json:  # now, not after the hour that a measurement may take
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.open("a").close()
        if not arguments.json.stat().st_size:
            arguments.json.unlink()
    arguments.run(arguments)


if __name__ == "__main__":
    with told_plainly():
        main()
