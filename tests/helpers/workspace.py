"""The folder of a user who follows the documentation: small features, annotations, videos and released files.

Names and formats are those of the four benchmarks; the content is random.
"""

import shutil
from itertools import product
from pathlib import Path

import numpy as np
import torch
import yaml
from made_videos import write_video
from smaller import WIDTH

from clipfusionvad.cli.options import option_file_of, settings_of
from clipfusionvad.datasets import DATASETS
from clipfusionvad.engine.checkpoint import released_state
from clipfusionvad.engine.setup import build_model
from clipfusionvad.io.files import write_array, write_torch
from clipfusionvad.models.clip import toy_state

ROOT = Path(__file__).resolve().parents[2]
NORMAL = ["Training_Normal_Videos_Anomaly/Normal_Videos00{}_x264"]
NORMAL += ["Testing_Normal_Videos_Anomaly/Normal_Videos_00{}_x264"]
XD_NORMAL = "A.Film__#00-0{}-00_label_A"
GARAGE = """\
title: Parking garage
classes:
  Quiet: an empty parking garage
  Theft: a person breaking into a car
  Shouting: people shouting at each other
"""
CLIPS = ["Arson009", "Arson016", "Explosion016", "Explosion021", "Fighting033", "RoadAccidents133", "Vandalism017"]


def make_features(folder: Path, names: list[str], crops=(0, 5), events: str | None = None) -> None:
    """Features of videos, and beside ``folder`` their event features in the folder ``events``."""
    rng, places = np.random.default_rng(5), [folder, *([folder.parent / events] if events else [])]
    for name in names:
        video = rng.normal(size=(int(rng.integers(6, 30)), WIDTH)).astype(np.float16)
        for place, crop in product(places, crops):
            write_array(place / f"{name}__{crop}.npy", video + np.float16(0.1 * crop))


def make_workspace() -> None:
    """Fill the current folder."""
    for name in ("configs", "benchmarks"):
        Path(name).symlink_to(ROOT / name)
    for name in ("annotations", "list", "model", "released", "authors", "weights", "videos"):
        Path(name).mkdir()
    shutil.copy(ROOT / "README.md", "README.md")
    shutil.copytree(ROOT / "docs", "docs")
    for script in (ROOT / "list").glob("*.py"):
        shutil.copy(script, "list")
    write_video("videos/shop.mp4", frames=70)
    _make_released()
    # UCF-Crime.
    names = [f"{label}/{label}{number:03}_x264" for label in ("Abuse", "Arson") for number in (1, 2, 28)]
    names += [part.format(number) for part in NORMAL for number in (1, 3, 4)]
    make_features(Path("features/ucf"), names)
    annotations = "Abuse028_x264  Abuse  20  60  -1  -1\nArson028_x264  Arson  10  40  50  80\n"
    clips = "".join(f"{name}_x264  {name[:-3]}  10  30  -1  -1\n" for name in CLIPS)
    normal = "".join(f"Normal_Videos_00{number}_x264  Normal  -1  -1  -1  -1\n" for number in (1, 3, 4))
    Path("annotations/Temporal_Anomaly_Annotation.txt").write_text(annotations + normal)
    Path("annotations/clips.txt").write_text(clips + "Normal_Videos_641_x264  Normal  -1  -1  -1  -1\n")
    tested = ["Abuse/Abuse028_x264", "Arson/Arson028_x264", *(NORMAL[1].format(number) for number in (1, 3, 4))]
    Path("annotations/Anomaly_Test.txt").write_text("".join(f"{name}.mp4\n" for name in tested))

    # XD-Violence.
    names = [f"B.Film__#00-0{number}-00_label_B2-0-0" for number in range(6)]
    names += [f"C.Film__#00-0{number}-00_label_G-0-0" for number in range(2)]
    names += [XD_NORMAL.format(number) for number in range(8)]
    make_features(Path("features/xd"), names, crops=(0, 1))
    tested = [names[4], names[7], XD_NORMAL.format(6), XD_NORMAL.format(7)]
    Path("annotations/annotations.txt").write_text(f"{names[4]} 10 40\n{names[7]} 5 30\n")
    Path("annotations/annotations_multiclasses.txt").write_text(f"{names[4]} B2 10 40\n{names[7]} G 5 30\n")
    # The authors' lists have the paths of their machine.
    listed = {name: f"/home/authors/xd/{name}__0.npy,{name.split('_label_')[1]}\n" for name in names}
    for path in ("annotations/xd_CLIP_rgbtest.csv", "authors/xd_CLIP_rgbtest.csv"):
        Path(path).write_text("path,label\n" + "".join(listed[name] for name in tested))
    trained = "".join(line for name, line in listed.items() if name not in tested)
    Path("authors/xd_CLIP_rgb.csv").write_text("path,label\n" + trained)

    # ShanghaiTech.
    names = [f"{label}/0{number}_0{number}28" for label, number in (("car", 1), ("robbery", 2))]
    names += [f"{label}/0{number}_0130" for label, number in (("car", 3), ("robbery", 4))]
    names += [f"normal/01_00{number}" for number in range(6)]
    make_features(Path("features/shanghaitech/rgb"), names, events="event")
    padding = " -1 -1" * 5
    lines = [f"03_0130.avi car 10 60{padding}", f"04_0130.avi robbery 20 70{padding}"]
    lines += [f"01_00{number}.avi normal{padding}" for number in (4, 5)]
    Path("annotations/shang_annotations.txt").write_text("\n".join(lines) + "\n")

    # MSAD.
    names = [f"{label}/{label}_{number}" for label in ("Fire", "Robbery") for number in (1, 2, 8)]
    names += [f"Normal/office{number}" for number in range(4)] + ["Normal/MSAD_normal_testing_1"]
    make_features(Path("features/msad/rgb"), names, events="event_thr_10")
    lines = ["Fire_8.mp4 office 1 60 -1 -1", "Robbery_8.mp4 shop 9 70 -1 -1"]
    lines += ["MSAD_normal_testing_1.mp4 Normal -1 -1 -1 -1"]
    Path("annotations/msad_annotations.txt").write_text("\n".join(lines) + "\n")


def _make_released() -> None:
    """Checkpoints in the form that the authors released, with random weights, and event-CLIP."""
    for method, dataset in (("vadclip", "ucf"), ("vadclip", "xd"), ("iefvad", "msad"), ("anomalyclip", "ucf")):
        known = DATASETS[dataset]
        args = option_file_of(known).parse_args(["--method", method])
        model, clip = build_model(settings_of(args, known).model, known, args.seed)
        state = released_state(model, clip)
        if method == "anomalyclip":
            lightning = {"state_dict": {f"net.{key}": value for key, value in state.items()}}
            write_torch("released/last.ckpt", lightning)
        else:
            write_torch(f"released/model_{dataset}.pth", state)
    encoder = {f"encoder_k.{key}": value for key, value in toy_state(WIDTH).items()}
    torch.save({"checkpoint": encoder}, "weights/event_clip.pth")


def forget_extraction() -> None:
    """Remove what was extracted before with other options."""
    for path in [*Path("features").glob("*.npy"), Path("features/manifest.jsonl")]:
        path.unlink(missing_ok=True)


def forget_unlabelled() -> None:
    """Remove the features of a video whose name gives no class of UCF-Crime."""
    for path in Path("features/ucf").glob("shop*"):
        path.unlink()


def make_detection() -> None:
    """The class names and the annotation file that docs/detect.md uses."""
    Path("annotations/shop.csv").write_text("video,frames,label,start,end\nshop,,Stealing,16,32\n")
    Path("classes.txt").write_text("normal\nfall=person falling on the floor\nsmoke\n")


def make_garage() -> None:
    """The videos of docs/own-data.md."""
    Path("parking.yaml").write_text(GARAGE)
    shutil.rmtree("videos")
    shutil.rmtree("features")
    rows = []
    numbered = [("train", number) for number in range(8)] + [("test", number) for number in range(2)]
    for label, (part, number) in product(yaml.safe_load(GARAGE)["classes"], numbered):
        path = Path("videos", part, label, f"{part}_{label}_{number}.mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, frames=34 + number)
        bounds = "," if label == "Quiet" else f"4,{20 + number}"
        rows += [f"{path.stem},{34 + number},{label},{bounds}\n"] if part == "test" else []
    Path("truth.csv").write_text("video,frames,label,start,end\n" + "".join(rows))


def make_clips() -> None:
    """Videos with the names of those of docs/real-clips.md."""
    shutil.rmtree("videos", ignore_errors=True)
    shutil.rmtree("features", ignore_errors=True)
    Path("videos").mkdir()
    for name in [*CLIPS, "Normal_Videos_641"]:
        write_video(f"videos/{name}_x264.mp4", frames=34)
    shutil.copy("annotations/clips.txt", "annotations/Temporal_Anomaly_Annotation.txt")
    tested = ("Arson016", "Explosion016", "Fighting033", "RoadAccidents133", "Vandalism017")
    Path("test_videos.txt").write_text("".join(f"{name}_x264\n" for name in tested))
