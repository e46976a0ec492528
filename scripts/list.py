"""List the choices of each group, one per line, with the cost of each backbone.

python scripts/list.py
python scripts/list.py backbone --hours    also time each backbone on this machine, to plan a sweep; takes minutes
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from l2bn.failures import exit_with_message
from l2bn.training.catalogue import CATALOGUED, choices_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", nargs="?", choices=CATALOGUED, help="only this group")
    parser.add_argument("--hours", action="store_true", help="estimate the hours of the usual recipe here")
    parser.add_argument("--config-dir", type=Path, action="append", default=[], help="your folder of YAML files")
    arguments = parser.parse_args()
    if arguments.hours and arguments.group not in (None, "backbone"):
        parser.error(f"--hours times backbones, not {arguments.group}: python scripts/list.py backbone --hours")
    groups = [arguments.group] if arguments.group else CATALOGUED
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    own = [path.resolve() for path in arguments.config_dir]
    console.print(choices_text(groups, console.width, own, timed=arguments.hours))


if __name__ == "__main__":
    with exit_with_message():
        main()
