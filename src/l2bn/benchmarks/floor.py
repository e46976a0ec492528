"""Lower bound of the time of full training on a GPU, computed from its data sheet.

Arithmetic: the operations of convolutions and matrix products at the peak rate for their type. Bytes: the feature
maps that have to pass through memory, at its peak bandwidth, with every ReLU fused into the pass before it. A run
takes at least the longer of both; launches, small maps and the optimizer add to it.
"""

import argparse
from math import prod
from pathlib import Path

from l2bn.benchmarks.report import Result, Row, page, prose, report, table
from l2bn.benchmarks.train import flops_of
from l2bn.benchmarks.workload import NETWORKS, bn_inputs

# NVIDIA H100 SXM, data sheet: FLOP/s without sparsity, bytes/s.
RATES = {"float32": 67e12, "TF32": 494.7e12, "bfloat16": 989.4e12}
BANDWIDTH = 3.35e12
BYTES = {"float32": 4, "TF32": 4, "bfloat16": 2}

# Of a map between a convolution and the next. Forward: written by the one, read for the statistics, read and
# written by batch norm, read by the other. Backward: its gradient written and the map read by the other's, both
# read twice and a gradient written by batch norm's, that gradient read twice by the one's.
PASSES = 14

RUNS = {  # epochs, training images
    32: (200, 50_000),
    224: (90, 1_281_167),
}


def floors(network: str) -> Row:
    """Seconds of arithmetic and of memory traffic of a full run, by type."""
    size = NETWORKS[network].size
    epochs, images = RUNS[size]
    flops, values = flops_of(network), sum(map(prod, bn_inputs(network)))
    total = epochs * images
    return {
        "network": network,
        "size": size,
        "epochs": epochs,
        "train_images": images,
        "flops_per_image": flops,
        "map_values_per_image": values,
        "arithmetic_seconds": {kind: total * flops / rate for kind, rate in RATES.items()},
        "bytes_seconds": {kind: total * PASSES * values * width / BANDWIDTH for kind, width in BYTES.items()},
    }


def written(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


EXPLANATION = """
Computed, not measured: lower bounds of the time of a full run's training images on an NVIDIA H100 SXM at the peak
rates of its data sheet (67, 494.7 and 989.4 TFLOP/s in float32, TF32 and bfloat16; 3.35 TB/s), for the arithmetic
of convolutions and matrix products and for the bytes of the feature maps, 14 passes over each. A run takes at least
the longer of both.
"""


def floor_table(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        times = (written(row[f"{of}_seconds"][kind]) for kind in RATES for of in ("arithmetic", "bytes"))
        rows.append((f"{row['network']}, {row['size']}²", f"{row['train_images']:,}", str(row["epochs"]), *times))
    columns = (
        "network",
        ">images",
        ">epochs",
        *(f">{kind}: {of}" for kind in RATES for of in ("arithmetic", "bytes")),
    )
    return page("Lower bound of a run's time on a GPU", prose(EXPLANATION), table(columns, rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="write the result here, and its table beside it")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))


def run(arguments: argparse.Namespace) -> None:
    rows = [floors(network) for network in arguments.networks]
    report({"benchmark": "floor", "rows": rows}, arguments.json, floor_table)
