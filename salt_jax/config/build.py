"""Frozen dataclasses from nested mappings: same names, nothing missing, nothing more, every value
of its kind.
"""

import dataclasses
import typing

from salt_jax.errors import UserError


def build(kind, config, path):
    """One dataclass from one ConfigDict, recursively: same names, nothing missing, nothing more."""
    hints = typing.get_type_hints(kind)
    if not hasattr(config, "keys"):
        raise UserError(
            f"{path} is {config!r}, not a section of keys; configs/base.py lists every key"
        )
    unknown, missing = sorted(set(config) - set(hints)), sorted(set(hints) - set(config))
    if unknown or missing:
        raise UserError(
            f"{path} has unknown keys {_few(unknown)} and lacks {_few(missing)}; configs/base.py "
            "lists every key"
        )
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
    value = tuple(value) if several and isinstance(value, list) else value
    for one in value if several and isinstance(value, tuple) else [value]:
        fits = isinstance(one, (int, float) if kind is float else kind)
        if (
            not fits
            or isinstance(one, bool) != (kind is bool)
            or several != isinstance(value, tuple)
        ):
            raise UserError(
                f"{where} is {value!r}; it has to be {'several' if several else 'one'} "
                f"{kind.__name__}"
            )
    as_told = lambda one: float(one) if kind is float else one
    return tuple(map(as_told, value)) if several else as_told(value)


def _few(names: list[str]) -> list[str]:
    return names if len(names) <= 10 else [*names[:10], f"... and {len(names) - 10} more"]
