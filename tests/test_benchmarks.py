"""The benchmarks run, say what they measured, and their committed tables are those of their committed results."""

import json
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from l2bn.benchmarks.report import norm_table, step_table

RESULTS = ROOT / "results" / "benchmarks"
TABLES = {"norm": norm_table, "step": step_table}


@pytest.mark.parametrize("name", TABLES)
def test_committed_tables_are_made_from_the_committed_results(name: str) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert (RESULTS / f"{name}.md").read_text().startswith(TABLES[name](result))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("norm", ["--networks", "ResNet-20", "--maps", "1", "--callers", "eager"]),
        ("step", ["--networks", "ResNet-20", "--callers", "eager", "--layouts", "contiguous", "--batch", "4"]),
    ],
)
def test_a_short_measurement_is_written(
    name: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    import benchmark

    path = tmp_path / f"{name}.json"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", name, *options, "--seconds", "0.01", "--json", str(path)])
    benchmark.main()
    result = json.loads(path.read_text())
    rows = result["cells" if name == "norm" else "rows"]
    assert rows
    for row in rows:
        assert min(row["seconds"].values()) > 0
        # What the plain composition costs shows whatever the machine is doing: it writes the features once more.
        assert row["peak_bytes"]["naive"] > row["peak_bytes"]["fused"]
    assert result["machine"]["packages"]["torch"]
    assert (tmp_path / f"{name}.md").read_text() == TABLES[name](result) + (
        f"\n![time against the map's size]({name}.png)\n" if name == "norm" else ""
    )
