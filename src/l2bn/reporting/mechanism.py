"""`results/mechanism.md`: features of the norms, controls and studies, which bear on why L2BN would work.

All numbers are made from records. The reading is a text by hand that names the records from which it was written.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from l2bn.records import Problem, Record
from l2bn.reporting.comparison import Arm, Comparison, arms_of, by_cell, compare, find_arm
from l2bn.reporting.evidence import (
    ANGLE_MEAN,
    BN,
    DETACHED,
    FEATURE_QUANTITIES,
    INPUT,
    L2BN,
    MEAN_NORM,
    NORM_CV,
    OUTPUT,
    PENULTIMATE,
    SHRINK,
    TOP1,
    WITHIN_SHARE,
    images_in_words,
    read_evidence,
)
from l2bn.reporting.formatting import (
    Table,
    csv_text,
    file_name,
    left_out,
    markdown,
    mean_interval,
    mean_std_n,
    names_of,
    numbers_of_values,
    plural,
    title,
)
from l2bn.reporting.studies import Studies, read_studies, studies_csv, studies_sections, trap_table

# ---- Features -----------------------------------------------------------------------------------------------


class Quantity(NamedTuple):
    """A quantity as a table names it, and the decimals with which it is written."""

    name: str
    text: str
    digits: int


QUANTITIES = (
    Quantity(NORM_CV, "norm cv, inputs of norm layers", 4),
    Quantity(f"{INPUT}/norm_cv_within", "— within classes", 4),
    Quantity(f"{INPUT}/norm_cv_between", "— between classes", 4),
    Quantity(f"{OUTPUT}/norm_cv", "norm cv, outputs of norm layers", 4),
    Quantity(f"{OUTPUT}/within_share", "within share, outputs of norm layers", 4),
    Quantity(WITHIN_SHARE, "within share, penultimate", 4),
    Quantity(f"{PENULTIMATE}/class_cosine", "class cosine, penultimate", 4),
    Quantity(ANGLE_MEAN, "mean angle, penultimate (°)", 2),
    Quantity(f"{PENULTIMATE}/angle_min", "smallest angle, penultimate (°)", 2),
    Quantity(f"{PENULTIMATE}/centred_angle_min", "smallest centred angle, penultimate (°)", 2),
    Quantity(f"{PENULTIMATE}/distance", "distance, penultimate", 3),
    Quantity(f"{PENULTIMATE}/cdnv", "CDNV, penultimate", 4),
    Quantity(f"{PENULTIMATE}/nc1", "NC1, penultimate", 3),
    Quantity(f"{PENULTIMATE}/fisher", "Fisher's ratio, penultimate", 2),
    Quantity(f"{PENULTIMATE}/effective_rank", "effective rank, penultimate", 2),
    Quantity(f"{PENULTIMATE}/norm_cv", "norm cv, penultimate", 4),
    Quantity(SHRINK, "shrink factor of the norm layers", 4),
)

ACCURACY = Quantity(TOP1, "Accuracy", 2)
CONTROL_QUANTITIES = (
    ACCURACY,
    Quantity(WITHIN_SHARE, "Within share, penultimate", 4),
    Quantity(ANGLE_MEAN, "Mean angle, penultimate (°)", 2),
    Quantity(NORM_CV, "Norm cv, inputs of norm layers", 4),
)


def measured_pairs(arms: Sequence[Arm]) -> list[Comparison]:
    """BN and L2BN in each cell in which features of both were measured."""
    return [pair for pair in compare(arms, [L2BN]) if pair.measured]


def pair_table(pair: Comparison) -> Table:
    """Every measure in the two arms of a cell after the last epoch, and their paired differences."""
    columns = ("Measure", "BN (n)", "L2BN (n)", "L2BN − BN", "95 % interval", "Pairs")
    rows = []
    for quantity, text, digits in QUANTITIES:
        arms = (mean_std_n(arm, quantity, digits) for arm in pair.arms)
        difference = pair.difference(quantity)
        rows.append((text, *arms, *mean_interval(difference, digits), str(difference.n)))
    return Table(columns, rows)


def summary_table(pairs: Sequence[Comparison]) -> Table:
    """A row per cell: the spread of the norms, and the two measures that decide the claims."""
    columns = (
        *("Data set", "Backbone", "Recipe", "Norm cv, BN (n)", "Norm cv, L2BN (n)", "Within share, L2BN − BN"),
        *("95 % interval", "Mean angle, L2BN − BN (°)", "95 % interval of that", "Pairs"),
    )
    rows = []
    for pair in pairs:
        share, angle = pair.difference(WITHIN_SHARE), pair.difference(ANGLE_MEAN)
        spreads = (mean_std_n(arm, NORM_CV, 3) for arm in pair.arms)
        results = *mean_interval(share, 4), *mean_interval(angle), numbers_of_values([share, angle])
        rows.append((*names_of(pair.cell), *spreads, *results))
    return Table(columns, rows, names=3)


def quantity_table(arms: Sequence[Arm], quantity: Quantity) -> Table:
    """Every norm of one cell in one quantity, against BN and L2BN against it, paired by seed."""
    name, text, digits = quantity
    bn, l2bn = (find_arm(arms, arms[0].cell, norm) for norm in (BN, L2BN))
    columns = ("Norm", f"{text} (n)", "Norm − BN", "95 % interval", "L2BN − norm", "95 % interval of that")
    rows = []
    for arm in sorted(arms, key=lambda arm: (arm.norm != BN, arm.norm != L2BN, arm.norm)):
        results = Comparison(bn, arm).difference(name), Comparison(arm, l2bn).difference(name)
        cells = (cell for result in results for cell in mean_interval(result, digits))
        rows.append((arm.norm, mean_std_n(arm, name, digits), *cells))
    return Table(columns, rows)


STEPS = (
    (MEAN_NORM, DETACHED, "equal norms"),
    (DETACHED, L2BN, "the gradient through them"),
    (MEAN_NORM, L2BN, "both"),
)
"""The steps from the control with unequal norms to L2BN: from, to, what changes."""


def steps_table(arms: Sequence[Arm]) -> Table:
    """The effect of equal norms and of their gradient; no rows where a control is missing."""
    found = {arm.norm: arm for arm in arms}
    columns = ("Difference", *(quantity.text for quantity in CONTROL_QUANTITIES), "Pairs")
    rows = []
    for start, end, text in STEPS if {DETACHED, MEAN_NORM, L2BN} <= found.keys() else ():
        steps = Comparison(found[start], found[end])
        results = [steps.difference(quantity.name) for quantity in CONTROL_QUANTITIES]
        cells = (
            " ".join(mean_interval(result, quantity.digits))
            for result, quantity in zip(results, CONTROL_QUANTITIES, strict=True)
        )
        rows.append((f"{text}: {end} − {start}", *cells, numbers_of_values(results)))
    return Table(columns, rows)


def features_csv(arms: Sequence[Arm]) -> str:
    """A line per cell, norm, place and measure: the norm after its last epoch, beside BN where it was measured."""
    columns = (
        *("dataset", "label", "backbone", "recipe", "setting", "norm", "kernels", "place", "measure"),
        *("bn_n", "bn_mean", "bn_std", "norm_n", "norm_mean", "norm_std"),
        *("pairs", "difference", "low", "high", "p"),
    )
    rows = []
    for comparison in compare(arms, {arm.norm for arm in arms}):
        for quantity in FEATURE_QUANTITIES:
            place, _, name = quantity.partition("/")
            rows.append(comparison.csv_row(quantity) | {"place": place, "measure": name})
    return csv_text(rows, columns, ".5g")


# ---- The records ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mechanism:
    """All that the document is made from."""

    arms: Sequence[Arm]  # of the cells in which features were measured
    studies: Studies
    problems: Sequence[Problem]

    @property
    def records(self) -> list[Record]:
        """Those with measured features, and all of the studies."""
        studied = [arm for studies in self.studies for study in studies for arm in study.arms]
        measured = [run for arm in self.arms for run in arm.records if run.seed in arm.features]
        return measured + [run for arm in studied for run in arm.records]

    @cached_property
    def digest(self) -> str:
        """8 hexadecimal digits over everything that the tables are made from."""
        parts = [features_csv(self.arms), studies_csv(self.studies)]
        tables = [trap_table(study) for study in self.studies.traps]
        tables += [quantity_table(norms, ACCURACY) for _, norms in by_cell(self.arms)]
        parts += [markdown(table) + "\n" for table in tables]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=4).hexdigest()


def read_mechanism(runs: Path, studies: Path | None) -> Mechanism:
    """The records under a folder, and those of studies under another, if any. Raises UserError."""
    evidence = read_evidence(runs, features=True)
    found, problems = read_studies(studies)
    arms = [arm for _, group in by_cell(arms_of(evidence)) if any(arm.features for arm in group) for arm in group]
    return Mechanism(arms, found, [*evidence.problems, *problems])


# ---- The sections on features ---------------------------------------------------------------------------------


def _overview(pairs: Sequence[Comparison]) -> Iterator[str]:
    if pairs:
        yield "## Overview"
        yield (
            "Norm cv is the coefficient of variation of the samples' norms at the inputs of norm layers. Within "
            "share and mean angle are those of the features before the classifier: a smaller share is more "
            "compact, a larger angle more separated."
        )
        yield markdown(summary_table(pairs))


def _features(pairs: Sequence[Comparison]) -> Iterator[str]:
    if pairs:
        yield "## Features of BN and L2BN"
        yield (
            "All measures of BN and L2BN. One measure decides each claim ([claims.md](claims.md) has the rules): "
            "within share for compactness, mean angle for separation; the others are only shown. Intervals are not "
            "corrected for their number: one in 20 misses 0 by chance alone."
        )
    for pair in pairs:
        name = file_name(pair.cell)
        yield f"### {title(pair.cell)}"
        yield markdown(pair_table(pair))
        yield from _images(pair.arms)
        yield f"![Spread of the norms at each norm layer](figures/norms-{name}.png)"
        if pair.measured_epochs:
            yield f"![Compactness and separation over the epochs](figures/training-{name}.png)"
        if pair.sampled:
            yield f"![Penultimate features on the plane of their joint PCA](figures/map-{name}.png)"


def _controls(arms: Sequence[Arm]) -> Iterator[str]:
    cells = [(cell, norms) for cell, norms in by_cell(arms) if not {arm.norm for arm in norms} <= {BN, L2BN}]
    if cells:
        yield "## Controls"
        yield (
            "`l2bn_detached` has L2BN's values without a gradient through the norms; `l2bn_mean_norm` has its "
            "scale, but neither equal norms nor that gradient; `l2bn_rms` has equal norms at a scale where eps "
            "matters as little as in BN; `l2bn_position` has equal norms at every position; `group_norm` is an "
            "unrelated norm for comparison. Intervals are not corrected for their number."
        )
    for cell, norms in cells:
        yield f"### {title(cell)}"
        yield from (markdown(quantity_table(norms, quantity)) for quantity in CONTROL_QUANTITIES)
        yield from _images(norms)
        steps = steps_table(norms)
        if steps.rows:
            yield f"**Effects of equal norms and of the gradient through them**\n\n{markdown(steps)}"


def _images(arms: Iterable[Arm]) -> Iterator[str]:
    """A note where some fingerprints leave open whether the images were equal; the summary counts runs without."""
    text = images_in_words([run for arm in arms for run in arm.records])
    if text not in ("", "no fingerprint"):
        yield f"Images not proven equal by their fingerprints: {text}."


# ---- The document -------------------------------------------------------------------------------------------


def mechanism_documents(mechanism: Mechanism, reading: str) -> dict[str, str]:
    """File name to text: `mechanism.md`, and the CSV files beside it.

    `reading` is the text by hand.
    """
    pairs = measured_pairs(mechanism.arms)
    document = [
        "# Mechanism: why would it work?",
        "<!-- Generated by make tables from the records; results/README.md defines every measure and column. -->",
        _summary(mechanism),
        _labelled(reading, mechanism.digest),
        *_overview(pairs),
        *_features(pairs),
        *_controls(mechanism.arms),
        *studies_sections(mechanism.studies),
    ]
    return {
        "mechanism.md": "\n\n".join(filter(None, document)) + "\n",
        "mechanism/features.csv": features_csv(mechanism.arms),
        "mechanism/studies.csv": studies_csv(mechanism.studies),
    }


def _summary(mechanism: Mechanism) -> str:
    arms = [*mechanism.arms, *(arm for study in mechanism.studies.eps for arm in study.arms)]
    measured = sum(len(arm.features) for arm in arms)
    unproven = sum(record.images is None for record in mechanism.records)
    return (
        f"From {plural('record', len(mechanism.records))} ({measured} with measured features, {unproven} without a "
        f"fingerprint of their images{left_out(mechanism.problems)}), digest `{mechanism.digest}`. Values are "
        "mean ± standard deviation over the seeds (n); differences are paired by seed, with Student's 95 % "
        "interval. Features are those of the test images after the last epoch."
    )


_WRITTEN = re.compile(r"<!-- written from the records of digest (\w+) -->\n*")


def _labelled(reading: str, digest: str) -> str:
    """The reading under a line that says whether it was written from these very records."""
    found = _WRITTEN.match(reading)
    if not found:
        return ""
    which = "which are these."
    if found[1] != digest:
        which = f"**not these** (`{digest}`): where text and tables differ, the tables are right."
    label = f"*Written by hand from the records of digest `{found[1]}`, {which}*"
    return f"## Reading\n\n{label}\n\n{reading[found.end() :]}".strip("\n")
