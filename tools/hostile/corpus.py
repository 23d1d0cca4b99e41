"""All cases: each module of them puts its own into the list when it is imported."""

from __future__ import annotations

from hostile import descriptions, files, hdf5, json_forms, names, places, values
from hostile.forge import CASES

__all__ = ["CASES", "MODULES"]

MODULES = (hdf5, places, files, names, json_forms, descriptions, values)
