"""A cell's preprocessing for tests, as `emulated.Case` is a cell."""

import copy

import torch
from torch import nn

from rfdarts_fast.nn.primitives import FactorizedReduce, ReLUConvBN
from rfdarts_fast.ops import reference, use_backend
from rfdarts_fast.ops.compiled import cuda
from tests.kernels.cuda.emulated import wave


class ConvCase:
    """ReLU, convolution, BatchNorm and an input, in float64, rounded so that `dtype` holds every value."""

    def __init__(
        self, shape=(2, 6, 10), dtype=torch.float64, channels=(6, 4), reduce=False, train=True, affine=True
    ):
        c_in, c_out = channels
        conv = ReLUConvBN(c_in, c_out, 1, affine=affine)
        module = FactorizedReduce(c_in, c_out, affine) if reduce else conv
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                part.requires_grad_(False)
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
                if affine:
                    nn.init.uniform_(part.weight, 0.5, 2)
                    nn.init.normal_(part.bias, 0, 0.3)
        self.module = module.to(dtype).double().train(train)
        n, h, w = shape
        self.inputs = [torch.randn(n, c_in, h, w).to(dtype).double()]
        self.dtype = dtype

    @staticmethod
    def parts(module):
        found = list(module.modules())
        convs = tuple(part for part in found if isinstance(part, nn.Conv2d))
        return convs, next(part for part in found if isinstance(part, nn.BatchNorm2d))

    def run(self, engine, dtype, parameters=None, device="cpu", **options):
        """{name: output, gradients, running statistics}, of the engine computing in `dtype`."""
        convs, norm = self.parts(copy.deepcopy(self.module).to(device, parameters or dtype))
        x = self.inputs[0].detach().to(device, dtype).requires_grad_()
        out = engine(x, convs, norm, **options)
        assert out.dtype == dtype
        leaves = [x, *(p for p in norm.parameters())]
        loss = (out.double() * wave(out).to(device)).sum()
        dx, *norms = torch.autograd.grad(loss, leaves)
        found = {"states": [out.detach()], "inputs": [dx], "norms": norms}
        found["running"] = [norm.running_mean, norm.running_var]
        assert norm.num_batches_tracked == norm.training
        return {name: [x.cpu() for x in group] for name, group in found.items()}

    def reference(self, dtype=torch.float64, device="cpu"):
        with use_backend("reference"):
            return self.run(reference.relu_conv_bn, dtype, device=device)

    def emulated(self, dtype=None, device="cpu", **options):
        dtype = dtype or self.dtype
        convs, norm = self.parts(copy.deepcopy(self.module).to(cuda.parameter_dtype(dtype)))
        assert cuda.unsupported_conv(self.inputs[0].to(dtype), convs, norm) is None
        return self.run(cuda.relu_conv_bn, dtype, cuda.parameter_dtype(dtype), device, **options)

    def kernels(self, dtype=None, **options):
        """On the GPU."""
        return self.emulated(dtype, "cuda", **options)
