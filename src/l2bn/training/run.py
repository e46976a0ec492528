"""Runs, from configuration to record: train, replay, evaluate, analyze. The only reader of the configuration."""

import contextlib
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import nn

from l2bn import records
from l2bn.analysis.probe import Probe
from l2bn.data.loader import Loader, check_batch_size
from l2bn.data.splits import Fingerprint, Splits
from l2bn.errors import UserError
from l2bn.failures import describe, fitting, note_failure
from l2bn.norms.swap import norm_layers, swap_norm
from l2bn.norms.sync import counterparts
from l2bn.records import (
    CONFIG,
    FEATURES,
    METRICS,
    SUMMARY,
    FeatureRow,
    InvalidRecordError,
    Record,
    Sample,
    read_metrics,
    without_machine_paths,
    write_lines,
)
from l2bn.seeding import derive_seed
from l2bn.training.checkpoint import CheckpointPolicy, Checkpoints
from l2bn.training.compute import Compute, quieten
from l2bn.training.instantiate import CONFIGS, Builder, machine_keys
from l2bn.training.interruption import is_owned, sole_owner
from l2bn.training.journal import Journal
from l2bn.training.loop import evaluate
from l2bn.training.observation import AnalysisPolicy, check_observable, collect
from l2bn.training.optim import Recipe
from l2bn.training.plan import (
    Cell,
    Config,
    PlannedRun,
    Settings,
    check_images,
    differences,
    identity,
    make_folder,
    plan_run,
    read_config,
    read_planned,
    read_settings,
)
from l2bn.training.session import Job, launch, make_loaders

log = logging.getLogger(__name__)


def train_composed(config: DictConfig, hydra: Any) -> Record:
    """Train the run that Hydra composed; `hydra` is the configuration's `hydra` node."""
    return run(plan_run(config, hydra))


def train_job(config: DictConfig) -> Record:
    """Train the run of a job of a sweep. A failure is reported at once, because Hydra goes on to the next job."""
    planned = read_planned(config)
    try:
        return run(planned)
    except Exception as error:
        log.error("%s failed: %s", planned.cell, describe(error))
        # A run that has its folder has noted the failure itself; nothing is written into another process's run.
        if not (planned.folder / CONFIG).exists() and not is_owned(planned.folder):
            note_failure(planned.folder, error)
        raise


def run(planned: PlannedRun) -> Record:
    """Train a run to its end, from its last checkpoint if it has one; return its record.

    A run that has ended is left alone. Raises UserError for what the user can correct; then no folder is made.
    """
    quieten()
    config, cell, builder = planned.config, planned.cell, planned.builder
    settings = read_settings(config, builder)
    folder = planned.folder
    record = find_record(folder, config)
    if record is not None:
        check_ended([(record, planned)])
    else:
        job = make_job(config, settings, cell, folder, builder)
        if not folder.exists():
            note_other_lengths(planned)
        make_folder(folder)
        launch(job)
        record = Record.read(folder)
    log.info("%s: %s; record in %s", cell, _result(record), folder)
    return record


def note_other_lengths(planned: PlannedRun) -> None:
    """Say that a run starts at its first epoch, where an equal one of another number of epochs exists.

    The schedule of the learning rate spans the whole run, so that a run is not continued beyond its end.
    """
    for path in sorted(planned.folder.parents[1].glob(f"*/{planned.folder.name}/{CONFIG}")):
        with contextlib.suppress(OSError, ValueError):
            changed = differences(identity(read_config(path)[0]), planned.identity)
            if [line.partition(":")[0] for line in changed] == ["recipe.epochs"]:
                log.info(
                    "%s is an equal run with another number of epochs; this one starts from its first epoch, "
                    "because the learning rate follows the number of epochs",
                    path.parent,
                )


def find_record(folder: Path, config: Config) -> Record | None:
    """The record of the run in a folder, if it has ended.

    Raises UserError if the folder holds a run of another identity: it is neither overwritten nor mixed.
    """
    record = None
    if (folder / SUMMARY).exists():
        try:
            record = Record.read(folder)
        except InvalidRecordError as error:
            raise UserError(f"{folder}: {error}\nmove the folder away to train this run anew") from error
    stored = record.identity if record else _stored_identity(folder / CONFIG)
    changed = differences(stored, identity(config)) if stored else []
    if changed:
        raise UserError(
            f"{folder} holds another run, which differs (there against here) in\n"
            + "".join(f"  {line}\n" for line in changed)
            + "give this one another runs_dir, or move the old folder away"
        )
    return record


def check_ended(runs: Iterable[tuple[Record, PlannedRun]]) -> None:
    """Raise UserError if an ended run was made on other images than its configuration names now.

    Images that cannot be read are logged, and the run stands. The data set of several runs is read once.
    """
    found: dict[str, Fingerprint | None] = {}
    for record, planned in runs:
        if record.images is None:
            continue
        key = yaml.safe_dump(planned.config["dataset"])
        if key not in found:
            found[key] = _fingerprint(planned)
        present = found[key]
        if present is not None:
            check_images(record.images, asdict(present), record.folder)


def _fingerprint(planned: PlannedRun) -> Fingerprint | None:
    try:
        splits: Splits = planned.builder.build(planned.config["dataset"], "dataset", Splits)
    except UserError as error:
        log.warning("%s: its images cannot be compared with those present: %s", planned.folder, error)
        return None
    return splits.fingerprint


def _stored_identity(path: Path) -> Config | None:
    """The identity in the `config.yaml` of a run; None if there is no such file."""
    try:
        return identity(read_config(path)[0])
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged: {error}\nremove this file to continue the run, whose checkpoints hold its "
            "identity, or move the folder away to train it again"
        ) from error


def check(planned: PlannedRun) -> None:
    """Check a run's configuration without its data, its network and its machine. Raises UserError."""
    config, builder = planned.config, planned.builder
    read_settings(config, builder)
    builder.call(Recipe, config["recipe"], "recipe")
    builder.call(CheckpointPolicy, config["checkpoint"], "checkpoint")
    builder.call(AnalysisPolicy, config["analysis"], "analysis")
    builder.check(config["compute"], "compute", Compute)
    builder.build(config["norm"], "norm", functools.partial)
    builder.check(config["dataset"], "dataset")
    builder.check({**config["backbone"], "num_classes": 2}, "backbone")


def make_job(config: Config, settings: Settings, cell: Cell, folder: Path, builder: Builder) -> Job:
    """Instantiate what a configuration describes. Raises UserError that names the wrong key."""
    recipe: Recipe = builder.call(Recipe, config["recipe"], "recipe")
    compute: Compute = builder.call(Compute, config["compute"], "compute")
    checkpoint: CheckpointPolicy = builder.call(CheckpointPolicy, config["checkpoint"], "checkpoint")
    analysis: AnalysisPolicy = builder.call(AnalysisPolicy, config["analysis"], "analysis")
    norm = builder.build(config["norm"], "norm", functools.partial)
    splits: Splits = builder.build(config["dataset"], "dataset", Splits)
    check_batch_size(recipe.batch_size, len(splits.train), compute.devices)
    torch.manual_seed(derive_seed(settings.seed, "weights"))
    if "num_classes" in config["backbone"]:
        raise UserError(
            f"backbone.num_classes follows from the data set, which has {splits.num_classes}: leave it out"
        )
    backbone = {**config["backbone"], "num_classes": splits.num_classes}
    model: nn.Module = builder.build(backbone, "backbone", nn.Module)
    check_fit(model, splits)
    layers = norm_layers(model)
    try:
        swap_norm(model, norm)
        if compute.sync_bn:
            counterparts(model)  # raises where a layer has none
    except (ValueError, TypeError) as error:
        raise UserError(f"norm: {error}") from error
    check_observable(analysis, model, splits.num_classes)
    return Job(
        cell=cell,
        folder=folder,
        config=yaml.safe_dump({**config, "cell": asdict(cell)}, sort_keys=False),
        identity=identity(config),
        seed=settings.seed,
        splits=splits,
        model=model,
        norm_layers=layers,
        recipe=recipe,
        compute=compute,
        checkpoint=checkpoint,
        analysis=analysis,
        progress=settings.progress,
    )


def check_fit(model: nn.Module, splits: Splits) -> None:
    """Raise UserError unless the model turns an image of the data set into a logit for each class."""
    size, classes = splits.image_size, splits.num_classes
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"backbone: this network cannot take images of {size} x {size} pixels: {error}\n"
            "set a larger dataset.image_size, where the data set has that key, or take another backbone"
        ) from error
    finally:
        model.train()
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(
            f"backbone: for one image this network returns {found}, not (1, {classes}), a logit for each class"
        )


def replay(folder: Path, runs_dir: str, root: str | None = None, config_dirs: Sequence[Path] = ()) -> Record:
    """Train the run of a record again, under `runs_dir`. Raises UserError.

    A record may come from anybody: its YAML is read as plain values, only a `_target_` of `configs/` or of the
    folders `config_dirs` is called, and no path of the record is used: paths are those of the data set's YAML file,
    or `root`.
    """
    planned = read_run(folder, root, config_dirs, foreign=True)
    return run(replace(planned, config={**planned.config, "runs_dir": str(Path(runs_dir).expanduser())}))


def evaluate_run(
    folder: Path, device: str = "auto", root: str | None = None, config_dirs: Sequence[Path] = ()
) -> tuple[float, float, float | None]:
    """Loss, top-1 and top-5 accuracy in percent of a run's last weights on its test images. Raises UserError."""
    opened = open_run(folder, device, root, config_dirs)
    state = opened.checkpoints.load(opened.fabric.device)
    if state is None:
        raise UserError(f"{folder} has no checkpoint to evaluate")
    check_images(state.get("images"), asdict(opened.job.splits.fingerprint), folder)
    with fitting(folder):
        opened.network.load_state_dict(state["model"])
    return evaluate(opened.network, opened.test, opened.job.splits.num_classes, opened.fabric)


@dataclass(frozen=True)
class OpenedRun:
    """An existing run on a device, without its weights."""

    job: Job
    fabric: Fabric
    network: nn.Module
    test: Loader
    checkpoints: Checkpoints


def open_run(
    folder: Path, device: str = "auto", root: str | None = None, config_dirs: Sequence[Path] = ()
) -> OpenedRun:
    """The run in a folder, on one device. Raises UserError."""
    quieten()
    planned = read_run(folder, root, config_dirs)
    config, builder = planned.config, planned.builder
    # Only training is worth compiling for.
    compute = {**config["compute"], "device": device, "devices": 1, "sync_bn": False, "compile": False}
    job = make_job({**config, "compute": compute}, read_settings(config, builder), planned.cell, folder, builder)
    job.compute.set_up()
    fabric = job.compute.fabric()
    network = job.compute.place(job.model, fabric.device, updates=0).network
    _, test = make_loaders(job, fabric)
    return OpenedRun(job, fabric, network, test, Checkpoints(folder / "checkpoints", []))


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
    opened = open_run(folder, device, root, config_dirs)
    with sole_owner(folder):
        found = []
        for state in _checkpoints(opened):
            found.append(_measure(opened, state))
            if not every_checkpoint:
                break
        if not found:
            raise UserError(f"{folder} has no checkpoint after an epoch to analyze")
        rows = [row for row, _ in reversed(found)]
        kept = opened.job.analysis.sample and rows[-1]["epoch"] == opened.job.recipe.epochs
        _write_measures(opened.job.cell, folder, rows, found[0][1] if kept else None)
    return rows


def _checkpoints(opened: OpenedRun) -> Iterator[dict[str, Any]]:
    """The readable checkpoints after whole epochs, newest first."""
    for path in reversed(opened.checkpoints.paths()):
        try:
            state = opened.checkpoints.read(path, opened.fabric.device)
        except ValueError as error:
            log.warning("the damaged checkpoint %s is left out: %s", path, error)
            continue
        if state["position"]["step"] == 0:
            yield state


def _measure(opened: OpenedRun, state: dict[str, Any]) -> tuple[FeatureRow, Sample]:
    check_images(state.get("images"), asdict(opened.job.splits.fingerprint), opened.job.folder)
    with fitting(opened.job.folder):
        opened.network.load_state_dict(state["model"])
    classes = opened.job.splits.num_classes
    probe = Probe(opened.network, opened.job.norm_layers, classes)
    with probe.attached():
        evaluate(opened.network, opened.test, classes, opened.fabric, probe.expect)
    position = state["position"]
    return collect(probe, opened.fabric, position["epoch"], int(position["rows"][-1]["step"]))


def _write_measures(cell: Cell, folder: Path, rows: list[FeatureRow], sample: Sample | None) -> None:
    """Merge the lines into those of the run, and draw all of them again."""
    try:
        before, _ = records.keep_measurements(folder, math.inf)
        metrics = read_metrics(folder / METRICS)
    except InvalidRecordError as error:
        raise UserError(f"{folder}: {error}") from error
    merged = {row["step"]: row for row in [*before, *rows]}
    write_lines(folder / FEATURES, [merged[step] for step in sorted(merged)])
    if sample:
        records.write_sample(folder, sample)
    journal = Journal(folder, cell, metrics, math.inf)
    if (folder / SUMMARY).exists():
        journal.conclude(Record.read(folder))
    journal.close()


def read_run(
    folder: Path, root: str | None = None, config_dirs: Sequence[Path] = (), *, foreign: bool = False
) -> PlannedRun:
    """The run of a folder or of a published record.

    root: the folder of the data set, if it has moved since training.
    config_dirs: the user's own folders of YAML files, whose `_target_`s may be called, as those of `configs/`.
    foreign: take no path from the record. These, and the paths that publishing leaves out, come from the data set's
    YAML file.

    Raises UserError for a file that is missing or not the configuration of a run.
    """
    for config_dir in config_dirs:
        if not config_dir.is_dir():
            raise UserError(f"--config-dir: there is no folder {config_dir}")
    folders = [CONFIGS, *(config_dir.resolve() for config_dir in config_dirs)]
    path = folder / CONFIG
    try:
        config, cell = read_config(path)
    except OSError as error:
        raise UserError(f"{folder} is not the folder of a run: {CONFIG}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not the configuration of a run: {error}") from error
    if foreign:
        config = {"runs_dir": "runs", **without_machine_paths(config)}
        _check_inside(config["dataset"], "dataset")
    dataset = {**machine_keys(f"dataset/{cell.dataset.partition(',')[0]}.yaml", folders), **config["dataset"]}
    if root is not None:
        dataset["root"] = root
    return PlannedRun(cell, {**config, "dataset": dataset}, folders=folders)


def _check_inside(node: Config, path: str) -> None:
    """Raise UserError for a value that leads out of the data set's folder."""
    for key, value in node.items():
        if isinstance(value, dict):
            _check_inside(value, f"{path}.{key}")
        elif isinstance(value, str) and (Path(value).is_absolute() or ".." in Path(value).parts):
            raise UserError(
                f"{path}.{key} is {value!r}: a record may only name what lies within its data set's folder"
            )


def _result(record: Record) -> str:
    if record.status == "diverged":
        return f"diverged ({record.divergence})"
    return f"finished, test accuracy {record.last['test/top1']:.2f} % after the last of {record.epochs} epochs"
