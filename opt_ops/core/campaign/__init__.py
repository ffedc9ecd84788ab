"""Campaigns over sizes: what their journal holds, the state it tells, and which size comes next. Pure."""
