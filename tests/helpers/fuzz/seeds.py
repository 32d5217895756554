"""Valid files of every kind, small enough to be damaged thousands of times."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from made_videos import write_video
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat
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
    _make_arrays(folder / "arrays")
    _make_masks(folder / "masks")
    _make_pictures(folder / "pictures")
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
    save_file(
        {f"text.{key}" if "visual" not in key else key: value for key, value in state.items()},
        folder / "oc.safetensors",
    )
    torch.save(_huggingface(state), folder / "huggingface.bin")
    model = CLIP(WIDTH, 224, 2, 64, 32, 77, 49408, WIDTH, 1, 2)
    model.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = torch.zeros(1, 3, 224, 224), torch.zeros(1, 77).long()
        torch.jit.trace(model.half().float().eval(), inputs).save(folder / "script.pt")


def _huggingface(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state dict of ``CLIPModel`` with the same weights."""
    own = {"logit_scale": state["logit_scale"], "text_projection.weight": state["text_projection"].T.contiguous()}
    own["visual_projection.weight"] = state["visual.proj"].T.contiguous()
    own["text_model.embeddings.token_embedding.weight"] = state["token_embedding.weight"]
    own["text_model.embeddings.position_embedding.weight"] = state["positional_embedding"]
    names = {"ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm"}
    names |= {
        "visual.ln_post": "vision_model.post_layernorm",
        "visual.conv1": "vision_model.embeddings.patch_embedding",
    }
    names |= {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names |= {"ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    for key, value in state.items():
        tower = "vision_model" if key.startswith("visual.") else "text_model"
        stem, _, kind = key.rpartition(".")
        if "resblocks." not in key:
            embedding = {"visual.class_embedding": "class_embedding"}
            embedding |= {"visual.positional_embedding": "position_embedding.weight"}
            if stem in names or key in embedding:
                own[f"{names[stem]}.{kind}" if stem in names else f"{tower}.embeddings.{embedding[key]}"] = value
            continue
        layer, part = stem.split("resblocks.")[1].split(".", 1)
        place = f"{tower}.encoder.layers.{layer}."
        if kind.startswith("in_proj_"):
            for name, rows in zip("qkv", value.chunk(3), strict=True):
                own[f"{place}self_attn.{name}_proj.{kind.removeprefix('in_proj_')}"] = rows.contiguous()
        else:
            own[f"{place}{names[part]}.{kind}"] = value
    return own


def _make_arrays(folder: Path) -> None:
    """Features as other projects keep them: crops as an axis, several videos in a file."""
    import h5py

    folder.mkdir()
    crops, video = np.random.default_rng(3).normal(size=(6, 10, 128)).astype(np.float32), np.ones((5, 128), np.float16)
    np.save(folder / "crops.npy", crops)
    np.savez(folder / "videos.npz", a=video, b=video[:2], label=np.zeros(5))
    np.savez(folder / "stacked.npz", train=crops, train_names=list("abcdef"))
    np.save(folder / "dictionary.npy", np.array({"a": crops, "b": crops[:2]}, dtype=object))
    torch.save({"a": torch.tensor(crops), "epoch": 3}, folder / "a.pt")
    save_file({"a": torch.tensor(crops[0]), "b": torch.tensor(crops[1])}, folder / "rows.safetensors")
    with h5py.File(folder / "groups.h5", "w") as file:
        for name in "ab":
            file[f"{name}/features"], file[f"{name}/frames"] = video, 80


def _make_masks(folder: Path) -> None:
    """Annotations as frame masks and in MATLAB's format."""
    (folder / "shanghaitech_masks").mkdir(parents=True)
    for name, shape in {"01_0014": (30,), "04_0012": (20, 3, 4)}.items():
        mask = np.zeros(shape, np.uint8)
        mask[5:9] = 1
        np.save(folder / "shanghaitech_masks" / f"{name}.npy", mask)
    named = {"VideoName": "Arson011_x264.mp4", "EventName": "Arson", "Anno": np.array([[150, 420], [680, 1267]])}
    savemat(folder / "ucf_anno.mat", {"Annotation_file": named})
    cells = np.empty((1, 2), dtype=object)
    cells[0, 0], cells[0, 1] = np.array([[78, 392], [120, 422]]), np.zeros((2, 0))
    savemat(folder / "shanghaitech_gt.mat", {"gt": cells})
    savemat(folder / "ucf_label.mat", {"volLabel": cells})


def _make_pictures(folder: Path) -> None:
    """Videos as numbered pictures: one in its folder, two beside each other."""
    rng = np.random.default_rng(4)
    for name, suffix in {"01_0014/00": "jpg", "Abuse/Abuse001_x264_": "png", "Abuse/Abuse002_x264_": "png"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for number in (0, 1, 2):
            picture = Image.fromarray(rng.integers(0, 256, size=(32, 40, 3), dtype=np.uint8))
            picture.save(folder / f"{name}{number}.{suffix}")
