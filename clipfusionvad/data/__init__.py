"""From lists and feature files to batches."""

from clipfusionvad.data.sampling import sample_uniform, split_windows

__all__ = ["sample_uniform", "split_windows"]
