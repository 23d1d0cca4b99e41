"""A cache for others: smaller ones out of it."""
