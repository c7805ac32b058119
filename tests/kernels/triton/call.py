"""A call of the Triton backend; imports no triton, whose interpreter is chosen at its import."""

from rfdarts_fast.ops import backends
from rfdarts_fast.ops.dispatch import cell_call


def mixed_cell(*arguments, **options):
    """The nodes, from the arguments of `cell_call`."""
    return backends()["triton"].mixed_cell(cell_call(*arguments, **options))
