"""What the watch could not read or do, in the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from opt_ops.core import events as e
from opt_ops.core.state.model import Failing, State, left_out_key
from opt_ops.core.state.update import with_item


def _input_left_out(state: State, event: e.InputLeftOut, _: e.Entry) -> State:
    return replace(state, left_out=with_item(state.left_out, left_out_key(event.source, event.file), event))


def _watcher_failed(state: State, event: e.WatcherFailed, entry: e.Entry) -> State:
    known = state.failing.get(event.watcher)
    failing = Failing(why=event.why, since=known.since if known else entry.ts)
    return replace(state, failing=with_item(state.failing, event.watcher, failing))


def _watcher_recovered(state: State, event: e.WatcherRecovered, _: e.Entry) -> State:
    return replace(state, failing={name: each for name, each in state.failing.items() if name != event.watcher})


FOLDS: Mapping[type[e.Event], Callable[[State, Any, e.Entry], State]] = {
    e.InputLeftOut: _input_left_out,
    e.WatcherFailed: _watcher_failed,
    e.WatcherRecovered: _watcher_recovered,
}
