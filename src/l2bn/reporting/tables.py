"""Tables from records: the grid and the other norms, as Markdown, CSV and LaTeX.

`results/README.md` defines every column. Every number comes from a record or a published source.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from l2bn.reporting.comparison import (
    FULL_EPOCHS,
    Arm,
    Comparison,
    arms_of,
    grid,
    holm_over,
    other_norms,
    pooled,
)
from l2bn.reporting.evidence import BEST, BN, L2BN, Evidence, images_in_words
from l2bn.reporting.formatting import (
    NONE,
    Table,
    conditions,
    csv_text,
    in_words,
    interval,
    latex,
    mark,
    markdown,
    mean_std_n,
    plural,
    probability,
    signed,
)
from l2bn.reporting.published import EPOCHS, Reference
from l2bn.reporting.statistics import pooled_spread, seeds_needed

TARGET = 0.3
"""The difference, in points, for which a line gives the number of seeds needed."""

Columns = dict[str, Callable[[Comparison], str]]
"""Header to the text of a comparison in that column."""


# ---- The grid ---------------------------------------------------------------------------------------------


def grid_table(rows: Sequence[Comparison], reference: Reference | None = None, counts: Sequence[str] = ()) -> Table:
    """BN against L2BN over data set x backbone, with a reference beside published BN numbers and the paper's own.

    `counts` are lines on the number of runs, for below the table.
    """
    names, conditions_notes = _names(rows)
    sources: dict[str, str] = {}
    columns: Columns = {
        **names,
        "BN (n)": lambda row: _accuracy(row, row.reference),
        "L2BN (n)": lambda row: _accuracy(row, row.other),
        **_differences(rows, "L2BN − BN"),
    }
    numeric = columns.keys() - names.keys()
    notes = [
        "Test top-1 in percent after the last epoch: mean ± standard deviation over the seeds (n). "
        "L2BN − BN in points, paired by seed, with Student's interval; p: paired t-test with Holm's "
        "correction over the rows.",
        *conditions_notes,
        *_kernels(rows, "L2BN"),
        *_images(rows),
        *counts,
    ]
    if reference is None:
        return _table("BN against L2BN", columns, numeric, rows, notes if rows else [])
    columns["Published BN (ours − published)"] = lambda row: _published(row, reference, sources)
    texts = [[cell(row) for cell in columns.values()] for row in rows]
    wheres: dict[str, str] = {}
    paper = [_paper(row, reference, wheres, len(sources)) for row in rows]
    unknown = mark(len(sources) + 1) if not wheres else ""
    header = f"Paper, BN / L2BN{unknown}"
    notes += [*_pooled(rows), *(f"{number} {text}." for text, number in (sources | wheres).items())]
    return Table(
        "BN against L2BN",
        (*columns, header),
        frozenset(columns) - names.keys() | {header},
        tuple((*row, last) for row, last in zip(texts, paper, strict=True)),
        tuple(notes + ([f"{unknown} {_UNKNOWN}"] if unknown else [])),
    )


_UNKNOWN = (
    "No number of the L2BN paper's image tables is known to this project; the column fills once they are "
    "entered in results/reference/baselines.yaml."
)


def best_table(rows: Sequence[Comparison], reference: Reference) -> Table:
    """The same cells at their best epoch: only for comparison with sources that report it."""
    names, _ = _names(rows)  # by the letters of the grid

    def best(arm: Arm | None) -> str:
        return mean_std_n(arm, BEST) if arm and arm.of(BEST) else NONE

    def published(row: Comparison) -> str:
        found = reference.published(row)
        return f"{found.best:.2f}" if found and found.best is not None else NONE

    columns: Columns = {
        **names,
        "BN, best epoch (n)": lambda row: best(row.reference),
        "L2BN, best epoch (n)": lambda row: best(row.other),
        "Published BN, best epoch": published,
    }
    note = "The best epoch is chosen on the test set, which favours every arm: it is not a result of this project."
    return _table("Best epoch", columns, columns.keys() - names.keys(), [row for row in rows if row.arms], [note])


def norms_table(rows: Sequence[Comparison]) -> Table:
    """Every other norm, and every variant of BN or L2BN, against plain BN."""
    names, conditions_notes = _names(rows)
    columns: Columns = {
        **names,
        "Norm": lambda row: in_words(row.norm),
        "BN (n)": lambda row: _accuracy(row, row.reference),
        "Norm (n)": lambda row: _accuracy(row, row.other),
        **_differences(rows, "Norm − BN"),
    }
    note = "Test top-1 in percent after the last epoch, as in the grid; Holm's correction over these rows."
    numeric = columns.keys() - names.keys() - {"Norm"}
    notes = [note, *conditions_notes, *_kernels(rows, "the norm"), *_images(rows)]
    return _table("Other norms against BN", columns, numeric, rows, notes)


def _table(
    title: str, columns: Columns, numeric: Iterable[str], rows: Sequence[Comparison], notes: Sequence[str]
) -> Table:
    texts = tuple(tuple(cell(row) for cell in columns.values()) for row in rows)
    return Table(title, tuple(columns), frozenset(numeric), texts, tuple(notes))


def _names(comparisons: Sequence[Comparison]) -> tuple[Columns, list[str]]:
    """The columns that name a row, and the notes to them.

    The conditions of a row's runs are long and differ in few rows: they stand below the table, once where they are
    the same for all, else by letters.
    """
    columns: Columns = {
        "Data set": lambda row: row.label,
        "Backbone": lambda row: in_words(row.cell.backbone),
    }
    distinct = list(dict.fromkeys(map(conditions, comparisons)))
    if len(distinct) < 2:
        return columns, [f"Recipe of all rows: {text}." for text in distinct]
    letters = {text: _letters(number) for number, text in enumerate(distinct)}
    columns["Recipe"] = lambda row: letters[conditions(row)]
    return columns, ["Recipes: " + "; ".join(f"{letter}: {text}" for text, letter in letters.items()) + "."]


def _letters(number: int) -> str:
    """A, B, ... Z, AA, AB, ..."""
    before, last = divmod(number, 26)
    return (_letters(before - 1) if before else "") + chr(ord("A") + last)


def _accuracy(row: Comparison, arm: Arm | None) -> str:
    return mean_std_n(arm, missing=len(row.missing_seeds(arm))) if arm else "missing"


def _differences(comparisons: Sequence[Comparison], name: str) -> Columns:
    corrected = dict(zip(map(id, comparisons), holm_over(comparisons), strict=True))

    def difference(row: Comparison) -> str:
        result = row.difference()
        return signed(result.mean) + ("" if result.low is None else f" {interval(result)}")

    return {
        f"{name} [95 % interval]": difference,
        "p (Holm)": lambda row: probability(corrected[id(row)], row.difference()),
    }


def _published(comparison: Comparison, reference: Reference, sources: dict[str, str]) -> str:
    """The published number, our distance to it, and its footnote, numbered in the order of first use."""
    found, distance = reference.published(comparison), reference.distance(comparison)
    if found is None:
        return NONE
    text = f"{EPOCHS[found.kind].capitalize()}; {found.source}"
    ours = "" if distance is None else f" ({signed(distance)})"
    return f"{found.accuracy:.2f}{sources.setdefault(text, mark(len(sources) + 1))}{ours}"


def _paper(comparison: Comparison, reference: Reference, wheres: dict[str, str], used: int) -> str:
    row = reference.paper(comparison)
    if row is None:
        return NONE
    number = wheres.setdefault(f"L2BN paper, {row.where or 'place not given'}", mark(used + len(wheres) + 1))
    bn, l2bn = (NONE if value is None else f"{value:.2f}" for value in (row.bn, row.l2bn))
    return f"{bn} / {l2bn}{number}"


# ---- Lines under the grid ---------------------------------------------------------------------------------


def _counts(evidence: Evidence, comparisons: Sequence[Comparison]) -> list[str]:
    runs = [record for record in evidence.records if record.norm in (BN, L2BN)]
    diverged = sum(record.status == "diverged" for record in runs)
    missing = sum(len(row.missing_seeds(arm)) for row in comparisons for arm in (row.reference, row.other))
    empty, problems = sum(not comparison.arms for comparison in comparisons), len(evidence.problems)
    text = f"Runs: {len(runs) - diverged} finished, {diverged} diverged, "
    text += f"{missing} missing whose seed the other arm has"
    text += f"; {plural('cell', empty)} of the grid without any run" if empty else ""
    text += f"; {plural('unreadable record', problems)} left out" if problems else ""
    return [text + "."] if comparisons or problems else []


def _kernels(comparisons: Sequence[Comparison], norm: str) -> list[str]:
    """The kernel paths by which the norm was computed; rows that mix several are named."""
    groups = _grouped(comparisons, lambda row: row.kernels, lambda text: " and " in text or "in part" in text)
    text = ", ".join(groups)
    return [f"Kernels of {norm}, equal within rounding, so that runs of all share a row: {text}."] if text else []


def _images(comparisons: Sequence[Comparison]) -> list[str]:
    """The rows in which the fingerprints do not show that all runs saw the same images."""
    groups = _grouped(comparisons, lambda row: images_in_words(row.records), lambda text: text != "no fingerprint")
    return [f"Images not proven equal by their fingerprints: {', '.join(groups)}."] if groups else []


def _grouped(
    comparisons: Sequence[Comparison], text: Callable[[Comparison], str], named: Callable[[str], bool]
) -> list[str]:
    """The number of rows for each text but the empty one, and the rows themselves where the text asks for it."""
    rows: dict[str, list[str]] = defaultdict(list)
    for row in comparisons:
        rows[text(row)].append(f"{row.label}, {in_words(row.cell.backbone)}")
    return [
        f"{key} in {plural('row', len(names))}{' (' + '; '.join(names) + ')' if named(key) else ''}"
        for key, names in rows.items()
        if key
    ]


def _pooled(comparisons: Sequence[Comparison]) -> list[str]:
    """The pooled estimate and the seeds needed, long runs and short ones apart."""
    lines = []
    for full, name in (
        (True, f"runs of {FULL_EPOCHS} epochs and more"),
        (False, f"runs under {FULL_EPOCHS} epochs"),
    ):
        rows = [
            row
            for row in comparisons
            if row.full_length is full and row.differences() and row.cell.task == "images"
        ]
        if not rows:
            continue
        result = pooled(rows)
        tail = f"95 % interval {interval(result)}, p {probability(result.p, result)}"
        lines.append(
            f"Pooled L2BN − BN, {name}: {signed(result.mean)} points over "
            f"{plural('data set × backbone cell', result.n)} that weigh alike; "
            f"{f'no interval: {result.reason}' if result.low is None else tail}. {_seeds(rows)}"
        )
    return lines


def _seeds(comparisons: Sequence[Comparison]) -> str:
    """The number of seeds that would detect `TARGET` points, and its range by the interval of the spread."""
    spread = pooled_spread([comparison.differences() for comparison in comparisons])
    aim = f"Seeds to see {TARGET} points with 80 % power: "
    if spread is None:
        return aim + "not known, since the spread of a paired difference needs two seeds in a cell."
    likely, low, high = (seeds_needed(std, TARGET) for std in (spread.std, spread.low, spread.high))
    return (
        f"{aim}{likely} ({low} to {high}), at a paired difference's measured standard deviation of "
        f"{spread.std:.2f} points ({spread.low:.2f} to {spread.high:.2f}; "
        f"{plural('degree', spread.degrees)} of freedom)."
    )


# ---- Files ------------------------------------------------------------------------------------------------


def grid_csv(comparisons: Sequence[Comparison], reference: Reference, norm: str) -> str:
    """A line per comparison; `norm` begins the columns of the norm's arm."""
    own = ("n", "mean", "std", "best_epoch_mean", "diverged", "missing")
    columns = (
        *("dataset", "label", "backbone", "recipe", "setting", "norm", "kernels", "epochs"),
        *(f"{name}_{column}" for name in ("bn", norm) for column in own),
        *("pairs", "difference", "difference_std", "low", "high", "p", "p_holm", "seeds_needed"),
        *("published_bn", "published_kind", "published_source", "distance"),
        *("paper_bn", "paper_l2bn", "paper_where"),
    )
    rows = []
    for comparison, corrected in zip(comparisons, holm_over(comparisons), strict=True):
        found, paper, std = (
            reference.published(comparison),
            reference.paper(comparison),
            comparison.difference().std,
        )
        arms = (("bn", comparison.reference), (norm, comparison.other))
        rows.append(
            comparison.row(norm=norm)
            | {f"{name}_best_epoch_mean": arm.estimate(BEST).mean if arm else None for name, arm in arms}
            | {"p_holm": corrected, "seeds_needed": None if std is None else seeds_needed(std)}
            | {"published_bn": found and found.accuracy, "published_kind": found and found.kind}
            | {"published_source": found and found.source, "distance": reference.distance(comparison)}
            | {"paper_bn": paper and paper.bn, "paper_l2bn": paper and paper.l2bn}
            | {"paper_where": paper and paper.where}
        )
    return csv_text(rows, columns, ".4f")


def documents(evidence: Evidence, reference: Reference) -> dict[str, str]:
    """File name to text of all that `make tables` writes to `results/tables/`."""
    arms = arms_of(evidence)
    rows, others = grid(arms), other_norms(arms)
    main = grid_table(rows, reference, _counts(evidence, rows))
    best, norms = best_table(rows, reference), norms_table(others)
    head = "<!-- Generated by make tables from the records; results/README.md defines the columns. -->"
    sections = [f"# {main.title}\n", head + "\n", markdown(main)]
    if best.rows:
        sections += [f"## {best.title}\n", markdown(best)]
    return {
        "grid.md": "\n".join(sections),
        "grid.csv": grid_csv(rows, reference, "l2bn"),
        "grid.tex": latex(main),
        "norms.md": "\n".join([f"# {norms.title}\n", head + "\n", markdown(norms)]),
        "norms.csv": grid_csv(others, reference, "norm"),
        "norms.tex": latex(norms),
    }


def write_documents(texts: Mapping[str, str], folder: Path) -> list[Path]:
    """Write each text under its name, which may hold folders; the paths written."""
    paths = [folder / name for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return paths
