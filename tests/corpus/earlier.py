"""The package of another checkout in the place of this one, so that the corpus tries an earlier revision."""

import importlib.util
import sys
import types
import typing
from pathlib import Path


def take_package(checkout: str) -> None:
    """Has rfdarts_fast imported from a checkout, as far back as 50b6400."""
    sys.path.insert(0, str(Path(checkout).resolve()))
    if importlib.util.find_spec("rfdarts_fast.runs.options"):
        return
    # what the corpus calls was elsewhere
    from rfdarts_fast import cli
    from rfdarts_fast.runs import config

    moved = types.ModuleType("rfdarts_fast.runs.options")
    vars(moved).update(parse_config=cli.parse_config, read_yaml=config.read_yaml)
    sys.modules[moved.__name__] = moved
    vars(config).setdefault("type_hints", typing.get_type_hints)
