"""CLIP's image encoder over batches of images."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipfusionvad.io.errors import UserError
from clipfusionvad.models.clip import ClipWeights, image_tower

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of CLIP's own preprocessing.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def check_precision(device: torch.device, precision: str) -> None:
    """Raise ``UserError`` for arithmetic that the device does not support."""
    if precision == "fp16" and device.type == "cpu":
        raise UserError("fp16 needs a GPU; on a CPU use fp32 or bf16")


class ImageEncoder:
    """A frozen image encoder on its device.

    ``precision`` "fp16" (GPU only) and "bf16" run it in that type, with normalisation layers in float32; features are
    always float32. ``batch_size`` limits the memory of a forward pass.
    """

    def __init__(self, clip: ClipWeights, device: torch.device | str, precision: str = "fp32", batch_size: int = 64):
        self.device, self.dtype, self.batch_size = torch.device(device), _DTYPES[precision], batch_size
        check_precision(self.device, precision)
        tower: Any = image_tower(clip)
        self.dim: int = tower.output_dim
        self.resolution: int = tower.input_resolution
        for module in tower.modules():
            if not isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(self.dtype)
        self.tower = tower.to(self.device)
        # Buffers that every batch reuses: on a CPU, a new allocation takes longer than a small encoder.
        self._pixels = self._scale = self._shift = torch.empty(0, device=self.device)

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """Return features (n, D) float32 of images (n, H, W, 3) uint8, normalised by CLIP's mean and deviation.

        Event images (n, H, W) in 0..1 become three equal channels and are not normalised.
        """
        features = [torch.empty(0, self.dim, device=self.device)]
        for batch in torch.from_numpy(np.ascontiguousarray(images)).split(self.batch_size):
            batch = batch.to(self.device)
            pixels = self._normalise(batch) if batch.ndim == 4 else batch.float()[..., None].expand(-1, -1, -1, 3)
            pixels = pixels.permute(0, 3, 1, 2)
            if pixels.shape[-1] != self.resolution:
                size = (self.resolution, self.resolution)
                pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
            features.append(self.tower(pixels.to(self.dtype)).float())
        return torch.cat(features).cpu().numpy()

    def _normalise(self, batch: Tensor) -> Tensor:
        """Return (x / 255 - mean) / std of (n, H, W, 3), as one product and one sum along whole rows of pixels."""
        if self._pixels.shape[1:] != batch.shape[1:]:
            self._pixels = torch.empty(self.batch_size, *batch.shape[1:], device=self.device)
            mean, std = (torch.tensor(value, device=self.device).repeat(batch.shape[2]) for value in (_MEAN, _STD))
            self._scale, self._shift = 1 / (255 * std), -mean / std
        pixels = self._pixels[: len(batch)].copy_(batch)
        pixels.flatten(2).mul_(self._scale).add_(self._shift)
        return pixels
