"""Existing runs and records: trained again, evaluated, analyzed."""

import logging
import math
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from torch import nn

from l2bn import records
from l2bn.analysis.probe import Probe
from l2bn.data.loader import Loader
from l2bn.errors import UserError, expand
from l2bn.failures import checkpoint_errors
from l2bn.processes import available_cores, silence_libraries
from l2bn.records import (
    CONFIG,
    FEATURES,
    MACHINE_PATHS,
    METRICS,
    FeatureRow,
    InvalidRecordError,
    Metrics,
    Record,
    Sample,
    read_metrics,
    without_machine_paths,
    write_lines,
)
from l2bn.training.acceleration import prepare
from l2bn.training.checkpoint import Checkpoints
from l2bn.training.compute import GPU_PRECISIONS
from l2bn.training.environment import warn_of_other_source
from l2bn.training.instantiate import Node, flatten
from l2bn.training.interruption import run_lock
from l2bn.training.journal import Journal
from l2bn.training.loop import evaluate
from l2bn.training.observation import collect, watched
from l2bn.training.plan import (
    CHECKPOINTS,
    CONFIG_NAME,
    PlannedRun,
    check_images,
    check_keys,
    composing,
    config_folders,
    read_config,
)
from l2bn.training.run import build_run, read_record, run
from l2bn.training.session import BuiltRun, make_loaders

log = logging.getLogger(__name__)

DATASET_ROOT = "dataset.root=FOLDER"  # in messages of data sets


def replay(folder: Path, runs_dir: str, root: str | None = None, config_dirs: Sequence[Path] = ()) -> Record:
    """Train the run of a record again, under `runs_dir`. Raises UserError, also for other images than the record's.

    A record may come from anybody: its YAML is read as plain values, only a `_target_` of `configs/` or of the
    folders `config_dirs` is called, and no path of the record is used: paths are those of the data set's YAML file,
    or `root`.
    """
    planned = read_run(folder, root, config_dirs, foreign=True)
    precision = planned.config["compute"]["precision"]
    if precision in GPU_PRECISIONS and not torch.cuda.is_available():
        raise UserError(
            f"{folder} was trained in {precision}, which only a GPU computes: repeat it on a machine with one"
        )
    compute = {**planned.config["compute"], "device": "auto", "threads": _threads(planned)}
    if compute.get("compile") == "graphs" and not torch.cuda.is_available():
        compute["compile"] = "auto"
    own = {"runs_dir": str(expand(runs_dir, "runs_dir")), "compute": compute}
    with _naming_root():
        return run(replace(planned, config={**planned.config, **own}), original=folder)


@contextmanager
def _naming_root() -> Iterator[None]:
    """Messages about missing images name the option of the scripts that open runs, which have no overrides."""
    try:
        yield
    except UserError as error:
        message = str(error)
        if DATASET_ROOT not in message:
            raise
        raise UserError(message.replace(DATASET_ROOT, "--root FOLDER")) from error


def _threads(planned: PlannedRun) -> int | None:
    """Return the CPU threads of a run, which change the last bits of sums; None where this machine has fewer."""
    threads = planned.config["compute"].get("threads")
    return threads if isinstance(threads, int) and threads <= available_cores() else None


def evaluate_run(
    folder: Path, device: str = "auto", root: str | None = None, config_dirs: Sequence[Path] = ()
) -> tuple[float, float, float | None]:
    """Return loss, top-1 and top-5 accuracy in percent of a run's last weights on its test images.

    Warns where these weights are no result: of a run that has not ended, or diverged, or whose last checkpoint is
    gone. Raises UserError.
    """
    opened = OpenedRun.open(folder, device, root, config_dirs)
    state = opened.checkpoints.load(opened.fabric.device)
    if state is None:
        raise UserError(f"{folder} has no checkpoint to evaluate")
    opened.load(state)
    done, step, epochs = state["position"]["epoch"], state["position"]["step"], opened.built.recipe.epochs
    record = read_record(folder)
    reason = ""
    if record is None:
        reason = "has not ended"
    elif record.status == "diverged":
        reason = f"diverged ({record.divergence})"
    elif done < epochs:
        reason = "lacks the checkpoint at its end"
    if reason:
        at = f"after {done} of {epochs} epochs" + (f" and {step} steps" if step else "")
        log.warning("%s %s: its last weights, those %s, are no result", folder, reason, at)
    return evaluate(opened.network, opened.test.epoch(0), opened.built.splits.num_classes, opened.fabric)


def analyze(
    folder: Path,
    *,
    every_checkpoint: bool = False,
    device: str = "auto",
    root: str | None = None,
    config_dirs: Sequence[Path] = (),
) -> list[FeatureRow]:
    """Measure the features of a run, from its newest checkpoint after an epoch or from every one.

    The measures go to the run's `features.jsonl`, where they replace those of the same update, and to TensorBoard.
    A sample of the penultimate features after the last epoch is kept. `root` and `config_dirs` are those of
    `read_run`. Returns the measured lines. Raises UserError if the folder is not a run, if it has no readable
    checkpoint after an epoch, and if another process works on the run.
    """
    opened = OpenedRun.open(folder, device, root, config_dirs, measured=True)
    with run_lock(folder):
        found = []
        epochs: list[Metrics] = []
        for _, state in opened.checkpoints.intact(opened.fabric.device):
            if state["position"]["step"] == 0:  # after a whole epoch
                found.append(opened.measure(state))
                epochs = epochs or state["position"]["rows"]  # the newest comes first
                if not every_checkpoint:
                    break
        if not found:
            raise UserError(f"{folder} has no checkpoint after an epoch to analyze")
        rows = [row for row, _ in reversed(found)]
        kept = opened.built.analysis.sample and rows[-1]["epoch"] == opened.built.recipe.epochs
        _write_measures(folder, epochs, rows, found[0][1] if kept else None)
    return rows


@dataclass(frozen=True)
class OpenedRun:
    """An existing run on a device, without its weights."""

    folder: Path
    built: BuiltRun
    fabric: Fabric
    network: nn.Module
    test: Loader
    checkpoints: Checkpoints

    @classmethod
    def open(
        cls, folder: Path, device: str, root: str | None, config_dirs: Sequence[Path], *, measured: bool = False
    ) -> "OpenedRun":
        """Return the run in a folder, on one device. Raises UserError, also if it is to be measured and cannot."""
        silence_libraries()
        planned = read_run(folder, root, config_dirs)
        # Only training is worth compiling for.
        own = {"device": device, "devices": 1, "sync_bn": False, "compile": False, "threads": _threads(planned)}
        precision = planned.config["compute"]["precision"]
        if precision in GPU_PRECISIONS and (device == "cpu" or not torch.cuda.is_available()):
            log.warning("%s was trained in %s, which needs a GPU; it is computed in float32", folder, precision)
            own["precision"] = "32-true"
        compute = {**planned.config["compute"], **own}
        analysis = planned.config["analysis"]
        if measured:
            analysis = {**analysis, "every": analysis.get("every") or None}
        with _naming_root():
            built = build_run(replace(planned, config={**planned.config, "compute": compute, "analysis": analysis}))
        warn_of_other_source(folder, planned.config)
        built.compute.set_up()
        fabric = built.compute.fabric()
        network = prepare(built.model, built.compute, fabric.device, updates=0).network
        _, test = make_loaders(built, fabric)
        return cls(folder, built, fabric, network, test, Checkpoints(folder / CHECKPOINTS, []))

    def load(self, state: dict[str, Any]) -> None:
        """Load the weights of a checkpoint. Raises UserError if it does not fit, or is of other images."""
        check_images(state.get("images"), self.built.splits.fingerprint, self.folder)
        with checkpoint_errors(self.folder):
            self.network.load_state_dict(state["model"])

    def measure(self, state: dict[str, Any]) -> tuple[FeatureRow, Sample | None]:
        """Return the features of a checkpoint on the test images, as a row and a sample."""
        self.load(state)
        classes = self.built.splits.num_classes
        position = state["position"]
        try:
            probe = Probe(self.network, self.built.norm_layers, classes)
            evaluate(self.network, watched(probe, self.test.epoch(0)), classes, self.fabric)
            return collect(probe, self.fabric, position["epoch"], int(position["rows"][-1]["step"]))
        except ValueError as error:
            raise UserError(f"{self.folder}: its features cannot be measured: {error}") from error


def _write_measures(folder: Path, epochs: list[Metrics], rows: list[FeatureRow], sample: Sample | None) -> None:
    """Merge the lines into those of the run, and draw all of them again.

    epochs: the metrics in the checkpoints. The file has an epoch less if the run was cut off between the two.
    """
    try:
        before, _ = records.truncate_measurements(folder, math.inf)
        metrics = max(read_metrics(folder / METRICS), epochs, key=len)
    except InvalidRecordError as error:
        raise UserError(f"{folder}: {error}") from error
    record = read_record(folder)
    merged = {row["step"]: row for row in [*before, *rows]}
    write_lines(folder / FEATURES, [merged[step] for step in sorted(merged)])
    if sample:
        records.write_sample(folder, sample)
    journal = Journal(folder, metrics, math.inf)
    if record is not None:
        journal.conclude(record)
    journal.close()


def read_run(
    folder: Path, root: str | None = None, config_dirs: Sequence[Path] = (), *, foreign: bool = False
) -> PlannedRun:
    """Return the run of a folder or of a published record.

    root: the folder of the data set, if it has moved since training.
    config_dirs: the user's own folders of YAML files, whose `_target_`s may be called, as those of `configs/`.
    foreign: take no path from the record. These paths, and those that publishing leaves out, come from the data
    set's YAML file.

    Raises UserError for a file that is missing or not the configuration of a run.
    """
    with composing(folders=config_dirs):
        try:
            planned = read_config(folder)
        except OSError as error:
            raise UserError(f"{folder} is not the folder of a run: {CONFIG}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{folder / CONFIG} is not the configuration of a run: {error}") from error
        config = dict(planned.config)
        here = _composed(planned.cell.dataset.partition(",")[0])
        if foreign:
            config = {"runs_dir": "runs", **without_machine_paths(config)}
            _refuse_paths(config["dataset"], here)
        dataset = config["dataset"] if root is None else {**config["dataset"], "root": root}
        config["dataset"] = {**_values(here, MACHINE_PATHS - dataset.keys()), **dataset}
        planned = replace(planned, config=config, folders=list(config_folders()))
    check_keys(planned.config, planned.builder)
    return planned


def _composed(dataset: str) -> DictConfig:
    """Return the node of a data set as its YAML file here gives it; an empty one if there is no such file."""
    if not any(source.is_config(f"dataset/{dataset}") for source in config_folders().values()):
        return DictConfig({})
    node: DictConfig = compose(CONFIG_NAME, [f"dataset={dataset}"]).dataset
    return node


def _refuse_paths(dataset: Node, here: DictConfig) -> None:
    """Raise UserError if a record's data set names a path out of its folder that its YAML file here does not."""
    for key, value in flatten(dataset):
        if isinstance(value, str) and (Path(value).is_absolute() or ".." in Path(value).parts):
            own = None
            with suppress(OmegaConfBaseException):
                own = OmegaConf.select(here, key)
            if value != own:
                raise UserError(
                    f"dataset.{key} is {value!r}: a record may only name what lies within its data set's folder; a "
                    "path of your own must also stand in the YAML file of the data set, below --config-dir"
                )


def _values(node: DictConfig, keys: Set[str]) -> dict[str, Any]:
    """Return those of the keys to which a data set's node gives a value. Raises UserError."""
    try:
        return {key: node[key] for key in keys & node.keys()}  # also one without a value, which raises
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value; give --root") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error.msg).splitlines()[0]}; give --root") from None
