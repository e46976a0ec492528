"""Runs, from configuration to record: instantiated, tried, trained, and found again in their folders."""

import contextlib
import functools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from l2bn.data.loader import check_batch_size
from l2bn.data.splits import Splits
from l2bn.errors import UserError
from l2bn.failures import note_failure, run_errors
from l2bn.norms.swap import norm_layers, replacements, swap_norm
from l2bn.processes import silence_libraries
from l2bn.records import CONFIG, STATISTICS, SUMMARY, Fingerprint, InvalidRecordError, Record, read_features
from l2bn.seeding import derive_seed, seed_global
from l2bn.training.checkpoint import CheckpointPolicy
from l2bn.training.compute import Compute, check_numbers
from l2bn.training.environment import describe_code, warn_of_other_source
from l2bn.training.interruption import EXIT_CODE, LockedError, is_locked
from l2bn.training.observation import AnalysisPolicy, check_observable
from l2bn.training.optim import Recipe
from l2bn.training.plan import (
    Config,
    PlannedRun,
    check_identity,
    check_images,
    differences,
    has_begun,
    make_folder,
    read_config,
)
from l2bn.training.session import BuiltRun, check_record, launch
from l2bn.training.trial import check_fit, check_samples, check_step

log = logging.getLogger(__name__)

OURS = ("l2bn.norms.", *(f"l2bn.backbones.{name}." for name in ("resnet", "vgg", "shufflenetv2", "mobilenetv2")))
"""Networks and norms that can be built before a sweep, without a device."""

PARTS = {"recipe": Recipe, "compute": Compute, "checkpoint": CheckpointPolicy, "analysis": AnalysisPolicy}
"""The nodes without a `_target_`, and what each describes."""


def run(planned: PlannedRun, *, alone: bool = True, original: Path | None = None) -> Record:
    """Train a run to its end, from its last checkpoint if it has one; return its record.

    A run that has ended is left alone. Unless it is `alone`, a request to stop that comes when it is all but ended
    ends the process, with `interruption.EXIT_CODE`, so that no other run begins. Raises UserError for what the user
    can correct. A failure is noted in the run's folder; a run that is `alone` has none before it trains.

    original: the folder of a record that the run repeats, on the same images; other code of the user's own is a
    warning.
    """
    silence_libraries()
    record, late, before = find_record(planned), False, ""
    if record is not None:
        check_ended([(record, planned)])
        before = "ended before: "
    else:
        try:
            built = _prepare(planned, original)
            if not planned.folder.exists():
                note_other_lengths(planned)
            make_folder(planned.folder)
            late = launch(built)
        except LockedError:
            raise
        except Exception as error:
            # In place of the note of an earlier start, but not into a run that another process trains.
            with contextlib.suppress(OSError):  # a folder out of reach may be the failure itself
                if (planned.folder.is_dir() or not alone) and not is_locked(planned.folder):
                    note_failure(planned.folder, error)
            raise
        record = Record.read(planned.folder)
    if record.status == "diverged":
        result = f"diverged ({record.divergence})"
    else:
        accuracy = record.last["test/top1"]
        result = f"finished, test accuracy {accuracy:.2f} % after the last of {record.epochs} epochs"
    log.info("%s%s: %s; record in %s", before, planned.cell, result, planned.folder)
    if late and not alone:
        raise SystemExit(EXIT_CODE)
    return record


def _prepare(planned: PlannedRun, original: Path | None) -> BuiltRun:
    """Instantiate a run and try what it needs. Raises UserError."""
    from l2bn.norms.advice import warn_if_few_updates

    built = build_run(planned)
    if original is not None:
        warn_of_other_source(original, planned.config)
        repeated = read_record(original)
        if repeated is not None:
            check_images(repeated.images, built.splits.fingerprint, original)
    with run_errors(planned.cell, planned.folder):
        check_step(built)
    if built.compute.devices > 1:
        from l2bn.training.devices import check_sendable  # here: most runs have one device

        check_sendable(built)
    check_record(built)
    built.recipe.warn_if_cut_off()
    warn_if_few_updates(built.model, built.recipe.epochs * (len(built.splits.train) // built.recipe.batch_size))
    return built


def build_run(planned: PlannedRun) -> BuiltRun:
    """Instantiate what a configuration describes. Raises UserError that names the wrong key."""
    config, builder = planned.config, planned.builder
    parts = {name: builder.call(kind, config[name], name) for name, kind in PARTS.items()}
    norm = builder.build(config["norm"], "norm", functools.partial)
    describe_code(config)  # before a data set that takes its time
    splits: Splits = builder.build(config["dataset"], "dataset", Splits)
    check_batch_size(parts["recipe"].batch_size, len(splits.train), parts["compute"].devices)
    seed_global(derive_seed(planned.cell.seed, "weights"), torch.device("cpu"))
    model: nn.Module = builder.build(_with_classes(planned, splits.num_classes), "backbone", nn.Module)
    layers = norm_layers(model)
    batches = check_fit(model, splits, config["backbone"].get("stem"))
    # Norm layers that see another batch than the images, as of tokens or windows.
    regrouped = [name for name in layers if batches.get(model.get_submodule(name), {1}) != {1}]
    try:
        swap_norm(model, norm)
        if parts["compute"].sync_bn:
            from l2bn.norms.sync import counterparts  # here: few runs synchronise

            counterparts(model)  # raises where a layer has none
    except (ValueError, TypeError) as error:
        raise UserError(f"norm: {error}") from error
    check_observable(parts["analysis"], model, splits.num_classes, batches)
    check_samples(regrouped, model, measured=parts["analysis"].every != 0)
    code = describe_code(config)
    return BuiltRun(run=planned, splits=splits, model=model, norm_layers=layers, code=code, **parts)


def _with_classes(planned: PlannedRun, classes: int) -> dict[str, Any]:
    """Return the backbone's node with a number of classes. Raises UserError where it cannot take one."""
    node = planned.config["backbone"]
    if "num_classes" in node:
        raise UserError("backbone.num_classes follows from the data set: leave it out")
    if not planned.builder.accepts(node, "backbone", "num_classes"):
        raise UserError(
            f"backbone: {node['_target_']} needs a parameter num_classes, the number of the data set's classes"
        )
    return {**node, "num_classes": classes}


def check(planned: PlannedRun, tried: set[str] | None = None) -> None:
    """Check a run's configuration without its data and its machine. Raises UserError.

    tried: networks with their norms that other runs have had checked; this run's is added.
    """
    config, builder = planned.config, planned.builder
    for name, kind in PARTS.items():
        if kind is Compute:  # this machine may lack the devices of the job's
            given = builder.fit(kind, config[name], name)
            try:
                check_numbers(given["devices"], given["threads"], given["workers"])
            except ValueError as error:
                raise UserError(f"{name}: {error}") from error
        else:
            builder.call(kind, config[name], name)
    norm = builder.build(config["norm"], "norm", functools.partial)
    builder.check(config["dataset"], "dataset")
    backbone = _with_classes(planned, 2)
    builder.check(backbone, "backbone")
    network = yaml.safe_dump([backbone, config["norm"]])
    # A network of the user's own or of a library may need its files, or no device but a real one.
    ours = all(node["_target_"].startswith(OURS) for node in (backbone, config["norm"]))
    tried = set() if tried is None else tried
    if ours and network not in tried:
        tried.add(network)
        with torch.device("meta"):
            model = builder.build(backbone, "backbone", nn.Module)
        try:
            replacements(model, norm)
        except (ValueError, TypeError) as error:
            raise UserError(f"norm: {error}") from error
    describe_code(config)  # what is edited from here on is no code of this process


# The folder of a run.


def find_record(planned: PlannedRun) -> Record | None:
    """Return the record in a run's folder, if the run has ended.

    Raises UserError if the folder holds a run of another identity.
    """
    folder = planned.folder
    record = read_record(folder)
    stored: Config | None = None
    if record is not None:
        stored = record.identity
    elif (folder / CONFIG).exists() and has_begun(folder):
        try:
            stored = read_config(folder).identity
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder / CONFIG} is damaged: {error}\nremove this file to continue the run, whose checkpoints "
                "hold its identity, or move the folder away to train it again"
            ) from error
    if stored:
        check_identity(stored, planned.identity, folder)
    return record


def read_record(folder: Path) -> Record | None:
    """Return the record of a run, None if it has not ended. Raises UserError for a damaged one."""
    if not (folder / SUMMARY).exists():
        return None
    try:
        return Record.read(folder)
    except InvalidRecordError as error:
        raise UserError(f"{folder}: {error}\nmove the folder away to train this run anew") from error


def note_other_lengths(planned: PlannedRun) -> None:
    """Log that a run starts at its first epoch, if an equal one with another number of epochs exists.

    The schedule of the learning rate spans the whole run, so that a run is not continued beyond its end.
    """
    for path in sorted(planned.folder.parents[1].glob(f"*/{planned.folder.name}/{CONFIG}")):
        with contextlib.suppress(OSError, ValueError):
            changed = differences(read_config(path.parent).identity, planned.identity)
            if [line.partition(":")[0] for line in changed] == ["recipe.epochs"]:
                log.info(
                    "%s is an equal run with another number of epochs; this one starts from its first epoch, "
                    "because a schedule may follow the number of epochs",
                    path.parent,
                )


def check_ended(runs: Iterable[tuple[Record, PlannedRun]]) -> None:
    """Raise UserError if an ended run was made on other images than its configuration names now.

    Images that cannot be read are logged, and the run stands. The data set of several runs is read once. Other code
    of the user's own, and measurements that are asked for and were not made, are warnings.
    """
    found: dict[str, Fingerprint | None] = {}
    tried: set[str] = set()
    for record, planned in runs:
        with contextlib.suppress(UserError):  # the code is gone
            check(planned, tried)  # imports it
            warn_of_other_source(record.folder, planned.config)
            warn_if_unmeasured(record, planned)
        if record.images is None:
            continue
        key = yaml.safe_dump(planned.config["dataset"])
        if key not in found:
            found[key] = _fingerprint(planned)
        present = found[key]
        if present is not None:
            check_images(record.images, present, record.folder)


def warn_if_unmeasured(record: Record, planned: PlannedRun) -> None:
    """Warn if an ended run lacks measurements that its configuration asks for now."""
    policy: AnalysisPolicy = planned.builder.call(AnalysisPolicy, planned.config["analysis"], "analysis")
    if record.status == "diverged":  # it may have ended before the first one
        return
    try:
        measured = [row["epoch"] for row in read_features(record.folder)]
    except InvalidRecordError:
        measured = []
    if policy.every != 0 and record.epochs not in measured:
        log.warning(
            "%s has ended without features of its last epoch, and is not trained again: measure them by python "
            "scripts/analyze.py --run RUN",
            record.folder,
        )
    due = min(policy.statistics_until, record.updates) >= policy.statistics_every
    if due and not (record.folder / STATISTICS).exists():
        log.warning(
            "%s has ended without statistics of its first updates: only a new run, in another runs_dir, has them",
            record.folder,
        )


def _fingerprint(planned: PlannedRun) -> Fingerprint | None:
    try:
        splits: Splits = planned.builder.build(planned.config["dataset"], "dataset", Splits)
    except UserError as error:
        log.warning("%s: its images cannot be compared with those present: %s", planned.folder, error)
        return None
    return splits.fingerprint
