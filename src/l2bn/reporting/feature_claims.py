"""The claims about features: one primary measure each, chosen before BN and L2BN had been compared in any.

Compactness (claim 2) is judged by `within_share`: it lies in [0, 1] and neither the scale nor the place of the
origin, which nothing fixes in a network, changes it. Separation (claim 3) is judged by `angle_mean`: unlike the
distance of class means over their spread it does not contain the compactness once more, unlike the mean angle of
centred means it is not fixed by the number of classes, and unlike the smallest angle it does not hang on one pair.
It depends on where the origin is, which the biases of batch norm layers place. Claim 1 says that unequal norms are
the cause: it is judged by what equal norms change together with the gradient through them, L2BN against the control
that has its scale and neither, in `within_share`, which falls when classes get compact and when they part. As one
measure decides a claim, no p-value is corrected; the others are shown and decide nothing.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from l2bn.records import Record
from l2bn.reporting.comparison import BN, FULL_EPOCHS, L2BN
from l2bn.reporting.feature_tables import ANGLE_MEAN, MEAN_NORM, NORM_CV, WITHIN_SHARE
from l2bn.reporting.features import Measure, MeasuredPair, measured_arms, measured_pairs, read_all
from l2bn.reporting.statistics import MIN_PAIRS, Estimate, estimate, pooled_estimate
from l2bn.reporting.verdicts import MIN_BACKBONES, Finding, Verdict
from l2bn.reporting.wording import in_words, interval, plural, signed


@dataclass(frozen=True)
class Question:
    """What a claim says of a measure: that it is lower, or higher, in L2BN than in another norm."""

    measure: Measure
    reference: str
    better: int  # -1: lower, 1: higher
    digits: int
    text: str  # the measure and what is compared, in words

    @property
    def rule(self) -> str:
        good, bad = ("below", "above") if self.better < 0 else ("above", "below")
        return (
            f"Primary measure: {self.text}, of the penultimate features of the test images after the last epoch. "
            f"Cells count with runs of at least {FULL_EPOCHS} epochs and {MIN_PAIRS} paired seeds. With "
            f"{MIN_BACKBONES} backbones or more among them: supported if the whole 95 % interval of the pooled "
            f"paired difference lies {good} 0, contradicted if {bad}; else not decided at this n."
        )

    def judge(self, records: Sequence[Record]) -> Finding:
        """Evidence in numbers from all cells, and a verdict from those that count."""
        features, _ = read_all(records)
        pairs = measured_pairs(measured_arms(records, features), self.reference, L2BN)
        pairs = [pair for pair in pairs if pair.differences(self.measure)]
        if not pairs:
            return Finding(
                f"0 of {plural('record', len(records))} hold measured features of L2BN and of {self.reference} in "
                "one cell and seed.",
                "not measured",
            )
        counted = [pair for pair in pairs if self._counts(pair)]
        result = self._pooled(counted)
        backbones = {pair.cell.backbone for pair in counted}
        evidence = [
            f"{self.measure.name} of the penultimate features, L2BN − {self.reference}: "
            + "; ".join(map(self._cell, pairs))
            + f". {len(counted)} of {plural('cell', len(pairs))} count ({plural('backbone', len(backbones))})."
        ]
        if result.n:
            evidence.append(f"Pooled: {signed(result.mean, self.digits)}, 95 % interval {self._interval(result)}.")
        return Finding(" ".join(evidence), self._verdict(result, len(backbones)))

    def _counts(self, pair: MeasuredPair) -> bool:
        epochs = min(pair.reference.arm.epochs, pair.other.arm.epochs)
        return epochs >= FULL_EPOCHS and len(pair.differences(self.measure)) >= MIN_PAIRS

    def _pooled(self, pairs: Sequence[MeasuredPair]) -> Estimate:
        """Over data set x backbone, as accuracies are pooled: each weighs alike, whatever its recipes."""
        cells: dict[tuple[str, str], list[float]] = defaultdict(list)
        for pair in pairs:
            mean = pair.difference(self.measure).mean
            assert mean is not None
            cells[pair.cell.dataset, pair.cell.backbone].append(mean)
        return pooled_estimate(list(cells.values()))

    def _cell(self, pair: MeasuredPair) -> str:
        result, cell = pair.difference(self.measure), pair.cell
        cv = estimate(list(pair.reference.last(NORM_CV).values())).mean
        unequal = f", norm cv {cv:.3f} in {self.reference}" if cv is not None and self.reference != BN else ""
        names = pair.other.arm.label, in_words(cell.backbone), in_words(cell.recipe)
        return (
            f"{', '.join(names)} ({plural('epoch', pair.other.arm.epochs)}): "
            f"{signed(result.mean, self.digits)}, {self._interval(result)}, n = {result.n}{unequal}"
        )

    def _interval(self, result: Estimate) -> str:
        return interval(result, self.digits)

    def _verdict(self, result: Estimate, backbones: int) -> Verdict:
        if result.low is None or result.high is None or backbones < MIN_BACKBONES:
            return "not decided at this n"
        low, high = sorted((self.better * result.low, self.better * result.high))
        return "supported" if low > 0 else "contradicted" if high < 0 else "not decided at this n"


EQUAL_NORMS = Question(
    WITHIN_SHARE,
    MEAN_NORM,
    better=-1,
    digits=4,
    text=f"within_share, L2BN against {MEAN_NORM}, which has L2BN's scale and unequal norms",
)
COMPACT = Question(
    WITHIN_SHARE,
    BN,
    better=-1,
    digits=4,
    text="within_share, the share of the variance that lies within classes, L2BN against BN",
)
SEPARATED = Question(
    ANGLE_MEAN,
    BN,
    better=1,
    digits=2,
    text="angle_mean, the mean angle between class means, seen from the origin, L2BN against BN",
)
