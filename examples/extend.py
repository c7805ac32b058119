"""A primitive, a search space and a data set from outside the package, searched and retrained.

    python examples/extend.py runs/extend

They are choices of the command line too, `rfdarts search --space blur --dataset diagonals`, once a package is
installed that names this module as an entry point. In its pyproject.toml:

    [project.entry-points."rfdarts_fast.plugins"]
    extend = "extend"
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from rfdarts_fast.data import Dataset, Images, ImageSet, register_dataset
from rfdarts_fast.nn import Primitive, register_primitive
from rfdarts_fast.retrain import TrainConfig, train
from rfdarts_fast.search import PRESETS, SearchConfig, search
from rfdarts_fast.spaces import register_space, uniform_space


class Blur(nn.Module):
    """A 3x3 binomial filter, [N, C, H, W] -> [N, C, H / stride, W / stride]."""

    def __init__(self, stride):
        super().__init__()
        self.stride = stride
        row = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("kernel", torch.outer(row, row)[None, None], persistent=False)

    def forward(self, x):
        kernel = self.kernel.expand(x.shape[1], 1, 3, 3)
        return nn.functional.conv2d(x, kernel, stride=self.stride, padding=1, groups=x.shape[1])


def make_blur(channels, stride, affine, track):
    return Blur(stride)


register_primitive(Primitive("blur_3x3", make_blur, parameter_free=True, batch_norm=True))

register_space(uniform_space("blur", ("none", "skip_connect", "sep_conv_3x3", "blur_3x3")))


def load_diagonals(root, download):
    """300 noisy waves of 16 x 16 pixels that rise or fall from left to right; the last 60 are to test."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 2
    direction, phase = 1 - 2 * labels[:, None, None], 6.28 * torch.rand(300, 1, 1, generator=random)
    step = torch.arange(16)
    waves = torch.sin(0.8 * (step[:, None] + direction * step) + phase)
    noisy = (waves + 0.5 * torch.randn(300, 16, 16, generator=random)).clamp(-1, 1)
    images = (127.5 + 127.5 * noisy).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    train, test = (ImageSet(images[part], labels[part]) for part in (slice(240), slice(240, None)))
    return Images(train, test, class_names=("rise", "fall"))


register_dataset(Dataset("diagonals", load_diagonals, mirrored=False))


def main(args=None):
    """Returns the genotype and the result of its training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the two runs")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args(args)
    common = {"dataset": "diagonals", "epochs": options.epochs, "layers": 3}
    quick = {**PRESETS["quick"], **common, "space": "blur", "arch_warmup_epochs": options.epochs // 3}
    genotype = search(SearchConfig(out=options.out / "search", **quick))
    small = {**common, "channels": 16, "auxiliary": False, "cutout": 0, "drop_path": 0.0}
    result = train(TrainConfig(out=options.out / "train", genotype=str(genotype), **small))
    print(f"{genotype}\ntest accuracy {result['test_accuracy']:.1f}%")
    return genotype, result


if __name__ == "__main__":
    main()
