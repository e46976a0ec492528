"""Evaluation throughput with BN, with BN folded into the convolutions, and with L2BN, which can't be folded."""

import argparse
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from l2bn.benchmarks.measure import Action, add_common_arguments, count, interleaved, set_up
from l2bn.benchmarks.report import Result, hardware, page, prose, report, table
from l2bn.benchmarks.workload import NETWORKS, NORMS, build
from l2bn.training.compute import keep_freed_memory
from l2bn.training.environment import describe_environment

BATCH = {32: 512, 224: 32}  # by image size
KINDS = {"bn": "BN", "folded": "BN, folded", "l2bn": "L2BN"}


def network_of(network: str, kind: str) -> nn.Module:
    """Build a network with its initial weights in evaluation mode."""
    model = build(network, NORMS["l2bn" if kind == "l2bn" else "bn"]).eval()
    return fuse(model) if kind == "folded" else model


def evaluation(network: str, kind: str, caller: str, batch: int, device: torch.device) -> Action:
    """Forward pass of a batch of noise in channels_last, as an action."""
    size = NETWORKS[network].size
    model = network_of(network, kind).to(device).to(memory_format=torch.channels_last)
    run: Any = torch.compile(model, dynamic=False) if caller == "compiled" else model
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda: run(images))


EXPLANATION = """
Forward passes in `inference_mode`, channels_last, all forms of a network in turn in one process. Folded: BN's scale
and shift are part of the convolution's weights (`torch.fx.experimental.optimization.fuse`), as a deployed network
has them. L2BN needs each sample's norm and can't be folded. Time per image, against BN as trained and against
folded BN.
"""


def evaluation_table(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        speeds, names = (
            row["images_per_second"],
            (row["network"], f"{row['batch']} × {row['size']}²", row["caller"]),
        )
        times = (f"{speeds[kind] / speeds['l2bn']:.2f}" for kind in ("bn", "folded"))
        rows.append((*names, *(f"{speeds[kind]:,.0f}" for kind in KINDS), *times))
    numbers = (*KINDS.values(), "time, L2BN / BN", "time, L2BN / folded")
    columns = ("network", ">batch", "called", *(f">{name}" for name in numbers))
    return page("Evaluation: images/s", f"{hardware(result)}.", prose(EXPLANATION), table(columns, rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, NETWORKS)
    parser.add_argument("--callers", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--batch", type=count, help="images (default: 512 at 32x32, 32 at 224x224)")
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time of a row (default: 10)")


def run(arguments: argparse.Namespace) -> None:
    keep_freed_memory()  # as a run does
    device = set_up(arguments)
    rows = []
    for network, caller in product(arguments.networks, arguments.callers):
        torch.compiler.reset()  # after eight compiled variants of a function it would fall back to eager
        size = NETWORKS[network].size
        batch = arguments.batch or BATCH[size]
        actions = {kind: evaluation(network, kind, caller, batch, device) for kind in KINDS}
        seconds = interleaved(actions, device, arguments.seconds, fewest=5, warm_up=2)
        speeds = {kind: batch / value for kind, value in seconds.items()}
        names = {"network": network, "size": size, "batch": batch, "caller": caller}
        rows.append({**names, "images_per_second": speeds})
        text = "   ".join(f"{KINDS[kind]} {speed:8,.0f}" for kind, speed in speeds.items())
        print(f"{network:13} {caller:9} {text} images/s", flush=True)
    result: Result = {"benchmark": "evaluation", "machine": describe_environment(device), "rows": rows}
    report(result, arguments.json, evaluation_table)
