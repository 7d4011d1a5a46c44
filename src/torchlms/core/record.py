"""Frozen records to JSON and back, with the schema checked before anything else."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from torchlms.errors import PlanMismatch

T = TypeVar("T")

_SCALARS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def to_json(record: Any) -> Any:
    """Plain lists, dicts and scalars; fields that hold their default are left out."""
    if isinstance(record, Enum):
        return record.value
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {
            field.name: to_json(getattr(record, field.name))
            for field in dataclasses.fields(record)
            if field.name == "schema" or getattr(record, field.name) != field.default
        }
    if isinstance(record, (tuple, list)):
        return [to_json(item) for item in record]
    if isinstance(record, dict):
        return {str(key): to_json(item) for key, item in record.items()}
    return record


@cache
def _field_types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def from_json(kind: Any, data: Any) -> Any:
    """Build ``kind`` (a dataclass, enum, tuple, union with None, or scalar type) from plain data."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        inner = [arm for arm in typing.get_args(kind) if arm is not type(None)]
        return None if data is None else from_json(inner[0], data)
    if origin is tuple:
        if not isinstance(data, list):
            raise ValueError(f"{str(data)[:40]} where a list belongs")
        arms = typing.get_args(kind)
        if len(arms) == 2 and arms[1] is Ellipsis:
            return tuple(from_json(arms[0], item) for item in data)
        return tuple(from_json(arm, item) for arm, item in zip(arms, data, strict=True))
    if origin is dict:
        return {key: from_json(typing.get_args(kind)[1], item) for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        fields = _field_types(typing.cast("type", kind))
        unknown = sorted(set(data) - set(fields))
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r} in {getattr(kind, '__name__', kind)}")
        made: Any = kind
        return made(**{name: from_json(fields[name], item) for name, item in data.items()})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(data)
    if kind is float and type(data) is int:
        return float(data)
    if kind in _SCALARS and type(data) is not kind:
        raise ValueError(f"{data!r} where {_SCALARS[kind]} belongs")
    return data


def save_record(record: Any, path: str | Path) -> None:
    Path(path).write_text(json.dumps(to_json(record), separators=(",", ":")) + "\n")


def load_record(cls: type[T], path: str | Path, *, schema: str) -> T:
    """Read ``path`` as a ``cls``, or as a record that holds one under its name, as that of a run does;
    PlanMismatch names the file and what is wrong with it."""
    name = cls.__name__.lower()
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise PlanMismatch(f"cannot read {name} file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PlanMismatch(f"{path} is not JSON, so not a {name} file: {error}") from error
    inner = data.get(name) if isinstance(data, dict) else None
    if isinstance(inner, dict) and "schema" in inner:
        data = inner
    found = data.get("schema") if isinstance(data, dict) else None
    if str(found).partition("/")[0] != schema.partition("/")[0]:
        what = f"a {found}" if found else "no record of torchlms"
        raise PlanMismatch(f"{path} is not a {name} file: it holds {what}, and not a {schema}")
    if found != schema:
        raise PlanMismatch(
            f"{path} has schema {found!r}, this version reads {schema!r}: "
            f"make the {name} file again with this version of torchlms"
        )
    try:
        return typing.cast("T", from_json(cls, data))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise PlanMismatch(f"{path} is not a complete {name} file: {error}") from error
