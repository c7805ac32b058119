"""The one exception that bad input data raises."""

from __future__ import annotations

from rfdarts_fast.messages import one_line, shown


class DataError(ValueError):
    """Input data or a data option is unusable: one line that names it, what was expected and what came."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def require(condition: bool, message: str) -> None:
    """Raise `DataError(message)` unless `condition` holds."""
    if not condition:
        raise DataError(message)


def require_int(value: object, name: str, minimum: int) -> int:
    """`value` as an int of at least `minimum`; DataError naming `name` otherwise (bool is no int here)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise DataError(f"{name}: expected an integer of at least {minimum}, got {shown(value)}")
    return value
