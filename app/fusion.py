"""Fusion: several ranked lists of the same things to one order."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def fuse(lists: Sequence[Mapping[Key, float]], weights: Sequence[float], *, length: int) -> dict[Key, float]:
    """Add up the scores that each list gives, relative to its best one and weighted; in [0, 1] for scores above 0.

    What a list does not hold scored there at most as its last entry, if the list has its full `length`; else nothing.

    Relative scores keep what ranks lose: by how much the best is better. Against reciprocal ranks, which the engines
    offer, that gains 0.01 to 0.02 nDCG@10 on SQuAD, MTRAG and Cranfield (docs/retrieval.md).
    """
    total = sum(weight for one, weight in zip(lists, weights, strict=True) if one) or 1.0
    fused: dict[Key, float] = dict.fromkeys((key for one in lists for key in one), 0.0)
    for one, weight in zip(lists, weights, strict=True):
        best = max(one.values(), default=0.0)
        if best <= 0:
            continue
        lowest = min(one.values()) if len(one) >= length else 0.0
        for key in fused:
            fused[key] += weight / total * one.get(key, lowest) / best
    return fused
