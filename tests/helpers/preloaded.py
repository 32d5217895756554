"""Programs for processes of tests; ``warm.py`` imports this module before it starts one."""

import contextlib
import os
import resource
import threading
import time

import matplotlib.pyplot  # noqa: F401
from tiny import package_main, quietly
from tqdm import tqdm

import clipfusionvad.cli.extract
import clipfusionvad.cli.pack
import clipfusionvad.cli.training
import clipfusionvad.extraction.extract  # noqa: F401
import clipfusionvad.io.event_log  # noqa: F401
from clipfusionvad.io.files import hold
from clipfusionvad.models.clip import openai_clip

openai_clip()
with contextlib.suppress(ImportError):
    import transformers  # noqa: F401
# tqdm's default lock is shared by processes, and stays taken when its holder is killed.
tqdm.set_lock(threading.RLock())


def limited(argv, limit, told):
    """Run a command whose files may not grow beyond ``limit`` bytes, as on a full disk; send its outcome."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    told.send(quietly(package_main, argv))


def hold_until_killed(tell, folder, name, shared, forks):
    """Hold a folder; send the child that it has forked, if it should fork one."""
    with hold(folder, name, shared):
        child = os.fork() if forks else None
        if child != 0:
            tell.send(child)
        time.sleep(600)
