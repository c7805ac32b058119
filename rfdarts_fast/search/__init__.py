"""Architecture search: the bilevel loop and its methods."""

from rfdarts_fast.search.architect import Architect
from rfdarts_fast.search.build import build_supernet
from rfdarts_fast.search.config import PRESETS, SearchConfig
from rfdarts_fast.search.run import search

__all__ = ["PRESETS", "Architect", "SearchConfig", "build_supernet", "search"]
