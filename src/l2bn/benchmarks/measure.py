"""Measurements that benchmarks share: interleaved times and peak memory, and the options of their commands."""

import argparse
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch._C._profiler import _EventType
from torch.profiler._utils import traverse_dfs

from l2bn.errors import UserError

Action = Callable[[], Any]
Key = TypeVar("Key")


def add_common_arguments(
    parser: argparse.ArgumentParser, networks: Iterable[str], default: Iterable[str] | None = None
) -> None:
    """Add the options of the measuring benchmarks; `default` are the networks measured, all without it."""
    parser.add_argument("--json", type=Path, help="write the result here, and its table beside it")
    parser.add_argument("--networks", nargs="+", choices=list(networks), default=list(default or networks))
    add_device_arguments(parser)


def count(text: str) -> int:
    """Read an option's number from 1 on; argparse names the option that has another."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"give a number from 1 on, not {text}")
    return int(text)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=count, help="threads of the CPU (default: torch's own choice)")


def device_of(arguments: argparse.Namespace) -> torch.device:
    """The device of --device. Raises UserError for one on which torch can't compute here."""
    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        accepted = "cpu or cuda" if torch.cuda.is_available() else "cpu; torch finds no CUDA device"
        raise UserError(
            f"--device is {arguments.device}, on which torch can't compute here: take {accepted}"
        ) from error
    return device


def set_up(arguments: argparse.Namespace) -> torch.device:
    """Set the number of threads; return the device. Raises UserError."""
    device = device_of(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return device


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


REALTIME_PRIORITY = 40


@contextmanager
def undisturbed() -> Iterator[None]:
    """Give this process and its children real-time priority, where the system allows it (Linux, as root).

    Other processes wait meanwhile. The priority is given back afterwards, because compiling must not have it.
    """
    _set_priority("SCHED_FIFO", REALTIME_PRIORITY)
    try:
        yield
    finally:
        _set_priority("SCHED_OTHER", 0)


def _set_priority(policy: str, priority: int) -> None:
    if not hasattr(os, policy):
        return
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    for thread in [thread for process in processes for thread in Path(f"/proc/{process}/task").glob("*")]:
        with suppress(PermissionError, ProcessLookupError):
            os.sched_setscheduler(int(thread.name), getattr(os, policy), os.sched_param(priority))


def interleaved(
    actions: dict[Key, Action], device: torch.device, seconds: float, fewest: int = 20, warm_up: int = 3
) -> dict[Key, float]:
    """Seconds of each action, measured in rounds in which each takes a turn.

    The order within a round is random, so that none always runs in the caches that the same other one left. The
    first decile of an action's times is returned: other load can only add time, and on a quiet machine decile and
    median are close. Rounds last for about `seconds`, at least `fewest`, after `warm_up` calls of each (0: they are
    warm). A call too short for the clock is repeated within its turn.
    """
    repeats = dict.fromkeys(actions, 1)
    for name, action in actions.items():
        for _ in range(warm_up):
            action()
        if warm_up:
            synchronise(device)
            repeats[name] = max(1, round(5e-4 / max(_time(action, 1, device), 1e-6)))
    times: dict[Key, list[float]] = {name: [] for name in actions}
    order = random.Random(0)
    with undisturbed():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[next(iter(times))]) < fewest:
            for name in order.sample(list(actions), len(actions)):
                times[name].append(_time(actions[name], repeats[name], device))
    return {name: sorted(values)[len(values) // 10] for name, values in times.items()}


def _time(action: Action, repeats: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        action()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


def peak_memory(action: Action, device: torch.device) -> int:
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
