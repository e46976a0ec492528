"""The paper's claims against the records: evidence in numbers, and a verdict by a rule stated beforehand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from l2bn.records import Problem, Record
from l2bn.reporting.comparison import BN, FULL_EPOCHS, L2BN, Comparison, grid, pooled
from l2bn.reporting.feature_claims import COMPACT, EQUAL_NORMS, SEPARATED
from l2bn.reporting.statistics import MIN_PAIRS
from l2bn.reporting.verdicts import MIN_BACKBONES, Finding, Verdict
from l2bn.reporting.wording import interval, plural, probability, signed


@dataclass(frozen=True)
class Claim:
    """A claim in our words, the rule by which it is judged, and the judge."""

    number: int
    text: str
    rule: str
    judge: Callable[[Sequence[Record]], Finding]


def _no_parameters_added(records: Sequence[Record]) -> Finding:
    """Equal parameter counts in every cell that holds both arms."""
    pairs = [row for row in grid(records) if row.bn and row.other]
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


def _better_on_images(records: Sequence[Record]) -> Finding:
    """The pooled paired difference over the cells that are long and repeated enough."""
    cells = grid(records)
    rows = [row for row in cells if row.differences]
    if not rows:
        return Finding("0 cells hold a pair of finished runs of BN and L2BN.", "not measured")
    counted = [row for row in rows if _counts(row)]
    result = pooled(counted)
    backbones = {row.cell.backbone for row in counted}
    diverged = [
        sum(arm.diverged for row in cells for arm in row.arms if arm.norm == norm and row.full_length)
        for norm in (BN, L2BN)
    ]
    evidence = [
        f"{len(counted)} of {plural('row', len(rows))} of the grid count: "
        f"{plural('data set × backbone cell', result.n)}, {plural('backbone', len(backbones))}."
    ]
    if result.n:
        evidence.append(
            f"Pooled L2BN − BN: {signed(result.mean)} points, 95 % interval {interval(result)}, "
            f"p {probability(result.p, result)}."
        )
    left_out = [row for row in rows if not _counts(row)]
    if left_out:
        evidence.append(f"Not counted: {'; '.join(map(_short, left_out))}.")
    evidence.append(f"Diverged of that length: {diverged[0]} of BN, {diverged[1]} of L2BN.")
    return Finding(" ".join(evidence), _direction(result.low, result.high, len(backbones), *diverged))


def _counts(row: Comparison) -> bool:
    return row.full_length and len(row.differences) >= MIN_PAIRS


def _short(row: Comparison) -> str:
    epochs = min(arm.epochs for arm in row.arms)
    return (
        f"{row.label}, {row.cell.backbone}, {row.cell.recipe} ({plural('epoch', epochs)}): "
        f"{signed(row.difference.mean)}, n = {row.difference.n}"
    )


def _direction(
    low: float | None, high: float | None, backbones: int, bn_diverged: int, l2bn_diverged: int
) -> Verdict:
    """A one-sided interval decides; more models lost to divergence forbid support."""
    if low is None or high is None or backbones < MIN_BACKBONES:
        return "not decided at this n"
    if high < 0:
        return "contradicted"
    return "supported" if low > 0 and l2bn_diverged <= bn_diverged else "not decided at this n"


def _no_sound(records: Sequence[Record]) -> Finding:
    return Finding(
        f"0 of {plural('record', len(records))} are of acoustic scenes: the suite holds no such data.",
        "not measured",
    )


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


def claims_markdown(records: Sequence[Record], problems: Sequence[Problem]) -> str:
    """The claims as a Markdown table and the rules under it."""
    findings = [(claim, claim.judge(records)) for claim in CLAIMS]
    rows = [f"| {claim.number} | {claim.text} | {found.evidence} | {found.verdict} |" for claim, found in findings]
    rules = [f"{claim.number}. {claim.rule}" for claim in CLAIMS]
    left_out = f", {plural('unreadable record', len(problems))} left out" if problems else ""
    return "\n".join(
        [
            "# The paper's claims and the evidence",
            "",
            "<!-- Generated by make claims from the records. -->",
            "",
            "The claims are those of the abstract of arXiv:2207.02625, in our words. The evidence is that of "
            f"{plural('record', len(records))}{left_out}.",
            "",
            "| | Claim | Evidence | Verdict |",
            "| ---: | --- | --- | --- |",
            *(row.replace("_", r"\_") for row in rows),
            "",
            "## Rules",
            "",
            "The verdict is one of: supported, contradicted, not decided at this n, not measured.",
            "",
            *rules,
            "",
        ]
    )
