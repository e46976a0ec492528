"""Lower bound of the time of full training on a GPU, computed from its data sheet.

Arithmetic: the operations of convolutions and matrix products at the peak rate for their type. Bytes: the feature
maps that have to pass through memory, at its peak bandwidth, with every ReLU fused into the pass before it. A run
takes at least the longer of both; launches, small maps and the optimizer add to it.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2bn.benchmarks.measure import write_json
from l2bn.benchmarks.report import prose, write_table
from l2bn.benchmarks.train import flops_of
from l2bn.benchmarks.workload import NETWORKS, make_workload

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


def map_values(network: str) -> int:
    """Count the values of all maps of one image that enter batch norm layers."""
    build, size, _ = NETWORKS[network]
    seen = 0

    def count(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal seen
        seen += inputs[0].numel()

    model = build().eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return seen


def floors(network: str) -> dict[str, Any]:
    """Seconds of arithmetic and of memory traffic of a full run, by type."""
    size = NETWORKS[network][1]
    epochs, images = RUNS[size]
    flops, values = flops_of(make_workload(network, None, 1, 2)), map_values(network)
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


def floor_table(result: dict[str, Any]) -> str:
    kinds = list(RATES)
    lines = [
        "# Lower bound of a run's time on a GPU",
        "",
        prose(EXPLANATION),
        "",
        "| network | images | epochs | " + " | ".join(f"{k}: arithmetic | {k}: bytes" for k in kinds) + " |",
        "|---|---:|---:|" + "---:|" * 2 * len(kinds),
    ]
    for row in result["rows"]:
        cells = [f"{row['network']}, {row['size']}²", f"{row['train_images']:,}", str(row["epochs"])]
        cells += [written(row[key][kind]) for kind in kinds for key in ("arithmetic_seconds", "bytes_seconds")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="write the result here, and its table beside it")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))


def run(arguments: argparse.Namespace) -> None:
    result = {"benchmark": "floor", "rows": [floors(network) for network in arguments.networks]}
    if arguments.json:
        write_json(arguments.json, result)
    print(write_table(floor_table(result), arguments.json))
