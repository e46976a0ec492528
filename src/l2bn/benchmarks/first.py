"""The first calls of a timm network in eager code, a new process each: what compiling L2BN's kernels adds."""

import argparse
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from l2bn import swap_norm
from l2bn.backbones.library import timm_model
from l2bn.benchmarks.measure import DEVICE, Result, Row, count, page, seconds_of, table
from l2bn.errors import UserError
from l2bn.failures import describe

NETWORKS = ("resnet50", "efficientnet_b0")
CALLS = {  # in this order: batch and pixels, as shares of the first step's
    "first step": (1.0, 1.0),
    "second step": (1.0, 1.0),
    "another batch size": (0.75, 1.0),
    "another image size": (1.0, 6 / 7),
}
CASES = (("bn", "–"), ("l2bn", "empty"), ("l2bn", "filled"))  # a norm, and the cache of kernels on disk


def seconds_of_calls(network: str, norm: str, batch: int, pixels: int) -> dict[str, float]:
    """Return the seconds of training steps and of an evaluation in a process that has called nothing yet."""
    model = timm_model(10, network).to(DEVICE)
    if norm == "l2bn":
        swap_norm(model, "l2bn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(images: Tensor) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(model(images).square().mean())
        optimizer.step()

    seconds = {}
    for call, (of_batch, of_pixels) in CALLS.items():
        side = round(pixels * of_pixels)
        images = torch.randn(round(batch * of_batch), 3, side, side, device=DEVICE)
        seconds[call] = seconds_of(partial(step, images))
    model.eval()
    with torch.no_grad():
        images = torch.randn(batch, 3, pixels, pixels, device=DEVICE)
        seconds["first evaluation"] = seconds_of(partial(model, images))
    return seconds


EXPLANATION = """
Seconds of the first calls in one process, eager, contiguous, one measurement each, in the order of the columns: a
training step (forward, backward, SGD), one more, the first step of another batch size and of another image size,
the first evaluation. Cache: torch's cache of compiled kernels on disk.
"""


def make_page(result: Result) -> str:
    rows = [
        (
            f"{row['network']}, {row['batch']} × {row['pixels']}²",
            {"bn": "BN", "l2bn": "L2BN"}[row["norm"]],
            row["cache"],
            *(f"{seconds:.1f}" for seconds in row["seconds"].values()),
        )
        for row in result["rows"]
    ]
    columns = ("network", "norm", "cache", *result["rows"][0]["seconds"])
    return page("First calls: seconds", result, EXPLANATION, table(columns, rows, names=3))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="names of timm")
    parser.add_argument("--batch", type=count, default=8, help="images (default: 8)")
    parser.add_argument("--pixels", type=count, default=224, help="side of an image (default: 224)")


def run(arguments: argparse.Namespace) -> Result:
    rows: list[Row] = []
    batch, pixels = arguments.batch, arguments.pixels
    for network in arguments.networks:
        with (
            tempfile.TemporaryDirectory() as cache,
            mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=f"{cache}/triton"),
        ):
            for norm, state in CASES:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    called = process.submit(seconds_of_calls, network, norm, batch, pixels)
                    if (error := called.exception()) is not None:
                        raise UserError(f"{network} with {norm} cannot be measured: {describe(error)}") from error
                    seconds = called.result()
                row = {"network": network, "batch": batch, "pixels": pixels, "norm": norm, "cache": state}
                rows.append({**row, "seconds": seconds})
                print(network, norm, state, f"first step {seconds['first step']:.1f} s", flush=True)
    return {"rows": rows}
