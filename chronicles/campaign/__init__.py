"""A campaign over sizes: the law of its losses, what the law expects of the next size, and the campaign's logbook."""
