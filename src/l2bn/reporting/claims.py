"""The paper's claims against the records: evidence in numbers, and verdicts by two rules stated beforehand.

The rule for other networks asks what to expect of a network like these: Student's interval over the cells. The rule
for these networks asks about a named set of runs alone: a spread pooled within its cells, and no verdict before the
set is complete.

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

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Literal

from l2bn.reporting.comparison import (
    FULL_EPOCHS,
    Arm,
    Comparison,
    arms_of,
    backbone_of,
    by_fold,
    compare,
    find_arm,
    pooled,
    without_further_folds,
)
from l2bn.reporting.evidence import (
    ANGLE_MEAN,
    BN,
    L2BN,
    MEAN_NORM,
    NORM_CV,
    TOP1,
    WITHIN_SHARE,
    Cell,
    Evidence,
    Task,
    seeds_on_unlike_devices,
    unlike_devices,
)
from l2bn.reporting.formatting import (
    NONE,
    Table,
    conditions,
    escape_markdown,
    in_words,
    interval,
    left_out,
    markdown,
    mean_interval,
    plural,
    points,
    probability,
    signed,
    title,
)
from l2bn.reporting.reference import RunSet
from l2bn.reporting.statistics import LEVEL, MIN_PAIRS, Estimate, fixed_estimate, holm

Verdict = Literal["supported", "contradicted", "not decided at this n", "not decided", "not measured"]

MIN_BACKBONES = 3
"""A claim about various models needs at least this many of them."""


@dataclass(frozen=True)
class Question:
    """The claim that a quantity is lower, or higher, in L2BN than in a reference."""

    quantity: str
    reference: str
    better: int  # -1: lower, 1: higher
    digits: int
    text: str  # the quantity up to the first comma, and what is compared, in words
    unit: str = ""

    @property
    def reference_name(self) -> str:
        """The reference as tables name it."""
        return "BN" if self.reference == BN else self.reference


@dataclass(frozen=True)
class Finding:
    """The evidence on a claim, and the verdict."""

    evidence: str
    verdict: Verdict
    details: tuple[str, ...] = ()  # the cells, a line each


@dataclass(frozen=True)
class Claim:
    """A claim in our words, the rule by which it is judged, the judge, and tests that bear on it."""

    number: int
    text: str
    rule: str
    judge: Callable[[Sequence[Arm]], Finding]
    question: Question | None = None  # for the rule for these networks
    tested: str = ""  # the links to these tests, as Markdown


EQUAL_NORMS = Question(
    WITHIN_SHARE,
    MEAN_NORM,
    better=-1,
    digits=4,
    text=f"within_share of the penultimate features, L2BN against {MEAN_NORM}, which has L2BN's scale and unequal "
    "norms",
)
COMPACT = Question(
    WITHIN_SHARE,
    BN,
    better=-1,
    digits=4,
    text="within_share of the penultimate features, the share of the variance that lies within classes, L2BN "
    "against BN",
)
SEPARATED = Question(
    ANGLE_MEAN,
    BN,
    better=1,
    digits=2,
    text="angle_mean of the penultimate features, the mean angle between class means, seen from the origin, L2BN "
    "against BN",
    unit="°",
)
ACCURATE = Question(
    TOP1,
    BN,
    better=1,
    digits=2,
    text="test top-1 in percent after the last epoch, L2BN against BN",
    unit=" points",
)


# ---- The rule for other networks ------------------------------------------------------------------------------


def is_counted(row: Comparison, quantity: str = TOP1) -> bool:
    """Tell whether the runs of a row are long and repeated enough to count for other networks."""
    return row.full_length and len(row.differences(quantity)) >= MIN_PAIRS


def estimate_for_others(rows: Iterable[Comparison], quantity: str = TOP1) -> Estimate:
    """The pooled paired difference from rows that count, all seeds; under `MIN_BACKBONES` n alone."""
    counted = [row for row in rows if is_counted(row, quantity)]
    result = pooled(counted, quantity)
    return result if len(_backbones(counted)) >= MIN_BACKBONES else Estimate(result.n)


def judge_others(question: Question, rows: Sequence[Comparison]) -> Verdict:
    """The verdict on a question for other networks, from the rows of a task; divergence counts for accuracy."""
    found = verdict_of(estimate_for_others(rows, question.quantity), question.better)
    bn, l2bn = _diverged(row for row in rows if row.full_length)
    lost = question.quantity == TOP1 and found == "supported" and l2bn > bn
    return found if found and not lost else "not decided at this n"


def _diverged(rows: Iterable[Comparison]) -> tuple[int, int]:
    """The runs of BN and of L2BN that diverged, of the seeds that both have."""
    lost = Counter(
        run.norm
        for row in rows
        for run in row.records
        if run.status == "diverged" and run.seed in row.reference.seeds & row.other.seeds
    )
    return lost[BN], lost[L2BN]


def verdict_of(result: Estimate, better: int) -> Verdict | None:
    """The verdict of an interval on one side of 0; `better` is the sign of the claimed difference."""
    verdicts: dict[int, Verdict] = {1: "supported", -1: "contradicted"}
    return verdicts.get(better * result.side)


def _about_features(number: int, text: str, question: Question) -> Claim:
    """A claim about a measure of the penultimate features."""
    good, bad = ("below", "above") if question.better < 0 else ("above", "below")
    rule = (
        f"Primary measure: {question.text}; measured on the test images after the last epoch. "
        f"Cells of images count with runs of at least {FULL_EPOCHS} epochs and {MIN_PAIRS} paired seeds. With "
        f"{MIN_BACKBONES} backbones or more among them: supported if the whole 95 % interval of the pooled "
        f"paired difference lies {good} 0, contradicted if {bad}; else not decided at this n."
    )
    return Claim(number, text, rule, partial(_finding, question, "images"), question)


def compared(question: Question, arms: Sequence[Arm], task: Task = "images") -> list[Comparison]:
    """L2BN and the reference of a question, in the cells of a task."""
    return [row for row in compare(arms, [L2BN], question.reference) if row.cell.task == task]


def _finding(question: Question, task: Task, arms: Sequence[Arm]) -> Finding:
    """Evidence in numbers from all cells of a task, and a verdict from those that count."""
    quantity, digits, unit, reference = question.quantity, question.digits, question.unit, question.reference_name
    rows = compared(question, arms, task)
    pairs = [row for row in rows if row.differences(quantity)]
    what = f"{question.text.partition(',')[0]}, L2BN − {reference}"
    bn, l2bn = _diverged(row for row in rows if row.full_length) if quantity == TOP1 else (0, 0)
    lost = f" Diverged, of runs from {FULL_EPOCHS} epochs on whose seed both have: {bn} of BN, {l2bn} of L2BN."
    if not pairs:
        text = f"{what}: 0 cells of {task} hold a pair of equal seed in which both runs have this measure."
        return Finding(text + lost, "not decided at this n") if bn or l2bn else Finding(text, "not measured")
    counted = [row for row in pairs if is_counted(row, quantity)]
    pool = pooled(counted, quantity)
    evidence = (
        f"{what}: {len(counted)} of {plural('cell', len(pairs))} count for other networks "
        f"({plural('combination', pool.n)} of data set and backbone, {_enough(counted)}{_of_one_source(counted)})."
    )
    if pool.n:
        tail = f"95 % interval {interval(pool, digits)}, p {probability(pool.p, pool)}"
        evidence += (
            f" Pooled: {signed(pool.mean, digits)}{unit}, {f'no interval: {pool.reason}' if pool.reason else tail}."
        )
    evidence += lost if quantity == TOP1 else ""
    cells = []
    for row in pairs:
        result = row.difference(quantity)
        mean, bounds = mean_interval(result, digits)
        cv = row.reference.estimate(NORM_CV).mean if question.reference != BN else None
        text = f"{_named(row)}: {mean}{unit}, {bounds}, n = {result.n}"
        text += "" if cv is None else f", norm cv {cv:.3f} in {reference}"
        cells.append(text if row in counted else f"{text}; not counted")
    return Finding(evidence, judge_others(question, rows), tuple(cells))


def _no_parameters_added(arms: Sequence[Arm]) -> Finding:
    """Equal parameter counts in every cell that holds both arms."""
    pairs = without_further_folds([row for row in compare(arms, [L2BN]) if len(row.arms) == 2])
    if not pairs:
        return Finding("0 cells hold both arms.", "not measured")
    unequal = [row for row in pairs if len({record.parameters for record in row.records}) > 1]
    evidence = (
        f"BN and L2BN have equal parameter counts in {len(pairs) - len(unequal)} of "
        f"{plural('cell', len(pairs))} ({plural('backbone', len(_backbones(pairs)))})."
    )
    if unequal:
        cells = "; ".join(f"{row.cell.label}, {row.cell.backbone}" for row in unequal)
        return Finding(f"{evidence} Unequal: {cells}.", "contradicted")
    return Finding(evidence, "supported")


def _better_on_scenes(arms: Sequence[Arm]) -> Finding:
    """The verdict from acoustic scenes, and beside it, without a part in it, what was measured on other sound."""
    scenes = _finding(ACCURATE, "acoustic scenes", arms)
    return replace(scenes, evidence=f"{scenes.evidence} {environmental_sound(arms)}".strip())


def environmental_sound(arms: Sequence[Arm]) -> str:
    """The differences measured on environmental sound, as sentences; empty where there is none."""
    rows = compared(ACCURATE, arms, "environmental sound")
    sound = [row for row in rows if row.differences()]
    measured: dict[str, list[str]] = defaultdict(list)
    for row in without_further_folds(sound):
        result = row.difference()
        text = f"{in_words(row.cell.backbone)} {points(result)}, n = {result.n}"
        measured[f"{row.cell.label}, {conditions(row)}, {plural('epoch', row.epochs)}"].append(text)
    for folds in by_fold(sound):
        first = folds.first
        bn, l2bn = (fmean(folds.accuracies(norm).values()) for norm in (BN, L2BN))
        numbers, seeds = (", ".join(map(str, sorted(found))) for found in (folds.rows, folds.seeds))
        place = f"{first.cell.all_folds}, {conditions(first)}, {plural('epoch', first.epochs)}"
        place += f", mean over folds {numbers} (seed{'s' * (len(folds.seeds) > 1)} {seeds}, no interval)"
        measured[place].append(f"{in_words(first.cell.backbone)} {signed(l2bn - bn)} points")
    beside = "; ".join(f"{place}: {'; '.join(found)}" for place, found in measured.items())
    note = f"Environmental sound, which is no evidence on scenes, L2BN − BN: {beside}." if beside else ""
    diverged = _diverged(rows)
    lost = "Runs that diverged on environmental sound, of those whose seed both have: "
    lost += f"{diverged[0]} of BN, {diverged[1]} of L2BN."
    return " ".join(filter(None, [note, lost if any(diverged) else ""]))


def _backbones(rows: Iterable[Comparison]) -> set[str]:
    return {backbone_of(row.cell) for row in rows}


def _enough(rows: Iterable[Comparison]) -> str:
    """The number of backbones, and how many are needed where they are fewer."""
    count = len(_backbones(rows))
    return plural("backbone", count) + (f" of at least {MIN_BACKBONES}" if count < MIN_BACKBONES else "")


def _of_one_source(rows: Iterable[Comparison]) -> str:
    """The data set, where all rows have one: they tell nothing of others."""
    sources = {row.cell.source for row in rows}
    return f", all on {sources.pop()}" if len(sources) == 1 else ""


def _named(row: Comparison) -> str:
    """The cell of a row and the length of its runs."""
    return f"{title(row.cell)}, {plural('epoch', row.epochs)}"


# ---- The rule for these networks ------------------------------------------------------------------------------


UNKNOWN = Estimate(0)


@dataclass(frozen=True)
class SetFinding:
    """The finding of a set of runs on a question: how far it is, and once it is complete, the estimates."""

    question: Question
    run_set: RunSet
    ended: int  # runs of the set, finished with the quantity measured or diverged
    wanted: int
    estimates: Sequence[Estimate] = ()  # one per cell; none until the set is complete
    overall: Estimate = UNKNOWN
    diverged: tuple[int, int] = (0, 0)  # runs of the reference and of L2BN
    pairs: Sequence[Comparison] = ()  # one per cell, of the seeds of the set alone
    doubts: Sequence[str] = ()  # why ended runs may be missing

    @property
    def cells(self) -> list[Cell]:
        """The cells that are compared; none where the set has no runs of the reference."""
        return self.run_set.cells(self.question.reference)

    @property
    def corrected(self) -> list[float | None]:
        """The p-values of the cells with Holm's correction."""
        return holm([one.p for one in self.estimates])

    def significant(self, side: int) -> list[str]:
        """The backbones whose difference lies on this side of 0 and is significant by Holm's correction."""
        found = zip(self.cells, self.estimates, self.corrected, strict=True)
        return [cell.backbone for cell, one, p in found if p is not None and p < 1 - LEVEL and one.side == side]

    @property
    def against(self) -> str:
        """The objection to the side of the interval: a cell significant on the other, or L2BN's divergence.

        Divergence counts for accuracy alone: L2BN must have diverged no more often to be supported, no less often
        to be contradicted.
        """
        if not self.overall.side:
            return ""
        if others := self.significant(-self.overall.side):
            return f"significant on the other side: {', '.join(others)}"
        reference, l2bn = self.diverged
        claimed = self.overall.side * self.question.better  # 1: the side that the claim is on
        counts = self.question.quantity == TOP1 and claimed * (l2bn - reference) > 0
        return f"diverged: {l2bn} of L2BN, {reference} of {self.question.reference_name}" if counts else ""

    @property
    def verdict(self) -> Verdict:
        """The whole interval on one side, and nothing against it."""
        return "not decided" if self.against else verdict_of(self.overall, self.question.better) or "not decided"

    @property
    def sides(self) -> str:
        """The number of networks on the interval's side of 0, and the significant ones; of both without a side."""
        side = self.overall.side
        if not side:
            both = (("above", self.significant(1)), ("below", self.significant(-1)))
            named = ", ".join(f"{where} 0: {', '.join(found)}" for where, found in both if found)
            return f"significantly {named}" if named else ""
        alike = sum(side * (one.mean or 0.0) > 0 for one in self.estimates)
        networks = f"{alike} of {plural('network', len(self.cells))} {'above' if side > 0 else 'below'} 0"
        found = self.significant(side)
        return f"{networks}, {len(found)} significantly" + (f" ({', '.join(found)})" if found else "")

    @property
    def mixed(self) -> dict[str, list[bool]]:
        """By network, for each pair that has the quantity: whether it was made on a CPU and on a GPU."""
        found, quantity = {}, self.question.quantity
        for pair in self.pairs:
            unlike = seeds_on_unlike_devices(pair.records)
            seeds = pair.reference.of(quantity).keys() & pair.other.of(quantity).keys()
            found[pair.cell.backbone] = [seed in unlike for seed in seeds]
        return found

    @property
    def confounded(self) -> list[str]:
        """The networks all of whose pairs are mixed: device and norm cannot be separated there."""
        return [name for name, pairs in self.mixed.items() if pairs and all(pairs)]

    @property
    def caveat(self) -> str:
        """The number of mixed pairs as text, and where all are; empty without."""
        pairs = [pair for found in self.mixed.values() for pair in found]
        where = f", all of {', '.join(self.confounded)}" if self.confounded else ""
        return f"{sum(pairs)} of {plural('pair', len(pairs))} mix CPU and GPU{where}" if any(pairs) else ""

    @property
    def text(self) -> str:
        """The verdict with its estimate, or how far the set is; a dash where it has no runs of the reference."""
        if not self.cells:
            return NONE
        if not self.estimates:
            return f"not decided, {self.ended} of {self.wanted} runs" + "".join(f"; {one}" for one in self.doubts)
        pairs = plural("pair", self.overall.n)
        text = f"{self.verdict}, {pairs}: {' '.join(mean_interval(self.overall, self.question.digits))}"
        text = ", ".join(filter(None, [text, self.sides, self.caveat]))
        return text + (f" ({self.against})" if self.against else "")


def judge_set(question: Question, run_set: RunSet, arms: Sequence[Arm]) -> SetFinding:
    """The finding of a set on a question, from its runs on images alone: a name does not tell sound apart."""
    images = [arm for arm in arms if arm.cell.task == "images"]
    needed = {
        (cell, norm): find_arm(images, cell, norm).only(run_set.seeds)
        for norm in (BN, L2BN, question.reference)
        for cell in run_set.cells(norm)
    }
    ended = sum(len(arm.of(question.quantity)) + arm.diverged for arm in needed.values())
    wanted = len(needed) * len(run_set.seeds)
    if ended < wanted:
        unmeasured = sum(len(arm.records) for arm in needed.values()) - ended
        doubts = [f"{unmeasured} ended without measured features (scripts/analyze.py)"] if unmeasured else []
        for cell, norm in (key for key, arm in needed.items() if not arm.records):
            alike = (arm.cell for arm in images if arm.norm == norm and arm.only(run_set.seeds).records)
            settings = {other.setting for other in alike if replace(other, setting=cell.setting) == cell}
            if settings:
                doubts.append(
                    f"{cell.backbone} has runs in {' and '.join(sorted(settings))}, not in {cell.setting}"
                )
        return SetFinding(question, run_set, ended, wanted, doubts=tuple(dict.fromkeys(doubts)))
    cells = run_set.cells(question.reference)
    pairs = [Comparison(needed[cell, question.reference], needed[cell, L2BN]) for cell in cells]
    estimates, overall = fixed_estimate([pair.differences(question.quantity) for pair in pairs])
    diverged = sum(pair.reference.diverged for pair in pairs), sum(pair.other.diverged for pair in pairs)
    return SetFinding(question, run_set, ended, wanted, estimates, overall, diverged, pairs)


SETS_NOTE = (
    "Significantly: p (Holm) below 0.05. All intervals and p of the following tables go by s, the deviation pooled "
    "within the cells, which the last row of a table gives; other tables go by each cell's own deviation, so their "
    "intervals differ. The last p is not corrected."
)


def sets_section(arms: Sequence[Arm], sets: Sequence[RunSet]) -> list[str]:
    """The verdicts of the sets that have runs as a table, and the estimates of complete ones, as Markdown."""
    asked = {claim.number: claim.question for claim in CLAIMS if claim.question}
    rows, estimates, absent = [], [], []
    for run_set in sets:
        findings = {number: judge_set(question, run_set, arms) for number, question in asked.items()}
        if any(finding.ended or finding.doubts for finding in findings.values()):
            rows.append((run_set.label, *(finding.text for finding in findings.values())))
        else:
            wanted = max(finding.wanted for finding in findings.values())
            absent.append(f"{escape_markdown(run_set.label)} ({wanted} runs)")
        for number, finding in findings.items():
            if finding.estimates:
                table = markdown(_set_table(finding))
                estimates += [f"### Claim {number} on {run_set.label}", table, *_second(finding, arms)]
    columns = ("Set", *(f"Claim {number}" for number in asked))
    parts = [markdown(Table(columns, rows, names=len(columns)))] if rows else []
    parts += [f"Without runs yet, so not decided: {', '.join(absent)}."] if absent else []
    return [*parts, *([SETS_NOTE] if estimates else []), *estimates]


def _second(first: SetFinding, arms: Sequence[Arm]) -> list[str]:
    """The second estimate of a complete set, over all its seeds, once there are runs of the later ones."""
    question, run_set = first.question, first.run_set
    whole = replace(run_set, seeds=(*run_set.seeds, *run_set.more_seeds), more_seeds=())
    second = judge_set(question, whole, arms)
    if second.ended == first.ended or question.reference != BN:  # the control has no later seeds
        return []
    names = f"seeds {', '.join(map(str, run_set.more_seeds))}"
    if not second.estimates:
        return [f"With {names}: {second.ended} of {second.wanted} runs, no second estimate yet."]
    estimate, pairs = " ".join(mean_interval(second.overall, question.digits)), plural("pair", second.overall.n)
    return [f"Second estimate, with {names}, which does not replace the first: {estimate}, {pairs}."]


def _set_table(finding: SetFinding) -> Table:
    """A row per cell and one for all, with each cell's own deviation beside the pooled one."""
    question, digits, overall = finding.question, finding.question.digits, finding.overall
    reference = question.reference_name
    columns = ("Backbone", f"L2BN − {reference}", "95 % interval, pooled s", "p (Holm)", "Deviation", "Pairs")
    names = [*(in_words(cell.backbone) for cell in finding.cells), "all, each weighing alike"]
    results = zip(names, (*finding.estimates, overall), (*finding.corrected, overall.p), strict=True)
    rows = [
        (
            *(name, *mean_interval(one, digits), probability(p, one)),
            *(NONE if one.std is None else f"{one.std:.{digits}f}", str(one.n)),
        )
        for name, one, p in results
    ]
    degrees = sum(max(one.n - 1, 0) for one in finding.estimates)
    unlike = [(in_words(pair.cell.backbone), unlike_devices(pair.records)) for pair in finding.pairs]
    mixed = "; ".join(f"{name}, {seeds}" for name, seeds in unlike if seeds)
    notes = [
        f"Measure: {question.text}. s has {plural('degree', degrees)} of freedom.",
        f"Diverged: {finding.diverged[0]} of {reference}, {finding.diverged[1]} of L2BN.",
        f"Data: {' / '.join(sorted({pair.cell.label for pair in finding.pairs}))}.",
        *([f"Pairs made in part on a CPU and in part on a GPU: {mixed}."] if mixed else []),
    ]
    return Table(columns, rows, [" ".join(notes)])


# ---- The claims and their document ----------------------------------------------------------------------------

CLAIMS = (
    _about_features(
        1,
        "Unequal l2 norms of the samples' features keep BN from separating classes and making them compact.",
        EQUAL_NORMS,
    ),
    _about_features(2, "L2BN makes the features of a class more compact.", COMPACT),
    _about_features(3, "L2BN makes the features of different classes more distinct.", SEPARATED),
    Claim(
        4,
        "L2BN adds no parameters and no hyper-parameters.",
        "Supported if the parameter counts of BN and L2BN are equal in every cell with both arms, "
        "contradicted if they differ in one. Records show the parameters alone; the operation has no "
        "hyper-parameter by its definition (`scale` is this suite's).",
        _no_parameters_added,
        tested="[state dicts are those of batch norm](../tests/test_norm.py), "
        "[every norm keeps parameters and learns](../tests/test_swap.py)",
    ),
    Claim(
        5,
        "L2BN improves the accuracy of various models on image classification.",
        f"Cells of images count with runs of at least {FULL_EPOCHS} epochs and {MIN_PAIRS} paired seeds. With "
        f"{MIN_BACKBONES} backbones or more among them: supported if the whole 95 % interval of the pooled "
        "paired difference lies above 0 and of the runs of that length whose seed both have L2BN's diverged no "
        "more often than BN's; contradicted if the whole interval lies below 0; else not decided at this n.",
        partial(_finding, ACCURATE, "images"),
        ACCURATE,
    ),
    Claim(
        6,
        "L2BN improves the accuracy of acoustic scene classification.",
        "As claim 5, from cells of acoustic scenes alone: tau2020, TAU Urban Acoustic Scenes 2020 Mobile. "
        "Environmental sound (esc50) is shown beside it under its own name and takes no part in the verdict. The "
        "published accuracies in results/reference/baselines.yaml are not records.",
        _better_on_scenes,
    ),
)

THESE_NETWORKS = (
    "Each verdict names its set of runs and waits until all of them have ended; results/reference/sets.yaml, "
    "or the file of --sets, lists them. "
    "Differences are paired by seed; s is their standard deviation pooled within the cells, with df "
    "= Σ(n − 1) degrees of freedom. A cell's mean has the interval ± t(df)·s/√n and a p-value that is corrected "
    "by Holm over the cells; the mean of the k cell means, each weighing alike, has ± t(df)·s·√(Σ 1/n)/k. "
    "Supported if that interval lies on the claimed side of 0, no cell is significant at 5 % on the other, and "
    "for claim 5 L2BN diverged no more often than BN; contradicted in the mirror case; else not decided. The "
    "verdict speaks of these networks, this data set, recipe and these test images alone. It assumes the same "
    "spread in all cells, so each cell's own deviation is shown. A diverged run counts and is not replaced by "
    "another seed. More seeds give a second estimate that does not replace the first."
)


CELLS_NOTE = (
    "L2BN minus BN, for claim 1 minus l2bn\\_mean\\_norm, cell by cell: the mean difference, its 95 % interval by "
    "the cell's own deviation (n too small: fewer than 3 pairs), and the number n of pairs. Not counted: runs "
    f"under {FULL_EPOCHS} epochs, or fewer than {MIN_PAIRS} pairs."
)

TERMS = (
    "A cell is a data set, backbone, recipe and setting; it counts for other networks from "
    f"{FULL_EPOCHS} epochs and {MIN_PAIRS} pairs of equal seed on. within\\_share is the share of the features' "
    "variance that lies within classes (smaller: more compact), angle\\_mean the mean angle between class means "
    "(larger: more distinct), both of the features before the classifier; l2bn\\_mean\\_norm is a control with "
    "L2BN's scale and unequal norms. Claim 1 is judged by within\\_share, not by angle\\_mean; on which network a "
    "verdict rests is [computed apart](README.md#two-rules-for-a-verdict). Norm cv is the standard deviation over "
    "the mean of the samples' norms at the inputs of norm layers ([measures](README.md#measures-of-features), "
    "[rules](README.md#two-rules-for-a-verdict))."
)


def claims_markdown(evidence: Evidence, sets: Sequence[RunSet]) -> str:
    """The claims as a Markdown table, below it the estimates of complete sets, the cells and the rules.

    `sets` are those of `read_sets`; the first stands in the table.
    """
    arms = arms_of(evidence)
    findings = [(claim, claim.judge(arms)) for claim in CLAIMS]
    details: list[str] = []
    for claim, found in findings:
        if found.details:
            lines = "\n".join(f"- {escape_markdown(line)}" for line in found.details)
            details += [f"### Cells of claim {claim.number}", lines]
    rules = "\n".join(f"{claim.number}. {escape_markdown(claim.rule)}" for claim in CLAIMS)
    parts = [
        "# The paper's claims and the evidence",
        "<!-- Generated by make claims from the records. -->",
        "The claims are those of the abstract of arXiv:2207.02625, in our words. The evidence is that of "
        f"{plural('record', sum(len(arm.records) for arm in arms))}{left_out(evidence.problems)}, and of tests "
        "where they are named. Each claim has a verdict for other networks, which asks what to expect of networks "
        "like those measured, and of other data sets once there are several; claims 1, 2, 3 and 5 have one for "
        f"these networks, which speaks of a named set of runs alone, here {sets[0].label}.",
        TERMS,
        "\n".join(
            [
                "| | Claim | Other networks | These networks | Evidence |",
                "| ---: | --- | --- | --- | --- |",
                *(_row(claim, found, arms, sets[0]) for claim, found in findings),
            ]
        ),
        "## These networks",
        *sets_section(arms, sets),
        *(["## Other networks", CELLS_NOTE] if details else []),
        *details,
        "## Rule for other networks",
        "The verdict is one of: supported, contradicted, not decided at this n, not measured.",
        rules,
        "## Rule for these networks",
        escape_markdown(THESE_NETWORKS),
    ]
    return "\n\n".join(parts) + "\n"


def _row(claim: Claim, found: Finding, arms: Sequence[Arm], first: RunSet) -> str:
    evidence = escape_markdown(found.evidence) + (f" Tested: {claim.tested}." if claim.tested else "")
    these = judge_set(claim.question, first, arms).text if claim.question else NONE
    these = these if these == NONE else escape_markdown(f"{first.label}: {these}")
    return f"| {claim.number} | {escape_markdown(claim.text)} | {found.verdict} | {these} | {evidence} |"
