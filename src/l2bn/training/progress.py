"""Progress of a run: a bar on a terminal, else a line per epoch, which names the run if several run at once."""

import os

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from l2bn.records import Metrics

NAMED = "L2BN_NAMED_PROGRESS"
"""Environment variable, set in the processes of runs side by side."""


class ProgressDisplay:
    """Shows the training steps made by this process, while `bar` is entered."""

    def __init__(self, name: str, *, epochs: int, steps: int, batch_size: int, shown: bool) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._epochs, self._steps, self._batch_size = epochs, steps, batch_size
        self._shown = shown
        self._named = NAMED in os.environ
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[loss]} {task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            disable=self._named or not (shown and self._console.is_terminal),
        )
        self._task = self.bar.add_task(name, total=epochs * steps, loss="", speed="")
        self._name = name

    def step(self, epoch: int, step: int, seconds: float) -> None:
        """Show that `step` steps of an epoch, counted from 0, took `seconds`."""
        if self.bar.disable:
            return
        self.bar.update(
            self._task,
            completed=epoch * self._steps + step,
            description=f"{self._name} epoch {epoch + 1}/{self._epochs}",
            speed=f"{step * self._batch_size / seconds:,.0f} images/s" if seconds else "",
        )

    def epoch(self, row: Metrics) -> None:
        """Show the metrics of an epoch."""
        line = (
            f"epoch {row['epoch']:>{len(str(self._epochs))}}/{self._epochs}  loss {row['train/loss']:.4f}  "
            f"train {row['train/top1']:.2f} %  test {row['test/top1']:.2f} %"
        )
        self.bar.update(self._task, loss=f"loss {row['train/loss']:.3f} test {row['test/top1']:.2f} %")
        if self._shown:
            line = f"{self._name}  {line}" if self._named else line
            self._console.print(f"{line}  {row['images_per_second']:,.0f} images/s  {row['seconds']:.1f} s")
