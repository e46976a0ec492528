"""How a sweep stands: which runs are done, under way, cut off, failed or missing, and how long the rest takes.

python scripts/status.py --experiment cifar_table         the runs of an experiment
python scripts/status.py dataset=cifar10 norm=bn,l2bn     those of a sweep over these values
python scripts/status.py                                  all that have begun in runs/
"""

import argparse
import sys
from pathlib import Path

from hydra import initialize_config_dir
from rich.console import Console

from l2bn.errors import told_plainly
from l2bn.training.instantiate import CONFIGS
from l2bn.training.outcome import look
from l2bn.training.plan import compose_sweep, find_runs, plan_sweep
from l2bn.training.status import overview


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", help="a name in configs/experiment")
    parser.add_argument("overrides", nargs="*", help="as for train.py: backbone=resnet20,vgg16")
    arguments = parser.parse_args()
    overrides = [f"experiment={arguments.experiment}"] if arguments.experiment else []
    overrides += arguments.overrides
    if overrides:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            runs = plan_sweep(compose_sweep(overrides))
    else:
        runs = find_runs(Path("runs"))
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(overview([(run, look(run)) for run in runs]))


if __name__ == "__main__":
    with told_plainly():
        main()
