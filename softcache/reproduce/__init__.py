"""Tables of papers, from recipes."""
