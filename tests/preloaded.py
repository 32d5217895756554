"""A training in a process of its own that has imported everything before, so that a kill meets it at work."""

from __future__ import annotations

import contextlib
import sys
import threading

import matplotlib.pyplot  # noqa: F401
import torch
import torch.utils.tensorboard  # noqa: F401
from tiny import TRAIN, quietly
from tqdm import tqdm

from clipfusionvad.clip import openai_clip

openai_clip()
with contextlib.suppress(ImportError):
    import transformers  # noqa: F401
# By default a lock that processes share, and that stays taken when its holder is killed.
tqdm.set_lock(threading.RLock())


def train(dataset, argv):
    sys.exit(quietly(TRAIN[dataset], argv).code)
