"""Tables from records: the grid and the other norms, as Markdown, CSV and LaTeX.

`results/README.md` defines every column. Every number comes from a record or a published source.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from l2bn.reporting.comparison import (
    FULL_EPOCHS,
    Arm,
    Comparison,
    arms_of,
    by_fold,
    grid,
    holm_over,
    other_norms,
    pooled,
    without_further_folds,
)
from l2bn.reporting.evidence import (
    BEST,
    BN,
    L2BN,
    Evidence,
    agreement,
    images_in_words,
    is_mixed,
    unlike_code,
    unlike_devices,
)
from l2bn.reporting.formatting import (
    NONE,
    Table,
    conditions,
    csv_text,
    few_pairs,
    in_words,
    interval,
    latex,
    left_out,
    mark,
    markdown,
    mean_std_n,
    plural,
    probability,
    signed,
    title,
)
from l2bn.reporting.reference import EPOCHS, Reference
from l2bn.reporting.statistics import MIN_PAIRS, NO_SPREAD, pooled_spread, seeds_needed

TARGET = 0.3
"""The difference, in points, for which a line gives the number of seeds needed."""

Columns = dict[str, list[str]]
"""Header to the texts of all rows."""


# ---- The tables -------------------------------------------------------------------------------------------


def grid_table(rows: Sequence[Comparison], reference: Reference | None = None, counts: Sequence[str] = ()) -> Table:
    """BN against L2BN over data set x backbone, with a reference beside published BN numbers and the paper's own.

    `counts` are lines on the number of runs, for below the table.
    """
    names, recipes = _names(rows)
    columns = names | _accuracies(rows, "L2BN")
    notes = [
        "Test top-1 in percent after the last epoch: mean ± standard deviation over the seeds (n). "
        "L2BN − BN in points, paired by seed, with Student's interval by each row's own spread; p: paired t-test "
        f"with Holm's correction over the rows{_families(rows)}.",
        *recipes,
        *_differing(rows, "L2BN"),
        *counts,
    ]
    if reference is None:
        return _table("BN against L2BN", columns, notes if rows else [], len(names))
    footnotes: dict[str, str] = {}
    columns["Published BN (ours − published)"] = [_published(row, reference, footnotes) for row in rows]
    paper = [_paper(row, reference, footnotes) for row in rows]
    notes += [*_pooled(rows), *(f"{number} {text}." for text, number in footnotes.items())]
    unknown = mark(len(footnotes) + 1) if set(paper) <= {NONE} and not reference.images else ""
    columns[f"Paper, BN / L2BN{unknown}"] = paper
    if unknown:
        notes.append(
            f"{unknown} No number of the L2BN paper's image tables is known to this project; the column fills once "
            "they are entered in results/reference/baselines.yaml."
        )
    return _table("BN against L2BN", columns, notes, len(names))


def best_table(rows: Sequence[Comparison], reference: Reference) -> Table:
    """The same cells at their best epoch: only for comparison with sources that report it."""
    names, _ = _names(rows)  # by the letters of the grid
    found = [reference.published(row) for row in rows]
    columns = {
        **names,
        "BN, best epoch (n)": [_best(row.reference) for row in rows],
        "L2BN, best epoch (n)": [_best(row.other) for row in rows],
        "Published BN, best epoch": [NONE if f is None or f.best is None else f"{f.best:.2f}" for f in found],
    }
    note = "The best epoch is chosen on the test set, which favours every arm: it is not a result of this project."
    return _table("Best epoch", columns, [note], len(names))


def norms_table(rows: Sequence[Comparison]) -> Table:
    """Every other norm, and every variant of BN or L2BN, against plain BN."""
    names, recipes = _names(rows)
    names["Norm"] = [in_words(row.norm) for row in rows]
    note = (
        "Test top-1 in percent after the last epoch, as in the grid, differences paired by seed; Holm's correction "
        f"over these rows{_families(rows)}."
    )
    notes = [note, *recipes, *_differing(rows, "the norm")]
    return _table("Other norms against BN", names | _accuracies(rows, "Norm"), notes, len(names))


def folds_table(rows: Sequence[Comparison]) -> Table:
    """BN against L2BN on each fold of a data set whose folds were tested in turn, and the means over them."""
    found = by_fold(rows)
    folds = sorted({fold for one in found for fold in one.rows})
    columns = ("Data set", "Backbone", "Recipe", "Norm", *(f"Fold {one}" for one in folds), "Mean (folds)", "Seeds")
    lines = []
    for one in found:
        cell, seeds = one.first.cell, ", ".join(map(str, sorted(one.seeds)))
        bn, l2bn = one.accuracies(BN), one.accuracies(L2BN)
        difference = {fold: l2bn[fold] - bn[fold] for fold in bn}
        for name, values, number in (
            ("BN", bn, "{:.2f}".format),
            ("L2BN", l2bn, "{:.2f}".format),
            ("L2BN − BN", difference, signed),
        ):
            names = cell.all_folds, in_words(cell.backbone), conditions(one.first), name
            numbers = (number(values[fold]) if fold in values else NONE for fold in folds)
            lines.append((*names, *numbers, f"{number(fmean(values.values()))} ({len(values)})", seeds))
    note = (
        "Test top-1 in percent after the last epoch, mean over the seeds that all folds have. The means over folds "
        "have no interval: folds share training clips, so their spread says little of another data set or seed."
    )
    every = [row for one in found for row in one.rows.values()]
    notes = [note, *_differing(every, "L2BN")]
    if diverged := [title(row.cell) for one in found for row in one.diverged]:
        notes.append(f"A run of BN or L2BN diverged and counts in no mean: {'; '.join(diverged)}.")
    return Table(columns, lines, notes, names=4, title="Folds")


def _families(rows: Sequence[Comparison]) -> str:
    """The groups of rows that Holm's correction treats separately, as text; empty for one group."""
    tasks: list[str] = list(dict.fromkeys(row.cell.task for row in rows))
    parts = tasks if len(tasks) > 1 else []
    if len({row.cell.fold for row in rows} - {None}) > 1:
        parts.append("each fold")
    return f" ({' and '.join(parts)} apart)" if parts else ""


def _table(title: str, columns: Columns, notes: Sequence[str], names: int) -> Table:
    return Table(list(columns), list(zip(*columns.values(), strict=True)), notes, names, title)


def _names(rows: Sequence[Comparison]) -> tuple[Columns, list[str]]:
    """The columns that name a row, and the notes to them.

    The conditions of a row's runs are long and differ in few rows: they stand below the table, once where they are
    the same for all, else by letters.
    """
    datasets, backbones = [row.cell.label for row in rows], [in_words(row.cell.backbone) for row in rows]
    columns = {"Data set": datasets, "Backbone": backbones}
    distinct = list(dict.fromkeys(map(conditions, rows)))
    if len(distinct) < 2:
        return columns, [f"Recipe of all rows: {text}." for text in distinct]
    letters = {text: _letters(number) for number, text in enumerate(distinct)}
    columns["Recipe"] = [letters[conditions(row)] for row in rows]
    return columns, ["Recipes: " + "; ".join(f"{letter}: {text}" for text, letter in letters.items()) + "."]


def _letters(number: int) -> str:
    """A, B, ... Z, AA, AB, ..."""
    before, last = divmod(number, 26)
    return (_letters(before - 1) if before else "") + chr(ord("A") + last)


def _accuracies(rows: Sequence[Comparison], norm: str) -> Columns:
    """The columns of both arms, of their difference, and of its p-value."""
    results = [row.difference() for row in rows]
    return {
        "BN (n)": [_accuracy(row, row.reference) for row in rows],
        f"{norm} (n)": [_accuracy(row, row.other) for row in rows],
        f"{norm} − BN [95 % interval]": [
            " ".join(filter(None, [signed(result.mean), "" if result.low is None else interval(result), pairs]))
            for result, pairs in zip(results, map(few_pairs, rows), strict=True)
        ],
        "p (Holm)": [probability(p, result) for p, result in zip(holm_over(rows), results, strict=True)],
    }


def _accuracy(row: Comparison, arm: Arm) -> str:
    if not arm.records:
        return "missing"
    name = f"{in_words(arm.norm)}: " if arm is row.reference and arm.norm != BN else ""
    return name + mean_std_n(arm, missing=row.missing(arm))


def _best(arm: Arm) -> str:
    return mean_std_n(arm, BEST) if arm.of(BEST) else NONE


def _published(row: Comparison, reference: Reference, footnotes: dict[str, str]) -> str:
    """The published number, our distance to it, and its footnote, numbered in the order of first use."""
    found = reference.published(row)
    if found is None:
        return NONE
    text = f"{EPOCHS[found.kind].capitalize()}; {found.source}"
    ours = "" if found.distance is None else f" ({signed(found.distance)})"
    return f"{found.accuracy:.2f}{footnotes.setdefault(text, mark(len(footnotes) + 1))}{ours}"


def _paper(row: Comparison, reference: Reference, footnotes: dict[str, str]) -> str:
    """The paper's own numbers and their footnote."""
    found = reference.paper(row)
    if not found:
        return NONE
    text = f"L2BN paper, {found.get('where') or 'place not given'}"
    bn, l2bn = (NONE if found.get(norm) is None else f"{found[norm]:.2f}" for norm in (BN, L2BN))
    return f"{bn} / {l2bn}{footnotes.setdefault(text, mark(len(footnotes) + 1))}"


# ---- Lines under the grid ---------------------------------------------------------------------------------


def _counts(evidence: Evidence, rows: Sequence[Comparison]) -> list[str]:
    runs = [record for record in evidence.records if record.norm in (BN, L2BN)]
    diverged = sum(record.status == "diverged" for record in runs)
    missing = sum(row.missing(arm) for row in rows for arm in (row.reference, row.other))
    text = f"Runs: {len(runs) - diverged} finished, {diverged} diverged, "
    text += f"{missing} missing whose seed the other arm has"
    text += left_out(evidence.problems, "; ")
    return [text + "."] if rows or evidence.problems else []


def _differing(rows: Sequence[Comparison], norm: str) -> list[str]:
    """Notes on what runs of one row may differ in: the norm's kernels, pixels of the images, kinds of device."""
    mixed = "Pairs made in part on a CPU and in part on a GPU"
    kernels = _grouped(rows, lambda row: row.kernels, is_mixed)
    images = _grouped(rows, lambda row: images_in_words(row.records), lambda text: text != "no fingerprint")
    devices = _grouped(rows, lambda row: unlike_devices(row.records))
    code = _grouped(rows, lambda row: unlike_code(row.records))
    found = {
        f"Kernels of {norm} (they agree {agreement(kernels)})": kernels,
        "Images not proven equal by their fingerprints": images,
        f"{mixed} (they round differently and draw other masks of dropout)": devices,
        "Your own code was edited between runs that are compared; train them anew by one version": code,
    }
    return [f"{head}: {text}." for head, text in found.items() if text]


def _grouped(
    rows: Sequence[Comparison], note: Callable[[Comparison], str], full: Callable[[str], bool] = bool
) -> str:
    """The number of rows for each text but the empty one, and the rows themselves where the text asks for it."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        found[note(row)].append(f"{row.cell.label}, {in_words(row.cell.backbone)}")
    return ", ".join(
        f"{key} in {plural('row', len(names))}{' (' + '; '.join(names) + ')' if full(key) else ''}"
        for key, names in found.items()
        if key
    )


def _pooled(rows: Sequence[Comparison]) -> list[str]:
    """The pooled estimate, of rows that are repeated enough, and the seeds needed; long and short runs apart."""
    lines, images = [], [row for row in rows if row.cell.task == "images"]
    for full, name in ((True, f"of {FULL_EPOCHS} epochs and more"), (False, f"under {FULL_EPOCHS} epochs")):
        chosen = [row for row in images if row.full_length is full and row.differences()]
        if not chosen:
            continue
        result = pooled(chosen)
        tail = f"95 % interval {interval(result)}, p {probability(result.p, result)}"
        mean = (
            f"{signed(result.mean)} points over {plural('data set × backbone cell', result.n)}, which weigh alike; "
            f"{f'no interval: {result.reason}' if result.low is None else tail}"
        )
        lines.append(
            f"Pooled L2BN − BN, rows of images with at least {MIN_PAIRS} pairs, runs {name}: "
            f"{mean if result.n else 'there are none'}. {_seeds(chosen)}"
        )
    return lines


def _seeds(rows: Sequence[Comparison]) -> str:
    """The number of seeds that would detect `TARGET` points, and its range by the interval of the spread."""
    spread = pooled_spread([row.differences() for row in rows])
    aim = f"Seeds to see {TARGET} points with 80 % power: "
    if spread is None:
        return aim + "not known, since the spread of a paired difference needs two seeds in a cell."
    if spread.std < NO_SPREAD:
        return aim + "not known, since the measured differences have no spread."
    likely, low, high = (seeds_needed(std, TARGET) for std in (spread.std, spread.low, spread.high))
    return (
        f"{aim}{likely} ({low} to {high}), at a paired difference's measured standard deviation of "
        f"{spread.std:.2f} points ({spread.low:.2f} to {spread.high:.2f}; "
        f"{plural('degree', spread.degrees)} of freedom)."
    )


# ---- Files ------------------------------------------------------------------------------------------------


def grid_csv(rows: Sequence[Comparison], reference: Reference, norm: str) -> str:
    """A line per comparison; `norm` begins the columns of the norm's arm."""
    own = ("n", "mean", "std", "best_epoch_mean", "diverged", "missing")
    columns = (
        *("dataset", "label", "backbone", "recipe", "setting", "norm", "reference", "kernels", "epochs"),
        *(f"{name}_{column}" for name in ("bn", norm) for column in own),
        *("pairs", "difference", "difference_std", "low", "high", "p", "p_holm", "seeds_needed"),
        *("published_bn", "published_kind", "published_source", "distance"),
        *("paper_bn", "paper_l2bn", "paper_where"),
    )
    lines = []
    for row, corrected in zip(rows, holm_over(rows), strict=True):
        found, std = reference.published(row), row.difference().std
        arms = (("bn", row.reference), (norm, row.other))
        lines.append(
            row.csv_row(norm=norm)
            | {f"{name}_best_epoch_mean": arm.estimate(BEST).mean for name, arm in arms}
            | {"p_holm": corrected, "seeds_needed": seeds_needed(std, TARGET) if std and std >= NO_SPREAD else None}
            | {"published_bn": found and found.accuracy, "published_kind": found and found.kind}
            | {"published_source": found and found.source, "distance": found and found.distance}
            | {f"paper_{key}": reference.paper(row).get(key) for key in ("bn", "l2bn", "where")}
        )
    return csv_text(lines, columns, ".6g")


def documents(evidence: Evidence, reference: Reference) -> dict[str, str]:
    """File name to text of all that `make tables` writes to `results/tables/`."""
    arms = arms_of(evidence)
    rows, others = grid(arms), other_norms(arms)
    shown = without_further_folds(rows)
    main = grid_table(shown, reference, _counts(evidence, rows))
    best, folds, norms = best_table(shown, reference), folds_table(rows), norms_table(others)
    head = "<!-- Generated by make tables from the records; results/README.md defines the columns. -->"
    sections = [f"# {main.title}", head, markdown(main)]
    sections += [text for table in (folds, best) if table.rows for text in (f"## {table.title}", markdown(table))]
    return {
        "grid.md": "\n\n".join(sections) + "\n",
        "grid.csv": grid_csv(rows, reference, "l2bn"),
        "grid.tex": latex(main),
        "norms.md": "\n\n".join([f"# {norms.title}", head, markdown(norms)]) + "\n",
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
