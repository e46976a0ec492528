"""The benchmarks run, say what they measured, and their committed tables are those of their committed results."""

import contextlib
import json
import os
import sys
from pathlib import Path

import pandas as pd
import pytest

from conftest import ROOT
from l2bn.benchmarks import tables
from l2bn.benchmarks.report import norm_table, step_table, tables_table

RESULTS = ROOT / "results" / "benchmarks"
TABLES = {"norm": norm_table, "step": step_table, "tables": tables_table}


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


def test_ten_thousand_records_in_ten_seconds_and_a_gigabyte(tmp_path: Path) -> None:
    assert tables.write_copies(tmp_path / "runs", 10_000) == 10_000
    command = [str(tables.ROOT / "scripts/tables.py"), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    seconds, peak = tables.time_command(command)
    print(f"{seconds:.1f} s, {peak / 2**30:.2f} GiB on {os.cpu_count()} cores")
    assert len((tmp_path / "grid.csv").read_text().splitlines()) == 201
    assert seconds < 10
    assert peak < 2**30


def test_the_tables_and_plain_pandas_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables.tempfile, "TemporaryDirectory", lambda: contextlib.nullcontext(str(tmp_path)))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "tables", "--records", "500", "--repeats", "1"])
    sys.path.insert(0, str(ROOT / "scripts"))
    import benchmark

    benchmark.main()
    ours = pd.read_csv(tmp_path / "out/grid.csv").sort_values("dataset")
    theirs = pd.read_csv(tmp_path / "out/table.csv", header=[0, 1], index_col=[0, 1, 2]).sort_index()
    assert len(ours) == 10
    for name, column in (("bn_mean", ("bn", "mean")), ("l2bn_std", ("l2bn", "std")), ("bn_n", ("bn", "count"))):
        assert list(ours[name]) == pytest.approx(list(theirs[column]), abs=6e-5)
    assert list(ours["p"]) == pytest.approx(list(theirs["p"].iloc[:, 0]), abs=6e-5)
