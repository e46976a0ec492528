"""Make tables of up to 10,000 records: seconds and memory of the whole command, beside plain pandas.

The records are copies of a published one under other names, seeds and accuracies. What a user would write with
pandas reads the same files, pairs the norms by seed and writes means and t-tests; it checks nothing.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median

import torch

from l2bn.benchmarks.measure import machine, undisturbed, write_json
from l2bn.benchmarks.report import write_tables_report
from l2bn.errors import UserError
from l2bn.records import SUMMARY

ROOT = Path(__file__).parents[3]
PUBLISHED = ROOT / "results/records"
SEEDS, DATASETS = 25, 10

# The peak of the process itself; what the system tells its parent begins at the parent's own.
PEAK = """
import re, runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""

PANDAS = """
import json, sys
from pathlib import Path
import pandas as pd
from scipy import stats
cell = ["dataset", "backbone", "recipe"]
rows = []
for path in Path(sys.argv[1]).rglob("summary.json"):
    content = json.loads(path.read_text())
    rows.append({key: content[key] for key in [*cell, "norm", "seed"]} | {"top1": content["last"]["test/top1"]})
pairs = pd.DataFrame(rows).pivot(index=[*cell, "seed"], columns="norm", values="top1")
table = pairs.groupby(cell).agg(["mean", "std", "count"])
table["p"] = [stats.ttest_rel(group["l2bn"], group["bn"]).pvalue for _, group in pairs.groupby(cell)]
table.to_csv(Path(sys.argv[2]) / "table.csv")
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="file for the result; the table is written beside it")
    parser.add_argument("--records", type=int, nargs="*", default=[500, 2_500, 10_000], help="a row each")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, of which the median counts")


def run(arguments: argparse.Namespace) -> None:
    rows = []
    for count in arguments.records:
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"records": write_copies(Path(folder) / "runs", count), **measure(Path(folder), arguments)})
        print(rows[-1], flush=True)
    result = {"benchmark": "tables", "machine": machine(torch.device("cpu")), "rows": rows}
    if arguments.json:
        write_json(arguments.json, result)
    print("\n" + write_tables_report(result, arguments.json))


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of both ways, in turn."""
    (folder / "pandas.py").write_text(PANDAS)
    runs, out = str(folder / "runs"), str(folder / "out")
    Path(out).mkdir()
    commands = {
        "tables": [str(ROOT / "scripts/report.py"), "tables", "--runs", runs, "--out", out],
        "pandas": [str(folder / "pandas.py"), runs, out],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(arguments.repeats):
        for name, command in commands.items():
            taken, peak = time_command(command)
            seconds[name].append(taken)
            peaks[name].append(peak)
    return {
        "seconds": {name: median(values) for name, values in seconds.items()},
        "peak_bytes": {name: median(values) for name, values in peaks.items()},
    }


def time_command(command: list[str]) -> tuple[float, float]:
    """Seconds of a Python script from start to end, and the most bytes it held. Raises UserError if it fails."""
    with undisturbed():
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", PEAK, *command], capture_output=True, text=True)
        seconds = time.perf_counter() - begin
    peak = re.search(r"^peak (\d+)$", done.stdout, re.MULTILINE)
    if done.returncode or not peak:
        raise UserError(f"{command[0]} failed:\n{done.stderr}")
    return seconds, int(peak[1]) * 1024


def write_copies(root: Path, count: int) -> int:
    """Write about so many records, pairs of BN and L2BN of 25 seeds in each of 10 data sets; how many there are."""
    originals = {json.loads(path.read_text())["norm"]: path for path in sorted(PUBLISHED.rglob(SUMMARY))}
    if not {"bn", "l2bn"} <= originals.keys():
        raise UserError(f"{PUBLISHED} holds no record of both bn and l2bn to make copies of")
    contents = {norm: json.loads(originals[norm].read_text()) for norm in ("bn", "l2bn")}
    draw = random.Random(0)
    nets = max(1, round(count / (DATASETS * SEEDS * 2)))
    for dataset, net, seed, norm in product(range(DATASETS), range(nets), range(SEEDS), contents):
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
    return DATASETS * nets * SEEDS * 2
