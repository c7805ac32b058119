"""What a step must not do if a CUDA graph is to hold it."""

from torch.utils._python_dispatch import TorchDispatchMode


class Asked(TorchDispatchMode):
    """Operations that make the host wait for a value, or whose shapes depend on one."""

    NAMES = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket.__name__ in self.NAMES:
            self.found.append(str(function))
        return function(*arguments, **(options or {}))
