"""Students for other programs: exported and verified."""
