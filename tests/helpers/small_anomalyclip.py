"""A small AnomalyCLIP with a toy CLIP, for its tests."""

import functools

import numpy as np
import torch

from clipfusionvad.models import build_method
from clipfusionvad.models.clip import load_clip

CLASSES = ["normal", "riot", "car accident", "abuse", "shooting"]
# Segments, frames of each, and the width of the temporal model.
S, FRAMES, E = 4, 3, 16
SMALL = {"embed_dim": 64, "visual_width": 64, "num_segments": S, "seg_length": FRAMES}
SMALL |= {"emb_size": E, "heads": 2, "num_topk": 2, "num_bottomk": 1}
TERMS = ("dir_abn", "dir_nor", "topk_abn", "bottomk_abn", "topk_nor", "smooth", "sparse")
# Videos of one class and of several, normal ones in between.
TARGETS = torch.tensor([[0.0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]])


@functools.cache
def toy_clip():
    return load_clip("toy", 64)


def clip_under_prefix():
    """The whole of CLIP as a released state is made from it."""
    return {f"clipmodel.{key}": value for key, value in toy_clip().state.items()}


def small_model(classes=CLASSES, seed=0, centred=True, **options):
    torch.manual_seed(seed)
    model = build_method("anomalyclip", classes, toy_clip(), **{**SMALL, **options})
    if centred:
        model.set_normal_centroid([np.linspace(-1, 1, 3 * 64).reshape(3, 64)])
    return model.eval()


def small_batch():
    """Features (5, T, 64) of the videos of TARGETS."""
    return torch.randn(len(TARGETS), S * FRAMES, 64, generator=torch.Generator().manual_seed(3))
