"""Texts that tables, figures and claims share: numbers, names, and a table as Markdown, LaTeX or CSV."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from operator import itemgetter

import pandas as pd

from l2bn.records import Problem
from l2bn.reporting.comparison import Arm, Comparison
from l2bn.reporting.evidence import TOP1, Cell, overrides, with_changes
from l2bn.reporting.statistics import Estimate, estimate

NONE = "–"


# ---- Numbers ------------------------------------------------------------------------------------------------


def signed(value: float | None, digits: int = 2) -> str:
    """A number with its sign, the minus a real one."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def interval(result: Estimate, digits: int = 2) -> str:
    """`[low, high]`, or why there is none. A bound that rounds to 0 has the digit that shows its side."""
    if result.low is None or result.high is None:
        return result.reason if result.n else NONE
    low, high = (signed(bound, digits + _zeros(bound, digits)) for bound in (result.low, result.high))
    return f"[{low}, {high}]"


def _zeros(value: float, digits: int) -> int:
    """The decimals to add to `digits` until a value does not round to 0; none where it is no difference at all."""
    return next((more for more in range(10 - digits) if round(value, digits + more)), 0)


def mean_interval(result: Estimate, digits: int = 2) -> tuple[str, str]:
    """Two cells of a table: the mean difference and its interval."""
    return signed(result.mean, digits), interval(result, digits)


def numbers_of_values(results: Iterable[Estimate]) -> str:
    """The n of several estimates of a row: one where they agree, else each, in the order of the columns."""
    numbers = [str(result.n) for result in results]
    return numbers[0] if len(set(numbers)) == 1 else ", ".join(numbers)


def points(result: Estimate, unit: str = "points") -> str:
    """A mean difference and its interval as part of a sentence, or why it has none."""
    bounds = f"no interval: {result.reason}" if result.low is None else f"95 % interval {interval(result)}"
    return f"{signed(result.mean)} {unit}, {bounds}"


def probability(p: float | None, result: Estimate) -> str:
    """A p-value, corrected or not, or why its estimate has none."""
    if p is None:
        return result.reason if result.n else NONE
    if p < 0.001:
        return "<0.001"
    return "<0.05" if p < 0.05 and f"{p:.3f}" == "0.050" else f"{p:.3f}"


def mean_std(values: Iterable[float], digits: int = 2) -> str:
    """`mean ± std`, without the spread where there is only one value."""
    result = estimate(list(values))
    if result.mean is None:
        return NONE
    spread = "" if result.std is None else f" ± {result.std:.{digits}f}"
    return f"{result.mean:.{digits}f}{spread}"


def mean_std_n(arm: Arm, quantity: str = TOP1, digits: int = 2, missing: int = 0) -> str:
    """`mean ± std (n)` over the runs of an arm, with the number of diverged and missing ones."""
    values, rest = arm.of(quantity).values(), lost(arm, missing)
    if not values:
        return rest or NONE
    return f"{mean_std(values, digits)} ({len(values)}{'; ' + rest if rest else ''})"


def lost(arm: Arm, missing: int) -> str:
    """The number of diverged and of missing runs; empty where there are none."""
    counts = {"diverged": arm.diverged, "missing": missing}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def few_pairs(row: Comparison) -> str:
    """`(2 pairs)` where an arm has more runs than the difference has pairs; empty elsewhere.

    The difference of the arms' means then is another than that of the pairs.
    """
    pairs = len(row.differences())
    return f"({plural('pair', pairs)})" if 0 < pairs < max(len(arm.of()) for arm in row.arms) else ""


def plural(noun: str, count: int) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def left_out(problems: Iterable[Problem], before: str = ", ") -> str:
    """`, 1 unreadable record and measurements of 2 records left out`; empty without a problem."""
    texts = [
        plural("unreadable record", count) if not part else f"{part} of {plural('record', count)}"
        for part, count in sorted(Counter(problem.part for problem in problems).items())
    ]
    return f"{before}{' and '.join(texts)} left out" if texts else ""


# ---- Names --------------------------------------------------------------------------------------------------

PRECISIONS = {
    "32-true": "float32",
    "tf32-mixed": "float32 with products in TF32",
    "bf16-mixed": "mixed bfloat16",
    "16-mixed": "mixed float16",
}


def in_words(folder: str) -> str:
    """A part of a run's folder in words: "short (batch size 16, epochs 3)" for "short,batch_size=16,epochs=3"."""
    return with_changes(folder.partition(",")[0], overrides(folder))


def conditions(comparison: Comparison) -> str:
    """The recipe and the setting of a comparison's runs."""
    return f"{in_words(comparison.cell.recipe)}, {setting(comparison.cell)}"


def setting(cell: Cell) -> str:
    """Precision, and what else is not the default."""
    precision, *others = cell.setting.split(", ")
    return ", ".join([PRECISIONS.get(precision, precision), *others])


def names_of(cell: Cell) -> tuple[str, str, str]:
    """Data set, backbone and recipe in words."""
    return cell.label, in_words(cell.backbone), in_words(cell.recipe)


def title(cell: Cell) -> str:
    """All that a cell's runs share: "CIFAR-10, resnet20, short (epochs 7), float32"."""
    return ", ".join((*names_of(cell), setting(cell)))


LONGEST_NAME = 200  # bytes; file systems allow 255


def file_name(cell: Cell) -> str:
    """A cell as part of a file's name."""
    setting = "" if cell.setting == "32-true" else cell.setting
    return as_file_name("-".join(filter(None, (cell.dataset, cell.backbone, cell.recipe, setting))))


def as_file_name(text: str) -> str:
    """A text as part of a file's name. A digest stands for the end of one that is too long for that, and tells
    apart texts that differ in replaced characters alone; commas are replaced without one.
    """
    name = re.sub(r"[^\w.=-]+", "-", text).encode()
    if len(name) > LONGEST_NAME or re.search(r"[^\w.=,-]", text):
        name = name[: LONGEST_NAME - 17] + f"-{blake2b(text.encode(), digest_size=8).hexdigest()}".encode()
    return name.decode(errors="ignore")  # of a character that was cut


# ---- Tables -------------------------------------------------------------------------------------------------

SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

LATEX = str.maketrans(
    {char: f"\\{char}" for char in "&%$#_{}"}
    | {char: f"${char}$" for char in "<>"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "−": "$-$", "×": r"$\times$", "–": "--"}
    | {mark: rf"\textsuperscript{{{digit}}}" for digit, mark in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
)


@dataclass(frozen=True)
class Table:
    """Cells are plain text; columns after the first `names` are flush right; notes stand below the table."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    names: int = 1
    title: str = ""


def mark(number: int) -> str:
    """The number of a footnote as superscript."""
    return str(number).translate(SUPERSCRIPT)


def markdown(table: Table) -> str:
    """The table and its notes in GitHub's Markdown, without the title."""
    rules = ["---" if place < table.names else "---:" for place in range(len(table.columns))]
    lines = [
        "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
        for row in (table.columns, rules, *table.rows)
    ]
    body = "\n".join(lines) if table.rows else "No record for this table yet."
    return "\n\n".join([body, *map(escape_markdown, table.notes)])


def escape_markdown(text: str) -> str:
    """The text with its underscores, asterisks, bars and angle brackets as they stand."""
    return re.sub(r"([*_|])", r"\\\1", text).replace("<", "&lt;")


def latex(table: Table) -> str:
    """A `tabular` with the rules of booktabs, and its notes, for a document's own `table`."""
    width = len(table.columns)
    head, *rows = (
        " & ".join(cell.translate(LATEX) for cell in row) + r" \\" for row in (table.columns, *table.rows)
    )
    lines = [
        f"% {table.title}. Generated by make tables; needs \\usepackage{{booktabs}}.",
        rf"\begin{{tabular}}{{{'l' * table.names + 'r' * (width - table.names)}}}",
        *(r"\toprule", head, r"\midrule"),
        *(rows or [rf"\multicolumn{{{width}}}{{l}}{{No record for this table yet.}} \\"]),
        *(r"\bottomrule", r"\end{tabular}"),
    ]
    if table.notes:
        notes = (note.translate(LATEX) + r"\par" for note in table.notes)
        lines += [r"\par\smallskip", r"{\footnotesize", *notes, "}"]
    return "\n".join(lines) + "\n"


def csv_text(rows: Iterable[Mapping[str, object]], columns: Sequence[str], float_format: str) -> str:
    """The rows as CSV, None as an empty cell.

    Floats are rounded, and to 0 below 1e-10, so that the last bits of another machine's sums change nothing. A text
    that is not ASCII begins with a byte order mark, without which spreadsheets take UTF-8 for another encoding.
    """
    chosen = map(itemgetter(*columns), rows)
    cells = [
        [format(round(cell, 10) + 0.0, float_format) if isinstance(cell, float) else cell for cell in row]
        for row in chosen
    ]
    text = pd.DataFrame(cells, columns=list(columns), dtype=object).to_csv(index=False, lineterminator="\n")
    return text if text.isascii() else f"\ufeff{text}"
