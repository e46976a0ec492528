"""The metrics of a run as JSON lines, for tables, and as TensorBoard events, for eyes: one call writes both."""

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l2bn import records
from l2bn.errors import UserError
from l2bn.records import (
    FEATURES,
    METRICS,
    SIDES,
    STATISTICS,
    FeatureRow,
    InvalidRecordError,
    Measures,
    Metrics,
    Record,
    Sample,
    StatisticsRow,
    as_line,
    write_lines,
)

FINAL = "final/test_top1"


class Journal:
    """The metrics of a run, opened at the position of its checkpoint; later lines are dropped.

    A run that was cut off between a checkpoint and its line therefore has no epoch twice and none missing.
    Measurements are written before the checkpoint of their position, so that their own files hold those to keep.
    TensorBoard's events are written again from the same lines.
    """

    def __init__(self, folder: Path, rows: list[Metrics], step: float) -> None:
        """`rows` are the completed epochs, `step` counts the steps of the run. Raises UserError."""
        self._folder = folder
        write_lines(folder / METRICS, rows)
        try:
            features, statistics = records.truncate_measurements(folder, step, len(rows))
        except InvalidRecordError as error:
            raise UserError(f"{folder}: {error}\nmove this file away to go on without it") from error
        self._writer = _open_writer(folder / "tb")
        for row in rows:
            self._draw(row)
        for line in features:
            self._draw_features(line)
        for line in statistics:
            self._draw_statistics(line)

    def append(self, row: Metrics) -> None:
        """Add an epoch."""
        _append_durably(self._folder / METRICS, row)  # before the record, which is written last
        self._draw(row)

    def append_features(self, row: FeatureRow, sample: Sample | None) -> None:
        """Add the features measured after an epoch, and a sample of them if there is one."""
        _append_durably(self._folder / FEATURES, row)
        if sample:
            records.write_sample(self._folder, sample)
        self._draw_features(row)

    def append_statistics(self, row: StatisticsRow) -> None:
        """Add a comparison of running and batch statistics."""
        _append_durably(self._folder / STATISTICS, row)
        self._draw_statistics(row)

    def conclude(self, record: Record) -> None:
        """Add the run's cell, main settings and final test accuracy to TensorBoard's HParams tab.

        `SummaryWriter.add_hparams` would open a second run beside it. A diverged run has no accuracy.
        """
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[import-untyped]
        from torch.utils.tensorboard.summary import hparams

        recipe = record.identity["recipe"]
        cell = {name: getattr(record, name) for name in ("dataset", "backbone", "norm", "recipe", "seed")}
        values = cell | {"lr": recipe["lr"], "batch": recipe["batch_size"], "epochs": record.epochs}
        values["precision"] = record.precision
        if record.status == "finished":
            self._writer.add_scalar(FINAL, record.last["test/top1"], record.epochs)
        columns, start, end = hparams(values, {FINAL: None})  # type: ignore[no-untyped-call]
        # The tab shows five columns until others are ticked: those that differ among runs, and then by their names.
        data = columns.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(data.content)
        for column in content.experiment.hparam_infos:
            column.differs = column.name in cell
        data.content = content.SerializeToString()
        for summary in (columns, start, end):
            self._writer.file_writer.add_summary(summary)

    def close(self) -> None:
        self._writer.close()

    def _draw(self, row: Metrics) -> None:
        self._add_scalars({tag: value for tag, value in row.items() if tag != "epoch"}, row["epoch"])
        self._writer.flush()

    def _draw_features(self, row: FeatureRow) -> None:
        """Draw a chart per measure and side over all layers, and a histogram of each layer's input norms."""
        epoch = row["epoch"]
        self._add_scalars({f"penultimate/{name}": value for name, value in row["penultimate"].items()}, epoch)
        for layer in row["layers"]:
            name = layer["name"]
            scalars = {f"{m} {side}/{name}": value for side in SIDES for m, value in layer[side].items()}
            self._add_scalars({f"shrink/{name}": layer["shrink"], **scalars}, epoch)
            self._add_histogram(f"norms/{name}", layer["norms"], layer["input"], epoch)
        self._writer.flush()

    def _draw_statistics(self, row: StatisticsRow) -> None:
        self._add_scalars(
            {f"statistics/{tag.replace('/', ' ')}": row[tag] for tag in row if tag != "step"}, row["step"]
        )
        self._writer.flush()

    def _add_scalars(self, values: Mapping[str, float | None], at: float | None) -> None:
        for tag, value in values.items():
            if value is not None:
                self._writer.add_scalar(tag, value, at)

    def _add_histogram(self, tag: str, norms: Mapping[str, Any], measures: Measures, at: int) -> None:
        mean, cv = measures["norm_mean"], measures["norm_cv"]
        if mean is None or cv is None:
            return
        counts, images = norms["counts"], sum(norms["counts"])
        limits = [2 ** ((norms["first"] + i) / records.BINS_PER_OCTAVE) for i in range(len(counts) + 1)]
        self._writer.add_histogram_raw(
            tag,
            min=limits[0],
            max=limits[-1],
            num=images,
            sum=images * mean,
            sum_squares=images * mean**2 * (1 + cv**2),
            bucket_limits=limits[1:],
            bucket_counts=counts,
            global_step=at,
        )


def _append_durably(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line, and flush it to the disk."""
    with path.open("a") as file:
        file.write(as_line(row))
        file.flush()
        os.fsync(file.fileno())


def _open_writer(folder: Path) -> Any:
    """Return a writer whose file first purges the events of earlier files.

    Earlier files stay, because a running TensorBoard would wait forever for more of a deleted file. It reads files
    in the order of the seconds in their names: if the clock has gone back, the earlier ones would be read last, and
    are deleted.
    """
    # Imported here, because it takes seconds.
    from torch.utils.tensorboard import SummaryWriter

    prefix = "events.out.tfevents."
    if any(path.name >= f"{prefix}{int(time.time()):010d}" for path in folder.glob(f"{prefix}*")):
        shutil.rmtree(folder)
    return SummaryWriter(str(folder), purge_step=1)
