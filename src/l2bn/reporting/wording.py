"""How a number or a name is written: the texts that tables, figures and claims share."""

from collections.abc import Iterable

from l2bn.reporting.comparison import Arm, Cell, Comparison, changes_in_words, overrides
from l2bn.reporting.statistics import Estimate, estimate

NONE = "–"


def signed(value: float | None, digits: int = 2) -> str:
    """Points with their sign, the minus a real one."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def interval(result: Estimate, digits: int = 2) -> str:
    """`[low, high]`, or why there is none."""
    if result.low is None:
        return result.reason if result.n else NONE
    return f"[{signed(result.low, digits)}, {signed(result.high, digits)}]"


def probability(p: float | None, result: Estimate) -> str:
    """A p-value that may have been corrected, or why its estimate has none."""
    if p is None:
        return result.reason if result.n else NONE
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def mean_std(values: Iterable[float], digits: int = 2) -> str:
    """`mean ± std`, without the spread where there is only one value."""
    result = estimate(list(values))
    if result.mean is None:
        return NONE
    spread = "" if result.std is None else f" ± {result.std:.{digits}f}"
    return f"{result.mean:.{digits}f}{spread}"


def accuracy(arm: Arm | None, missing: int) -> str:
    """`mean ± std (n)` over the finished runs, with what else became of the seeds."""
    if arm is None:
        return "missing"
    n, other = len(arm.accuracies), lost(arm, missing)
    if not n:
        return other
    return f"{mean_std(arm.accuracies.values())} ({n}{'; ' + other if other else ''})"


def lost(arm: Arm, missing: int) -> str:
    """What became of the seeds without a result; empty where all have one."""
    counts = {"diverged": arm.diverged, "missing": missing}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


PRECISIONS = {"32-true": "float32", "bf16-mixed": "mixed bfloat16", "16-mixed": "mixed float16"}


def in_words(folder: str) -> str:
    """A part of a run's folder in words: "short (batch size 16, epochs 3)" for "short,batch_size=16,epochs=3"."""
    choice, changes = folder.partition(",")[0], overrides(folder)
    return f"{choice} ({changes_in_words(changes)})" if changes else choice


def conditions(comparison: Comparison) -> str:
    """The recipe and the setting under which a row's runs were made."""
    return f"{in_words(comparison.cell.recipe)}, {setting(comparison)}"


def setting(comparison: Comparison) -> str:
    """Precision, what else is not the default, and the norm's kernel path if it was run."""
    kernels = f", {comparison.kernels} kernels" if comparison.other else ""
    return cell_setting(comparison.cell) + kernels


def cell_setting(cell: Cell) -> str:
    """Precision, and what else is not the default."""
    precision, *others = cell.setting.split(", ")
    return ", ".join([PRECISIONS.get(precision, precision), *others])


def whole_cell(label: str, cell: Cell) -> str:
    """All that a cell's runs share, as a title has it: "CIFAR-10, resnet20, short (epochs 7), float32"."""
    return ", ".join((label, in_words(cell.backbone), in_words(cell.recipe), cell_setting(cell)))


def plural(noun: str, count: int) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
