"""XD-Violence: the options of xd_train.py and xd_test.py.

Edit a line here, put what differs into a YAML file (--config FILE), or override it on the command line.
What a method was published with on this dataset stands in configs/METHOD_xd.yaml and goes over these lines.
"""

from clipfusionvad.cli.options import parse_options
from clipfusionvad.datasets import XD

DATASET = XD

DEFAULTS = {
    "seed": 234,
    # model
    "method": "clipfusionvad",
    "embed_dim": 512,
    "visual_length": 256,
    "visual_width": 512,
    "visual_head": 1,
    "visual_layers": 3,
    "attn_window": 64,
    "prompt_prefix": 10,
    "prompt_postfix": 10,
    "classes_num": 7,
    # training
    "max_epoch": 10,
    "batch_size": 96,
    "balanced": False,
    "lr": 1e-5,
    "scheduler_rate": 0.1,
    "scheduler_milestones": [3, 6, 10],
    "separation_weight": 1e-4,
    "eval_every": 0,
    "select": "ap2",
    # files
    "model_path": "model/model_xd.pth",
    "use_checkpoint": False,
    "checkpoint_path": "model/checkpoint.pth",
    "train_list": "list/xd_CLIP_rgb.csv",
    "test_list": "list/xd_CLIP_rgbtest.csv",
    "gt_path": "list/gt.npy",
    "gt_segment_path": "list/gt_segment.npy",
    "gt_label_path": "list/gt_label.npy",
}


def parse_args(argv=None, stored=None):
    return parse_options(argv, DATASET, DEFAULTS, stored)
