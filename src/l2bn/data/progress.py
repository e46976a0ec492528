"""A progress bar where somebody is watching."""

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def tracked(items: Iterable[T], text: str, total: int | None = None) -> Iterable[T]:
    """The items, with a bar that says how far it is; silent where the output is no terminal."""
    console = Console(stderr=True)
    return track(items, text, total=total, console=console, disable=not console.is_terminal)
