"""From folders of videos to feature files: what is written, resumed, refused, and reported."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from made_videos import opencv_frames, plain_event_rows, plain_rows, write_sound, write_video
from tiny import quietly

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.data.features import read_shape
from clipfusionvad.extraction.extract import run_in_processes
from clipfusionvad.extraction.jobs import EncoderConfig, FeatureManifest, Job, find_videos
from clipfusionvad.extraction.snippets import ExtractOptions
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.provenance import code
from clipfusionvad.models.clip import image_tower, load_clip

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TOY = ["--clip", "toy", "--embed-dim", "64", "--device", "cpu"]
ROWS = {"Abuse/a": 2, "Normal/b__1.x": 2, "Normal/c": 1}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three good videos in the folders of their classes, and a file that is not a video."""
    folder = tmp_path_factory.mktemp("videos")
    for name, frames in {"Abuse/a.mp4": 40, "Normal/b__1.x.avi": 33, "Normal/c.MKV": 17}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_video(folder / name, frames, codec="mpeg4" if "avi" in name else "libx264", size=(160, 120))
    (folder / "Normal" / "readme.txt").write_text("notes")
    return folder


def extract(output, *flags, videos=()):
    argv = ["extract", "--videos", *map(str, videos), "--output", str(output), *TOY, *map(str, flags)]
    return quietly(package_main, argv)


def contents(folder):
    """Feature files by their path, as bytes; nothing else but manifests may be there."""
    files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
    assert all(name.endswith(".npy") or name.startswith("manifest") for name in files), sorted(files)
    return {name: path.read_bytes() for name, path in files.items() if name.endswith(".npy")}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory):
    """Ten crops of the three videos."""
    output = tmp_path_factory.mktemp("whole")
    outcome = extract(output, videos=[videos])
    assert outcome.code == 0 and "3 videos extracted (90 frames" in outcome.out, outcome
    assert f"lists --dataset NAME --features {output} --output list\n" in outcome.out
    return output


def test_a_file_for_each_crop_in_the_folder_of_its_class(whole, tmp_path):
    files = contents(whole)
    assert sorted(files) == sorted(f"{name}__{crop}.npy" for name in ROWS for crop in range(10))
    for name, content in files.items():
        features = np.load(whole / name)
        assert features.shape == read_shape(whole / name) == (ROWS[name.rpartition("__")[0]], 64)
        assert features.dtype == np.float16
        np.save(tmp_path / "again.npy", features)
        assert (tmp_path / "again.npy").read_bytes() == content


@pytest.mark.parametrize("stream", ["rgb", "event"])
def test_files_equal_the_plain_way_through_the_video(videos, tmp_path, stream):
    video = videos / "Abuse" / "a.mp4"
    outcome = extract(tmp_path, "--dtype", "float32", "--stream", stream, videos=[video])
    assert outcome.code == 0 and ("--event-clip" in outcome.err) == (stream == "event")
    tower, frames = image_tower(load_clip("toy", 64)), list(opencv_frames(video))
    for crop in range(10):
        plain = plain_rows if stream == "rgb" else plain_event_rows
        expected = plain(tower, [frames[:16], frames[16:32]], crop)
        np.testing.assert_allclose(np.load(tmp_path / f"a__{crop}.npy"), expected, atol=1e-5)


def test_event_clip_is_the_encoder_of_events_only(videos, tmp_path):
    encoder = {f"encoder_k.{key}": value for key, value in load_clip("toy", 128).state.items()}
    other = {f"encoder_q.{key}": value for key, value in load_clip("toy", 64).state.items()}
    torch.save({"checkpoint": encoder | other | {"queue": torch.zeros(3)}, "epoch": 3}, tmp_path / "e.pt")
    for name, flags, shape in (("rgb", ["--reduce", "none"], (40, 64)), ("event", ["--stream", "event"], (2, 128))):
        more = ["--event-clip", tmp_path / "e.pt", "--crops", 1]
        outcome = extract(tmp_path / name, *flags, *more, videos=[videos / "Abuse"])
        assert outcome.code == 0 and "warning" not in outcome.err
        assert ("--frames-per-snippet 1\n" in outcome.out) == (name == "rgb")
        assert read_shape(tmp_path / name / "a__0.npy") == shape
    assert load_clip(str(tmp_path / "e.pt")).image_fingerprint == load_clip("toy", 128).image_fingerprint


def test_the_manifest_says_what_was_made_of_what(whole, videos):
    records = lines(whole / "manifest.jsonl")
    states = [(record["video"], record["state"]) for record in records]
    assert states == [(name, state) for state in ("begun", "done") for name in ROWS]
    record, source = records[3], videos / "Abuse" / "a.mp4"
    assert record["source"] == str(source) and record["bytes"] == source.stat().st_size
    assert record["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert (record["fps"], record["frames"], record["rows"]) == (30, 40, 2)
    assert record["files"] == [f"Abuse/a__{crop}.npy" for crop in range(10)]
    assert record["model"] == {"clip": "toy", "fingerprint": load_clip("toy", 64).image_fingerprint, "dim": 64}
    assert record["code"] == code()
    assert record["options"] == {
        **{"stride": 16, "reduce": "mean", "crops": list(range(10)), "stream": "rgb", "tail": "floor"},
        **{"resize": "released", "dtype": "float16", "precision": "fp32"},
    }


def test_only_what_is_missing_is_made_again(whole, videos, tmp_path):
    """The program was killed between the last file and its line in the manifest, then a feature file is deleted."""
    for name, content in contents(whole).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    *kept, _ = (whole / "manifest.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "manifest.jsonl").write_text("".join(kept))
    for _ in range(2):
        outcome = extract(tmp_path, videos=[videos])
        assert outcome.code == 0 and "1 videos extracted" in outcome.out and contents(tmp_path) == contents(whole)
        (tmp_path / "Normal" / "c__3.npy").unlink()
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    outcome = extract(whole, videos=[videos])
    assert outcome.code == 0 and "0 videos extracted" in outcome.out and "3 existed already" in outcome.out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


CHANGES = {"crops": "--crops 1", "stride": "--stride 8", "dtype": "--dtype float32", "precision": "--precision bf16"}
CHANGES |= {"model": "--embed-dim 128", "stream": "--stream event"}


@pytest.mark.parametrize(("word", "flags"), CHANGES.items())
def test_other_options_are_refused_and_nothing_is_touched(whole, videos, word, flags):
    before = contents(whole), (whole / "manifest.jsonl").read_bytes()
    outcome = extract(whole, *flags.split(), videos=[videos])
    assert outcome.code == 2 and word in outcome.err and "--overwrite" in outcome.err
    assert "2 more videos" in outcome.err
    assert [line.split(":")[0] for line in outcome.err.splitlines() if not line.startswith("warning")] == ["error"]
    assert (contents(whole), (whole / "manifest.jsonl").read_bytes()) == before


def test_features_made_before_an_option_came_are_done_where_the_option_has_its_default(whole, videos, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "manifest.jsonl").read_text()
    assert '"tail": "floor", ' in text
    (tmp_path / "manifest.jsonl").write_text(text.replace('"tail": "floor", ', ""))
    before = contents(tmp_path)
    assert extract(tmp_path, videos=[videos]).code == 0 and contents(tmp_path) == before
    outcome = extract(tmp_path, "--tail", "ceil", videos=[videos])
    assert outcome.code == 2 and "tail (floor, now ceil)" in outcome.err


def test_overwrite_replaces_and_a_changed_video_is_noticed(tmp_path):
    video, output = write_video(tmp_path / "v.mp4", 20), tmp_path / "features"
    assert extract(output, "--crops", 1, videos=[video]).code == 0
    stride = ["--crops", 1, "--stride", 8]
    assert extract(output, *stride, "--overwrite", videos=[video]).code == 0
    assert read_shape(output / "v__0.npy")[0] == 2
    assert extract(output, *stride, videos=[video]).out.startswith("0 videos extracted")
    write_video(video, 40)
    refused = extract(output, *stride, videos=[video])
    assert refused.code == 2 and "video (" in refused.err and read_shape(output / "v__0.npy")[0] == 2


def test_files_of_unknown_origin_are_not_replaced(videos, tmp_path):
    (tmp_path / "Abuse").mkdir()
    np.save(tmp_path / "Abuse" / "a__0.npy", np.zeros((2, 64)))
    outcome = extract(tmp_path, videos=[videos])
    assert outcome.code == 2 and "is in no manifest, so its options are unknown" in outcome.err
    assert list(contents(tmp_path)) == ["Abuse/a__0.npy"] and not (tmp_path / "manifest.jsonl").exists()


def test_bad_videos_are_reported_and_the_others_continue(tmp_path):
    folder, out = tmp_path / "mixed", tmp_path / "out"
    folder.mkdir()
    write_video(folder / "good.mp4", 20)
    write_video(folder / "short.mp4", 15)
    write_sound(folder / "sound.mp4")
    (folder / "text.mp4").write_text("text")
    (folder / "zero.mp4").touch()
    content = write_video(folder / "cut.mp4", 100, movflags="faststart").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    outcome = extract(out, "--crops", 5, videos=[folder])
    assert outcome.code == 1
    bad = ["cut", "short", "sound", "text", "zero"]
    failed = [line for line in outcome.err.splitlines() if line.startswith("failed: ")]
    assert [line.split("/")[-1].split()[0] for line in failed] == [f"{name}.mp4" for name in bad]
    assert "5 of 6 videos failed" in outcome.err and "Traceback" not in outcome.err
    assert sorted(contents(out)) == [f"good__{crop}.npy" for crop in range(5)]
    records = {record["video"]: record for record in lines(out / "manifest.jsonl")}
    assert {name for name, record in records.items() if record["state"] == "failed"} == {*bad}
    assert "of 100 frames" in records["cut"]["error"] and "--tail ceil" in records["short"]["error"]
    # Failed videos are tried again.
    write_video(folder / "zero.mp4", 20)
    again = extract(out, "--crops", 5, videos=[folder])
    assert again.code == 1 and "1 videos extracted" in again.out and "4 of 6 videos failed" in again.err


REFUSED = {"crops must be": "--crop-ids 10", "I/N": "--shard 3/2", "GPU": "--precision fp16"}
REFUSED |= {"cuda:99": "--device cuda:99", "absent.pt": "--clip absent.pt", "--engine ray": "--ray-address auto"}
REFUSED |= {"--batch-size": "--batch-size 0", "--stride": "--stride 0"}


@pytest.mark.parametrize(("words", "flags"), REFUSED.items())
def test_bad_options_are_refused_before_anything_starts(videos, tmp_path, words, flags):
    outcome = extract(tmp_path / "out", *flags.split(), videos=[videos])
    assert outcome.code == 2 and words in outcome.err and "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


def test_videos_and_the_names_of_their_features(videos, tmp_path):
    assert "no videos below" in extract(tmp_path / "out", videos=[tmp_path]).err
    assert "video not found" in extract(tmp_path / "out", videos=[tmp_path / "absent.mp4"]).err
    assert [name for _, name in find_videos([videos])] == list(ROWS)
    assert [name for _, name in find_videos([videos / "Abuse", videos / "Normal" / "c.MKV"])] == ["a", "c"]
    write_video(tmp_path / "a.avi", 2, codec="mpeg4")
    with pytest.raises(UserError, match="both become a:"):
        find_videos([videos / "Abuse", tmp_path])
    address, listing = "https://host/bucket/Normal/Normal%20Video.mp4?key=1", tmp_path / "list.txt"
    listing.write_text(f"{videos}/Abuse/a.mp4\n\n{address}\na.avi\n")
    named = [(f"{videos}/Abuse/a.mp4", "Abuse/a"), (address, "Normal/Normal Video"), (str(tmp_path / "a.avi"), "a")]
    assert find_videos([listing]) == named


def test_shards_make_the_same_files_and_a_manifest_each(whole, videos, tmp_path):
    for shard in ("2/2", "1/2", "4/4"):
        assert extract(tmp_path, "--shard", shard, videos=[videos]).code == 0
    assert contents(tmp_path) == contents(whole)
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["manifest-1-of-2.jsonl", "manifest-2-of-2.jsonl"]
    assert len(lines(tmp_path / "manifest-1-of-2.jsonl")) == 4 and len(lines(tmp_path / "manifest-2-of-2.jsonl")) == 2
    # A run of all videos reads both.
    assert "3 existed already" in extract(tmp_path, videos=[videos]).out
    assert not (tmp_path / "manifest.jsonl").exists()


def test_workers_make_the_same_files_and_leave_nothing_half_written(whole, videos, tmp_path, monkeypatch):
    """One of them is killed while it makes a fourth, long video."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options, output = (ExtractOptions(crops=tuple(range(10))), EncoderConfig("toy", 64, "cpu")), tmp_path / "out"
    found = [*find_videos([videos]), *find_videos([write_video(tmp_path / "long.mp4", 900)])]
    jobs = [Job(source, name, str(output), *options) for source, name in found]
    with closing(run_in_processes(jobs, 2)) as outcomes:
        made = [next(outcomes) for _ in ROWS]
        assert {job.name for job, _ in made} == set(ROWS) and not any("error" in record for _, record in made)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(UserError, match="worker process died, 1 videos are left"):
            next(outcomes)
    assert not multiprocessing.active_children()
    assert contents(output) == contents(whole)


def test_a_line_that_was_cut_off_is_no_line(tmp_path):
    manifest = FeatureManifest(tmp_path)
    manifest.append("first", "begun", {})
    manifest.append("other", "done", {"model": {}, "options": {}, "bytes": 1, "source": "x"})
    manifest.path.write_bytes(manifest.path.read_bytes()[:-20])
    again = FeatureManifest(tmp_path)
    assert list(again.records) == ["first"]
    again.append("third", "begun", {})
    assert list(FeatureManifest(tmp_path).records) == ["first", "third"]
    manifest.path.write_text('{"something": "else"}\n')
    with pytest.raises(UserError, match="line 1, is not from a manifest"):
        FeatureManifest(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real clips of ../shared/data")
def test_real_clips_give_the_rows_of_the_benchmark(tmp_path):
    frames = pd.read_csv(SHARED / "benchmarks" / "ucf_test_videos.csv", index_col="video")["n_frames"]
    names = ["RoadAccidents017_x264", "RoadAccidents133_x264"]
    clips = [SHARED / "ucf_clips" / f"{name}.mp4" for name in names]
    assert extract(tmp_path, "--crop-ids", 5, "--reduce", "middle", videos=clips).code == 0
    assert [read_shape(tmp_path / f"{name}__5.npy")[0] for name in names] == [frames[name] // 16 for name in names]
    assert [record["frames"] for record in lines(tmp_path / "manifest.jsonl")[2:]] == [frames[name] for name in names]
