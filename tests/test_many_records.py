"""Tables of many records: fast enough for thousands of runs, and equal to what plain pandas makes of them."""

import json
import random
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from conftest import ROOT, Issue
from l2bn.records import SUMMARY, load

SEEDS, DATASETS = 25, 10

# The peak of the process itself: what the system tells its parent begins at the parent's own.
PEAK = """
import re, runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def make_tables(runs: Path, out: Path) -> tuple[float, float]:
    """Make the tables of a folder of runs; seconds and bytes that the command took."""
    command = [sys.executable, "-c", PEAK, str(ROOT / "scripts/report.py"), "tables"]
    begin = time.perf_counter()
    done = subprocess.run([*command, "--runs", str(runs), "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - begin, int(done.stdout.rpartition("peak ")[2]) * 1024


def write_copies(root: Path, count: int) -> None:
    """Write copies of two published records as pairs of BN and L2BN: 25 seeds in each of 10 data sets."""
    paths = sorted((ROOT / "results/records/digits").rglob(SUMMARY))
    contents = {content["norm"]: content for content in (json.loads(path.read_text()) for path in paths)}
    draw = random.Random(0)
    for dataset, net, seed, norm in product(
        range(DATASETS), range(count // (DATASETS * SEEDS * 2)), range(SEEDS), ("bn", "l2bn")
    ):
        content = contents[norm]
        names = {"dataset": f"data{dataset}", "backbone": f"net{net}", "recipe": "copied", "norm": norm}
        accuracy = {"test/top1": draw.gauss(90, 0.2)}
        copy = {
            **content,
            **names,
            "seed": seed,
            "identity": {**contents["bn"]["identity"], "norm": content["identity"]["norm"], "seed": seed},
            "last": {**content["last"], **accuracy},
            "best": {**content["best"], **accuracy},
        }
        folder = root.joinpath(*names.values(), f"seed{seed}")
        folder.mkdir(parents=True)
        (folder / SUMMARY).write_text(json.dumps(copy))


@pytest.mark.slow
def test_ten_thousand_records_in_twenty_seconds_and_a_gigabyte(tmp_path: Path) -> None:
    write_copies(tmp_path / "runs", 10_000)
    seconds, peak = make_tables(tmp_path / "runs", tmp_path / "out")
    print(f"{seconds:.1f} s, {peak / 2**30:.2f} GiB")
    assert len((tmp_path / "out/grid.csv").read_text().splitlines()) == 201
    assert seconds < 20
    assert peak < 2**30


def test_tables_and_plain_pandas_agree(tmp_path: Path, issue: Issue) -> None:
    write_copies(tmp_path / "runs", 500)
    assert issue("report", "tables", "--runs", tmp_path / "runs", "--out", tmp_path / "out").code == 0
    ours = pd.read_csv(tmp_path / "out/grid.csv").sort_values("dataset").reset_index(drop=True)
    cell = ["dataset", "backbone", "recipe"]
    pairs = load(tmp_path / "runs").pivot(index=[*cell, "seed"], columns="norm", values="test/top1")
    theirs = pairs.groupby(cell).agg(["mean", "std", "count"]).sort_index()
    assert len(ours) == DATASETS
    for name, column in (("bn_mean", ("bn", "mean")), ("l2bn_std", ("l2bn", "std")), ("bn_n", ("bn", "count"))):
        assert list(ours[name]) == pytest.approx(list(theirs[column]), abs=6e-5)
    p = [stats.ttest_rel(group["l2bn"], group["bn"]).pvalue for _, group in pairs.groupby(cell)]
    assert list(ours["p"]) == pytest.approx(p, abs=6e-5)
