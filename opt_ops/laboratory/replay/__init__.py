"""Published records of failures, replayed through the real supervisor in virtual time, beside an oracle."""
