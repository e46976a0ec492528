"""The paper's claims against the records: evidence in numbers, and a verdict by a rule stated beforehand.

Each claim about features has one primary measure, chosen before BN and L2BN had been compared in any. Compactness
(claim 2) is judged by `within_share`: it lies in [0, 1], and neither the scale nor the origin of the features, both
arbitrary in a network, changes it. Separation (claim 3) is judged by `angle_mean`: unlike the distance of class
means over their spread it does not contain the compactness once more, unlike the mean angle of centred means it is
not fixed by the number of classes, and unlike the smallest angle it does not depend on one pair. It depends on the
origin, which the biases of batch norm layers place. Claim 1 says that unequal norms are the cause: it is judged by
the effect of equal norms together with the gradient through them, L2BN against the control that has its scale and
neither, in `within_share`, which falls when classes get compact and when they separate. One measure decides a
claim, so no p-value is corrected; the others are shown and decide nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from l2bn.reporting.comparison import FULL_EPOCHS, Arm, Comparison, arms_of, compare, grid, pooled
from l2bn.reporting.evidence import BN, L2BN, TOP1, Evidence
from l2bn.reporting.formatting import interval, names_of, plural, probability, signed
from l2bn.reporting.mechanism import ANGLE_MEAN, MEAN_NORM, NORM_CV, WITHIN_SHARE
from l2bn.reporting.statistics import MIN_PAIRS, Estimate

Verdict = Literal["supported", "contradicted", "not decided at this n", "not measured"]

MIN_BACKBONES = 3
"""A claim about various models needs at least this many of them."""


@dataclass(frozen=True)
class Finding:
    """The evidence on a claim, and the verdict."""

    evidence: str
    verdict: Verdict
    details: tuple[str, ...] = ()  # lines that are too long for a table


@dataclass(frozen=True)
class Claim:
    """A claim in our words, the rule by which it is judged, the judge, and tests that bear on it."""

    number: int
    text: str
    rule: str
    judge: Callable[[Sequence[Arm]], Finding]
    tests: tuple[str, ...] = ()  # "test_norm.py::test_that_it_is_so"


def _counts(row: Comparison, quantity: str) -> bool:
    return row.full_length and len(row.differences(quantity)) >= MIN_PAIRS


def _verdict(result: Estimate, backbones: int, better: int) -> Verdict:
    """The verdict of the whole interval; `better` is the sign of the claimed difference."""
    if result.low is None or result.high is None or backbones < MIN_BACKBONES:
        return "not decided at this n"
    low, high = sorted((better * result.low, better * result.high))
    return "supported" if low > 0 else "contradicted" if high < 0 else "not decided at this n"


# ---- Claims 1, 2 and 3: features ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """The claim that a measure of the penultimate features is lower, or higher, in L2BN than in a reference."""

    quantity: str
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

    def judge(self, arms: Sequence[Arm]) -> Finding:
        """Evidence in numbers from all cells, and a verdict from those that count."""
        pairs = [row for row in compare(arms, [L2BN], self.reference) if row.differences(self.quantity)]
        if not pairs:
            pair = f"measured features of L2BN and of {self.reference} in one cell and seed"
            return Finding(f"0 of {_records(arms)} hold {pair}.", "not measured")
        counted = [pair for pair in pairs if _counts(pair, self.quantity)]
        result, backbones = pooled(counted, self.quantity), {pair.cell.backbone for pair in counted}
        name = self.quantity.partition("/")[2]
        evidence = [
            f"{name} of the penultimate features, L2BN − {self.reference}: {'; '.join(map(self._cell, pairs))}. "
            f"{len(counted)} of {plural('cell', len(pairs))} count ({plural('backbone', len(backbones))})."
        ]
        if result.n:
            mean, reach = signed(result.mean, self.digits), interval(result, self.digits)
            evidence.append(f"Pooled: {mean}, 95 % interval {reach}.")
        return Finding(" ".join(evidence), _verdict(result, len(backbones), self.better))

    def _cell(self, pair: Comparison) -> str:
        result = pair.difference(self.quantity)
        cv = pair.reference.estimate(NORM_CV).mean if pair.reference and self.reference != BN else None
        unequal = "" if cv is None else f", norm cv {cv:.3f} in {self.reference}"
        return (
            f"{', '.join(names_of(pair.label, pair.cell))} ({plural('epoch', pair.epochs or 0)}): "
            f"{signed(result.mean, self.digits)}, {interval(result, self.digits)}, n = {result.n}{unequal}"
        )


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


# ---- Claims 4, 5 and 6 ----------------------------------------------------------------------------------------


def _no_parameters_added(arms: Sequence[Arm]) -> Finding:
    """Equal parameter counts in every cell that holds both arms."""
    pairs = [row for row in grid(arms) if len(row.arms) == 2]
    if not pairs:
        return Finding("0 cells hold both arms.", "not measured")
    unequal = [row for row in pairs if len({record.parameters for record in row.records}) > 1]
    backbones = len({row.cell.backbone for row in pairs})
    evidence = (
        f"BN and L2BN have equal parameter counts in {len(pairs) - len(unequal)} of "
        f"{plural('cell', len(pairs))} ({plural('backbone', backbones)})."
    )
    if unequal:
        cells = "; ".join(f"{row.label}, {row.cell.backbone}" for row in unequal)
        return Finding(f"{evidence} Unequal: {cells}.", "contradicted")
    return Finding(evidence, "supported")


def _better_on_images(arms: Sequence[Arm]) -> Finding:
    """The pooled paired difference over the cells that are long and repeated enough."""
    cells = grid(arms)
    rows = [row for row in cells if row.differences()]
    if not rows:
        return Finding("0 cells hold a pair of finished runs of BN and L2BN.", "not measured")
    counted = [row for row in rows if _counts(row, TOP1)]
    result, backbones = pooled(counted), {row.cell.backbone for row in counted}
    long = [arm for row in cells if row.full_length for arm in row.arms]
    diverged = {norm: sum(arm.diverged for arm in long if arm.norm == norm) for norm in (BN, L2BN)}
    evidence = [
        f"{len(counted)} of {plural('row', len(rows))} of the grid count: "
        f"{plural('data set × backbone cell', result.n)}, {plural('backbone', len(backbones))}."
    ]
    if result.n:
        tail = f"95 % interval {interval(result)}, p {probability(result.p, result)}" if result.p else result.reason
        evidence.append(f"Pooled L2BN − BN: {signed(result.mean)} points, {tail}.")
    evidence.append(f"Diverged of that length: {diverged[BN]} of BN, {diverged[L2BN]} of L2BN.")
    verdict = _verdict(result, len(backbones), 1)
    if verdict == "supported" and diverged[L2BN] > diverged[BN]:
        verdict = "not decided at this n"
    return Finding(" ".join(evidence), verdict, tuple(_short(row) for row in rows if not _counts(row, TOP1)))


def _short(row: Comparison) -> str:
    """A row that does not count, and by how much it falls short."""
    names, result = ", ".join(names_of(row.label, row.cell)), row.difference()
    pairs, epochs = plural("pair", result.n), plural("epoch", row.epochs or 0)
    return f"Not counted: {names}: {signed(result.mean)} points, {pairs} of {epochs}"


def _no_sound(arms: Sequence[Arm]) -> Finding:
    return Finding(f"0 of {_records(arms)} are of acoustic scenes: the suite holds no such data.", "not measured")


def _records(arms: Sequence[Arm]) -> str:
    return plural("record", sum(len(arm.records) for arm in arms))


CLAIMS = (
    Claim(
        1,
        "Unequal l2 norms of the samples' features keep BN from separating classes and making them compact.",
        EQUAL_NORMS.rule,
        EQUAL_NORMS.judge,
    ),
    Claim(2, "L2BN makes the features of a class more compact.", COMPACT.rule, COMPACT.judge),
    Claim(3, "L2BN makes the features of different classes more distinct.", SEPARATED.rule, SEPARATED.judge),
    Claim(
        4,
        "L2BN adds no parameters and no hyper-parameters.",
        "Supported if the parameter counts of BN and L2BN are equal in every cell with both arms, "
        "contradicted if they differ in one. Records speak for the parameters; that the layer takes no "
        "hyper-parameter is its definition.",
        _no_parameters_added,
        (
            "test_norm.py::test_state_dicts_are_those_of_batch_norm",
            "test_swap.py::test_every_norm_keeps_parameters_and_learns",
        ),
    ),
    Claim(
        5,
        "L2BN improves the accuracy of various models on image classification.",
        f"Rows count with runs of at least {FULL_EPOCHS} epochs and {MIN_PAIRS} paired seeds. With "
        f"{MIN_BACKBONES} backbones or more among them: supported if the whole 95 % interval of the pooled "
        "paired difference lies above 0 and L2BN's runs of that length diverged no more often than BN's; "
        "contradicted if the whole interval lies below 0; else not decided at this n.",
        _better_on_images,
    ),
    Claim(
        6,
        "L2BN improves the accuracy of acoustic scene classification.",
        "Needs records of acoustic scenes; the published accuracies in results/reference/baselines.yaml are "
        "no records, so there is no verdict.",
        _no_sound,
    ),
)


def claims_markdown(evidence: Evidence) -> str:
    """The claims as a Markdown table, and below it what is too long for it and the rules."""
    arms = arms_of(evidence)
    findings = [(claim, claim.judge(arms)) for claim in CLAIMS]
    left_out = f", {plural('unreadable record', len(evidence.problems))} left out" if evidence.problems else ""
    details: list[str] = []
    for claim, found in findings:
        if found.details:
            lines = (f"- {_escape(line)}" for line in found.details)
            details += [f"## More on claim {claim.number}", "", *lines, ""]
    return "\n".join(
        [
            "# The paper's claims and the evidence",
            "",
            "<!-- Generated by make claims from the records. -->",
            "",
            "The claims are those of the abstract of arXiv:2207.02625, in our words. The evidence is that of "
            f"{_records(arms)}{left_out}, and of tests where they are named.",
            "",
            "| | Claim | Verdict | Evidence |",
            "| ---: | --- | --- | --- |",
            *(_row(claim, found) for claim, found in findings),
            "",
            *details,
            "## Rules",
            "",
            "The verdict is one of: supported, contradicted, not decided at this n, not measured.",
            "",
            *(f"{claim.number}. {_escape(claim.rule)}" for claim in CLAIMS),
            "",
        ]
    )


def _row(claim: Claim, found: Finding) -> str:
    tests = []
    for test in claim.tests:
        file, _, name = test.partition("::")
        tests.append(f"[{_escape(name.removeprefix('test_').replace('_', ' '))}](../tests/{file})")
    evidence = _escape(found.evidence) + (f" Tested: {', '.join(tests)}." if tests else "")
    return f"| {claim.number} | {_escape(claim.text)} | {found.verdict} | {evidence} |"


def _escape(text: str) -> str:
    return text.replace("_", r"\_")
