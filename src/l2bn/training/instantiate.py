"""Instantiation of the nodes of a configuration, with messages that name what is wrong in a node.

`_target_` is the registry: a new data set, backbone or norm is one Python file and one YAML. Hydra would import
and call whatever a `_target_` names. Here a `_target_` must stand at the same place in a YAML file of `configs/`
or of a folder that the user has named, so that a stranger's record can run neither the stranger's code nor a
function of this package that is not meant to be called there.
"""

import difflib
import functools
import inspect
import logging
import multiprocessing
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union

import yaml
from hydra.utils import get_object
from pydantic import ValidationError
from pydantic.dataclasses import is_pydantic_dataclass

from l2bn.errors import UserError
from l2bn.records import files_under, first_fault, is_finite_number

log = logging.getLogger(__name__)


def _find_configs() -> Path:
    """Return the folder of configurations: of the checkout whose script is running, else of this package.

    Warns if the checkout has another package than the one that is running.
    """
    package = Path(__file__).parents[1]
    checkout = Path(sys.argv[0]).resolve().parent.parent
    own = checkout / "src" / "l2bn"
    if not (own / "configs").is_dir():
        own = package
    elif own.resolve() != package.resolve() and multiprocessing.parent_process() is None:
        log.warning(
            "scripts and configurations are those of %s, but the code is that in %s: edits of %s do nothing; "
            "install the checkout whose scripts you run, as by make setup there",
            *(checkout, package, own),
        )
    return (own / "configs").resolve()  # in a checkout the package has a link to it


CONFIGS = _find_configs()

Node = Mapping[str, Any]

LATER: Mapping[str, tuple[int, tuple[str, ...]]] = {"norm": (1, ("last",)), "recipe.schedule": (2, ())}
"""Arguments that the caller of a bound target passes, by the target's place: a number by position, and names."""


class Builder:
    """Instantiates the nodes of one configuration.

    folders: the folders of YAML files whose `_target_`s may be called; None for a configuration that has been
    checked already.
    files: the YAML files that the configuration was composed of, relative to their folder, so that a message can
    name the one to correct.
    """

    def __init__(self, folders: Sequence[Path] | None = (CONFIGS,), files: Sequence[str] = ()) -> None:
        self.folders = folders
        self.files = files

    def build(self, node: Node, path: str, kind: type = object) -> Any:
        """Instantiate a node with a `_target_`; `path` is the node's place in the configuration.

        With `_partial_: true` the result is the target with these arguments bound. Raises UserError, also if the
        object is not of the `kind` that is needed.
        """
        target, partial, arguments = self._split(node, path)
        if kind is functools.partial and not partial:
            raise UserError(f"{path}: add _partial_: true to its YAML file, since its first argument comes later")
        if partial:
            built = functools.partial(target, **self.fit(target, arguments, path, partial=True))
        else:
            built = self.call(target, arguments, path)
        if not isinstance(built, kind):
            raise UserError(
                f"{path}._target_: {node['_target_']} makes a {type(built).__name__}, "
                f"but a {kind.__name__} is needed here; name another choice of this group"
            )
        return built

    def call(self, target: Callable[..., Any], arguments: Node, path: str) -> Any:
        """Call a target with the arguments of a node, once their names and types fit the target's signature."""
        built = self.fit(target, arguments, path)
        try:
            return target(**built)
        except ValueError as error:
            reason = first_fault(error) if isinstance(error, ValidationError) else error
            raise UserError(f"{path}: {reason}") from error

    def check(self, node: Node, path: str) -> None:
        """Check a node's names and types. Its `_target_` is not called, those within it are. Raises UserError."""
        target, partial, arguments = self._split(node, path)
        self.fit(target, arguments, path, partial=partial)

    def accepts(self, node: Node, path: str, key: str) -> bool:
        """Return whether a node's `_target_` has a parameter of this name. Raises UserError."""
        accepted, open_ended = _parameters(self._split(node, path)[0])
        return open_ended or key in accepted

    def check_keys(self, given: Node, accepted: Collection[str], path: str) -> None:
        """Raise UserError for a key that is not accepted, with its file and the nearest key that is accepted."""
        for key in map(str, given):  # in YAML, `on` is a boolean
            if key not in accepted:
                place = _join(path, key)
                files = [
                    f"{_shown(folder)}/{file}"
                    for file in self.files
                    for folder in self.folders or ()
                    if _sets(folder, file, place)
                ]
                near = difflib.get_close_matches(key, accepted, n=1)
                raise UserError(
                    f"unknown key {place}"
                    + (f" in {', '.join(files)}" if files else "")
                    + (f"; did you mean {near[0]}?" if near else "")
                    + f"\naccepted here: {', '.join(sorted(accepted)) or 'nothing'}"
                )

    def fit(
        self, target: Callable[..., Any], arguments: Node, path: str, *, partial: bool = False
    ) -> dict[str, Any]:
        """Return the arguments, the nodes among them instantiated, once they fit the target's signature."""
        check_mapping(arguments, path)
        accepted, open_ended = _parameters(target)
        number, named = LATER.get(path, (0, tuple(accepted))) if partial else (0, ())
        for name in [key for key, parameter in accepted.items() if parameter.by_place][:number]:
            del accepted[name]
        if not open_ended:
            self.check_keys(arguments, accepted, path)
        needed = [key for key, parameter in accepted.items() if parameter.required and key not in named]
        missing = [_join(path, key) for key in needed if key not in arguments]
        if missing:
            is_called = path in LATER and not partial and not inspect.isclass(target)
            bound = ", or add _partial_: true to its YAML file" if is_called else ""
            raise UserError(f"missing {', '.join(missing)}: give each a value{bound}")
        built = {}
        for key, value in arguments.items():
            place = _join(path, key)
            hint = accepted[key].hint if key in accepted else Any
            if _is_node(value):
                built[key] = self.build(value, place)
            elif _holds_node(value):
                raise UserError(
                    f"{place} holds a node with a _target_, which would not be built in a list or below another "
                    "key; give it a parameter of its own"
                )
            else:
                built[key] = _as_hinted(value, hint)
            check_type(built[key], hint, place)
        return built

    def _split(self, node: Node, path: str) -> tuple[Callable[..., Any], bool, dict[str, Any]]:
        """Return a node's target, whether it is only to be bound, and its arguments."""
        check_mapping(node, path)
        partial = node.get("_partial_", False)
        check_type(partial, bool, f"{path}._partial_")
        arguments = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
        return self._import(node.get("_target_"), path), partial, arguments

    def _import(self, name: object, path: str) -> Callable[..., Any]:
        if not isinstance(name, str):
            raise UserError(f"{path}: has no _target_ to say what it is")
        if self.folders is not None and not any((path, name) in _targets(folder) for folder in self.folders):
            raise UserError(
                f"{path}._target_ is {name}, which is at this place in no YAML file of "
                f"{' or '.join(_shown(folder) + '/' for folder in self.folders)}; to use your own code, write a "
                "YAML file with this _target_ into the group's folder, or into a folder named by --config-dir"
            )
        try:
            target = get_object(name)
        except Exception as error:  # importing a user's own module may raise anything
            raise UserError(f"{path}._target_: {name} cannot be imported: {error}") from error
        if not callable(target):
            raise UserError(f"{path}._target_: {name} is neither a class nor a function")
        return target


def _is_node(value: object) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _holds_node(value: object) -> bool:
    """Tell whether a list or a mapping has a node at any depth."""
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(_is_node(item) or _holds_node(item) for item in values)


def check_mapping(node: object, path: str) -> None:
    """Raise UserError for a value where a node is needed."""
    if not isinstance(node, Mapping):
        raise UserError(f"{path} must be a node of keys and values, not {node!r}")


def check_type(value: object, hint: Any, path: str) -> None:
    """Raise UserError unless a value, or the object built in its place, is of the type of a hint."""
    if not _fits(value, hint):
        word = {True: "on", False: "off"}.get(value) if isinstance(value, bool) else None
        meant = word and _fits(word, hint) and not _fits("", hint)  # a word of a list, not a free text
        advice = f'; in YAML write "{word}" with its quotes' if meant else ""
        raise UserError(f"{path} must be {_describe(hint)}, not {value!r}{advice}")


# YAML files.


def is_hidden(path: Path) -> bool:
    """Tell whether a path is hidden, as the `._x.yaml` that macOS leaves with `x.yaml`; relative to the group."""
    return any(part.startswith(".") for part in path.parts)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _shown(folder: Path) -> str:
    """Return the name of a folder of configurations in messages."""
    return folder.name if folder == CONFIGS else str(folder)


@functools.cache
def _yaml_files(folder: Path) -> dict[str, Any]:
    """Return the content of every YAML file of a folder, by its path there, without those that cannot be read."""
    contents = {}
    groups = [path for path in folder.iterdir() if path.is_dir()]  # each by itself: one may be a link to another
    for path in [*folder.glob("*.yaml"), *(file for group in groups for file in files_under(group, "*.yaml"))]:
        if is_hidden(path.relative_to(folder)):
            continue
        try:
            contents[path.relative_to(folder).as_posix()] = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # a run that uses the file is refused by Hydra, which reads it too
    return contents


def flatten(tree: object, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values in nested nodes by their dotted keys, in the order of the keys; an empty node has none."""
    if not isinstance(tree, Mapping):
        yield place, tree
        return
    for key, value in sorted(tree.items(), key=lambda item: str(item[0])):
        yield from flatten(value, _join(place, str(key)))


@functools.cache
def _targets(folder: Path) -> frozenset[tuple[str, str]]:
    """Return every `_target_` of a folder's files with its place: in the node of the file's group, and as is."""
    found = set()
    for file, content in _yaml_files(folder).items():
        group = file.partition("/")[0].removesuffix("_for")
        for key, value in flatten(content):
            place, _, last = key.rpartition(".")
            if last == "_target_" and isinstance(value, str):
                found |= {(place, value), (f"{group}.{place}".rstrip("."), value)}
    return frozenset(found)


def _sets(folder: Path, file: str, place: str) -> bool:
    """Tell whether a file sets a key of its own group, or of the whole configuration."""
    group, _, key = place.partition(".")
    if file.startswith(("train.yaml", "experiment/")):
        key = place
    elif not file.startswith((f"{group}/", f"{group}_for/")):
        return False
    return any(f"{found}.".startswith(f"{key}.") for found, _ in flatten(_yaml_files(folder).get(file)))


# Types.


class _Parameter(NamedTuple):
    hint: Any  # its type
    required: bool
    by_place: bool = False  # whether a caller may pass it by position


def _parameters(target: Callable[..., Any]) -> tuple[dict[str, _Parameter], bool]:
    """Return the parameters of a signature by their names, and whether it takes any others."""
    of_class = inspect.isclass(target) and not is_pydantic_dataclass(target)  # whose __init__ has no hints
    try:
        hints = typing.get_type_hints(target.__init__ if of_class else target)
    except (NameError, TypeError):  # of a user's own code: hints that only its type checker can read
        hints = {}
    try:
        signature = inspect.signature(target)
    except ValueError:  # of a function written in C, as torch.relu
        return {}, True
    parameters: dict[str, _Parameter] = {}
    open_ended = False
    for name, parameter in signature.parameters.items():
        hint = hints.get(name, Any)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            if typing.get_origin(hint) is typing.Unpack:  # **common: Unpack[SomeTypedDict]
                (fields,) = typing.get_args(hint)
                for key, field_hint in typing.get_type_hints(fields).items():
                    parameters[key] = _Parameter(field_hint, key in fields.__required_keys__)
            else:
                open_ended = True
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            by_place = parameter.kind is not inspect.Parameter.KEYWORD_ONLY
            parameters[name] = _Parameter(hint, parameter.default is inspect.Parameter.empty, by_place)
    return parameters, open_ended


_WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    list: "a list",
    tuple: "a list",
    NoneType: "null",
}


def _options(hint: Any) -> Sequence[Any]:
    """Return the members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, UnionType) else (hint,)


def _as_hinted(value: object, hint: Any) -> object:
    """Return a list as a tuple and a text as a path where a type asks for these, which YAML lacks."""
    kinds = {typing.get_origin(option) or option for option in _options(hint)}
    if isinstance(value, list) and tuple in kinds and list not in kinds:
        return tuple(value)
    if isinstance(value, str) and Path in kinds and str not in kinds:
        return Path(value)
    return value


def _fits(value: object, hint: Any) -> bool:
    """Tell whether a value of the configuration, or the object made of it, is of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:  # 1 is not True
        return any(type(value) is type(option) and value == option for option in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, option) for item in value for option in arguments)
    if hint is float:
        return is_finite_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is Callable:
        return callable(value)
    kind = origin or hint
    try:
        return hint is Any or not inspect.isclass(kind) or isinstance(value, kind)
    except TypeError:  # a protocol or a TypedDict: only a type checker can tell
        return True


def _describe(hint: Any) -> str:
    """Return what a type accepts, in words for messages."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_describe(option) for option in arguments)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is list and arguments:
        return f"a list with each item {_describe(arguments[0])}"
    if (kind := origin or hint) in _WORDS:
        return _WORDS[kind]
    return "a node with a _target_" + (f" that makes a {hint.__name__}" if inspect.isclass(hint) else "")
