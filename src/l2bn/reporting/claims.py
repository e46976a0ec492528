"""The paper's claims against the records: evidence in numbers, and a verdict by a rule stated beforehand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from l2bn.records import Problem, Record
from l2bn.reporting.comparison import BN, FULL_EPOCHS, L2BN, Comparison, grid, pooled
from l2bn.reporting.feature_claims import COMPACT, EQUAL_NORMS, SEPARATED
from l2bn.reporting.statistics import MIN_PAIRS
from l2bn.reporting.verdicts import MIN_BACKBONES, Finding, Verdict
from l2bn.reporting.wording import in_words, interval, plural, probability, signed


@dataclass(frozen=True)
class Claim:
    """A claim in our words, the rule by which it is judged, the judge, and tests that bear on it."""

    number: int
    text: str
    rule: str
    judge: Callable[[Sequence[Record]], Finding]
    tests: tuple[str, ...] = ()  # "test_norm.py::test_that_it_is_so"


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
    # One arm of BN may stand in several rows, beside L2BN by each kernel path.
    arms = {(arm.cell, arm.norm, arm.kernels): arm for row in cells if row.full_length for arm in row.arms}
    diverged = [sum(arm.diverged for arm in arms.values() if arm.norm == norm) for norm in (BN, L2BN)]
    evidence = [
        f"{len(counted)} of {plural('row', len(rows))} of the grid count: "
        f"{plural('data set × backbone cell', result.n)}, {plural('backbone', len(backbones))}."
    ]
    if result.n:
        tail = f"95 % interval {interval(result)}, p {probability(result.p, result)}" if result.p else result.reason
        evidence.append(f"Pooled L2BN − BN: {signed(result.mean)} points, {tail}.")
    evidence.append(f"Diverged of that length: {diverged[0]} of BN, {diverged[1]} of L2BN.")
    verdict = _direction(result.low, result.high, len(backbones), *diverged)
    return Finding(" ".join(evidence), verdict, tuple(_short(row) for row in rows if not _counts(row)))


def _counts(row: Comparison) -> bool:
    return row.full_length and len(row.differences) >= MIN_PAIRS


def _short(row: Comparison) -> str:
    """A row that does not count, and by how much it falls short."""
    epochs = min(arm.epochs for arm in row.arms)
    return (
        f"Not counted: {row.label}, {in_words(row.cell.backbone)}, {in_words(row.cell.recipe)}: "
        f"{signed(row.difference.mean)} points, {plural('pair', row.difference.n)} of {plural('epoch', epochs)}"
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


def claims_markdown(records: Sequence[Record], problems: Sequence[Problem]) -> str:
    """The claims as a Markdown table, and below it what is too long for it and the rules."""
    findings = [(claim, claim.judge(records)) for claim in CLAIMS]
    left_out = f", {plural('unreadable record', len(problems))} left out" if problems else ""
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
            f"{plural('record', len(records))}{left_out}, and of tests where they are named.",
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
