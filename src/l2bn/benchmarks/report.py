"""From a benchmark's JSON to what a reader sees: a Markdown table, and for the layer a plot."""

import math
from pathlib import Path
from statistics import geometric_mean
from textwrap import fill
from typing import Any

from l2bn.records import write_durably

Cell = dict[str, Any]


def ratio(cell: Cell, norm: str, quantity: str = "seconds") -> float:
    """To BN, called the same way."""
    return float(cell[quantity][norm] / cell[quantity]["bn"])


def memory_ratio(cells: list[Cell], norm: str) -> str:
    """Geometric mean over the cells in which the profiler saw memory taken by both; "–" if it saw none."""
    seen = [c for c in cells if c["peak_bytes"][norm] > 0 and c["peak_bytes"]["bn"] > 0]
    return f"{geometric_mean(ratio(c, norm, 'peak_bytes') for c in seen):.3f}" if seen else "–"


def named(cell: Cell) -> str:
    return f"{'×'.join(map(str, cell['shape']))} {cell['layout']}"


def hardware(result: dict[str, Any]) -> str:
    facts = result["machine"]
    where = facts["processor"] if facts["device"] == "cpu" else facts["device"]
    threads = f", {facts['threads']} threads" if facts["device"] == "cpu" else ""
    return f"{where}{threads} ({facts['cpu_capability']}), torch {facts['packages']['torch']}, {facts['time'][:10]}"


OF_NORM = """
Ratios to `nn.BatchNorm2d` called the same way, measured in turn in one process: geometric mean over the maps, and
the worst. Memory: most bytes held at once, same ratio. Copy: traffic of the least passes over the map, as a share
of the bandwidth of a copy of that map; median.
"""


def norm_table(result: dict[str, Any]) -> str:
    lines = [
        "# The layer alone: time against batch norm's",
        "",
        f"{hardware(result)}.",
        "",
        prose(OF_NORM),
        "",
        "| called | phase | format | maps | naive | fused | fused, worst | memory | copy |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for caller in ("compiled", "eager"):
        for phase in ("training", "evaluation"):
            for layout in ("contiguous", "channels_last", "both"):
                cells = [
                    c
                    for c in result["cells"]
                    if (c["caller"], c["phase"]) == (caller, phase) and layout in (c["layout"], "both")
                ]
                if not cells:
                    continue
                fused = [ratio(c, "fused") for c in cells]
                copy = sorted(c["copy_fraction"] for c in cells)[len(cells) // 2]
                lines.append(
                    f"| {caller} | {phase} | {layout} | {len(cells)} "
                    f"| {geometric_mean(ratio(c, 'naive') for c in cells):.2f} | {geometric_mean(fused):.2f} "
                    f"| {max(fused):.2f} | {memory_ratio(cells, 'fused')} "
                    f"| {copy:.0%} |"
                )
    lines += ["", "The worst cells of training:", "", "| called | map | network | BN | fused | ratio |"]
    lines.append("|---|---|---|---:|---:|---:|")
    training = [c for c in result["cells"] if c["phase"] == "training"]
    for cell in sorted(training, key=lambda c: -ratio(c, "fused"))[:6]:
        bn, fused_time = (cell["seconds"][norm] * 1e3 for norm in ("bn", "fused"))
        lines.append(
            f"| {cell['caller']} | {named(cell)} | {cell['network']} | {bn:.3g} ms | {fused_time:.3g} ms "
            f"| {ratio(cell, 'fused'):.2f} |"
        )
    return "\n".join(lines) + "\n"


OF_STEP = """
Forward, backward and SGD; ratios to the same network with BN, measured in turn in one process. Memory: most bytes
held at once within the step.
"""


def step_table(result: dict[str, Any]) -> str:
    lines = [
        "# A whole training step: time and memory against batch norm's",
        "",
        f"{hardware(result)}.",
        "",
        prose(OF_STEP),
        "",
        "| network | batch | format | called | BN | naive | fused | memory, naive | memory, fused |",
        "|---|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['network']} | {row['batch']} | {row['layout']} | {row['caller']} "
            f"| {row['seconds']['bn'] * 1e3:.0f} ms | {ratio(row, 'naive'):.2f} | {ratio(row, 'fused'):.2f} "
            f"| {ratio(row, 'naive', 'peak_bytes'):.3f} | {ratio(row, 'fused', 'peak_bytes'):.3f} |"
        )
    return "\n".join(lines) + "\n"


def plot_norm(result: dict[str, Any], path: Path) -> None:
    """Ratio against the size of the map, one panel a way of calling, in training."""
    import matplotlib.pyplot as plt  # here, for a slow import that only a written report needs

    callers = [caller for caller in ("eager", "compiled") if caller in {c["caller"] for c in result["cells"]}]
    figure, grid = plt.subplots(
        1, len(callers), figsize=(4.5 * len(callers), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    panels = grid[0]
    for panel, caller in zip(panels, callers, strict=True):
        for norm, colour in (("naive", "tab:gray"), ("fused", "tab:blue")):
            for layout, marker in (("contiguous", "o"), ("channels_last", "^")):
                cells = [
                    c
                    for c in result["cells"]
                    if (c["caller"], c["layout"], c["phase"]) == (caller, layout, "training")
                ]
                panel.scatter(
                    [math.prod(cell["shape"]) * 4 / 2**20 for cell in cells],
                    [ratio(cell, norm) for cell in cells],
                    s=22,
                    color=colour,
                    marker=marker,
                    alpha=0.85,
                    label=f"{norm}, {layout}",
                )
        panel.axhline(1, color="black", linewidth=1)
        panel.text(0.99, 1.03, "BN", transform=panel.get_yaxis_transform(), ha="right", va="bottom")
        panel.set(title=f"called {'from eager code' if caller == 'eager' else 'in a compiled model'}")
        panel.set(xscale="log", yscale="log", xlabel="size of the map (MiB)")
        panel.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["1/4", "1/2", "1", "2", "4", "8"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time of forward and backward / BN's")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def prose(text: str) -> str:
    """A paragraph in lines of a file's width."""
    return fill(" ".join(text.split()), 110, break_on_hyphens=False, break_long_words=False)


def write_table(table: str, json_path: Path | None, picture: str = "") -> str:
    """The table; with the JSON's path it is written beside it, followed by the plot there if `picture` says what
    it shows."""
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        plot = f"\n![{picture}]({json_path.stem}.png)\n" if picture else ""
        write_durably(json_path.with_suffix(".md"), table + plot)
    return table


def write_norm_report(result: dict[str, Any], json_path: Path | None) -> str:
    """The table; with the JSON's path, table and plot are written beside it."""
    if json_path is not None:
        plot_norm(result, json_path.with_suffix(".png"))
    return write_table(norm_table(result), json_path, "time against the map's size")


def write_step_report(result: dict[str, Any], json_path: Path | None) -> str:
    """The table; with the JSON's path, it is written beside it."""
    return write_table(step_table(result), json_path)
