"""Judges whether a training command keeps the promises that opt-ops relies on (docs/trainer-check.md).

``attempts`` starts and ends ranks. ``runs`` says which attempts are made and keeps what they did. ``acts`` are those in
which signals, a fence or a drill come in the middle of training. ``promises`` judges all of it.
"""
