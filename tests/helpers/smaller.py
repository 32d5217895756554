"""Programs as they are, but small: every CLIP model is a toy, models are narrow, a training lasts an epoch.

For running commands as the documentation has them. Importing it changes the package in this process; its folder
``site`` on ``PYTHONPATH`` does so in every process that starts.
"""

from clipfusionvad.cli import options
from clipfusionvad.models import clip
from clipfusionvad.tools import demo

WIDTH = 64
SMALL = {"embed_dim": WIDTH, "visual_width": WIDTH, "visual_length": 64, "attn_window": 8, "max_epoch": 1}
SMALL |= {"batch_size": 2, "eval_every": 0, "scheduler_milestones": [1], "warmup_epochs": 0, "device": "cpu"}
SMALL |= {"prompt_encoder": "toy"}


def shrink(patch=setattr):
    """Make the programs small, through ``patch(object, name, value)``."""
    published, of_demo = options.settings_of_pair, demo.demo_settings

    def small(parser, path):
        sizes = SMALL | demo.method_settings(parser.get_default("method"))
        return published(parser, path) | options.known_settings(sizes, parser)

    patch(options, "settings_of_pair", small)
    patch(demo, "demo_settings", lambda *given: of_demo(*given) | {"max_epoch": 1})
    patch(clip, "_download", lambda name: clip.toy_state(WIDTH))
    patch(clip.load_clip, "__defaults__", (WIDTH,))
