"""Evaluation throughput with BN, with BN folded into the convolutions, and with L2BN, which can't be folded."""

import argparse
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from l2bn.benchmarks.measure import (
    CALLERS,
    DEVICE,
    Action,
    Result,
    Row,
    add_common_arguments,
    interleaved,
    page,
    table,
)
from l2bn.benchmarks.workload import NETWORKS, build

BATCH = {32: 512, 224: 32}  # by image size
KINDS = {"bn": "BN", "folded": "BN, folded", "l2bn": "L2BN"}


def network_of(network: str, kind: str) -> nn.Module:
    """Build a network with its initial weights in evaluation mode."""
    if kind == "folded":
        return fuse(build(network).eval())
    return build(network, kind).eval()


def evaluation(network: str, kind: str, caller: str) -> Action:
    """Forward pass of a batch of noise in channels_last, as an action."""
    size = NETWORKS[network].size
    model = network_of(network, kind).to(DEVICE).to(memory_format=torch.channels_last)
    run: Any = torch.compile(model, dynamic=False) if caller == "compiled" else model
    images = torch.randn(BATCH[size], 3, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda: run(images))


EXPLANATION = """
Forward passes in `inference_mode`, channels_last, all forms of a network in turn in one process. Folded: BN's scale
and shift are part of the convolution's weights (`torch.fx.experimental.optimization.fuse`), as a deployed network
has them. L2BN needs each sample's norm and can't be folded. Time per image, against BN as trained and against
folded BN.
"""


def make_page(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        speeds = row["images_per_second"]
        names = row["network"], row["caller"], f"{row['batch']} × {row['size']}²"
        times = [f"{speeds[kind] / speeds['l2bn']:.2f}" for kind in ("bn", "folded")]
        rows.append((*names, *(f"{speeds[kind]:,.0f}" for kind in KINDS), *times))
    columns = ("network", "called", "batch", *KINDS.values(), "time, L2BN / BN", "time, L2BN / folded")
    return page("Evaluation: images/s", result, EXPLANATION, table(columns, rows, names=2))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, NETWORKS, seconds=10)


def run(arguments: argparse.Namespace) -> Result:
    rows: list[Row] = []
    for network, caller in product(arguments.networks, CALLERS):
        torch.compiler.reset()  # after eight compiled variants of a function it would fall back to eager
        size = NETWORKS[network].size
        actions = {kind: evaluation(network, kind, caller) for kind in KINDS}
        seconds = interleaved(actions, arguments.seconds, fewest=5, warm_up=2)
        speeds = {kind: BATCH[size] / taken for kind, taken in seconds.items()}
        row = {"network": network, "size": size, "batch": BATCH[size], "caller": caller}
        rows.append({**row, "images_per_second": speeds})
        print(network, caller, f"{speeds['l2bn']:,.0f} images/s with L2BN", flush=True)
    return {"rows": rows}
