"""Hooks that users put on modules: kernels call no modules, so hooked ones are left to the reference."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.utils.hooks import RemovableHandle

REASON = "hooks on its modules"
_NAMES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Hooks:
    """The hooks of modules, true if there are any; not those that are registered for all modules."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        # a module never exchanges these dictionaries
        self.tables = [getattr(module, name) for module in modules for name in _NAMES]
        self._none_until = -1

    def __bool__(self) -> bool:
        # each new hook has a number, and thousands of modules need no look without one
        count = RemovableHandle.next_id
        if count != self._none_until:
            if any(self.tables):
                return True
            self._none_until = count
        return False
