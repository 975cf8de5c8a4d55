"""Pictures as a processor hands them to its model: pixel tensors turned back into pictures.

Legend: n pictures or tiles, C channels, H and W rows and columns of pixels, P patches, D numbers of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..streams import StreamEncoder


@dataclass(frozen=True)
class Seen:
    """The pictures of a row as a model sees them; ``note`` says what cannot be shown, or is empty."""

    images: list[Image.Image]
    note: str = ""


def seen_pictures(encoder: StreamEncoder, inputs: dict[str, Any]) -> Seen:
    """The pictures in a row's model inputs, their normalisation undone.

    Three layouts are known, by shape: [..., C, H, W] (pictures or tiles, padded with zeros or by ``image_sizes`` and
    ``pixel_attention_mask``), and [P, D] patches with ``image_grid_thw``.
    """
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return Seen([])
    processor = encoder.processor.image_processor
    grid = inputs.get("image_grid_thw")
    if not isinstance(pixels, Tensor) or (pixels.ndim < 4 and grid is None):
        shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        return Seen([], f"the layout of pixel_values {shape} is not known here, so it is not shown")
    if pixels.ndim == 2 and grid is not None:
        try:
            tiles = _unpatched(pixels, grid, processor)
        except (AttributeError, RuntimeError) as error:
            return Seen([], f"the patches {tuple(pixels.shape)} cannot be put together: {error}")
    elif pixels.shape[-3] not in (1, 3):
        return Seen([], f"the layout of pixel_values {tuple(pixels.shape)} is not known here, so it is not shown")
    else:
        tiles = _tiles(pixels, inputs)
    return Seen([_picture(tile, processor) for tile in tiles])


def _tiles(pixels: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
    tiles = list(pixels.flatten(0, -4))
    mask = inputs.get("pixel_attention_mask")
    masks = None if mask is None else mask.flatten(0, -3)
    sizes = inputs.get("image_sizes")
    if pixels.ndim == 4 and isinstance(sizes, Tensor) and len(sizes) == len(tiles):  # padded to the largest
        heights_widths = sizes.tolist()
        if all(h <= t.shape[1] and w <= t.shape[2] for t, (h, w) in zip(tiles, heights_widths, strict=True)):
            tiles = [tile[:, :h, :w] for tile, (h, w) in zip(tiles, heights_widths, strict=True)]
    kept = []
    for index, tile in enumerate(tiles):
        if masks is not None:
            rows, columns = masks[index].any(1).sum(), masks[index].any(0).sum()
            tile = tile[:, : int(rows), : int(columns)]
        if tile.numel() and bool(tile.any()):  # else padding of a row with fewer tiles
            kept.append(tile)
    return kept


def _unpatched(pixels_PD: Tensor, grid_n3: Tensor, processor: Any) -> list[Tensor]:
    """Pictures [C, H, W] of patches that stand in merged blocks, each over ``temporal_patch_size`` equal frames."""
    side, frames = processor.patch_size, processor.temporal_patch_size
    merge = getattr(processor, "merge_size", 1)
    tiles, at = [], 0
    for t, h, w in grid_n3.tolist():
        patches = pixels_PD[at : at + t * h * w]
        at += t * h * w
        blocks = patches.reshape(t, h // merge, w // merge, merge, merge, -1, frames, side, side)[0, ..., 0, :, :]
        # [h/m, w/m, m, m, C, side, side] -> [C, h/m, m, side, w/m, m, side]
        tiles.append(blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(-1, h * side, w * side))
    return tiles


def _picture(tile: Tensor, processor: Any) -> Image.Image:
    values = tile.float()
    if getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(getattr(processor, f"image_{name}")).view(-1, 1, 1) for name in ("mean", "std"))
        values = values * std + mean
    if getattr(processor, "do_rescale", True):
        values = values / processor.rescale_factor
    bytes_CHW = values.round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(bytes_CHW.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
