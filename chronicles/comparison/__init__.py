"""Two lineages side by side: where they part, what differs, which is better, what each has cost."""
