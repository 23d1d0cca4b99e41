"""Whole? Verify a cache, mend it, look into it."""
