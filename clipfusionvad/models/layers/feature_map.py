"""A map in front of a method, for features of another width or scale than its network takes."""

from collections.abc import Iterable, Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import LARGEST_SIZE, Option
from clipfusionvad.losses import valid_mask

NORMS = ("none", "l2", "standardize")


class FeatureMap(nn.Module):
    """Normalisation of each feature row, then a learned linear map to the width of the method; for each stream its own.

    ``width`` is that of the method, ``streams`` their number. The statistics of "standardize" are NaN until
    ``set_statistics``.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        width: int,
        streams: int = 1,
        *,
        feature_dim: Annotated[
            int | None,
            Option(
                "width of the features, which a learned linear map brings to --visual-width (default: no map)",
                minimum=1,
                maximum=LARGEST_SIZE,
            ),
        ] = None,
        feature_norm: Annotated[
            str | None,
            Option(
                "scale every feature row to norm 1, or every dim to mean 0 and deviation 1 over the training list "
                "(default: none)",
                choices=NORMS,
            ),
        ] = None,
    ):
        super().__init__()
        self.feature_dim, self.norm = feature_dim or width, feature_norm
        if feature_norm == "standardize":
            for name in ("mean", "std"):
                self.register_buffer(name, torch.full((streams * self.feature_dim,), torch.nan))
        self.linear = nn.ModuleList(nn.Linear(self.feature_dim, width) for _ in range(streams if feature_dim else 0))

    @property
    def lacks_statistics(self) -> bool:
        """Whether ``set_statistics`` is still to be called."""
        return self.norm == "standardize" and not bool(self.mean.isfinite().all())

    def set_statistics(self, videos: Iterable[np.ndarray]) -> None:
        """Take mean and standard deviation from the rows of all videos, (L, streams · feature_dim) each."""
        rows, mean = 0, np.zeros(len(self.mean))
        squares = np.zeros(len(self.mean))
        for video in videos:
            own = video.astype(np.float64)
            shift, rows = own.mean(axis=0) - mean, rows + len(own)
            mean += shift * (len(own) / rows)
            squares += ((own - own.mean(axis=0)) ** 2).sum(axis=0) + shift**2 * len(own) * (rows - len(own)) / rows
        if not rows:
            raise UserError("--feature-norm standardize needs the training features, but there are none")
        deviation = np.sqrt(squares / rows)
        self.mean.copy_(torch.from_numpy(mean))
        # A dim without variance stays at 0.
        self.std.copy_(torch.from_numpy(np.where(deviation > 0, deviation, 1)))

    @torch.no_grad()
    def map_video(self, features: np.ndarray) -> np.ndarray:
        """Return what ``forward`` makes of the rows of a video, (L, streams · width) float32."""
        device = next(iter([*self.parameters(), *self.buffers()]), torch.empty(0)).device
        return self(torch.from_numpy(features).to(device, torch.float32)).cpu().numpy()

    def forward(self, visual: Tensor | Sequence[Tensor], lengths: Tensor | None = None) -> Tensor:
        """visual (..., T, streams · feature_dim), or the streams one by one → (..., T, streams · width).

        Rows from ``lengths`` (B,) on are padding, and zero as before.
        """
        joined = visual if isinstance(visual, Tensor) else torch.cat(tuple(visual), dim=-1)
        streams = max(len(self.linear), 1)
        if self.linear and joined.shape[-1] != streams * self.feature_dim:
            raise UserError(
                f"features of width {joined.shape[-1] / streams:g} were given, but --feature-dim is {self.feature_dim}"
            )
        mapped = joined
        if self.norm == "standardize":
            mapped = (mapped - self.mean) / self.std
        parts = mapped.split(self.feature_dim, dim=-1)
        if self.norm == "l2":
            parts = tuple(F.normalize(part, dim=-1) for part in parts)
        if self.linear:
            parts = tuple(linear(part) for linear, part in zip(self.linear, parts, strict=True))
        mapped = torch.cat(parts, dim=-1).to(joined.dtype)
        if lengths is not None:
            mapped = mapped * valid_mask(lengths, mapped.shape[-2]).unsqueeze(-1)
        return mapped
