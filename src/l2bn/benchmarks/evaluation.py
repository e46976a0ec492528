"""Evaluation throughput with BN, with BN folded into the convolutions, and with L2BN, which can't be folded."""

import argparse
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from l2bn.benchmarks.measure import Action, forget_compiled, interleaved, machine, with_earlier_rows, write_json
from l2bn.benchmarks.report import hardware, prose, write_table
from l2bn.benchmarks.workload import NETWORKS, NORMS, add_workload_arguments
from l2bn.norms.swap import swap_norm
from l2bn.training.allocator import keep_freed_memory

BATCH = {32: 512, 224: 32}  # by image size
KINDS = {"bn": "BN", "folded": "BN, folded", "l2bn": "L2BN"}


def network_of(network: str, kind: str) -> nn.Module:
    """Build a network with its initial weights in evaluation mode."""
    torch.manual_seed(0)
    model = NETWORKS[network][0]()
    swap_norm(model, NORMS["l2bn" if kind == "l2bn" else "bn"])
    model.eval()
    return fuse(model) if kind == "folded" else model


def evaluation(network: str, kind: str, caller: str, batch: int, device: torch.device) -> Action:
    """Forward pass of a batch of noise in channels_last, as an action."""
    size = NETWORKS[network][1]
    model = network_of(network, kind).to(device).to(memory_format=torch.channels_last)
    run: Any = torch.compile(model, dynamic=False) if caller == "compiled" else model
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)

    def action() -> None:
        with torch.inference_mode():
            run(images)

    return action


EXPLANATION = """
Forward passes in `inference_mode`, channels_last, all forms of a network in turn in one process. Folded: BN's scale
and shift are part of the convolution's weights (`torch.fx.experimental.optimization.fuse`), as a deployed network
has them. L2BN needs each sample's norm and can't be folded. Time per image, against BN as trained and against
folded BN.
"""


def evaluation_table(result: dict[str, Any]) -> str:
    lines = [
        "# Evaluation: images/s",
        "",
        f"{hardware(result)}.",
        "",
        prose(EXPLANATION),
        "",
        "| network | batch | called | BN | BN, folded | L2BN | time, L2BN / BN | time, L2BN / folded |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        speeds = row["images_per_second"]
        lines.append(
            f"| {row['network']} | {row['batch']} × {row['size']}² | {row['caller']} | "
            + " | ".join(f"{speeds[kind]:,.0f}" for kind in KINDS)
            + f" | {speeds['bn'] / speeds['l2bn']:.2f} | {speeds['folded'] / speeds['l2bn']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload_arguments(parser, list(NETWORKS))
    parser.add_argument("--callers", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--batch", type=int, help="images (default: 512 at 32x32, 32 at 224x224)")
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time of a row (default: 10)")


def run(arguments: argparse.Namespace) -> None:
    """With --json, the networks measured before in the same setting keep their rows."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    device = torch.device(arguments.device)
    rows = []
    for network in arguments.networks:
        size = NETWORKS[network][1]
        batch = arguments.batch or BATCH[size]
        for caller in arguments.callers:
            forget_compiled()
            actions = {kind: evaluation(network, kind, caller, batch, device) for kind in KINDS}
            seconds = interleaved(actions, device, arguments.seconds, fewest=5, warm_up=2)
            speeds = {kind: batch / value for kind, value in seconds.items()}
            rows.append(
                {"network": network, "size": size, "batch": batch, "caller": caller, "images_per_second": speeds}
            )
            text = "   ".join(f"{KINDS[kind]} {speed:8,.0f}" for kind, speed in speeds.items())
            print(f"{network:13} {caller:9} {text} images/s", flush=True)
    result: dict[str, Any] = {"benchmark": "evaluation", "machine": machine(device), "rows": rows}
    if arguments.json:  # first, because it is what took the time
        result["rows"] = with_earlier_rows(arguments.json, result)
        write_json(arguments.json, result)
    print("\n" + write_table(evaluation_table(result), arguments.json))
