"""The one file layer and the locks: nothing else opens, writes, renames or removes."""
