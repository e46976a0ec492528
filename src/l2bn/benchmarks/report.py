"""From a benchmark's result to what a reader sees: JSON, and a page with tables."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from l2bn.records import write_durably

Result = dict[str, Any]
"""The result of a benchmark: its name, the machine, and `rows` (the layer's: `cells`; accuracies: `runs`)."""

Row = dict[str, Any]


def ratio(row: Row, norm: str, quantity: str = "seconds") -> float:
    """To BN, called the same way."""
    return float(row[quantity][norm] / row[quantity]["bn"])


def hardware(result: Result) -> str:
    facts = result["machine"]
    where = facts["processor"] if facts["device"] == "cpu" else facts["device"]
    threads = f", {facts['threads']} threads" if facts["device"] == "cpu" else ""
    return f"{where}{threads} ({facts['cpu_capability']}), torch {facts['packages']['torch']}, {facts['time'][:10]}"


def prose(text: str) -> str:
    """A paragraph in lines of a file's width."""
    return fill(" ".join(text.split()), 110, break_on_hyphens=False, break_long_words=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a column whose name begins with ">" is flush right."""
    rules = "|".join("---:" if column.startswith(">") else "---" for column in columns)
    heads = [column.removeprefix(">") for column in columns]
    head, *lines = (f"| {' | '.join(cells)} |" for cells in (heads, *rows))
    return "\n".join([head, f"|{rules}|", *lines])


def page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", *parts]) + "\n"


def report(
    result: Result,
    path: Path | None,
    make_page: Callable[[Result], str],
) -> None:
    """Print the page of a result; with a path, write the result there, and the page beside it."""
    if path is not None:  # before the page, because it is what took the time
        write_durably(path, json.dumps(result, indent=1) + "\n")
    text = make_page(result)
    if path is not None:
        write_durably(path.with_suffix(".md"), text)
    print("\n" + text)
