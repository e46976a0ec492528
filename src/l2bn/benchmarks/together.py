"""Several runs side by side on one machine: their images/s together, against one run that has it alone.

On a CPU the cores are divided among the runs; on a GPU all runs share it. An option of `benchmark.py train`.
"""

import argparse
import multiprocessing
import time
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from l2bn.benchmarks.measure import device_of, synchronise, undisturbed
from l2bn.benchmarks.paths import ours
from l2bn.benchmarks.report import Result, hardware, page, prose, report, table
from l2bn.benchmarks.workload import make_workload
from l2bn.processes import available_cores
from l2bn.training.environment import describe_environment

STEPS = 10  # of an epoch


def one_of_several(
    index: int, arguments: argparse.Namespace, network: str, runs: int, started: Any, times: Any
) -> None:
    """Train one of several runs in this process: warm up, wait for the others, then train for some epochs."""
    device = torch.device(arguments.device)
    threads = max(1, (arguments.threads or available_cores()) // runs)
    workload = make_workload(network, arguments.root, STEPS, arguments.batch)
    action, _ = ours(workload, arguments.norms[0], device, threads=threads)
    with undisturbed():
        action()
        synchronise(device)
        started.wait()
        start = time.perf_counter()
        for _ in range(arguments.rounds):
            action()
        synchronise(device)
        times[index] = time.perf_counter() - start


EXPLANATION = """
Runs of one network train at the same time, each in its own process; on a CPU the cores are divided among them.
×: their images/s together, relative to one run that has the machine alone.
"""


def together_table(result: Result) -> str:
    alone = {row["network"]: sum(row["images_per_second"]) for row in result["rows"] if row["runs"] == 1}
    rows = []
    for row in result["rows"]:
        speeds, names = row["images_per_second"], (row["network"], str(row["batch"]), str(row["runs"]))
        mean, whole = f"{sum(speeds) / len(speeds):,.0f}", f"{sum(speeds):,.0f}"
        rows.append((*names, mean, whole, f"{sum(speeds) / alone[row['network']]:.2f}"))
    columns = ("network", ">batch", ">runs", ">images/s, each", ">images/s, all", ">×")
    title = "Several runs side by side: images/s"
    return page(title, f"{hardware(result)}.", prose(EXPLANATION), table(columns, rows))


def run(arguments: argparse.Namespace) -> None:
    """Raises UserError."""
    device = device_of(arguments)
    context = multiprocessing.get_context("spawn")
    rows = []
    for network in arguments.networks:
        workload = make_workload(network, arguments.root, STEPS, arguments.batch)
        for runs in sorted({1, *arguments.together}):
            times, started = context.Array("d", runs), context.Barrier(runs)
            given = (arguments, network, runs, started, times)
            spawn(one_of_several, given, nprocs=runs)  # type: ignore[no-untyped-call]
            speeds = [arguments.rounds * workload.images / seconds for seconds in times[:]]
            rows.append({"network": network, "batch": workload.batch, "runs": runs, "images_per_second": speeds})
            print(f"{network:13} {runs} at once   {sum(speeds):8,.0f} images/s", flush=True)
    result = {"benchmark": "together", "machine": describe_environment(device), "rows": rows}
    report(result, arguments.json, together_table)
