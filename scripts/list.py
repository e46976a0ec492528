"""What there is to choose from, one line each: python scripts/list.py [backbone]."""

import argparse
import sys

from rich.console import Console

from l2bn.training.catalogue import GROUPS, overview


def main() -> None:
    parser = argparse.ArgumentParser(description="List what configs/ offers.")
    parser.add_argument("group", nargs="?", choices=GROUPS, help="this group alone")
    arguments = parser.parse_args()
    groups = [arguments.group] if arguments.group else GROUPS
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(overview(groups, console.width))


if __name__ == "__main__":
    main()
