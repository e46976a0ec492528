"""List the choices of each group, one per line: python scripts/list.py [backbone]."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from l2bn.errors import UserError
from l2bn.failures import told_plainly
from l2bn.training.catalogue import GROUPS, overview
from l2bn.training.instantiate import CONFIGS


def main() -> None:
    parser = argparse.ArgumentParser(description="List the choices of each group.")
    parser.add_argument("group", nargs="?", choices=GROUPS, help="only this group")
    parser.add_argument("--config-dir", type=Path, action="append", default=[], help="your own YAML files")
    arguments = parser.parse_args()
    for folder in arguments.config_dir:
        if not folder.is_dir():
            raise UserError(f"--config-dir: there is no folder {folder}")
    groups = [arguments.group] if arguments.group else GROUPS
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(overview(groups, console.width, [CONFIGS, *(path.resolve() for path in arguments.config_dir)]))


if __name__ == "__main__":
    with told_plainly():
        main()
