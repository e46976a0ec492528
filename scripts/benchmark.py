"""Measure speed and memory; prints a page with a table, and with --json also writes the result and its page.

python scripts/benchmark.py norm --json results/benchmarks/norm.json        the layer alone
python scripts/benchmark.py step --json results/benchmarks/step.json        whole training steps
python scripts/benchmark.py train --json results/benchmarks/train.json      training as a run has it
python scripts/benchmark.py together --json results/benchmarks/together.json    several runs at once
python scripts/benchmark.py data --json results/benchmarks/data.json        making batches
python scripts/benchmark.py evaluation --json results/benchmarks/evaluation.json
python scripts/benchmark.py waiting --json results/benchmarks/waiting.json  threads on a busy machine
python scripts/benchmark.py first --json results/benchmarks/first.json      the first calls of a model
python scripts/benchmark.py accuracy --root FOLDER --json results/benchmarks/accuracy.json
python scripts/benchmark.py pages       write the pages in results/benchmarks again, from the results there

The GPU is measured where torch finds one; CUDA_VISIBLE_DEVICES= hides it. OMP_NUM_THREADS sets the CPU's threads.
"""

import argparse
import json
import tempfile
from pathlib import Path

from l2bn.benchmarks import accuracy, data, evaluation, first, measure, norm, step, together, train, waiting
from l2bn.benchmarks.workload import compute
from l2bn.errors import UserError
from l2bn.failures import exit_with_message
from l2bn.kernels.compiler import compiler_works
from l2bn.records import write_durably
from l2bn.training.environment import describe_environment

BENCHMARKS = {
    module.__name__.rpartition(".")[2]: module
    for module in (norm, step, train, together, data, evaluation, waiting, first, accuracy)
}
WITHOUT_KERNELS = ("data", "together")
RESULTS = Path(__file__).resolve().parents[1] / "results/benchmarks"


def page_of(result: measure.Result) -> str:
    page: str = BENCHMARKS[result["benchmark"]].make_page(result)
    return page


def file_of_result(text: str) -> Path:
    """Read the option --json. Raises OSError where nothing can be written: now, not after hours of measuring."""
    path = Path(text)
    if path.suffix != ".json" or path.is_dir():
        raise argparse.ArgumentTypeError(f"give a file whose name ends in .json, not {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, text) from error
    return path


def write_pages() -> None:
    """Write the pages in results/benchmarks again, from the results there."""
    for path in sorted(RESULTS.rglob("*.json")):
        write_durably(path.with_suffix(".md"), page_of(json.loads(path.read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    commands.add_parser("pages", description=write_pages.__doc__)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, description=benchmark.__doc__)
        command.add_argument(
            "--json", type=file_of_result, metavar="FILE", help="write the result here, and its page beside it"
        )
        benchmark.add_arguments(command)
    arguments = parser.parse_args()
    if arguments.benchmark == "pages":
        write_pages()
        return
    if arguments.benchmark not in WITHOUT_KERNELS and not compiler_works(measure.DEVICE.type):
        raise UserError(
            f"{arguments.benchmark} measures L2BN's kernels, and no compiler works here for {measure.DEVICE.type}: "
            "install one (g++, as in Debian's build-essential)"
        )
    compute().set_up()  # as a run does
    measured = BENCHMARKS[arguments.benchmark].run(arguments)
    result = {"benchmark": arguments.benchmark, "machine": describe_environment(measure.DEVICE), **measured}
    print("\n" + page_of(result))  # before a full disk can keep it from being written
    if arguments.json:
        write_durably(arguments.json, json.dumps(result, indent=1) + "\n")
        write_durably(arguments.json.with_suffix(".md"), page_of(result))


if __name__ == "__main__":
    with exit_with_message():
        main()
