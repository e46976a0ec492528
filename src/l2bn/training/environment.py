"""The facts about machine and software that a record carries: this whitelist and nothing else of either."""

import ast
import functools
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec, resolve_name
from itertools import accumulate
from pathlib import Path
from pkgutil import get_importer
from typing import Any

import torch

from l2bn.records import ENVIRONMENT, THEN, write_durably
from l2bn.training.instantiate import flatten

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
PROJECT = Path(__file__).parents[3]
STANDARD = Path(sysconfig.get_path("stdlib"))
INSTALLED = {"site-packages", "dist-packages"}  # names of the folders of installed packages, wherever they lie
PACKAGES = ("l2bn", "torch", "torchvision", "timm", "lightning-fabric", "hydra-core", "omegaconf", "numpy")

# Imported where an option needs them, so that who reads a plain run meets none of them.
OPTIONS = (
    "l2bn.analysis.probe",
    "l2bn.norms.advice",
    "l2bn.norms.l2bn",
    "l2bn.norms.sync",
    "l2bn.training.acceleration",
    "l2bn.training.devices",
)

# What two starts of a run must share for their results to agree bit for bit; on a CPU also "processor", because
# oneDNN chooses kernels and block sizes by its instructions and caches.
FACTS_BEHIND_BITS = (
    *("packages", "device", "cuda", "cudnn", "cpu_capability", "threads", "deterministic", "kernels"),
    "channels_last",
)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return commit, source, versions, device and threads, at this moment.

    commit, dirty: of the checkout that the package runs from, None where it runs from none; dirty also counts
    untracked files under src/ and configs/. source: digest of the package's own Python files. All three are of the
    moment when this process first asked for them.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **_package(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "system": platform.system(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,  # type: ignore[no-untyped-call]
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def import_options() -> None:
    """Import what a run imports where an option is taken: what is edited from now on is no code of this process."""
    for name in OPTIONS:
        import_module(name)


def describe_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return commit, source and the user's own source, each of the moment when this process first asked for it.

    What runs is what was imported, whatever is written into the files later: to be called right after the imports,
    and in the process that started the others of a run. Imports what the options of a run need, too.
    """
    import_options()
    beside_norm = {key: node for key, node in config.items() if key != "norm"}
    return {**_package(), "own_source": own_source(config), "own_source_beside_norm": own_source(beside_norm)}


def note_start(folder: Path, device: torch.device, kernels: str, code: Mapping[str, Any], *, resumed: bool) -> str:
    """Add this start of a run to `env.json`; warn if it may compute other numbers than the last one.

    Returns the kernels of all starts of the run, as in `Record.kernels`.

    code: that of `describe_code`, with other facts of this start.
    resumed: whether it goes on from a checkpoint. Otherwise nothing of the starts before is in the result, and they
    are left out.
    """
    path = folder / ENVIRONMENT
    starts = _earlier_starts(path) if resumed else []
    facts = {**describe_environment(device), "kernels": kernels, **code}
    if starts:
        before = starts[-1]
        decisive = FACTS_BEHIND_BITS if device.type == "cuda" else (*FACTS_BEHIND_BITS, "processor")
        changed = [key for key in decisive if before.get(key, facts.get(key)) != facts.get(key)]
        if changed:
            masks = " and, with dropout, other masks" if {"device", "kernels"}.intersection(changed) else ""
            log.warning(
                "resumed with other %s: equal to an uninterrupted run up to rounding%s", ", ".join(changed), masks
            )
        code_keys = ("source" if "source" in before else "commit", "own_source")
        if any(before.get(key, facts[key]) != facts[key] for key in code_keys):
            log.warning(
                "resumed with other code (commit %s, before %s): the result is of neither alone",
                *(_name(start) for start in (facts, before)),
            )
    starts.append(facts)
    write_durably(path, json.dumps({"starts": starts}, indent=2) + "\n")
    return THEN.join(dict.fromkeys(start["kernels"] for start in starts if "kernels" in start))


def own_source(config: Mapping[str, Any]) -> str | None:
    """Return a digest over the user's own modules that the `_target_`s of a configuration have imported, or None.

    Own is what belongs neither to this package nor to an installed one. The modules that these import, now or
    later, count, too.
    """
    found: dict[str, str] = {}
    for place, name in flatten(config):
        if place.rpartition(".")[2] == "_target_":
            module = str(name)
            while module and module not in sys.modules:  # a class's method has two names behind the module's
                module = module.rpartition(".")[0]
            if module:
                _add_own(module, found)
    return _digest(found) if found else None


def warn_of_other_source(folder: Path, config: Mapping[str, Any]) -> None:
    """Warn if the user's own modules are others than those that an ended run was trained with."""
    starts, own = _earlier_starts(folder / ENVIRONMENT), own_source(config)
    if starts and starts[-1].get("own_source", own) != own:
        log.warning(
            "%s was trained with other code of yours than there is now, and its result is of that code; train it "
            "anew by a name of its own in your YAML file, or by another runs_dir",
            folder,
        )


def _add_own(name: str, found: dict[str, str]) -> None:
    spec = _spec(name)
    if spec is None or name in found or (content := _own(Path(spec.origin or ""))) is None:
        return
    found[name] = hashlib.sha256(content).hexdigest()
    for other in _imports(content, spec.parent or ""):
        _add_own(other, found)


def _spec(name: str) -> ModuleSpec | None:
    """Find a module without importing it: a function may import it later, and the code is the same all the time."""
    if name in sys.modules:
        module = sys.modules[name]
        spec = getattr(module, "__spec__", None)  # a library may put any object there
        return spec or ModuleSpec(name, None, origin=getattr(module, "__file__", None))
    package = name.rpartition(".")[0]
    if not package:
        return find_spec(name)
    above = _spec(package)
    places = above.submodule_search_locations if above is not None else None
    finders = filter(None, map(get_importer, places or ()))
    return next(filter(None, (finder.find_spec(name) for finder in finders)), None)


@functools.cache
def _own(file: Path) -> bytes | None:
    """Return the content of a module's file at the first call; None unless it is the user's own."""
    if not file.is_file() or INSTALLED.intersection(file.parts):
        return None
    if file.is_relative_to(PACKAGE) or file.is_relative_to(STANDARD):
        return None
    return file.read_bytes()


def _imports(content: bytes, package: str) -> Iterator[str]:
    """Yield the names of the modules that the code of a package may import, and of their packages."""
    try:
        statements = list(ast.walk(ast.parse(content)))
    except (SyntaxError, ValueError):  # a compiled module, or a file that was edited since it was imported
        return
    for node in statements:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            with suppress(ImportError):  # it leads out of its package
                base = resolve_name("." * node.level + (node.module or ""), package)
                names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            yield from accumulate(name.split("."), "{}.{}".format)


def _earlier_starts(path: Path) -> list[dict[str, Any]]:
    try:
        return [dict(start) for start in json.loads(path.read_text())["starts"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s); it is written anew, without the starts before this one", path, error)
        return []


def _name(start: dict[str, Any]) -> str:
    return f"{start.get('commit') or 'unknown'}{' with changes' if start.get('dirty') else ''}"


@functools.cache
def _package() -> dict[str, Any]:
    """Return the commit, whether files differ from it, and a digest of all Python files of the package."""
    commit, dirty = _checkout()
    files = (file for file in PACKAGE.rglob("*.py") if file.is_file())  # an editor's lock is a link to nothing
    digests = {str(file.relative_to(PACKAGE)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {"commit": commit, "dirty": dirty, "source": _digest(digests)}


def _digest(files: Mapping[str, str]) -> str:
    """Return 32 hexadecimal digits over the names and the digests of files."""
    lines = [f"{name} {files[name]}" for name in sorted(files)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _checkout() -> tuple[str | None, bool | None]:
    """Return the commit of the checkout that holds this package, and whether its files differ; None if unknown.

    A repository that merely contains the project, or the environment that it is installed in, is not its checkout.
    """
    top, commit = _git("rev-parse", "--show-toplevel"), _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    untracked = _git("ls-files", "--others", "--exclude-standard", "src", "configs")
    if top is None or Path(top).resolve() != PROJECT.resolve() or None in (commit, changed, untracked):
        return None, None
    return commit, bool(changed or untracked)


def _git(*arguments: str) -> str | None:
    """Return the output of git in the project's folder, or None without a checkout or git."""
    command = ["git", "-C", str(PROJECT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return os.fsdecode(done.stdout).strip()  # names of files need not be UTF-8


def _processor() -> str:
    """Return the processor's model name, which on Linux only /proc has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
