"""Tables of features: L2BN against BN in every measure, and the controls of L2BN against both."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from l2bn.records import MEASURES
from l2bn.reporting.comparison import BN, L2BN
from l2bn.reporting.features import INPUT, OUTPUT, PENULTIMATE, SHRINK, Measure, MeasuredArm, MeasuredPair
from l2bn.reporting.markup import Table
from l2bn.reporting.statistics import estimate, paired_differences
from l2bn.reporting.wording import NONE, in_words, interval, mean_std, signed

WITHIN_SHARE = Measure("within_share", PENULTIMATE)
ANGLE_MEAN = Measure("angle_mean", PENULTIMATE)
NORM_CV = Measure("norm_cv", INPUT)


@dataclass(frozen=True)
class Line:
    """A measure as a table calls it, and the decimals with which it is written."""

    measure: Measure
    text: str
    digits: int


LINES = (
    Line(NORM_CV, "norm cv, inputs of norm layers", 4),
    Line(Measure("norm_cv_within", INPUT), "— within classes", 4),
    Line(Measure("norm_cv_between", INPUT), "— between classes", 4),
    Line(Measure("norm_cv", OUTPUT), "norm cv, outputs of norm layers", 4),
    Line(Measure("within_share", OUTPUT), "within share, outputs of norm layers", 4),
    Line(WITHIN_SHARE, "within share, penultimate", 4),
    Line(Measure("class_cosine", PENULTIMATE), "class cosine, penultimate", 4),
    Line(ANGLE_MEAN, "mean angle, penultimate (°)", 2),
    Line(Measure("angle_min", PENULTIMATE), "smallest angle, penultimate (°)", 2),
    Line(Measure("centred_angle_min", PENULTIMATE), "smallest centred angle, penultimate (°)", 2),
    Line(Measure("distance", PENULTIMATE), "distance, penultimate", 3),
    Line(Measure("cdnv", PENULTIMATE), "CDNV, penultimate", 4),
    Line(Measure("nc1", PENULTIMATE), "NC1, penultimate", 3),
    Line(Measure("fisher", PENULTIMATE), "Fisher's ratio, penultimate", 2),
    Line(Measure("effective_rank", PENULTIMATE), "effective rank, penultimate", 2),
    Line(Measure("norm_cv", PENULTIMATE), "norm cv, penultimate", 4),
    Line(Measure("", SHRINK), "shrink factor of the norm layers", 4),
)


def pair_table(pair: MeasuredPair) -> Table:
    """Every measure in the two arms of a cell after the last epoch, and their paired differences."""
    columns = ("Measure", "BN", "L2BN", "L2BN − BN", "95 % interval", "n")
    rows = []
    for line in LINES:
        difference, digits = pair.difference(line.measure), line.digits
        arms = (mean_std(arm.last(line.measure).values(), digits) for arm in (pair.reference, pair.other))
        result = signed(difference.mean, digits), interval(difference, digits), str(difference.n)
        rows.append((line.text, *arms, *result))
    return Table("Features of BN and L2BN", columns, frozenset(columns[1:]), tuple(rows))


def summary_table(pairs: Sequence[MeasuredPair]) -> Table:
    """A row a cell: how unequal norms are, and the two measures that decide the claims."""
    columns = (
        *(
            "Data set",
            "Backbone",
            "Recipe",
            "Norm cv, BN",
            "Norm cv, L2BN",
            "Within share, L2BN − BN",
            "95 % interval",
        ),
        *("Mean angle, L2BN − BN (°)", "95 % interval of that", "n"),
    )
    rows = []
    for pair in pairs:
        share, angle = pair.difference(WITHIN_SHARE), pair.difference(ANGLE_MEAN)
        spreads = (mean_std(arm.last(NORM_CV).values(), 3) for arm in (pair.reference, pair.other))
        compact = signed(share.mean, 4), interval(share, 4)
        cell = pair.cell
        names = pair.other.arm.label, in_words(cell.backbone), in_words(cell.recipe)
        rows.append((*names, *spreads, *compact, signed(angle.mean), interval(angle), str(share.n)))
    return Table("Features of BN and L2BN", columns, frozenset(columns[3:]), tuple(rows))


@dataclass(frozen=True)
class Quantity:
    """What the norms of a cell are compared in: the accuracy, or a measure."""

    text: str
    digits: int
    measure: Measure | None = None  # None: test top-1 after the last epoch, percent

    def of(self, arm: MeasuredArm) -> dict[int, float]:
        return arm.arm.accuracies if self.measure is None else arm.last(self.measure)


ACCURACY = Quantity("Accuracy", 2)
QUANTITIES = (
    ACCURACY,
    Quantity("Within share, penultimate", 4, WITHIN_SHARE),
    Quantity("Mean angle, penultimate (°)", 2, ANGLE_MEAN),
    Quantity("Norm cv, inputs of norm layers", 4, NORM_CV),
)


def norms_table(arms: Sequence[MeasuredArm], quantity: Quantity) -> Table:
    """Every norm of one cell in one quantity, against BN and L2BN against it, paired by seed."""
    by_norm = {arm.arm.norm: quantity.of(arm) for arm in arms}
    columns = ("Norm", f"{quantity.text} (n)", "Norm − BN", "95 % interval", "L2BN − norm", "95 % interval of that")
    rows = []
    for arm in sorted(arms, key=lambda arm: (arm.arm.norm != BN, arm.arm.norm != L2BN, arm.arm.norm)):
        own = by_norm[arm.arm.norm]
        lost = f"; {arm.arm.diverged} diverged" if arm.arm.diverged else ""
        cells = [arm.arm.norm, f"{mean_std(own.values(), quantity.digits)} ({len(own)}{lost})"]
        for reference, other in ((by_norm.get(BN), own), (own, by_norm.get(L2BN))):
            if reference is None or other is None or reference is other:
                cells += [NONE, NONE]
                continue
            difference = estimate(paired_differences(reference, other))
            cells += [signed(difference.mean, quantity.digits), interval(difference, quantity.digits)]
        rows.append(tuple(cells))
    return Table(f"Norms: {quantity.text}", columns, frozenset(columns[1:]), tuple(rows))


DETACHED, MEAN_NORM = "l2bn_detached", "l2bn_mean_norm"

STEPS = (
    (MEAN_NORM, DETACHED, "of equal norms"),
    (DETACHED, L2BN, "of the gradient through them"),
    (MEAN_NORM, L2BN, "of both"),
)
"""In what L2BN differs from the control with unequal norms, one point at a time: from, to, what changes."""


def steps_table(arms: Sequence[MeasuredArm]) -> Table:
    """What comes of equal norms, and what of their gradient; no rows where a control is missing."""
    found = {arm.arm.norm: arm for arm in arms}
    columns = ("Difference", *(quantity.text for quantity in QUANTITIES), "n")
    rows = []
    for start, end, text in STEPS if {DETACHED, MEAN_NORM, L2BN} <= found.keys() else ():
        differences = [
            estimate(paired_differences(quantity.of(found[start]), quantity.of(found[end])))
            for quantity in QUANTITIES
        ]
        cells = [
            f"{signed(one.mean, quantity.digits)} {interval(one, quantity.digits)}"
            for one, quantity in zip(differences, QUANTITIES, strict=True)
        ]
        rows.append((f"{text}: {end} − {start}", *cells, str(differences[0].n)))
    return Table(
        "What comes of equal norms, and what of their gradient", columns, frozenset(columns[1:]), tuple(rows)
    )


CSV_COLUMNS = (
    *("dataset", "label", "backbone", "recipe", "setting", "norm", "kernels", "place", "measure"),
    *("bn_n", "bn_mean", "bn_std", "norm_n", "norm_mean", "norm_std", "pairs", "difference", "low", "high", "p"),
)


def features_csv(arms: Sequence[MeasuredArm]) -> str:
    """A line a cell, norm, place and measure: that norm after its last epoch, beside BN where it was measured."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    references = {arm.arm.cell: arm for arm in arms if arm.arm.norm == BN}
    places = [Measure("", SHRINK), *(Measure(m, p) for p in (INPUT, OUTPUT, PENULTIMATE) for m in MEASURES)]
    for arm in arms:
        for measure in places:
            reference, own = references.get(arm.arm.cell), estimate(list(arm.last(measure).values()))
            bn = estimate(list(reference.last(measure).values())) if reference else estimate([])
            differences = MeasuredPair(reference, arm).differences(measure) if reference else []
            pair = estimate(differences if arm is not reference else [])
            cell = arm.arm.cell
            names = (cell.dataset, arm.arm.label, cell.backbone, cell.recipe, cell.setting, arm.arm.norm)
            values = (bn.n, bn.mean, bn.std, own.n, own.mean, own.std)
            result = (pair.n, pair.mean, pair.low, pair.high, pair.p)
            row = (*names, arm.arm.kernels, measure.place, measure.name, *values, *result)
            writer.writerow([_number(value) for value in row])
    return file.getvalue()


def _number(value: object) -> str:
    """Five digits, as measured; the last bits of another machine's sums do not change a file."""
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
