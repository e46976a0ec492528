"""Look into a run that is there: measure the features of its checkpoints, and add them to its record."""

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from l2bn import records
from l2bn.analysis.probe import Probe
from l2bn.errors import UserError
from l2bn.records import (
    FEATURES,
    METRICS,
    SUMMARY,
    FeatureRow,
    InvalidRecordError,
    Record,
    Sample,
    read_metrics,
    write_lines,
)
from l2bn.training.identity import Cell, check_images
from l2bn.training.interruption import sole_owner
from l2bn.training.journal import Journal
from l2bn.training.loop import evaluate
from l2bn.training.observation import collect
from l2bn.training.run import OpenedRun, open_run
from l2bn.training.state import fitting

log = logging.getLogger(__name__)


def analyze(
    folder: Path, *, every_checkpoint: bool = False, device: str = "auto", root: str | None = None
) -> list[FeatureRow]:
    """Measure the features of a run after its last epoch that has a checkpoint, or of all that are there.

    They go to the run's `features.jsonl`, in the place of what was measured at the same update before, and to
    TensorBoard; a sample of the penultimate features after the last epoch is kept. Returns the lines measured.
    `root` says where the data set lies, if not where it lay in training. Raises UserError for what is no run, where
    no checkpoint after an epoch can be read, and where another process is at work on the run.
    """
    run = open_run(folder, device, root)
    with sole_owner(folder):
        found = []
        for state in _states(run):
            found.append(_measure(run, state))
            if not every_checkpoint:
                break
        if not found:
            raise UserError(f"{folder} has no checkpoint after an epoch to analyze")
        rows = [row for row, _ in reversed(found)]
        kept = run.job.analysis.sample and rows[-1]["epoch"] == run.job.recipe.epochs
        _write(run.job.cell, folder, rows, found[0][1] if kept else None)
    return rows


def _states(run: OpenedRun) -> Iterator[dict[str, Any]]:
    """The checkpoints after whole epochs that can be read, newest first."""
    for path in reversed(run.checkpoints.paths()):
        try:
            state = run.checkpoints.read(path, run.fabric.device)
        except ValueError as error:
            log.warning("the checkpoint %s is damaged and left out: %s", path, error)
            continue
        if state["position"]["step"] == 0:
            yield state


def _measure(run: OpenedRun, state: dict[str, Any]) -> tuple[FeatureRow, Sample]:
    check_images(state.get("images"), asdict(run.job.splits.fingerprint), run.job.folder)
    with fitting(run.job.folder):
        run.network.load_state_dict(state["model"])
    classes = run.job.splits.num_classes
    probe = Probe(run.network, run.job.norm_layers, classes)
    with probe.attached():
        evaluate(run.network, run.test, classes, run.fabric, probe.expect)
    position = state["position"]
    return collect(probe, run.fabric, position["epoch"], int(position["rows"][-1]["step"]))


def _write(cell: Cell, folder: Path, rows: list[FeatureRow], sample: Sample | None) -> None:
    """Merge the lines into the run's own, and draw them all anew."""
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
