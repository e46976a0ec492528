"""Shared by all tests: the real images, and ways to train runs, compare them and issue scripts, in process."""

import contextlib
import functools
import gc
import logging
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hydra import compose
from hypothesis import settings
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from l2bn.data import folder
from l2bn.records import COST_KEYS, Record
from l2bn.training import plan
from l2bn.training.instantiate import CONFIGS
from l2bn.training.plan import PlannedRun, composing, plan_run
from l2bn.training.sweep import compose_sweep, plan_sweep

ROOT = Path(__file__).parents[1]
TRAIN = str(ROOT / "scripts" / "train.py")

Process = subprocess.Popen[str]


class Done(NamedTuple):
    """The end of a command: its exit code, and its output on stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def printed(self) -> str:
        return self.out + self.err


Train = Callable[..., Record]
Issue = Callable[..., Done]
AtUpdate = Callable[[int, Callable[[Any], None]], None]

# The same examples on every machine and in every run; a busy machine is no failure. To search for new ones:
# pytest --hypothesis-profile=default
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

QUIET = ("progress=false", "compute.workers=0")
# Inductor's helper processes compile for GPUs alone, and are started on CPUs, too.
os.environ.setdefault("TORCH_WARM_POOL", "0")

# Eight updates an epoch on real digits: enough to see an epoch end, and quick.
TINY = ("dataset.subset=256", "dataset.image_size=8", *QUIET)
# Two updates an epoch.
TINIEST = ("dataset.subset=64", "dataset.image_size=8", "dataset.validation=0.05")
EPOCHS = "recipe.epochs=2"


@pytest.fixture(autouse=True, scope="session")
def _default_signals() -> None:
    """Processes inherit ignored signals: tests in the background of a shell would pass theirs on to the runs."""
    for number in signal.valid_signals():
        if signal.getsignal(number) == signal.SIG_IGN and number not in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def _quick_disk() -> Iterator[None]:
    """Without the wait for the disk: what a test writes here need not survive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _frozen() -> Iterator[None]:
    """Each run collects garbage: not among what the modules of all tests have made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sums are split among threads, so their number changes the last bits."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _defaults_composed_once() -> Iterator[None]:
    """Compose the defaults by which a run gets its name once: 50 ms, and always of the same files."""
    compose_anew, composed_before = plan.compose, dict[tuple[str, ...], DictConfig]()

    def compose_once(name: str, choices: list[str]) -> DictConfig:
        if set(plan.config_folders()) != {CONFIGS}:  # with a test's own files
            return compose_anew(name, choices)
        if tuple(choices) not in composed_before:
            composed_before[tuple(choices)] = compose_anew(name, choices)
        return composed_before[tuple(choices)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "compose", compose_once)
        yield


def start(*arguments: object, **options: Any) -> Process:
    """Start Python, in a group of its own; all that it prints goes to one pipe."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, text=True, start_new_session=True, **{**pipes, **options})


def finish(process: Process, code: int = 0) -> str:
    """Wait for the end of a process, which must be this; return what it has printed."""
    try:
        printed, _ = process.communicate(timeout=900)
    except BaseException as error:  # also Ctrl-C, which does not reach its group
        error.add_note(kill(process))
        raise
    assert process.returncode == code, printed
    return printed


def kill(process: Process) -> str:
    """End a process and its group, if it is still there; return what it has printed since it was last read."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return process.communicate()[0] if process.stdout and not process.stdout.closed else ""


def wait_for(condition: Callable[[], object], process: Process | None = None, seconds: float = 300) -> None:
    """Wait until the condition holds; a process must not have ended before, and is killed if it takes too long."""
    deadline = time.monotonic() + seconds
    try:
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s"
            assert process is None or process.poll() is None, f"ended with {process.returncode}"
            time.sleep(0.02)
    except BaseException as error:
        if process is not None:
            error.add_note(kill(process))
        raise


def require(what: str, missing: object) -> None:
    """Skip a test where something it needs is missing; fail it where all is said to be there, as in CI."""
    if missing:
        say = pytest.fail if os.environ.get("L2BN_REQUIRE_SERVICES") else pytest.skip
        say(f"{what} is not to be had here; missing: {missing}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images (see CONTRIBUTING.md); without it the tests on real images are skipped."""
    folder = Path(os.environ.get("L2BN_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} does not exist; set L2BN_SHARED_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def photographs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 100 ImageNet photographs in `imagenet-samples`."""
    folder = tmp_path_factory.mktemp("photographs")
    with tarfile.open(shared_data / "imagenet-samples.tar") as tar:
        tar.extractall(folder, filter="data")
    return folder


def decoding(folder: Path) -> tuple[str, ...]:
    """A run on photographs that processes decode while it trains: 4 updates an epoch."""
    return (
        "dataset=imagenet_samples",
        f"dataset.root={folder}",
        "dataset.image_size=32",
        "dataset.validation=0.2",
        "dataset.subset=64",
        "recipe=short",
        "recipe.batch_size=16",
        "norm=bn",
        "progress=false",
    )


def composed(overrides: Sequence[str]) -> tuple[DictConfig, DictConfig]:
    """The configuration of a run as Hydra composes it, and its `hydra` node."""
    config = compose("train", list(overrides), return_hydra_config=True)
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]), config.hydra


def planned(*overrides: str, folders: Sequence[Path] = ()) -> list[PlannedRun]:
    """Plan the runs of a sweep, as the command line does."""
    with composing(overrides, folders) as (_, rest):
        return plan_sweep(compose_sweep(rest))


def train_in(runs: Path, *overrides: str, folders: Sequence[Path] = ()) -> Record:
    """Compose a configuration from overrides, as the command line does, train it in a folder, return its record."""
    from l2bn.training.run import run  # seconds of imports that few tests need

    with composing([f"runs_dir={runs}", *overrides], folders) as (_, rest):
        return run(plan_run(*composed(rest)))


def results(record: Record) -> list[dict[str, Any]]:
    """The metrics of a record, without what they cost."""
    return [{k: v for k, v in row.items() if k not in COST_KEYS} for row in record.metrics()]


def weights(record: Record) -> dict[str, torch.Tensor]:
    newest = sorted((record.folder / "checkpoints").glob("*.pt"))[-1]
    return torch.load(newest, weights_only=True)["model"]


def events_of(folder: Path, **sizes: int) -> Any:
    """The events that TensorBoard reads in a folder; of the kinds in `sizes` so many, 0 for all."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), sizes).Reload()


def drawn(record: Record) -> dict[str, list[tuple[int, float]]]:
    """The curves that TensorBoard shows of a run, without what they cost: tag to (epoch, value)."""
    events = events_of(record.folder / "tb")
    tags = set(events.Tags()["scalars"]) - set(COST_KEYS)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def same(one: Record, other: Record) -> None:
    """Fail unless two runs have the same metrics, curves and weights to the last bit; what they cost may differ."""
    assert results(one) == results(other)
    assert drawn(one) == drawn(other)
    assert equal(weights(one), weights(other))


def stop_after(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """Interrupt the next run after so many updates."""
    from l2bn.training import session
    from l2bn.training.interruption import EXIT_CODE, Interruption

    class Counting(Interruption):
        looks = 0

        @property
        def signal(self) -> Any:
            self.looks += 1
            return "told" if self.looks >= updates else None

        @signal.setter
        def signal(self, _: Any) -> None: ...

        def leave(self) -> None:
            raise SystemExit(EXIT_CODE)

    monkeypatch.setattr(session, "Interruption", Counting)


def interrupted(updates: int, train: Train, *arguments: Any) -> None:
    """Train a run that is interrupted after so many updates."""
    from l2bn.training.interruption import EXIT_CODE

    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, updates)
        with pytest.raises(SystemExit) as left:
            train(*arguments)
    assert left.value.code == EXIT_CODE


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of files in each decoding of a tree so far."""
    counts = []
    read_all = folder.read_all

    def counted(paths: list[Path], *rest: Any) -> Any:
        counts.append(len(paths))
        return read_all(paths, *rest)

    monkeypatch.setattr(folder, "read_all", counted)
    return counts


def uncompiled(
    function: Callable[..., object], tensors: tuple[Tensor | None, ...], *constants: object, **_: object
) -> list[Tensor]:
    """Compute a kernel's formulas in the place of `autograd.run_kernel`, without the seconds that it compiles."""
    result = function(*tensors, *constants)
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """`train_in` the folder `runs` of the test's own."""
    return functools.partial(train_in, tmp_path / "runs")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """`train` a run once for all tests, which only read it; each asks for it before it patches anything."""
    return functools.cache(lambda *overrides: train_in(tmp_path_factory.mktemp("trained"), *overrides))


@pytest.fixture
def copied(trained: Train, tmp_path: Path) -> Train:
    """A `trained` run, copied into the folder `runs` of the test's own."""

    def copied(*overrides: str) -> Record:
        folder = trained(*overrides).folder
        own = tmp_path.joinpath("runs", *folder.parts[-5:])
        shutil.copytree(folder, own)
        return Record.read(own)

    return copied


@pytest.fixture
def issue(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Issue:
    """Issue a script of this project in this process, as the command line does, where the test is."""

    def issue(script: str, *arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        code: object = None
        root = logging.getLogger()
        level, handlers = root.level, root.handlers[:]
        root.handlers[:] = []  # as a new process has it
        try:
            runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
        except SystemExit as left:
            code = left.code
        finally:  # Hydra's logging writes to this test's stdout
            root.setLevel(level)
            root.handlers[:] = handlers
        out, err = capfd.readouterr()
        if isinstance(code, str):  # which Python prints at its end
            return Done(1, out, f"{err}{code}\n")
        return Done(int(code or 0), out, err)  # type: ignore[call-overload]

    return issue


@pytest.fixture
def at_update(monkeypatch: pytest.MonkeyPatch) -> AtUpdate:
    """Have something happen to the trainer just before the n-th update from now, once."""
    from l2bn.training.loop import Trainer

    forward = Trainer.forward

    def arrange(number: int, happen: Callable[[Trainer], None]) -> None:
        left = [number]

        def spied(self: Trainer, *arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                happen(self)
            return forward(self, *arguments)

        monkeypatch.setattr(Trainer, "forward", spied)

    return arrange


def answer_of(address: str) -> bytes:
    """Ask a server on this machine, and return its answer: nothing as long as there is none."""
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return bytes(answer.read())
    except OSError:
        return b""


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of headless Chromium."""
    browser = shutil.which("chromium")
    require("a browser (Debian's chromium)", [] if browser else ["chromium"])
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=browser, args=arguments) as chromium,
    ):
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        yield page


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
