"""Show how a sweep stands: which runs are done, running, interrupted, failed or missing, and the time left.

python scripts/status.py --experiment cifar_table         the runs of an experiment
python scripts/status.py dataset=cifar10 norm=bn,l2bn     the runs of a sweep over these values
python scripts/status.py                                  every run that has begun in runs/
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from l2bn.failures import exit_with_message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for train.py: backbone=resnet20,vgg16")
    parser.add_argument("--experiment", metavar="NAME", help="as experiment=NAME")
    parser.add_argument("--runs", metavar="FOLDER", help="folder of the runs, as runs_dir=FOLDER")
    parser.add_argument("--config-dir", type=Path, action="append", default=[], help="your folder of YAML files")
    parser.add_argument("-m", "--multirun", action="store_true", help="accepted, as for train.py")
    arguments = parser.parse_intermixed_args()
    from hydra.core.override_parser.types import Quote, QuotedString

    from l2bn.errors import UserError, expand
    from l2bn.training.plan import composing
    from l2bn.training.status import find_runs, read_status, status_grid
    from l2bn.training.sweep import compose_sweep, plan_sweep

    overrides = [f"experiment={arguments.experiment}"] if arguments.experiment else []
    overrides += arguments.overrides
    if overrides:
        if arguments.runs:
            overrides.append(f"runs_dir={QuotedString(arguments.runs, Quote.double).with_quotes()}")
        with composing(overrides, arguments.config_dir) as (_, rest):
            runs = plan_sweep(compose_sweep(rest))
    else:
        folder = expand(arguments.runs or "runs", "--runs")
        if arguments.runs and not folder.is_dir():
            raise UserError(f"--runs: there is no folder {folder}")
        runs = find_runs(folder)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(status_grid([read_status(run) for run in runs], console.width))


if __name__ == "__main__":
    with exit_with_message():
        main()
