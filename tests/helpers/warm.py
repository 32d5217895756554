"""Processes that start in tenths of a second, because the server that forks them has imported the package."""

import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

HELPERS = Path(__file__).resolve().parent


def warm_context():
    """Return a context of multiprocessing whose server has imported ``preloaded``; its processes use one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    paths = [str(HELPERS.parents[1]), *(str(HELPERS.parent / name) for name in ("helpers", "unit", "integration"))]
    # Python 3.11 ignores this process's sys.path when it imports them. CLIP asks for a GPU when it is imported; if CUDA
    # answered, forked processes could not use it.
    settings = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    with mock.patch.dict(os.environ, settings):
        forkserver.ensure_running()
    return context
