"""From a node of the configuration to the object that it describes, or to a clear word on what is wrong with it.

`_target_` is the registry: a new data set, backbone or norm is one Python file and one YAML. Hydra would import
and call whatever a `_target_` names; here it must stand at its place in a file of `configs/`, so that replaying
somebody's record cannot run code of theirs, nor ours where it is not meant to be.
"""

import difflib
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union

import yaml
from hydra.utils import get_object

from l2bn.errors import UserError
from l2bn.records import MACHINE_PATHS, is_finite_number

CONFIGS = Path(__file__).parents[3] / "configs"

Node = Mapping[str, Any]


class Builder:
    """Builds what the nodes of one configuration describe.

    `files` are the files of `configs/` that it was composed of, so that a message can name the one to mend.
    """

    def __init__(self, files: Sequence[str] = ()) -> None:
        self.files = files

    def build(self, node: Node, path: str, kind: type = object) -> Any:
        """The object of a node with a `_target_`; `path` is the node's place in the configuration.

        With `_partial_: true` it is the target with these arguments bound. Raises UserError, also where the
        object is not of the `kind` that is needed there.
        """
        target, partial, arguments = _split(node, path)
        built = self.call(target, arguments, path, partial=partial)
        if not isinstance(built, kind):
            raise UserError(
                f"{path}._target_: {node['_target_']} makes a {type(built).__name__}, "
                f"but a {kind.__name__} is needed here; name another choice of this group"
            )
        return built

    def call(self, target: Callable[..., Any], arguments: Node, path: str, *, partial: bool = False) -> Any:
        """Call a target with the arguments of a node, once their names and types are those of its signature."""
        built = self._fit(target, arguments, path, partial=partial)
        if partial:
            return functools.partial(target, **built)
        try:
            return target(**built)
        except ValueError as error:
            raise UserError(f"{path}: {error}" if path else str(error)) from error

    def check(self, node: Node, path: str, target: Callable[..., Any] | None = None) -> None:
        """Raise UserError if a node's names or types are not those of its `_target_`, or of a given target;
        neither is called."""
        found, partial, arguments = _split(node, path) if target is None else (target, False, node)
        self._fit(found, arguments, path, partial=partial)

    def _fit(self, target: Callable[..., Any], arguments: Node, path: str, *, partial: bool) -> dict[str, Any]:
        """The arguments with the nodes among them built, once they fit the target's signature."""
        check_mapping(arguments, path)
        accepted = _parameters(target)
        if partial:  # the first parameter is what the caller will give
            accepted.pop(next(iter(accepted)))
        self.check_keys(arguments, accepted, path)
        missing = [_join(path, key) for key, (_, need) in accepted.items() if need and key not in arguments]
        if missing:
            raise UserError(f"missing {', '.join(missing)}: give each a value")
        built = {key: self._build_nested(value, _join(path, key)) for key, value in arguments.items()}
        for key, value in built.items():
            hint = accepted[key][0]
            if not _fits(value, hint):
                raise UserError(f"{_join(path, key)} must be {_describe(hint)}, not {value!r}")
        return built

    def check_keys(self, given: Node, accepted: Collection[str], path: str) -> None:
        """Raise UserError naming the first key that is not accepted, its file, and the nearest that is."""
        for key in given:
            if key not in accepted:
                place = _join(path, key)
                files = [f"configs/{name}" for name in self.files if _sets(name, place)]
                near = difflib.get_close_matches(key, accepted, n=1)
                raise UserError(
                    f"unknown key {place}"
                    + (f" in {', '.join(files)}" if files else "")
                    + (f"; did you mean {near[0]}?" if near else "")
                    + f"\naccepted here: {', '.join(sorted(accepted)) or 'nothing'}"
                )

    def _build_nested(self, value: Any, path: str) -> Any:
        return self.build(value, path) if isinstance(value, Mapping) and "_target_" in value else value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def check_mapping(node: object, path: str) -> None:
    """Raise UserError for a value where a node is needed."""
    if not isinstance(node, Mapping):
        raise UserError(f"{path} must be a node of keys and values, not {node!r}")


def _split(node: Node, path: str) -> tuple[Callable[..., Any], bool, dict[str, Any]]:
    """What a node's `_target_` names, whether it is to be bound only, and its arguments."""
    check_mapping(node, path)
    partial = node.get("_partial_", False)
    if not isinstance(partial, bool):
        raise UserError(f"{path}._partial_ must be true or false, not {partial!r}")
    arguments = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    return _resolve(node.get("_target_"), path), partial, arguments


def _resolve(name: object, path: str) -> Callable[..., Any]:
    if not isinstance(name, str):
        raise UserError(f"{path}: has no _target_ to say what it is")
    if (path, name) not in _targets():
        raise UserError(
            f"{path}._target_ is {name}, which stands there in no file of {CONFIGS.name}/; "
            "for something of your own, add a YAML with this _target_ to the group's folder"
        )
    try:
        target = get_object(name)
    except Exception as error:  # whatever the import of a user's own module may raise
        raise UserError(f"{path}._target_: {name} cannot be imported: {error}") from error
    if not callable(target):
        raise UserError(f"{path}._target_: {name} is neither a class nor a function")
    return target


@functools.cache
def _yaml_files() -> dict[str, Any]:
    """Every file of configs/, by its path there."""
    paths = sorted(CONFIGS.rglob("*.yaml"))
    return {p.relative_to(CONFIGS).as_posix(): yaml.safe_load(p.read_text()) for p in paths}


@functools.cache
def _targets() -> frozenset[tuple[str, str]]:
    """Every `_target_` that stands in configs/, with its place: taken within its file's group, and as it stands."""
    found: set[tuple[str, str]] = set()
    for file, content in _yaml_files().items():
        for group in (file.partition("/")[0].removesuffix("_for"), ""):
            found.update(_find_targets(content, group))
    return frozenset(found)


def _find_targets(value: object, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        if isinstance(value.get("_target_"), str):
            yield place, value["_target_"]
        for key, child in value.items():
            yield from _find_targets(child, _join(place, key))


def machine_keys(file: str) -> dict[str, Any]:
    """What a file of configs/ says of places on the machine."""
    content = _yaml_files().get(file) or {}
    return {key: value for key, value in content.items() if key in MACHINE_PATHS and value != "???"}


def _sets(file: str, place: str) -> bool:
    """Whether a file of configs/ sets a key: one of its own group, or of the whole configuration."""
    group, *rest = place.split(".")
    own, whole = file.startswith((f"{group}/", f"{group}_for/")), file.startswith(("train.yaml", "experiment/"))
    content = _yaml_files().get(file) if own or whole else None
    if content is None:
        return False
    for key in rest if own else [group, *rest]:
        if not isinstance(content, dict) or key not in content:
            return False
        content = content[key]
    return True


def _parameters(target: Callable[..., Any]) -> dict[str, tuple[Any, bool]]:
    """The keyword parameters of a signature: type hint, and whether it must be given."""
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    parameters: dict[str, tuple[Any, bool]] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        hint = hints.get(name, Any)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:  # **common: Unpack[SomeTypedDict]
            (fields,) = typing.get_args(hint)
            for key, field_hint in typing.get_type_hints(fields).items():
                parameters[key] = (field_hint, key in fields.__required_keys__)
        else:
            parameters[name] = (hint, parameter.default is inspect.Parameter.empty)
    return parameters


_WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
}


def _fits(value: object, hint: Any) -> bool:
    """Whether a value of the configuration, or an object built for it, is of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return any(value is option or (isinstance(value, str) and value == option) for option in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if hint is float:
        return is_finite_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is Callable:
        return callable(value)
    kind = origin or hint
    return hint is Any or not inspect.isclass(kind) or isinstance(value, kind)


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_describe(option) for option in arguments)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is list:
        return f"a list, each of it {_describe(arguments[0])}"
    if hint in _WORDS:
        return _WORDS[hint]
    return "a node with a _target_" + (f" that makes a {hint.__name__}" if inspect.isclass(hint) else "")
