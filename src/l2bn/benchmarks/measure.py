"""Parts that benchmarks share: interleaved times, peak memory, the options of commands, and the pages of results.

Benchmarks measure the GPU where torch finds one. `CUDA_VISIBLE_DEVICES=` hides it, and `OMP_NUM_THREADS` sets the
threads of the CPU.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterable, Sequence
from textwrap import fill
from typing import Any, TypeVar

import torch
from torch._C._profiler import _EventType
from torch.profiler._utils import traverse_dfs

from l2bn.kernels.compiler import TRACED
from l2bn.reporting.formatting import Table, markdown, plural

Action = Callable[[], Any]
Key = TypeVar("Key")

Row = dict[str, Any]
Result = dict[str, Any]
"""A benchmark's result: its name, the machine, and `rows` (of the layer: `cells`, of accuracy: `runs`)."""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# ---- The options of commands ----------------------------------------------------------------------------------

CALLERS = ("eager", "compiled") if TRACED else ("eager",)
"""Ways to call a layer or a network. With an older torch, compiled L2BN is the plain composition."""


def count(text: str) -> int:
    """Read an option's number from 1 on; argparse names the option that has another."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"give a number from 1 on, not {text}")
    return int(text)


def add_common_arguments(
    parser: argparse.ArgumentParser, networks: Iterable[str], seconds: float, default: Sequence[str] = ()
) -> None:
    """Add the options of the measuring benchmarks; `default` are the networks measured, all without it."""
    parser.add_argument("--networks", nargs="+", choices=list(networks), default=list(default or networks))
    help_text = f"measuring time of each comparison (default: {seconds:g})"
    parser.add_argument("--seconds", type=float, default=seconds, help=help_text)


def add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=count, help="images a step (default: 128 at 32x32, 32 at 224x224)")


def add_callers(parser: argparse.ArgumentParser) -> None:
    graphs = ["graphs"] if DEVICE.type == "cuda" else []  # as by compute.compile=graphs
    parser.add_argument("--callers", nargs="+", choices=[*CALLERS, *graphs], default=list(CALLERS))


# ---- Time and memory ------------------------------------------------------------------------------------------


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def interleaved(actions: dict[Key, Action], seconds: float, fewest: int = 20, warm_up: int = 3) -> dict[Key, float]:
    """Seconds of each action, measured in rounds in which each takes a turn.

    The order within a round is random, so that none always runs in the caches that the same other one left. The
    first decile of an action's times is returned: other load can only add time, and on a quiet machine decile and
    median are close. Rounds last for about `seconds`, at least `fewest`, after `warm_up` calls of each. Where a
    call is too short for the clock, all are repeated within their turns, equally often: so all find warm caches.
    """
    repeats = 1
    for action in actions.values():
        for _ in range(warm_up):
            action()
        synchronise()
        repeats = max(repeats, round(5e-4 / max(seconds_of(action), 1e-6)))
    times: dict[Key, list[float]] = {name: [] for name in actions}
    order = random.Random(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < fewest:
        for name in order.sample(list(actions), len(actions)):
            times[name].append(seconds_of(actions[name], repeats))
    return {name: sorted(values)[len(values) // 10] for name, values in times.items()}


def seconds_of(action: Action, repeats: int = 1) -> float:
    """Mean seconds of an action over its repeats."""
    start = time.perf_counter()
    for _ in range(repeats):
        action()
    synchronise()
    return (time.perf_counter() - start) / repeats


def peak_memory(action: Action, device: torch.device = DEVICE) -> int:
    """Peak bytes of tensors during an action, above those held before it.

    On CUDA the allocator counts. On the CPU the allocations that the profiler records are summed up, less their
    releases; releases of earlier blocks are ignored, because the profiler may have a wrong size for them. The
    resident set of the process would also hold memory that the allocator keeps.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        action()
    assert profile.profiler is not None
    events = traverse_dfs(profile.profiler.kineto_results.experimental_event_tree())
    allocations = [event for event in events if event.tag == _EventType.Allocation]
    sizes: dict[int, int] = {}  # of the blocks held, by address
    held = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_time_ns):
        block = event.extra_fields
        if block.alloc_size > 0:
            sizes[block.ptr] = block.alloc_size
            held += block.alloc_size
            peak = max(peak, held)
        else:
            held -= sizes.pop(block.ptr, 0)
    return peak


# ---- The pages of results -------------------------------------------------------------------------------------


def ratio(row: Row, norm: str, quantity: str = "seconds") -> float:
    """To BN, called the same way."""
    return float(row[quantity][norm] / row[quantity]["bn"])


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], names: int) -> str:
    """A Markdown table; columns after the first `names` are flush right."""
    return markdown(Table(columns, list(rows), names=names))


def page(title: str, result: Result, explanation: str, *parts: str) -> str:
    """The Markdown page of a result: its machine, an explanation, and its tables."""
    facts = result["machine"]
    where = f"{facts['processor']}, {plural('thread', facts['threads'])}"
    if facts["device"] != "cpu":
        where = f"{facts['device']} in a host with {where}"
    machine = f"{where} ({facts['cpu_capability']}), torch {facts['packages']['torch']}, {facts['time'][:10]}."
    text = fill(" ".join(explanation.split()), 110, break_on_hyphens=False, break_long_words=False)
    return "\n\n".join([f"# {title}", machine, text, *parts]) + "\n"
