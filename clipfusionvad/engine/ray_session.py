"""Ray for the time of a run: the only place that knows how it is started, found and left."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from clipfusionvad.io.errors import UserError


@contextlib.contextmanager
def session(ray: ModuleType, workers: int, address: str | None) -> Iterator[None]:
    """Ray, quiet, without its web page and without reports to its makers.

    ``address`` is that of a running cluster ("auto" finds the one this machine is part of); without one here or in
    RAY_ADDRESS, Ray is started on this machine alone, for ``workers`` CPUs. ``UserError`` where no cluster answers.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    address = address or os.environ.get("RAY_ADDRESS")
    # What is started here is for this machine: nobody else can connect to it.
    here: dict[str, Any] = {"num_cpus": workers, "_node_ip_address": "127.0.0.1"} if address is None else {}
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **here)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"no Ray cluster at {address}" if address else "Ray does not start"
        raise UserError(f"--engine ray: {where} ({str(error).splitlines()[0]})") from error
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler would end the program without a word.
        signal.signal(signal.SIGTERM, on_term)
    try:
        yield
    finally:
        ray.shutdown()


def import_ray() -> ModuleType:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UserError("--engine ray needs Ray, which is not installed: pip install ray") from error
    return ray
