"""Caches that lie somewhere else: transports, and what is fetched of them. No torch."""
