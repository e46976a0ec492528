"""The numbers of a table for programs: one line a comparison, unrounded texts instead of footnotes.

`results/README.md` defines every column.
"""

import csv
import io
from collections.abc import Sequence

from l2bn.reporting.comparison import Arm, Cell, Comparison, holm_over
from l2bn.reporting.published import Reference
from l2bn.reporting.statistics import estimate, seeds_needed


def csv_text(comparisons: Sequence[Comparison], reference: Reference, norm: str) -> str:
    """One line a comparison; `norm` begins the columns of the norm's arm (see `results/README.md`)."""
    rows = [
        _csv_row(comparison, corrected, reference, norm)
        for comparison, corrected in zip(comparisons, holm_over(comparisons), strict=True)
    ]
    nothing = Comparison(Cell("", "", "", ""), "", None, None)
    file = io.StringIO()
    writer = csv.DictWriter(file, _csv_row(nothing, None, reference, norm), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _number(value) for key, value in row.items()} for row in rows)
    return file.getvalue()


def _csv_row(row: Comparison, corrected: float | None, reference: Reference, norm: str) -> dict[str, object]:
    cell, difference, found, paper = row.cell, row.difference, reference.published(row), reference.paper(row)
    return {
        "dataset": cell.dataset,
        "label": row.label,
        "backbone": cell.backbone,
        "recipe": cell.recipe,
        "setting": cell.setting,
        "norm": row.norm,
        "kernels": row.kernels if row.other else "",
        "epochs": min((arm.epochs for arm in row.arms), default=None),
        **_arm_columns(row, row.bn, "bn"),
        **_arm_columns(row, row.other, norm),
        "pairs": difference.n,
        "difference": difference.mean,
        "difference_std": difference.std,
        "low": difference.low,
        "high": difference.high,
        "p": difference.p,
        "p_holm": corrected,
        "seeds_needed": None if difference.std is None else seeds_needed(difference.std),
        "published_bn": found and found.accuracy,
        "published_kind": found and found.kind,
        "published_source": found and found.source,
        "distance": reference.distance(row),
        "paper_bn": paper and paper.bn,
        "paper_l2bn": paper and paper.l2bn,
        "paper_where": paper and paper.where,
    }


def _arm_columns(row: Comparison, arm: Arm | None, name: str) -> dict[str, object]:
    last, best = (arm.accuracies, arm.best) if arm else ({}, {})
    result = estimate(list(last.values()))
    return {
        f"{name}_n": result.n,
        f"{name}_mean": result.mean,
        f"{name}_std": result.std,
        f"{name}_best_epoch_mean": estimate(list(best.values())).mean,
        f"{name}_diverged": arm.diverged if arm else 0,
        f"{name}_missing": row.missing(arm),
    }


def _number(value: object) -> str:
    """Rounded, so that the last bits of another machine's sums do not change a file."""
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
