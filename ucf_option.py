"""UCF-Crime: the options of ucf_train.py and ucf_test.py.

Edit a line here, put what differs into a YAML file (--config FILE), or override it on the command line.
What a method was published with on this dataset stands in configs/METHOD_ucf.yaml and goes over these lines.
"""

from clipfusionvad.cli.options import parse_options
from clipfusionvad.datasets import UCF

DATASET = UCF

DEFAULTS = {
    "seed": 234,
    # model
    "method": "clipfusionvad",
    "embed_dim": 512,
    "visual_length": 256,
    "visual_width": 512,
    "visual_head": 1,
    "visual_layers": 2,
    "attn_window": 8,
    "prompt_prefix": 10,
    "prompt_postfix": 10,
    "classes_num": 14,
    # training
    "max_epoch": 10,
    "batch_size": 64,
    "balanced": True,
    "lr": 2e-5,
    "scheduler_rate": 0.1,
    "scheduler_milestones": [4, 8],
    "separation_weight": 1e-1,
    "eval_every": 1280,
    "select": "auc1",
    # files
    "model_path": "model/model_ucf.pth",
    "use_checkpoint": False,
    "checkpoint_path": "model/checkpoint.pth",
    "train_list": "list/ucf_CLIP_rgb.csv",
    "test_list": "list/ucf_CLIP_rgbtest.csv",
    "gt_path": "list/gt_ucf.npy",
    "gt_segment_path": "list/gt_segment_ucf.npy",
    "gt_label_path": "list/gt_label_ucf.npy",
}


def parse_args(argv=None, stored=None):
    return parse_options(argv, DATASET, DEFAULTS, stored)
