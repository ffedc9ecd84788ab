"""A logbook for readers outside of the site: names, addresses and people's words replaced, and checked for leaks."""
