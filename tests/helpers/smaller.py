"""Programs as they are, but small: every CLIP model is a toy, models are narrow, a training lasts an epoch.

For running commands as the documentation has them. Importing it changes the package in this process; its folder
``site`` on ``PYTHONPATH`` does so in every process that starts.
"""

from __future__ import annotations

from clipfusionvad.cli import options
from clipfusionvad.models import clip, find_method

WIDTH = 64
SMALL = {"embed_dim": WIDTH, "visual_width": WIDTH, "visual_length": 64, "attn_window": 8, "max_epoch": 1}
SMALL |= {"batch_size": 2, "eval_every": 0, "scheduler_milestones": [1], "warmup_epochs": 0, "device": "cpu"}


def shrink(patch=setattr):
    """Make the programs small, through ``patch(object, name, value)``."""
    published, demo = options.published_options, options.demo_defaults

    def small(parser, name, dataset):
        return published(parser, name, dataset) | SMALL | dict(find_method(name).demo)

    patch(options, "published_options", small)
    patch(options, "demo_defaults", lambda *given: demo(*given) | {"max_epoch": 1})
    patch(clip, "_download", lambda name: clip.toy_state(WIDTH))
    patch(clip.load_clip, "__defaults__", (WIDTH,))
