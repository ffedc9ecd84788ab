"""Checks the JSON of a manifest: what is read from it afterwards has the types that ``docs/formats.md`` promises."""

import math
from collections.abc import Mapping
from typing import Any, cast

LARGEST_MANIFEST = 256 * 1024 * 1024
"""Bytes. Sixteen thousand ranks with some files each are some ten MiB."""

_OBJECTS = ("layout", "telemetry", "files")
_OPTIONAL_OBJECTS = ("schedule", "model", "guard", "nodes")


def checked(value: Any) -> dict[str, Any]:
    """The fields of a manifest. A whole number may be written as a float.

    Raises:
        ValueError, TypeError: a field is missing or of another type; says which.
    """
    fields = dict(_object(value, "the manifest"))
    for name in ("step", "data_position", "tokens"):
        fields[name] = _whole(fields.get(name), name)
    if fields.get("seed") is not None:
        fields["seed"] = _whole(fields["seed"], "seed")
    for name in ("attempt", "settings_digest"):
        _text(fields.get(name), name)
    if not _is_number(fields.get("ts")):
        raise ValueError("`ts` is not a number")
    for name in _OBJECTS:
        _object(fields.get(name), f"`{name}`")
    for name in _OPTIONAL_OBJECTS:
        if fields.get(name) is not None:
            _object(fields[name], f"`{name}`")
    fields["nodes"] = fields.get("nodes") or {}
    for name in ("lr_factors", "skips", "data_since"):
        fields[name] = _pairs(fields.get(name) or [], name)
    telemetry = dict(fields["telemetry"])
    for name in ("num_updates", "skipped"):
        if telemetry.get(name) is None:
            telemetry.pop(name, None)
        else:
            telemetry[name] = _whole(telemetry[name], f"telemetry.{name}")
    fields["telemetry"] = telemetry
    _places(fields["nodes"])
    fields["files"] = _files(fields["files"], fields["nodes"])
    return fields


def _files(files: Mapping[str, Any], nodes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, value in files.items():
        file = dict(_object(value, f"the file {name!r}"))
        file["size"] = _whole(file.get("size"), f"files.{name}.size")
        _text(file.get("sha256"), f"files.{name}.sha256")
        if not isinstance(file.get("state", False), bool):
            raise TypeError(f"`files.{name}.state` is not true or false")
        if nodes and not _names_some_of(nodes, file.get("nodes")):
            raise ValueError(f"`files.{name}.nodes` does not name nodes of the manifest")
        found[name] = file
    return found


def _names_some_of(nodes: Mapping[str, Any], holders: Any) -> bool:
    found = cast("list[Any]", holders) if isinstance(holders, list) else []
    return bool(found) and all(isinstance(each, str) and each in nodes for each in found)


def _places(nodes: Mapping[str, Any]) -> None:
    for name, value in nodes.items():
        place = _object(value, f"the node {name!r}")
        for key in ("host", "folder"):
            _text(place.get(key), f"nodes.{name}.{key}")


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{name} is not an object")
    return cast("dict[str, Any]", value)


def _text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"`{name}` is not text")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any, name: str) -> int:
    if not _is_number(value) or value != int(value) or not 0 <= value < 2**63:
        raise ValueError(f"`{name}` is not a whole number from 0 on")
    return int(value)


def _pairs(value: Any, name: str) -> list[list[Any]]:
    pairs = cast("list[Any]", value) if isinstance(value, list) else [None]
    found = [cast("list[Any]", each) for each in pairs if isinstance(each, list)]
    if len(found) < len(pairs) or not all(len(each) == 2 and all(map(_is_number, each)) for each in found):
        raise ValueError(f"`{name}` is not a list of pairs of numbers")
    return found
