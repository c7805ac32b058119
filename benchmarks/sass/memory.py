"""Wavefronts of shared memory and lines of global memory that a warp's access takes.

Shared memory has 32 banks of 4 bytes, each serving one word a cycle; lanes that want the same word share it.
Accesses of 8 and 16 bytes are served for 16 and 8 different addresses at a time, in the order of the lanes
and addresses that occur again counting once: the least that it can take.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Vector = Any
BANKS = 32
LINE = 128
SECTOR = 32


def shared_wavefronts(addresses: Vector, lanes: Vector, size: int) -> tuple[Vector, Vector]:
    """Of each warp, and how many they were without bank conflicts.

    addresses: uint64 [warps, 32]; lanes: bool of the same shape; size: bytes a lane. A warp none of whose
    lanes takes part needs none.
    """
    words = np.maximum(size // 4, 1)
    group = 32 // words
    # of the lanes in the same word, or with the same address, the first counts
    word = np.where(lanes, addresses >> np.uint64(2), ~np.uint64(0))
    order = np.argsort(word, 1, kind="stable")
    ascending = np.take_along_axis(word, order, 1)
    new = ascending != ~np.uint64(0)
    new[:, 1:] &= ascending[:, 1:] != ascending[:, :-1]
    first = np.zeros_like(new)
    np.put_along_axis(first, order, new, 1)
    ideal = -(-first.sum(1) // group)
    if words == 1:
        return most_in_a_bank(word, first), ideal
    total = np.zeros(len(addresses), np.int64)
    rank = np.cumsum(first, 1) - 1
    each = np.repeat(word, words, 1) + np.tile(np.arange(words, dtype=np.uint64), 32)
    for part in range(words):
        chosen = first & (rank // group == part)
        total += most_in_a_bank(each, np.repeat(chosen, words, 1))
    return total, ideal


def most_in_a_bank(words: Vector, chosen: Vector) -> Vector:
    """Of each row the most of its chosen words, all different, that lie in one bank."""
    row, column = np.nonzero(chosen)
    bank = (words[row, column] & np.uint64(BANKS - 1)).astype(np.int64)
    return np.bincount(row * BANKS + bank, minlength=len(words) * BANKS).reshape(-1, BANKS).max(1)


def distinct(addresses: Vector, lanes: Vector, size: int, unit: int) -> Vector:
    """Of each warp how many different pieces of `unit` bytes it touches: lines, sectors."""
    shift = np.uint64(unit.bit_length() - 1)
    ends = addresses + np.uint64(size - 1)
    pieces = np.concatenate([addresses >> shift, ends >> shift], 1)
    key = np.sort(np.where(np.concatenate([lanes, lanes], 1), pieces, ~np.uint64(0)), 1)
    new = np.ones_like(key, bool)
    new[:, 1:] = key[:, 1:] != key[:, :-1]
    return (new & (key != ~np.uint64(0))).sum(1)
