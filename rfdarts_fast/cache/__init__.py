"""Decoding a subset of photos once, into a store that `--dataset cache` reads."""

from rfdarts_fast.cache.build import CacheOptions, build_store

__all__ = ["CacheOptions", "build_store"]
