"""Replays: published records of failures, met by the real supervisor in virtual time, and compared with an oracle."""
