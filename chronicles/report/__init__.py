"""The report of a lineage: its objects, how they are built, and how they become JSON."""
