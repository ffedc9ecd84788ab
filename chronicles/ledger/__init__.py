"""Where the time and the money of a lineage went."""
