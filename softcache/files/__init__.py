"""The file layer and the locks: what writes, renames or removes a file of a cache or a run folder goes through here."""
