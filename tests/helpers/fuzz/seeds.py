"""Valid files of every kind, small enough to be damaged thousands of times."""

import json
import shutil
import warnings
from pathlib import Path

import torch
from made_videos import write_video
from safetensors.torch import save_file
from small_detect import write_model
from small_report import made_test, write_test, write_training
from tiny import METHOD_FLAGS, WIDTH, make_tiny, quietly, strings

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.datasets import DATASETS, XD
from clipfusionvad.engine.checkpoint import CLIP_PREFIX
from clipfusionvad.models.clip import load_clip, toy_state
from clipfusionvad.report.results import RUN_SCORES
from clipfusionvad.report.scores import save_scores
from fuzz.targets import TOY_ENCODER

EVENTS = [{"start_frame": 3, "end_frame": 40}, {"start_frame": 60, "end_frame": 70}]
MSAD = [
    {"video_name": "Fire_1.mp4", "label": "Fire", "num_frames": 500, "anomalous": EVENTS},
    {"video_name": "MSAD_normal_testing_1", "label": "Normal", "num_frames": 300, "anomalous": []},
]
DETECTION = {"warning": None, "verdict": "normal", "max_score": 0.3}
DETECTION |= {"video": {"path": "a.mp4", "fps": 30.0, "frames": 20, "seconds": 0.7}}
DETECTION |= {"settings": {"checkpoint": "m.pth", "pages": "link"}}
DETECTION |= {"thresholds": {"high": 0.5, "low": 0.4, "min_seconds": 1.0, "merge_seconds": 1.0}}
DETECTION |= {"segments": [{"start": 0.0, "end": 1.0, "label": "Abuse"}]}
DETECTION |= {"snippets": {"start": [0.0], "end": [0.5], "anomaly": [0.3], "classes": None}}
FAILED = {"video": "other", "state": "failed", "time": "2026", "source": "x.mp4", "error": "e"}
TEXTS = {
    "annotations/ucf.txt": "Abuse500_x264.mp4  Abuse  16  240  -1  -1\nRobbery501_x264.mp4 Robbery 10 50 60 99\n"
    "Normal504_x264.mp4 Normal -1 -1 -1 -1\n",
    "annotations/xd.txt": "v=tiny500__#1_label_B1-0-0 0 151 197 303\nv=tiny501__#1_label_B2-G-0 5 9\n",
    "annotations/xd_classes.txt": "v=tiny500__#1_label_B1-0-0 B1 0 151 B1 197 303\n"
    "v=tiny501__#1_label_B2-G-0 B2 5 9 G 11 20\n",
    "annotations/shanghaitech.txt": "01_0014 car 5 5 10 40 -1 -1\n04_0012_1 running 3 80\n04_0012_2 stoop 90 120\n",
    "annotations/msad.txt": "Fire_1 street 10 90\nWater_incident_3 road 3 40\nMSAD_normal_testing_1 shop -1 -1\n",
    "annotations/msad.json": json.dumps({"videos": MSAD}),
    "detection.json": json.dumps(DETECTION),
    "shop.yaml": "name: shop\ntitle: Our shop\nclasses: {normal: quiet, theft: somebody steals, fall: they fall}\n"
    "fps: 12.5\nmulti_label: false\nlabel_pattern: '^([a-z]+)_'\naliases: {stealing: theft}\ntest_crop: 0\n",
}


def make_seeds(folder: Path) -> None:
    """Write everything below ``folder``."""
    for name in DATASETS:
        make_tiny(name, folder / "data" / name)
    for path in ("annotations", "models", "clips", "videos"):
        (folder / path).mkdir()
    for path, text in TEXTS.items():
        (folder / path).write_text(text)
    _make_models(folder / "models")
    _make_clips(folder / "clips")
    tiny = make_tiny("ucf", folder / "trained")
    outcome = tiny.train("--max-epoch", 1)
    assert outcome.code == 0, outcome.err
    _run("pack", "--dataset", "ucf", *make_tiny("ucf", folder / "packed").train_flags())
    write_training(folder / "runs" / "training", steps=40)
    write_test(folder / "runs" / "test")
    scores, videos = made_test(5, dataset=XD, truth=False)
    save_scores(folder / "runs" / "scored" / RUN_SCORES, scores, videos, {"method": "vadclip", "dataset": "xd"})
    shutil.copytree(tiny.work / "run", folder / "runs" / "trained", ignore=shutil.ignore_patterns("tensorboard"))
    codecs = {"a.mp4": "libx264", "b.mkv": "libx264", "c.avi": "mpeg4", "d.ts": "mpeg2video", "e.webm": "libvpx"}
    for name, codec in codecs.items():
        write_video(folder / "videos" / name, codec=codec)
    write_video(folder / "videos" / "turned.mp4", codec="mpeg4", rotation=90, frames=9)
    _run("extract", "--videos", folder / "videos" / "a.mp4", "--output", folder / "extracted", *TOY_ENCODER.split())
    with open(folder / "extracted" / "manifest.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(FAILED) + "\n")


def _run(*argv: object) -> None:
    outcome = quietly(package_main, strings(argv))
    assert outcome.code == 0, outcome.err


def _make_models(folder: Path) -> None:
    """Write our own files, those of the original projects with their CLIP, and those of other libraries."""
    whole = {CLIP_PREFIX + key: value for key, value in load_clip("toy", WIDTH).state.items()}
    for name in METHOD_FLAGS:
        model = write_model(folder / f"{name}.pth", name)
        state = model.to_released(dict(model.state_dict()) | whole)
        # The embedding of 49408 tokens is most of such a file.
        state = {key: value for key, value in state.items() if "token_embedding" not in key}
        torch.save(state, folder / f"{name}_released.pth")
    _run("export", folder / "iefvad.pth", "--output", folder / "iefvad.safetensors")
    save_file(torch.load(folder / "iefvad_released.pth"), folder / "bare.safetensors")
    released = torch.load(folder / "anomalyclip_released.pth")
    content = {"pytorch-lightning_version": "1.8.3", "epoch": 3, "state_dict": released, "callbacks": {"x": made_test}}
    torch.save(content, folder / "lightning.ckpt")


def _make_clips(folder: Path) -> None:
    from clip.model import CLIP

    state = {key: value.half() if value.is_floating_point() else value for key, value in toy_state(WIDTH).items()}
    torch.save(state, folder / "plain.pt")
    torch.save({"checkpoint": {f"module.encoder_k.{key}": value for key, value in state.items()}}, folder / "event.pt")
    model = CLIP(WIDTH, 224, 2, 64, 32, 77, 49408, WIDTH, 1, 2)
    model.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = torch.zeros(1, 3, 224, 224), torch.zeros(1, 77).long()
        torch.jit.trace(model.half().float().eval(), inputs).save(folder / "script.pt")
