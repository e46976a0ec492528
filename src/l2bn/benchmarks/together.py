"""Several runs side by side on one machine: their images/s together, against one run that has it alone.

On a CPU the cores are divided among the runs; on a GPU all runs share it.
"""

import argparse
import multiprocessing
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from l2bn.benchmarks.measure import Result, Row, add_batch, count, page, seconds_of, synchronise, table
from l2bn.benchmarks.workload import NETWORKS, make_workload, ours
from l2bn.processes import available_cores

STEPS = 10  # of an epoch
EPOCHS = 5


def one_of_several(index: int, network: str, batch: int, runs: int, started: Any, times: Any) -> None:
    """Train one of several runs in this process: warm up, wait for the others, then train for some epochs."""
    threads = max(1, min(torch.get_num_threads(), available_cores()) // runs)
    action, _ = ours(make_workload(network, STEPS, batch), "bn", threads=threads)
    action()
    synchronise()
    started.wait()
    times[index] = seconds_of(action, EPOCHS)


def together(row: Row) -> float:
    """Images/s of all runs, up to the end of the slowest: the others need not have trained all that time."""
    speeds = row["images_per_second"]
    return float(len(speeds) * min(speeds))


EXPLANATION = """
Runs of one network train at the same time, each in its own process; on a CPU the cores are divided among them.
×: their images/s together, until the slowest has ended, relative to one run that has the machine alone; each
measured once.
"""


def make_page(result: Result) -> str:
    alone = {row["network"]: together(row) for row in result["rows"] if row["runs"] == 1}
    rows = []
    for row in result["rows"]:
        speeds, names = row["images_per_second"], (row["network"], str(row["batch"]), str(row["runs"]))
        mean, whole = f"{sum(speeds) / len(speeds):,.0f}", together(row)
        rows.append((*names, mean, f"{whole:,.0f}", f"{whole / alone[row['network']]:.2f}"))
    columns = ("network", "batch", "runs", "images/s, each", "images/s, all", "×")
    return page("Several runs side by side: images/s", result, EXPLANATION, table(columns, rows, names=1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--runs", type=count, nargs="+", default=[2], help="at the same time (default: 2)")
    add_batch(parser)


def run(arguments: argparse.Namespace) -> Result:
    rows: list[Row] = []
    for network in arguments.networks:
        batch = arguments.batch or NETWORKS[network].batch
        for runs in sorted({1, *arguments.runs}):
            context = multiprocessing.get_context("spawn")
            times, started = context.Array("d", runs), context.Barrier(runs)
            spawn(one_of_several, (network, batch, runs, started, times), nprocs=runs)  # type: ignore[no-untyped-call]
            speeds = [STEPS * batch / seconds for seconds in times[:]]
            row = {"network": network, "batch": batch, "runs": runs, "images_per_second": speeds}
            rows.append(row)
            print(network, f"{runs} at once: {together(row):,.0f} images/s", flush=True)
    return {"rows": rows}
