"""Flags, keys of a file, `--help` and errors, all made of the fields of a frozen dataclass.

    max_sessions: Annotated[int, Flag("Engines at a time.", between(1, 4096))] = 64

A field whose type is a dataclass is a section: `memory_size_gb` of `cpu` is
`cpu: {memory_size_gb: 5}` in a file, --cpu-memory-size-gb 5 on the command line and
cpu.memory_size_gb in an error. A tuple of dataclasses is a list of sections, in a file only.

Not here: what a field means; rules between fields, which a dataclass has in its `__post_init__`,
after `check`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from kvc2 import errors
from kvc2.host.paths import user_path

# in what PyYAML says: an anchor's name, a tag, a value; not a sign or <a kind of token>
QUOTED_WORDS = re.compile(r"(['\"])(?!<)[^'\"]{2,}\1")
Values = dict[str, Any]  # field -> value, or section -> {field -> value}
Config = TypeVar("Config")
Command = Callable[..., None]


@dataclass(frozen=True)
class Allowed:
    """The values that `holds` takes; `text` names them in --help and in errors."""

    text: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Flag:
    """What a field tells its users. `shown` is its default in words, where its value says too
    little; `example` is its value in the example of --help, if it is to be there."""

    help: str
    allowed: Allowed | None = None
    shown: str = ""
    example: str = ""


def between(low: float, high: float) -> Allowed:
    return Allowed(f"{_number(low)} to {_number(high)}", lambda value: low <= value <= high)


def at_least(low: float) -> Allowed:
    return Allowed(f"at least {_number(low)}", lambda value: low <= value < math.inf)


def above(low: float) -> Allowed:
    return Allowed(f"a number above {_number(low)}", lambda value: low < value < math.inf)


def multiple_of(step: int, low: int, high: int) -> Allowed:
    text = f"a multiple of {step} from {low} to {high}"
    return Allowed(text, lambda value: low <= value <= high and value % step == 0)


def power_of_two(high: int) -> Allowed:
    text = f"a power of two from 1 to {high}"
    return Allowed(text, lambda value: 1 <= value <= high and value & (value - 1) == 0)


def matching(pattern: str, text: str) -> Allowed:
    return Allowed(text, lambda value: re.fullmatch(pattern, value) is not None)


def each_matching(pattern: str, text: str) -> Allowed:
    """Of a tuple of texts."""
    whole = re.compile(pattern)
    return Allowed(text, lambda values: all(whole.fullmatch(each) for each in values))


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


@dataclass(frozen=True)
class Field:
    """A field of a dataclass: its type without annotations, its flag; `default` may be MISSING."""

    name: str
    kind: Any
    flag: Flag | None
    default: Any


def fields_of(config: type) -> tuple[Field, ...]:
    """The fields of a dataclass, in their order."""
    hints = get_type_hints(config, include_extras=True)
    found = []
    for each in dataclasses.fields(config):
        hint = hints[each.name]
        kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        flag = next((note for note in notes if isinstance(note, Flag)), None)
        default = each.default if each.default_factory is MISSING else None
        found.append(Field(each.name, kind, flag, default))
    return tuple(found)


# Checks


def check(config: Any, section: str = "") -> None:
    """Refuse a value that its field doesn't allow, and make each path absolute: the beginning of a
    `__post_init__`. None, where the type has it, is allowed. Raises InvalidConfig."""
    for each in fields_of(type(config)):
        value = getattr(config, each.name)
        if each.flag is not None and value is not None:
            checked = _checked(_key(section, each.name), value, each)
            object.__setattr__(config, each.name, checked)


def _checked(key: str, value: Any, field: Field) -> Any:
    kinds = _kinds(field.kind)
    if Path in kinds:
        return config_path(key, value)
    for kind in kinds:
        if get_origin(kind) is Literal:
            _check_one_of(key, value, get_args(kind))
    allowed = field.flag.allowed if field.flag is not None else None
    if allowed is not None and not allowed.holds(value):
        raise errors.InvalidConfig(key, value, allowed.text)
    return value


def _check_one_of(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise errors.InvalidConfig(key, value, "one of " + ", ".join(choices))


@contextmanager
def refused_as(key: str, value: object) -> Iterator[None]:
    """An InvalidRequest of the block becomes the InvalidConfig of `key`."""
    try:
        yield
    except errors.InvalidRequest as error:
        raise errors.InvalidConfig(key, value, error.allowed) from error


def config_path(key: str, text: str | Path) -> Path:
    """An absolute path; a leading ~ is a home. Raises InvalidConfig."""
    with refused_as(key, str(text)):
        return user_path(key, text)


def _key(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _kinds(kind: Any) -> tuple[Any, ...]:
    """The members of a union, NoneType among them; a type that is none alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


# Files


def read(key: str, path: Path) -> Values:
    """The mapping that a YAML file holds. Raises InvalidConfig for `key`."""
    path = config_path(key, path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise errors.InvalidConfig(key, str(path), f"a readable file: {error}") from error
    return parse(key, content, shown=str(path))


def parse(key: str, content: bytes, *, shown: str) -> Values:
    """The mapping that YAML holds; nothing is an empty one. No error quotes the content, which may
    be secret, but `shown`. Raises InvalidConfig for `key`."""
    try:
        values = yaml.safe_load(content.decode())
    except UnicodeDecodeError as error:
        allowed = f"a readable file: UTF-8 ends at byte {error.start}"
        raise errors.InvalidConfig(key, shown, allowed) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = QUOTED_WORDS.sub("...", str(error.problem))
        raise errors.InvalidConfig(key, shown, f"YAML: {place}{problem}") from None
    except yaml.reader.ReaderError as error:
        allowed = f"YAML: a character at {error.position} that may not be there"
        raise errors.InvalidConfig(key, shown, allowed) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        allowed = f"YAML: a value can't be read ({type(error).__name__})"
        raise errors.InvalidConfig(key, shown, allowed) from None
    return {} if values is None else mapping(key, values, shown=shown)


def mapping(key: str, value: object, *, shown: object = None) -> Values:
    """`value` as a mapping of names to values. Raises InvalidConfig, which quotes `shown`."""
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value):
        quoted = value if shown is None else shown
        raise errors.InvalidConfig(key, quoted, "a mapping of names to values")
    return value


def overlay(values: Values, over: Values) -> Values:
    """`values` with those of `over` in their place, section by section."""
    made = dict(values)
    for key, value in over.items():
        if isinstance(value, dict):
            value = {**mapping(key, values.get(key) or {}), **value}
        made[key] = value
    return made


def build(config: type[Config], values: Values, section: str = "") -> Config:
    """The dataclass of nested values. An int is taken for a float, nothing else is converted.
    Raises InvalidConfig: an unknown key comes with the nearest valid one."""
    fields = {each.name: each for each in fields_of(config)}
    made = {}
    for name, value in values.items():
        key = _key(section, name)
        check_known(key, name, fields)
        made[name] = _made(key, value, fields[name].kind)
    for each in fields.values():
        if each.default is MISSING and each.name not in made:
            told = f"missing: {each.flag.help}" if each.flag is not None else "missing"
            raise errors.InvalidConfig(_key(section, each.name), None, told)
    return config(**made)


def check_known(key: str, name: str, known: Iterable[str]) -> None:
    """Raises InvalidConfig for a name that is not `known`, with the nearest that is."""
    if name not in set(known):
        close = errors.nearest(name, known)
        mend = f"did you mean {close}?" if close else f"known: {', '.join(sorted(known))}"
        raise errors.InvalidConfig(key, None, f"unknown key; {mend}")


def _made(key: str, value: object, kind: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, mapping(key, value or {}), key)  # type: ignore[arg-type]
    item = get_args(kind)[0] if get_origin(kind) is tuple else None
    if dataclasses.is_dataclass(item):
        if not isinstance(value, list):
            raise errors.InvalidConfig(key, value, "a list")
        places = [(f"{key}[{index}]", each) for index, each in enumerate(value)]
        return tuple(build(item, mapping(place, each), place) for place, each in places)  # type: ignore[arg-type]
    return typed(key, value, kind)


def typed(key: str, value: object, kind: Any) -> Any:
    """`value` as a field's type: an int is a float too. Raises InvalidConfig."""
    kinds = _kinds(kind)
    if value is None and NoneType in kinds:
        return None
    for each in kinds:
        if get_origin(each) is Literal:
            _check_one_of(key, value, get_args(each))
            return value
        if get_origin(each) is tuple and isinstance(value, list):
            return tuple(typed(key, item, get_args(each)[0]) for item in value)
        if each is Path and isinstance(value, str | Path) and str(value):
            return Path(value)
        if each is float and type(value) is int and abs(value) < 1 << 1000:  # else it overflows
            return float(value)
        if type(value) is each:
            return value
    names = " or ".join(getattr(each, "__name__", str(each)) for each in kinds if each != NoneType)
    raise errors.InvalidConfig(key, value, f"a value of type {names}")


# The command line


@dataclass(frozen=True)
class Option:
    """A field as a flag: of a section, or of none ("")."""

    section: str
    field: Field
    flag: Flag

    @property
    def name(self) -> str:
        """As a command's parameter."""
        return f"{self.section}_{self.field.name}" if self.section else self.field.name

    @property
    def text(self) -> str:
        """As it is written on a command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def help(self) -> str:
        notes = [f"default: {self.flag.shown or _shown(self.field.default)}"]
        if self.flag.allowed is not None:
            notes.append(f"allowed: {self.flag.allowed.text}")
        return f"{self.flag.help}  [{'; '.join(notes)}]"


def options_of(config: Any, section: str = "") -> Iterator[Option]:
    """An option for each field that has a flag, those of the sections after those before them."""
    for each in fields_of(config):
        if each.flag is not None:
            yield Option(section, each, each.flag)
        elif dataclasses.is_dataclass(each.kind):
            yield from options_of(each.kind, each.name)


def takes(config: type) -> Callable[[Command], Command]:
    """Decorates a typer command `f(its own parameters, **given)`: it takes the options of `config`
    in place of **given, None for what is not given, so that the others can go over a file."""

    def decorate(command: Command) -> Command:
        known = inspect.signature(command, eval_str=True).parameters.values()
        own = [each for each in known if each.kind is not inspect.Parameter.VAR_KEYWORD]
        made = [_parameter(each) for each in options_of(config)]
        command.__signature__ = inspect.Signature([*own, *made])  # type: ignore[attr-defined]
        return command

    return decorate


def nested(config: type, given: Values) -> Values:
    """Options as a file nests them, without those that are None."""
    values: Values = {}
    for each in options_of(config):
        if given.get(each.name) not in (None, []):  # [] is a list's option that isn't given
            place = values.setdefault(each.section, {}) if each.section else values
            place[each.field.name] = given[each.name]
    return values


def example(command: str, config: type) -> str:
    """A command line with every option that has an example."""
    words = [f"{each.text} {each.flag.example}" for each in options_of(config) if each.flag.example]
    return f"Example: {' '.join([command, *words])}"


def _parameter(option: Option) -> inspect.Parameter:
    import typer  # here, since what only reads a configuration needs no command line

    kind = option.field.kind
    if get_origin(kind) is tuple:  # an option that may come several times
        kind = list[get_args(kind)[0]]  # type: ignore[misc]
    names = f"{option.text}/--no{option.text[1:]}" if kind is bool else option.text
    about = typer.Option(names, help=option.help, show_default=False)
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, about],
    )


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if default == ():
        return "none"
    return _number(default) if isinstance(default, float) else str(default)
