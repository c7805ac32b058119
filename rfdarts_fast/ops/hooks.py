"""Hooks that users put on modules: kernels call no modules, so hooked ones are left to the reference."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

REASON = "hooks on its modules"
_NAMES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Hooks:
    """The hooks of modules, looked at once in each call; not those that are registered for all modules."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        # a module never exchanges these dictionaries
        self.tables = [getattr(module, name) for module in modules for name in _NAMES]

    def __bool__(self) -> bool:
        return any(self.tables)
