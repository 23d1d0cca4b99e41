"""croissant.json of a cache: its files with their hashes, in MLCommons' form (Croissant 1.0, JSON-LD), for programs that read it.

Made of the manifest and the preview alone. A cache of very many files names the lists that describe them instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from softcache.cache.card.front_matter import TAGS, license_identifier
from softcache.cache.card.preview_columns import Column, preview_columns
from softcache.cache.card.text import plain, without_folders
from softcache.cache.file_lists import ListedFiles
from softcache.cache.manifest import Manifest
from softcache.cache.schema import MANIFEST

MOST_FILES = 2000
HDF5, PARQUET, JSON = "application/x-hdf5", "application/x-parquet", "application/json"
TYPES = {"text": "sc:Text", "number": "sc:Float", "whole": "sc:Integer"}
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def croissant(manifest: Manifest, preview: tuple[str, bytes] | None = None) -> bytes:
    """The file, in UTF-8; the same for the same cache and preview.

    Args:
        preview: path and bytes of the table of samples that lies beside it.
    """
    plan = manifest.plan
    source = plain(without_folders(plan.samples.source))
    made: dict[str, Any] = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": f"Soft targets for {source}",
        "description": f"A softcache cache: answers of {len(plan.members)} trained models to {plan.samples.count} samples, in "
        f"{plan.views.count} views each, for knowledge distillation. The samples themselves are not in it.",
        "license": license_identifier(plan.license) if plan.license is None else plain(plan.license),
        "version": manifest.id,
        "keywords": list(TAGS),
        "distribution": [_file(*one) for one in _files(manifest)],
    }
    if preview is not None:
        path, data = preview
        made["distribution"].append(_file(path, len(data), hashlib.sha256(data).hexdigest(), PARQUET))
        made["recordSet"] = [_records(path, preview_columns(plan))]
    return (json.dumps(made, ensure_ascii=False, indent=1) + "\n").encode()


def _files(manifest: Manifest) -> Iterator[tuple[str, int, str, str]]:
    """(path, bytes, sha256, media type) of the manifest, and of what it names."""
    yield MANIFEST, len(manifest.to_bytes()), manifest.id, JSON
    if isinstance(manifest.files, ListedFiles):
        yield from ((one.path, one.nbytes, one.sha256, JSON) for one in manifest.files.lists)
    if len(manifest.files) <= MOST_FILES:
        yield from (
            (one.path, one.nbytes, one.sha256, HDF5 if one.path.endswith(".h5") else JSON) for one in manifest.files
        )


def _file(path: str, nbytes: int, sha256: str, media: str) -> dict[str, Any]:
    about = {"@type": "cr:FileObject", "@id": path, "name": path, "contentUrl": path, "contentSize": f"{nbytes} B"}
    return {**about, "encodingFormat": media, "sha256": sha256}


def _records(path: str, columns: list[Column]) -> dict[str, Any]:
    """The preview's rows."""
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"preview/{column.name}",
            "name": f"preview/{column.name}",
            "description": plain(column.about),
            "dataType": TYPES[column.kind],
            **({"repeated": True} if column.many else {}),
            "source": {"fileObject": {"@id": path}, "extract": {"column": column.name}},
        }
        for column in columns
    ]
    about = "some samples, and what the teachers answered to them: for looking at"
    return {"@type": "cr:RecordSet", "@id": "preview", "name": "preview", "description": about, "field": fields}
