"""Extraction on Ray: a worker is killed on the way, and the files are those of a run on this machine alone."""

import os
import signal
import sys
import threading
import time

import pytest
from made_videos import write_video
from ray_workers import needs_proc, needs_ray, working_processes

from clipfusionvad.extraction.extract import extract_job, run_on_ray
from clipfusionvad.extraction.jobs import EncoderConfig, Job, find_videos
from clipfusionvad.extraction.snippets import ExtractOptions
from clipfusionvad.io.errors import UserError


def jobs(videos, output):
    options = ExtractOptions(crops=(0, 5))
    return [Job(str(video), video.stem, str(output), options, EncoderConfig("toy", 64, "cpu")) for video in videos]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_one(output, killed):
    """Kill a worker as soon as one has begun to write."""
    ends = time.monotonic() + 100
    while time.monotonic() < ends and not killed:
        if any(output.glob(".*.tmp")) and (working := working_processes("extract_job")):
            os.kill(working[0], signal.SIGKILL)
            killed.append(working[0])
        time.sleep(0.02)


@pytest.mark.slow
@needs_ray
@needs_proc
def test_a_killed_worker_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    videos = [tmp_path / "videos" / f"v{number}.mp4" for number in range(3)]
    (tmp_path / "videos").mkdir()
    for number, video in enumerate(videos):
        write_video(video, 200 + 10 * number)
    bad = tmp_path / "videos" / "bad.mp4"
    bad.write_text("no video")
    here, there, killed = tmp_path / "here", tmp_path / "there", []
    expected = [extract_job(job) for job in jobs(videos, here)]
    watcher = threading.Thread(target=kill_one, args=(there, killed))
    watcher.start()
    records = {job.name: record for job, record in run_on_ray(jobs([*videos, bad], there), 2)}
    watcher.join()
    assert killed, "no worker was seen at work"
    assert "bad.mp4" in records["bad"]["error"]
    facts = ("source", "sha256", "model", "options", "fps", "frames", "rows", "files")
    for record, video in zip(expected, videos, strict=True):
        assert {key: records[video.stem][key] for key in facts} == {key: record[key] for key in facts}
    # Neither another byte nor another file.
    assert bytes_of(there) == bytes_of(here)


def test_without_ray_one_line_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install ray"):
        next(run_on_ray(jobs([tmp_path / "v.mp4"], tmp_path), 1))


@needs_ray
def test_no_cluster_at_an_address(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="no Ray cluster at auto"):
        next(run_on_ray(jobs([tmp_path / "v.mp4"], tmp_path), 1, "auto"))


def test_a_manifest_is_a_list_of_videos(tmp_path):
    """So that a cluster can do once more, with other options, what has been done."""
    manifest = tmp_path / "manifest.jsonl"
    lines = ['{"video": "Arson/a", "source": "videos/Arson/a.mp4", "state": "begun"}']
    lines += ['{"video": "b", "source": "https://host/b.mp4", "state": "failed"}', lines[0].replace("begun", "done")]
    manifest.write_text("\n".join([*lines, '{"video": "cut of']))
    assert find_videos([manifest]) == [("videos/Arson/a.mp4", "Arson/a"), ("https://host/b.mp4", "b")]
    manifest.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="line 1, does not name a video"):
        find_videos([manifest])
