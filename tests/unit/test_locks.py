"""One process at a time in a folder, and no trouble from one that was killed."""

import contextlib
import multiprocessing
import os
import signal
import time

import preloaded
import pytest
from made_videos import write_video
from refusal import assert_refused
from tiny import package, package_main, quietly, strings
from warm import warm_context

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import hold

pytest.importorskip("fcntl", reason="this system has no such locks")


@contextlib.contextmanager
def holder(folder, name=".lock", shared=False, forks=False):
    """Another process that holds a folder until it is killed."""
    context = warm_context()
    told, tell = context.Pipe()
    process = context.Process(target=preloaded.hold_until_killed, args=(tell, folder, name, shared, forks))
    process.start()
    assert told.poll(120)
    process.told = told.recv()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def test_the_second_is_refused_until_the_first_is_gone(tmp_path):
    folder = tmp_path / "runs" / "one"
    with holder(folder) as process:
        with pytest.raises(UserError, match=f"process {process.pid} on .* is using {folder}"), hold(folder):
            pass
        process.kill()
        process.join()
        with hold(folder):
            assert (folder / ".lock").exists()
    # Nothing is left of the lock; the folder was made by another.
    assert folder.exists() and not list(folder.iterdir())


def test_a_folder_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(ZeroDivisionError), hold(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_has_forked_keeps_no_lock(tmp_path):
    """Loading processes live for seconds after the first one was killed."""
    with holder(tmp_path, forks=True) as process:
        process.kill()
        # Its end cannot be waited for while the other lives.
        deadline = time.monotonic() + 60
        try:
            while time.monotonic() < deadline:
                with contextlib.suppress(UserError), hold(tmp_path):
                    os.kill(process.told, 0)
                    break
            else:
                raise AssertionError("the lock outlives its holder")
        finally:
            os.kill(process.told, signal.SIGKILL)


def test_some_share_and_keep_others_out(tmp_path):
    with holder(tmp_path, shared=True):
        with hold(tmp_path, shared=True), hold(tmp_path, ".lock-2-of-2"):
            pass
        # The first one still holds it.
        with pytest.raises(UserError, match="another run"), hold(tmp_path):
            pass
    with hold(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_of_many_only_one_gets_it(tmp_path):
    """They come while others leave, whose lock files vanish."""
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert all(pool.map(_count_up, [tmp_path] * 4))
    assert (tmp_path / "count").read_text() == "200"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def _count_up(folder):
    done = 0
    while done < 50:
        try:
            with hold(folder):
                count = folder / "count"
                count.write_text(str(int(count.read_text() if count.exists() else 0) + 1))
                done += 1
        except UserError:
            time.sleep(0.001)
    return True


def test_two_trainings_in_one_folder(tiny):
    (tiny.work / "run").mkdir()
    with holder(tiny.work / "run"):
        for more in ([], ["--seeds", 3, 5], ["--use-checkpoint"], ["--overwrite"]):
            assert_refused(tiny.train, tiny, *more, says=("another run", str(tiny.work / "run"), "name another"))


def test_two_packings_of_one_list(tiny):
    with holder(tiny.folder, ".train.pack.lock"):
        pack = lambda: quietly(package("pack", tiny.dataset), tiny.train_flags())  # noqa: E731
        assert_refused(pack, tiny, says=("another run", "is using"))


def test_two_extractions_into_one_folder(tmp_path):
    write_video(tmp_path / "a.mp4", 20, size=(32, 32))
    out, toy = tmp_path / "out", ["--clip", "toy", "--embed-dim", "64", "--device", "cpu", "--crops", 1]

    def extract(*more):
        argv = strings(["extract", "--videos", tmp_path / "a.mp4", "--output", out], toy, more)
        return quietly(package_main, argv)

    with holder(out):
        for more in ([], ["--shard", "1/2"]):
            refused = extract(*more)
            assert refused.code == 2 and refused.err.count("\n") == 1 and "another run" in refused.err
    with holder(out, shared=True), holder(out, ".lock-1-of-2"):
        assert "another run" in extract("--shard", "1/2").err
        assert extract("--shard", "2/2").code == 0
