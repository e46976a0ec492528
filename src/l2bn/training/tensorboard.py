"""Charts that compare runs in TensorBoard: one per data set, backbone and recipe, and each run in the HParams tab.

TensorBoard draws one chart per tag, over all selected runs. The tag therefore names data set, backbone and recipe,
with the values overridden in them, so that a chart shows all norms and seeds of one comparison and nothing else.
"""

import re
from collections.abc import Mapping
from typing import Any

from l2bn.records import Metrics, Record
from l2bn.training.plan import Cell

COMPARED = {"test_top1": ("test/top1", "test top-1 (%)"), "train_loss": ("train/loss", "training loss")}
"""Last part of a tag: the metric it shows, and its name in the chart."""

TITLE = "Norms compared, by data set, backbone and recipe"

FINAL = "final/test_top1"


def comparison(cell: Cell, row: Metrics) -> dict[str, float | None]:
    """Return an epoch's points by tag, such as "compare/cifar10/resnet20/short/test_top1"."""
    return {_tag(cell, end): row[metric] for end, (metric, _) in COMPARED.items()}


def layout(cell: Cell) -> Mapping[str, Mapping[str, Any]]:
    """Return the charts of a run's cell for the custom scalars tab, which joins the layouts of all runs."""
    charts = {
        f"{cell.dataset}, {cell.backbone}, {cell.recipe}: {name}": [
            "Multiline",
            [f"^{re.escape(_tag(cell, end))}$"],
        ]
        for end, (_, name) in COMPARED.items()
    }
    return {TITLE: charts}


def add_hparams(writer: Any, record: Record) -> None:
    """Write a run's cell and final test accuracy for the HParams tab, with the run's own writer.

    `SummaryWriter.add_hparams` would open a second run beside it. A diverged run has no accuracy.
    """
    from torch.utils.tensorboard.summary import hparams

    # The tab shows five columns by default; overridden values are part of these names.
    values = {name: getattr(record, name) for name in ("backbone", "dataset", "norm", "recipe", "seed")}
    if record.status == "finished":
        writer.add_scalar(FINAL, record.last["test/top1"], record.epochs)
    for summary in hparams(values, {FINAL: None}):  # type: ignore[no-untyped-call]
        writer.file_writer.add_summary(summary)


def _tag(cell: Cell, end: str) -> str:
    return f"compare/{cell.dataset}/{cell.backbone}/{cell.recipe}/{end}"
