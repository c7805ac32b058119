"""Differentiable architecture search with frozen random features (RF-DARTS, RF-PCDARTS)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rfdarts_fast.drop_in import accelerate as accelerate
    from rfdarts_fast.ops import use_backend as use_backend

__version__ = "0.1.0"

# imported on first use: `import rfdarts_fast` itself is to stay cheap
_LAZY = {"accelerate": "rfdarts_fast.drop_in", "use_backend": "rfdarts_fast.ops"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
