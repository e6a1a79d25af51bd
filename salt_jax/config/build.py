"""Frozen dataclasses from nested mappings: same names, nothing missing, nothing more, every value
of its kind.
"""

import dataclasses
import typing
from collections.abc import Iterator

from salt_jax.errors import UserError
from salt_jax.keys import is_finite


def all_keys(kind: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every key of a dataclass and its sections by its path, as the field that `keys.key` made."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(section := hints[field.name]):
            yield from all_keys(typing.cast(type, section), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


def build(kind, config, path):
    """One dataclass from one ConfigDict, recursively: same names, nothing missing, nothing more."""
    hints = typing.get_type_hints(kind)
    if not hasattr(config, "keys"):
        raise UserError(
            f"{path} is {config!r}, not a section of keys; docs/guide.md lists every key"
        )
    unknown, missing = sorted(set(config) - set(hints)), sorted(set(hints) - set(config))
    if unknown or missing:
        raise UserError(
            f"{path} has unknown keys {_few(unknown)} and lacks {_few(missing)}; configs/base.py "
            "lists every key"
        )
    must = {field.name: field.metadata.get("must") for field in dataclasses.fields(kind)}
    values = {}
    for name, hint in hints.items():
        value, where = config[name], f"{path}.{name}"
        if dataclasses.is_dataclass(hint):
            values[name] = build(hint, value, where)
        elif typing.get_origin(hint) is typing.Literal:
            if value not in typing.get_args(hint):
                raise UserError(
                    f"{where} is {value!r}; choose one of {', '.join(typing.get_args(hint))}"
                )
            values[name] = value
        else:
            values[name] = _value(value, hint, where)
            _refuse_value(values[name], must.get(name), where)
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _value(value, hint, where):
    """A number, word or tuple of these, if it is of the kind that is asked for; an int may stand
    for a float.
    """
    several = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if several else hint
    given = isinstance(value, list | tuple)
    values = list(value) if several and given else [value]
    for one in values:
        fits = isinstance(one, (int, float) if kind is float else kind)
        if not fits or isinstance(one, bool) != (kind is bool) or several != given:
            raise UserError(
                f"{where} is {tuple(value) if given else value!r}; it has to be "
                f"{'several' if several else 'one'} {kind.__name__}"
            )
    typed = tuple(float(one) if kind is float else one for one in values)
    return typed if several else typed[0]


def _refuse_value(value, must, where):
    if not is_finite(value):
        raise UserError(f"{where}={value} must be finite")
    if must and not must.holds(value):
        raise UserError(f"{where}={value} must be {must.words}")


def _few(names: list[str]) -> list[str]:
    return names if len(names) <= 10 else [*names[:10], f"... and {len(names) - 10} more"]
