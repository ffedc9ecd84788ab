"""Reads `orders.json`. Orders that are not as docs/formats.md says, or not by the owner of the lineage, are refused.

Refused orders change nothing: the last good ones stay in force, and the ranks run on.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opt_ops.core.names import EVALUATION, PROBE
from opt_ops.errors import OptOpsError
from opt_ops.node.log import log
from opt_ops.runfolder.files import read_json
from opt_ops.runfolder.owner import HIGHEST_EPOCH, OwnerFile

_ATTEMPT = re.compile(r"[A-Za-z0-9_]+\.[0-9]+-a[0-9]+")
_DUMP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_MOST_RANKS = 1024  # of a node
_LONGEST_BURN_IN = 600.0  # seconds; the configuration allows less


class OrdersRefused(ValueError):
    """Orders that are not obeyed, and why."""


class OrdersFile:
    """The orders of a lineage, as its agents read them."""

    def __init__(self, folder: Path, node: str) -> None:
        self._path = folder / "orders.json"
        self._owner = OwnerFile(folder / "journal")
        self._node = node
        self.seen = (0, 0)
        """Epoch and sequence number of the orders that were accepted last."""
        self.refused: dict[str, Any] | None = None
        """Why the present file is not obeyed, since when, and how often it was read so; None: it is obeyed."""

    def read(self) -> dict[str, Any] | None:
        """Return the orders in the file; None if there are none now, or if they are refused."""
        try:
            # By whom the file is written decides, not what it says: only this user or root.
            value = read_json(self._path, orders=True)
            if value is None:
                return None
            orders = orders_of(value, self._node)
            self._check(orders["epoch"], orders["seq"])
        except (OSError, OptOpsError, OrdersRefused) as error:
            self._refuse(str(error))
            return None
        self.refused = None
        return orders

    def accepted(self, orders: Mapping[str, Any]) -> None:
        """Remember that these orders were carried out."""
        self.seen = orders["epoch"], orders["seq"]

    def _check(self, epoch: int, seq: int) -> None:
        """Refuse orders of an older daemon process, and those of an epoch that the lineage's owner does not have."""
        if (epoch, seq) == self.seen:
            return  # a new owner has not written its own yet
        if (epoch, seq) < self.seen:
            raise OrdersRefused(
                f"epoch {epoch}, seq {seq} is older than {self.seen[0]}, {self.seen[1]}, which was obeyed"
            )
        owner = self._owner.read()  # after the orders: an owner is named before it writes orders
        if owner is not None and owner.epoch != epoch:
            raise OrdersRefused(f"its epoch is {epoch}, but the owner of the lineage has epoch {owner.epoch}")

    def _refuse(self, why: str) -> None:
        if self.refused is None or self.refused["why"] != why:
            log(f"orders.json is not obeyed: {why}")
            self.refused = {"why": why[:1000], "since": time.time(), "count": 0}
        self.refused["count"] += 1


def orders_of(value: Any, node: str) -> dict[str, Any]:
    """Orders with every field of its type. Unknown fields are left out.

    Raises:
        OrdersRefused: they are not as docs/formats.md says.
    """
    fields = _mapping(value, "the file")
    drills = [_drill(each) for each in _list(fields.get("drills", []), "drills")]
    return {
        "epoch": _whole(fields.get("epoch"), "epoch", HIGHEST_EPOCH),
        "seq": _whole(fields.get("seq"), "seq", 1 << 53),
        "launch": None if fields.get("launch") is None else _launch(fields["launch"], node),
        "drills": drills,
        "released": [_text(each, "released") for each in _list(fields.get("released", []), "released")],
        "save": _optional_text(fields.get("save"), "save"),
        "dump": _dump(fields.get("dump")),
        "probes": [_probe(each, node) for each in _list(fields.get("probes", []), "probes")],
        "evaluate": None if fields.get("evaluate") is None else _evaluation(fields["evaluate"]),
        "burn_in_seconds": _seconds(fields.get("burn_in_seconds")),
    }


def _evaluation(value: Any) -> dict[str, Any]:
    fields = _mapping(value, "evaluate")
    name = _text(fields.get("evaluation"), "evaluation")
    if not EVALUATION.fullmatch(name):  # it becomes the name of a file
        raise OrdersRefused(f"evaluation is {name[:100]!r}, which is no name of an evaluation")
    argv = [_text(each, "argv") for each in _list(fields.get("argv"), "argv")]
    if not argv:
        raise OrdersRefused("evaluate has no command")
    where = {each: _text(fields.get(each), each) for each in ("node", "holder")}
    return {"evaluation": name, **where, "argv": argv, "nice": _whole(fields.get("nice", 0), "nice", 19)}


def _probe(value: Any, node: str) -> dict[str, Any]:
    probe = _launch(value, node, PROBE, "a probe")
    if len(probe["nodes"]) != 1:
        raise OrdersRefused("a probe has one node")
    return probe


def _launch(value: Any, node: str, names: re.Pattern[str] = _ATTEMPT, what: str = "an attempt") -> dict[str, Any]:
    fields = _mapping(value, "launch")
    attempt = _text(fields.get("attempt"), "attempt")
    if not names.fullmatch(attempt):
        raise OrdersRefused(f"attempt is {attempt[:100]!r}, which is no name of {what}")
    launch = {
        "attempt": attempt,
        "nodes": [_text(each, "nodes") for each in _list(fields.get("nodes"), "nodes")],
        "holders": _texts(fields.get("holders"), "holders"),
        "ranks_per_node": _whole(fields.get("ranks_per_node"), "ranks_per_node", _MOST_RANKS),
        "address": _text(fields.get("address"), "address"),
        "port": _whole(fields.get("port"), "port", 65535),
        "argv": [_text(each, "argv") for each in _list(fields.get("argv"), "argv")],
        "environment": _texts(fields.get("environment", {}), "environment"),
        "membership": None if fields.get("membership") is None else _membership(fields["membership"]),
        "warm": _texts(fields.get("warm", {}), "warm"),
        "standbys": {
            _text(key, "standbys"): _whole(count, "standbys", _MOST_RANKS)
            for key, count in _mapping(fields.get("standbys", {}), "standbys").items()
        },
    }
    if node in launch["holders"] and node not in launch["nodes"]:
        raise OrdersRefused(f"launch has a holder of {node}, which is not among its nodes")
    if not launch["argv"] or launch["ranks_per_node"] < 1 or any("=" in name for name in launch["environment"]):
        raise OrdersRefused("launch has no command, no ranks, or a variable whose name holds `=`")
    if launch["membership"] is not None:
        _check_membership(launch)
    return launch


def _membership(value: Any) -> dict[str, Any]:
    fields = _mapping(value, "membership")
    ranks = [_list(each, "ranks") for each in _list(fields.get("ranks"), "ranks")]
    if not ranks or any(len(each) != 2 for each in ranks):
        raise OrdersRefused("ranks of a membership must be pairs of a node and a number there")
    return {
        "generation": _whole(fields.get("generation"), "generation", 1 << 31),
        "ranks": [(_text(node, "ranks"), _whole(local, "ranks", _MOST_RANKS - 1)) for node, local in ranks],
        "new": [_whole(each, "new", len(ranks) - 1) for each in _list(fields.get("new"), "new")],
        "address": _text(fields.get("address"), "address"),
        "port": _whole(fields.get("port"), "port", 65535),
    }


def _check_membership(launch: Mapping[str, Any]) -> None:
    ranks = launch["membership"]["ranks"]
    places = {(node, local) for node in launch["nodes"] for local in range(launch["ranks_per_node"])}
    if len(set(ranks)) < len(ranks) or set(ranks) != places:
        raise OrdersRefused("the ranks of the membership are not those of its nodes, each once")


def _drill(value: Any) -> dict[str, Any]:
    fields = _mapping(value, "drills")
    arguments = dict(_mapping(fields.get("arguments"), "arguments of a drill"))
    for name in ("rank", "xid"):
        if name in arguments:
            arguments[name] = _whole(arguments[name], name, 1 << 31)
    if "ranks" in arguments:
        arguments["ranks"] = [_whole(each, "rank", 1 << 31) for each in _list(arguments["ranks"], "ranks")]
    said = {"drill": _text(fields.get("drill"), "drill"), "fault": _text(fields.get("fault"), "fault")}
    return {**said, "node": _optional_text(fields.get("node"), "node"), "arguments": arguments}


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise OrdersRefused(f"{name} is {_kind(value)}, and must be an object")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise OrdersRefused(f"{name} is {_kind(value)}, and must be a list")
    return value


def _whole(value: Any, name: str, most: int) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise OrdersRefused(f"{name} is {_kind(value)}, and must be a whole number from 0 to {most}")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or "\0" in value or not _is_unicode(value):
        raise OrdersRefused(f"{name} is {_kind(value)}, and must be text")
    return value


def _is_unicode(text: str) -> bool:
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text)


def _optional_text(value: Any, name: str) -> str | None:
    return None if value is None else _text(value, name)


def _texts(value: Any, name: str) -> dict[str, str]:
    return {_text(key, name): _text(text, name) for key, text in _mapping(value, name).items()}


def _dump(value: Any) -> str | None:
    """It becomes the name of a folder."""
    name = _optional_text(value, "dump")
    if name and not _DUMP.fullmatch(name):
        raise OrdersRefused(f"dump is {name[:100]!r}, which is no name of a request")
    return name


def _seconds(value: Any) -> float:
    number = 0.0 if value is None else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise OrdersRefused(f"burn_in_seconds is {_kind(value)}, and must be a number")
    if not 0 <= number <= _LONGEST_BURN_IN:
        raise OrdersRefused(f"burn_in_seconds must be from 0 to {_LONGEST_BURN_IN:g}")
    return float(number)


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float):
        return repr(value)[:40]
    return {str: "text", list: "a list", dict: "an object"}.get(type(value), type(value).__name__)
