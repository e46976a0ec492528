"""Table and plot of the training benchmark."""

from pathlib import Path
from typing import Any

from l2bn.benchmarks.report import hardware, prose, write_table

Row = dict[str, Any]

NAMES = {"plain": "plain loop", "timm": "timm's loader"}
PHASES = ("data", "forward", "backward", "optimizer")


EXPLANATION = """
Whole training steps including data; all paths of a network take turns in one process, on the same images. Plain
loop: PIL transforms, a DataLoader with 2 workers, eager, contiguous, loss and accuracy read at every step.
timm's loader: `create_loader`, 2 workers (random resized crops), in the same loop with timm's SGD. Both free
memory as glibc does by default, ours keeps it. ×: images/s relative to the plain loop's, which has BN. The phases
of a step are in milliseconds; waiting: the share of data in the step. Memory: peak bytes in a step above those
held before it. Arithmetic: rate of convolutions and matrix products, as a share of the machine's rate of large
matrix products ({rate} GFLOP/s, the better of two libraries). *: the choice of `compute.compile=auto` for a run of
39,000 updates.
"""


def named(row: Row) -> str:
    if row["path"] != "ours":
        return NAMES[row["path"]]
    return f"ours, {row['norm'].upper()}, {row['caller']}" + ("*" if row["auto"] else "")


def baseline_of(row: Row, rows: list[Row]) -> float:
    """Images/s of the plain loop on the same network."""
    (found,) = (r for r in rows if r["network"] == row["network"] and r["path"] == "plain")
    return float(found["images_per_second"])


def train_table(result: dict[str, Any]) -> str:
    rows, best = result["rows"], max(result["matrix_products"].values())
    lines = [
        "# Training: images/s",
        "",
        f"{hardware(result)}, {result['precision']}.",
        "",
        prose(EXPLANATION.format(rate=f"{best / 1e9:,.0f}")),
        "",
        "| network | path | images/s | × | data | forward | backward | optimizer | waiting | memory | arithmetic |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        speed = row["images_per_second"]
        arithmetic = f"{speed * row['flops_per_image'] / best:.0%}"
        cells = [
            f"{row['network']}, {row['batch']} × {row['size']}²",
            named(row),
            f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}",
            f"{speed / baseline_of(row, rows):.2f}",
        ]
        if "seconds" in row:
            seconds = row["seconds"]
            cells += [f"{1e3 * seconds[phase]:.3g}" for phase in PHASES]
            cells += [f"{seconds['data'] / seconds['step']:.1%}", f"{row['peak_bytes'] / 2**20:,.0f} MiB"]
        else:
            cells += ["–"] * (len(PHASES) + 2)
        lines.append(f"| {' | '.join([*cells, arithmetic])} |")
    sources = sorted({row["images"] for row in rows})
    lines += ["", f"Images: {', '.join(sources)}."]
    return "\n".join(lines) + "\n"


def plot_train(result: dict[str, Any], path: Path) -> None:
    """Plot images/s relative to the plain loop's, a group of bars per network."""
    import matplotlib.pyplot as plt  # here, for a slow import that only a written report needs

    rows = result["rows"]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    kinds = [
        ("plain", "bn", "eager", "plain loop, BN", "tab:gray"),
        ("timm", "bn", "eager", "timm, BN", "tab:brown"),
    ]
    kinds += [("ours", "bn", "eager", "ours, BN", "tab:blue"), ("ours", "bn", "compiled", "compiled", "tab:cyan")]
    kinds += [("ours", "l2bn", "eager", "ours, L2BN", "tab:orange")]
    kinds += [("ours", "l2bn", "compiled", "compiled", "tab:pink")]
    figure, panel = plt.subplots(figsize=(9, 3.4), layout="constrained")
    width = 0.8 / len(kinds)
    for place, (trained_by, norm, caller, label, colour) in enumerate(kinds):
        found = [
            (networks.index(row["network"]), row["images_per_second"] / baseline_of(row, rows))
            for row in rows
            if (row["path"], row["norm"], row["caller"]) == (trained_by, norm, caller)
        ]
        if found:
            at, ratio = zip(*found, strict=True)
            panel.bar(
                [x + (place - len(kinds) / 2 + 0.5) * width for x in at], ratio, width, label=label, color=colour
            )
    panel.axhline(1, color="black", linewidth=1)
    panel.set_xticks(range(len(networks)), networks)
    panel.set_ylabel("images/s, relative to the plain loop")
    panel.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(kinds), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_train_report(result: dict[str, Any], json_path: Path | None) -> str:
    """The table; with the JSON's path, table and plot are written beside it."""
    if json_path is not None:
        plot_train(result, json_path.with_suffix(".png"))
    return write_table(train_table(result), json_path, "images/s relative to the plain loop")
