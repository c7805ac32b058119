"""Frozen, fused supernets for training scripts that exist already.

Change one import, `from rfdarts_fast.drop_in.darts import Network` (or `.pc_darts`, `.pc_darts_imagenet`), or
call `rfdarts_fast.accelerate(model)` on a supernet of another project.
"""

from rfdarts_fast.drop_in.foreign import accelerate
from rfdarts_fast.drop_in.look_ahead import complete_momentum
from rfdarts_fast.drop_in.report import Report

__all__ = ["Report", "accelerate", "complete_momentum"]
