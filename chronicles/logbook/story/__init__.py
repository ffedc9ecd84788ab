"""The story of a lineage: what mattered, by phase; like entries folded into one; what was tried and what worked."""
