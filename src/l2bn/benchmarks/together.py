"""Several runs side by side on one machine: their images/s together, against one run that has it alone.

On a CPU the cores are divided among the runs; on a GPU all runs share it. An option of `benchmark.py train`.
"""

import argparse
import multiprocessing
import os
import time
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from l2bn.benchmarks.measure import machine, synchronise, undisturbed, write_json
from l2bn.benchmarks.paths import ours
from l2bn.benchmarks.report import hardware, prose, write_table
from l2bn.benchmarks.workload import make_workload

STEPS = 10  # of an epoch


def one_of_several(
    index: int, arguments: argparse.Namespace, network: str, runs: int, started: Any, times: Any
) -> None:
    """Train one of several runs in this process: warm up, wait for the others, then train for some epochs."""
    device = torch.device(arguments.device)
    threads = max(1, (arguments.threads or os.cpu_count() or 1) // runs)
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


def images_per_second(arguments: argparse.Namespace, network: str, runs: int) -> list[float]:
    """Images/s of each of several runs that train at the same time."""
    context = multiprocessing.get_context("spawn")
    times, started = context.Array("d", runs), context.Barrier(runs)
    spawn(one_of_several, (arguments, network, runs, started, times), nprocs=runs)  # type: ignore[no-untyped-call]
    workload = make_workload(network, arguments.root, STEPS, arguments.batch)
    return [arguments.rounds * workload.images / seconds for seconds in times[:]]


EXPLANATION = """
Runs of one network train at the same time, each in its own process; on a CPU the cores are divided among them.
×: their images/s together, relative to one run that has the machine alone.
"""


def together_table(result: dict[str, Any]) -> str:
    lines = [
        "# Several runs side by side: images/s",
        "",
        f"{hardware(result)}.",
        "",
        prose(EXPLANATION),
        "",
        "| network | batch | runs | images/s, each | images/s, all | × |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        (alone,) = (
            sum(r["images_per_second"]) for r in result["rows"] if r["network"] == row["network"] and r["runs"] == 1
        )
        speeds = row["images_per_second"]
        lines.append(
            f"| {row['network']} | {row['batch']} | {row['runs']} | {sum(speeds) / len(speeds):,.0f} "
            f"| {sum(speeds):,.0f} | {sum(speeds) / alone:.2f} |"
        )
    return "\n".join(lines) + "\n"


def run(arguments: argparse.Namespace) -> None:
    """Raises UserError."""
    rows = []
    for network in arguments.networks:
        for runs in sorted({1, *arguments.together}):
            speeds = images_per_second(arguments, network, runs)
            batch = make_workload(network, arguments.root, 1, arguments.batch).batch
            rows.append({"network": network, "batch": batch, "runs": runs, "images_per_second": speeds})
            print(f"{network:13} {runs} at once   {sum(speeds):8,.0f} images/s", flush=True)
    device = torch.device(arguments.device)
    result = {"benchmark": "together", "machine": machine(device), "rows": rows}
    if arguments.json:  # first, because it is what took the time
        write_json(arguments.json, result)
    print("\n" + write_table(together_table(result), arguments.json))
