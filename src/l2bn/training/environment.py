"""The facts about machine and software that a record carries: this whitelist and nothing else of either."""

import json
import logging
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import torch

from l2bn.durable import write_durably
from l2bn.records import ENVIRONMENT, THEN

log = logging.getLogger(__name__)

PACKAGES = ("l2bn", "torch", "torchvision", "timm", "lightning-fabric", "hydra-core", "omegaconf", "numpy")

# What two starts of a run must share for their results to agree bit for bit.
FACTS_BEHIND_BITS = ("packages", "device", "cuda", "cudnn", "cpu_capability", "threads", "kernels")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Commit, versions, device and threads, at this moment."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: metadata(name)["Version"] for name in PACKAGES},
        "system": platform.system(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,  # type: ignore[no-untyped-call]
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def note_start(folder: Path, device: torch.device, kernels: str) -> str:
    """Add this start of a run to `env.json`; say so where it may compute other bits than the one before.

    Returns what all of the run's starts took for kernels, as a record has it (`Record.kernels`).
    """
    path = folder / ENVIRONMENT
    starts = _earlier_starts(path) if path.exists() else []
    facts = {**describe_environment(device), "kernels": kernels}
    if starts:
        changed = [key for key in FACTS_BEHIND_BITS if starts[-1].get(key) != facts[key]]
        if changed:
            log.warning("resumed with other %s: equal to an uninterrupted run up to rounding", ", ".join(changed))
    starts.append(facts)
    write_durably(path, json.dumps({"starts": starts}, indent=2) + "\n")
    return THEN.join(dict.fromkeys(start["kernels"] for start in starts if "kernels" in start))


def _earlier_starts(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(path.read_text())["starts"])
    except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s); it is written anew, without the starts before this one", path, error)
        return []


def _git(*arguments: str) -> str | None:
    """What git says of this source tree, or None where it is not a checkout or git is missing."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    """The processor's model name, which Linux tells in /proc and `platform` does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
