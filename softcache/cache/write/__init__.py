"""How the files of a cache are written; reading needs none of it."""
