"""Codec and features of a member as its manifest describes them, checked against this version and against the stored arrays."""

from __future__ import annotations

from collections.abc import Mapping

from softcache.cache.plan import FeatureInfo, MemberInfo
from softcache.cache.plan_rules import width_of
from softcache.cache.reader import CacheReader
from softcache.codecs import Codec, codec_constants, restore_codec
from softcache.codecs.features import StoredFeature
from softcache.errors import CacheError


def member_codec(reader: CacheReader, member: MemberInfo) -> Codec:
    """The codec of a member's logits, with its constants.

    Raises:
        CacheError: its constants, its records or its data sets are not those that this version's codec has.
    """
    assert member.codec is not None  # a member of features alone has none
    num_classes = width_of(member, reader.manifest.plan)
    constants = codec_constants(reader.constants(member.name))
    codec = restore_codec(member.codec["name"], member.codec["parameters"], num_classes, constants)
    if codec.format > reader.manifest.plan.format:
        raise CacheError(
            f"{reader.path}: member {member.name!r} is stored as {codec.text}, which format version "
            f"{reader.manifest.plan.format} does not have",
            tip="the cache was not written by softcache, or was changed; copy it again",
        )
    if codec.constants.keys() != constants.keys():
        raise CacheError(
            f"{reader.path}: member {member.name!r} has the constants {sorted(constants)}, codec {codec.text} takes "
            f"{sorted(codec.constants)}",
            tip="the cache was not written by softcache, or was changed; copy it again",
        )
    described = (dict(member.codec["parameters"]), list(member.codec["fields"]))
    if (codec.parameters, [field.to_json() for field in codec.fields]) != described:
        raise CacheError(
            f"{reader.path}: the records of member {member.name!r} are laid out otherwise than {codec.text} has them",
            tip="install the softcache that wrote the cache, or dump again",
        )
    bound: dict[str, tuple[str, tuple[int, ...]]] = {"eps": ("<f2", ())} if codec.bounded else {}
    _check_arrays(reader, member.name, {**codec.arrays, **bound}, f"codec {codec.text}")
    return codec


def member_feature(reader: CacheReader, member: str, info: FeatureInfo) -> StoredFeature:
    """How a feature of a member is stored; CacheError where its data sets are others."""
    feature = StoredFeature.described(info.name, info.dtype, info.stored, info.arrays, info.shapes)
    _check_arrays(reader, member, feature.arrays(), f"feature {info.name!r}")
    return feature


def _check_arrays(
    reader: CacheReader, member: str, wanted: Mapping[str, tuple[str, tuple[int, ...]]], what: str
) -> None:
    """The data sets of a member's parts must be of the kind that decoding takes."""
    found = reader.array_kinds(member)
    for name, kind in wanted.items():
        if found.get(name) != kind:
            raise CacheError(
                f"{reader.path}: {what} of member {member!r} needs the data set {name!r} as {kind}, "
                f"the manifest names {found.get(name)}",
                tip="the cache was not written by softcache, or was changed; copy it again",
            )
