"""What a run finds out as it goes, for tables (JSON lines) and for eyes (TensorBoard): one call writes both."""

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
from l2bn.training import tensorboard
from l2bn.training.identity import Cell


class Journal:
    """Opens with what a checkpoint knows of, and forgets what was written after it.

    A run that was cut off between a checkpoint and its line, or the other way round, so has no epoch twice and
    none missing. Measurements are on the disk before the checkpoint of their position, so what is to be kept of
    them stands in their own files. For TensorBoard the same lines are drawn anew.
    """

    def __init__(self, folder: Path, cell: Cell, rows: list[Metrics], step: float) -> None:
        """`rows` are the epochs done, `step` the updates made. Raises UserError."""
        self._folder, self._cell = folder, cell
        write_lines(folder / METRICS, rows)
        try:
            features, statistics = records.keep_measurements(folder, step, len(rows))
        except InvalidRecordError as error:
            raise UserError(f"{folder}: {error}\nmove this file away to go on without it") from error
        self._writer = _open_writer(folder / "tb")
        self._writer.add_custom_scalars(tensorboard.layout(cell))
        for row in rows:
            self._draw(row)
        for line in features:
            self._draw_features(line)
        for line in statistics:
            self._draw_statistics(line)

    def append(self, row: Metrics) -> None:
        """Add one epoch to both."""
        _append_durably(self._folder / METRICS, row)  # so that a record, written last, lacks none after a power cut
        self._draw(row)

    def append_features(self, row: FeatureRow, sample: Sample | None) -> None:
        """Add the features measured in one epoch, and a sample of them if there is one."""
        _append_durably(self._folder / FEATURES, row)
        if sample:
            records.write_sample(self._folder, sample)
        self._draw_features(row)

    def append_statistics(self, row: StatisticsRow) -> None:
        """Add a comparison of running and batch statistics."""
        _append_durably(self._folder / STATISTICS, row)
        self._draw_statistics(row)

    def conclude(self, record: Record) -> None:
        """Add how the run ended to TensorBoard; for tables its record says so."""
        tensorboard.add_hparams(self._writer, record)

    def close(self) -> None:
        self._writer.close()

    def _draw(self, row: Metrics) -> None:
        metrics = {tag: value for tag, value in row.items() if tag != "epoch"}
        self._add_scalars({**metrics, **tensorboard.comparison(self._cell, row)}, row["epoch"])
        self._writer.flush()

    def _draw_features(self, row: FeatureRow) -> None:
        """A chart a measure and side, with all layers; a histogram of the norms at the input of each layer."""
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
    """Add a line that is on the disk when this returns."""
    with path.open("a") as file:
        file.write(as_line(row))
        file.flush()
        os.fsync(file.fileno())


def _open_writer(folder: Path) -> Any:
    """A writer whose file begins with the word to forget what the files of earlier starts hold.

    Those stay, because a TensorBoard that is looking on would wait for ever for more of a file that is gone. Files
    are read in the order of the seconds in their names: where the clock has gone back, the earlier ones would come
    last, and go.
    """
    # Imported here, because it takes seconds that a skipped run need not spend.
    from torch.utils.tensorboard import SummaryWriter

    prefix = "events.out.tfevents."
    if any(path.name >= f"{prefix}{int(time.time()):010d}" for path in folder.glob(f"{prefix}*")):
        shutil.rmtree(folder)
    return SummaryWriter(str(folder), purge_step=1)
