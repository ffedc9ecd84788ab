"""Mappings and sets that share their items between versions, so that one more item costs the same at any size.

A journal may hold a hundred thousand notes, alerts or checkpoints. If each event copied the mapping that it adds to, a
replay would take hours. The newest version holds the items; an older one holds what is different from the next version.
Reading an older version moves the items to it, so every version stays right, and the newest is as fast as a dict.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from collections.abc import Set as AbstractSet
from typing import Any, Final, TypeVar

_T = TypeVar("_T")
_ABSENT: Final[Any] = object()


class _Items:
    """The items of one version; or None, and by which key they differ from those of another version."""

    __slots__ = ("before", "items", "key", "other")

    def __init__(self, items: dict[str, Any] | None) -> None:
        self.items = items
        self.other: _Items | None = None
        self.key = ""
        self.before: Any = _ABSENT

    def differ(self, other: _Items, key: str, value: Any) -> None:
        """Hand the items over to another version, in which only `key` is different; here it has `value`."""
        self.items, self.other, self.key, self.before = None, other, key, value

    def present(self) -> dict[str, Any]:
        """The items of this version, which holds them from now on."""
        way: list[_Items] = []
        version = self
        while version.items is None:
            way.append(version)
            assert version.other is not None
            version = version.other
        items = version.items
        for older in reversed(way):
            newer, key, value = older.other, older.key, older.before
            assert newer is not None
            newer.differ(older, key, items.get(key, _ABSENT))
            if value is _ABSENT:
                del items[key]
            else:
                items[key] = value
            older.items, older.other, older.before = items, None, _ABSENT
        return items


class Versions(Mapping[str, _T]):
    """An immutable mapping in the order in which keys were added; `with_item` gives the next version."""

    __slots__ = ("_version",)

    def __init__(self, items: Mapping[str, _T] | Iterable[tuple[str, _T]] | _Items = ()) -> None:
        self._version = items if isinstance(items, _Items) else _Items(dict(items))

    def with_item(self, key: str, value: _T) -> Versions[_T]:
        """The version with one more or another item."""
        items = self._present()
        following = _Items(items)
        self._version.differ(following, key, items.get(key, _ABSENT))
        items[key] = value
        return Versions(following)

    def _present(self) -> dict[str, _T]:
        version = self._version
        return version.items if version.items is not None else version.present()

    def __getitem__(self, key: str) -> _T:
        return self._present()[key]

    def __contains__(self, key: object) -> bool:
        return key in self._present()

    def __len__(self) -> int:
        return len(self._present())

    # Who goes through the items may add some meanwhile, to a later version: these work on copies.

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._present()))

    def __reversed__(self) -> Iterator[str]:
        return reversed(list(self._present()))

    def keys(self) -> KeysView[str]:
        """The keys, in order."""
        return dict(self._present()).keys()

    def values(self) -> ValuesView[_T]:
        """The values, in order."""
        return dict(self._present()).values()

    def items(self) -> ItemsView[str, _T]:
        """Keys and values, in order."""
        return dict(self._present()).items()

    def newest(self) -> _T | None:
        """The value of the key that was added last; None if there is none."""
        items = self._present()
        return items[next(reversed(items))] if items else None

    def __repr__(self) -> str:
        return repr(self._present())


class VersionedSet(AbstractSet[str]):
    """An immutable set in the order of addition; `with_member` gives the next version."""

    __slots__ = ("_members",)

    def __init__(self, members: Iterable[str] = (), versions: Versions[None] | None = None) -> None:
        self._members = versions if versions is not None else Versions(dict.fromkeys(members))

    def with_member(self, member: str) -> VersionedSet:
        """The version with one more member."""
        return self if member in self._members else VersionedSet((), self._members.with_item(member, None))

    def __contains__(self, member: object) -> bool:
        return member in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return repr(set(self))
