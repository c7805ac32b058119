"""Parts of the images of a whole batch, resized to one size on the device that holds them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# images whose floats are held at a time
_CHUNK = 128


def draw_boxes(
    count: int, side: int, area: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Random parts of square images as int64 [4, count]: top, left, height, width.

    torchvision's RandomResizedCrop for images of side x side pixels: ten tries at a box whose area is a
    fraction of the image's within `area` and whose width over height is within `ratio` (log-uniform); then
    the largest centred box of an allowed ratio.
    """
    tries = torch.rand(4, 10, count, generator=generator, dtype=torch.float64)
    target = side * side * (area[0] + (area[1] - area[0]) * tries[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * tries[1]).exp()
    widths, heights = (target * aspect).sqrt().round(), (target / aspect).sqrt().round()
    fits = (widths > 0) & (widths <= side) & (heights > 0) & (heights <= side)
    # argmax is the first that fits, or 0 where none does
    chosen = fits.int().argmax(dim=0, keepdim=True)
    width, height = (sizes.gather(0, chosen)[0] for sizes in (widths, heights))
    none = ~fits.any(dim=0)
    # the largest box within a square has the ratio next to 1
    nearest = min(max(1.0, ratio[0]), ratio[1])
    width[none], height[none] = round(min(side, side * nearest)), round(min(side, side / nearest))
    free = tries[2:].gather(1, chosen.expand(2, -1, -1))[:, 0]
    top, left = (((side - size + 1) * f).floor() for size, f in zip((height, width), free, strict=True))
    top[none], left[none] = ((side - height) / 2).floor()[none], ((side - width) / 2).floor()[none]
    return torch.stack([top, left, height, width]).to(torch.int64)


def centre_boxes(count: int, side: int, fraction: float) -> Tensor:
    """The centred squares of a fraction of the side, int64 [4, count]: top, left, height, width."""
    size = round(side * fraction)
    start = (side - size) // 2
    return torch.tensor([start, start, size, size]).view(4, 1).expand(-1, count)


def crop_and_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The part of each image in its box, resized to size x size pixels: bilinear, antialiased.

    images uint8 [B, 3, S, S], boxes int64 [4, B] on the CPU -> uint8 [B, 3, size, size]. On the CPU it is
    PyTorch's own `interpolate`, bit by bit what torchvision does with a tensor. Elsewhere all images are
    resized at once by products with the same weights, and a pixel may differ by one level.
    """
    if images.device.type == "cpu":
        parts = [
            F.interpolate(image[None, :, t : t + h, x : x + w], (size, size), mode="bilinear", antialias=True)
            for image, (t, x, h, w) in zip(images, boxes.t().tolist(), strict=True)
        ]
        return torch.cat(parts) if parts else images.new_empty(0, images.shape[1], size, size)
    chunks = zip(images.split(_CHUNK), boxes.to(images.device).split(_CHUNK, dim=1), strict=True)
    return torch.cat([resized_by_products(x, box, size) for x, box in chunks])


def resized_by_products(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """`crop_and_resize` for boxes on the images' own device, of any kind."""
    top, left, height, width = boxes
    rows = _weights(top, height, size, images.shape[2])[:, None]
    columns = _weights(left, width, size, images.shape[3])[:, None]
    resized = rows @ images.to(torch.float32) @ columns.transpose(2, 3)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _weights(start: Tensor, length: Tensor, size: int, side: int) -> Tensor:
    """The weights of `side` pixels in each of `size` resized ones, [B, size, side].

    A triangle around the centre of each resized pixel, as wide as the scale but never narrower than a pixel
    on each side (Pillow's, and PyTorch's, antialiased bilinear filter); pixels outside the box have none.
    """
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    scale = length / size
    centre = scale * (torch.arange(size, device=start.device).view(1, -1, 1) + 0.5)
    pixel = torch.arange(side, device=start.device).view(1, 1, -1) - start
    weights = (1 - ((pixel + 0.5 - centre) / scale.clamp(min=1)).abs()).clamp_(min=0)
    weights = weights * ((pixel >= 0) & (pixel < length))
    return weights / weights.sum(dim=2, keepdim=True)
