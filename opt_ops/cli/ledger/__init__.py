"""The command `opt-ops ledger`."""
