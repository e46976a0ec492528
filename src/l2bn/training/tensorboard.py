"""How the runs meet in TensorBoard: the norms of a pair in one chart, and each run as a row of the HParams tab.

A chart is drawn for a tag over all runs on show, so that a tag which carries data set and backbone brings together
the runs that are to be compared, and no others.
"""

import re
from collections.abc import Mapping
from typing import Any

from l2bn.records import Metrics, Record
from l2bn.training.plan import Cell

COMPARED = {"test_top1": ("test/top1", "test top-1 (%)"), "train_loss": ("train/loss", "training loss")}
"""The end of a tag: the metric that it shows, and what the chart calls it."""

TITLE = "The norms of each data set and backbone"

FINAL = "final/test_top1"


def comparison(cell: Cell, row: Metrics) -> dict[str, float | None]:
    """What an epoch adds to the charts of its pair, by tag: "compare/cifar10-resnet20/test_top1"."""
    return {_tag(cell, end): row[metric] for end, (metric, _) in COMPARED.items()}


def layout(cell: Cell) -> Mapping[str, Mapping[str, Any]]:
    """The charts of a pair for the custom scalars tab, which joins the layouts of all runs."""
    charts = {
        f"{cell.dataset}, {cell.backbone}: {name}": ["Multiline", [f"^{re.escape(_tag(cell, end))}$"]]
        for end, (_, name) in COMPARED.items()
    }
    return {TITLE: charts}


def add_hparams(writer: Any, record: Record) -> None:
    """Write what a run was and its final test accuracy for the HParams tab, with the run's own writer.

    `SummaryWriter.add_hparams` would open a run of its own beside it. A diverged run has no accuracy.
    """
    from torch.utils.tensorboard.summary import hparams

    # Five, because the tab shows no more unless asked; values overridden are in these names.
    values = {name: getattr(record, name) for name in ("backbone", "dataset", "norm", "recipe", "seed")}
    if record.status == "finished":
        writer.add_scalar(FINAL, record.last["test/top1"], record.epochs)
    for summary in hparams(values, {FINAL: None}):  # type: ignore[no-untyped-call]
        writer.file_writer.add_summary(summary)


def _tag(cell: Cell, end: str) -> str:
    return f"compare/{cell.dataset}-{cell.backbone}/{end}"
