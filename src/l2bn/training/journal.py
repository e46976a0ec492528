"""The metrics of a run, for tables (`metrics.jsonl`) and for eyes (TensorBoard): one call writes both."""

import json
import shutil
from pathlib import Path

from l2bn.records import METRICS, Metrics, write_metrics


class Journal:
    """Opens with the epochs that a checkpoint knows of, and forgets what was written after it.

    A run that was cut off between a checkpoint and its line, or the other way round, so has no epoch twice and
    none missing. TensorBoard's files are made anew from the same epochs.
    """

    def __init__(self, folder: Path, rows: list[Metrics]) -> None:
        # Imported here, because it takes seconds that a skipped run need not spend.
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / METRICS
        write_metrics(self._path, rows)
        shutil.rmtree(folder / "tb", ignore_errors=True)
        self._writer = SummaryWriter(str(folder / "tb"))
        for row in rows:
            self._draw(row)

    def append(self, row: Metrics) -> None:
        """Add one epoch to both."""
        with self._path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self._draw(row)

    def close(self) -> None:
        self._writer.close()

    def _draw(self, row: Metrics) -> None:
        for tag, value in row.items():
            if tag != "epoch" and value is not None:
                self._writer.add_scalar(tag, value, row["epoch"])
        self._writer.flush()
