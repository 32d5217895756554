"""Folders of numbered pictures are videos, for extract and detect: order, names, what is refused, times."""

import json

import numpy as np
import pytest
from made_videos import embed, picture, plain_crop, write_video
from PIL import Image
from small_detect import detect, write_model
from tiny import quietly

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.data.features import read_shape
from clipfusionvad.extraction.decode import BrokenVideo, read_frames
from clipfusionvad.extraction.jobs import find_videos
from clipfusionvad.models.clip import image_tower, load_clip

TOY = ["--clip", "toy", "--embed-dim", "64", "--device", "cpu", "--crops", "1"]
RATE_NOTE = "pictures have no times"


def write_pictures(folder, names, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names, start):
        Image.fromarray(picture(index)).save(folder / name)
    return folder


def frames_of(names):
    """Lossless pictures are read as they were written."""
    return [picture(index) for index in range(len(names))]


def extract(output, *flags, videos=()):
    return quietly(package_main, ["extract", "--videos", *map(str, videos), "--output", str(output), *TOY, *flags])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "names",
    [
        [f"{index:03d}.png" for index in range(12)],
        [f"img_{index}.bmp" for index in range(1, 13)],
        [f"frame-{index}.PNG" for index in range(95, 107)],
        [f"{index}.tif" for index in range(0, 120, 10)],
        ["0.png", "1.PNG", "02.png"],
    ],
)
def test_pictures_are_read_by_number_not_by_text(tmp_path, names):
    folder, infos = write_pictures(tmp_path / "01_0014", names), []
    ((source, name),) = find_videos([folder])
    assert name == "01_0014" and [name for _, name in find_videos([tmp_path])] == ["01_0014"]
    np.testing.assert_array_equal(list(read_frames(source, infos.append)), frames_of(names))
    assert (infos[0].frames, infos[0].width, infos[0].height, infos[0].times) == (len(names), 64, 48, "frame rate")


def test_grey_and_transparent_pictures_are_turned_to_colours_and_upright(tmp_path):
    grey = picture(0)[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "0.png")
    Image.fromarray(np.dstack([picture(1), grey])).save(tmp_path / "1.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(np.rot90(picture(2)).copy()).save(tmp_path / "2.png", exif=exif)
    ((source, _),) = find_videos([tmp_path])
    np.testing.assert_array_equal(list(read_frames(source)), [np.dstack([grey] * 3), picture(1), picture(2)])


def test_the_names_of_benchmarks(tmp_path):
    """ShanghaiTech: a folder is a video. UCF-Crime as Kaggle has it: a folder is a class, with all videos' pictures."""
    for name in ("01_0014", "12_0142"):
        write_pictures(tmp_path / "frames" / name, [f"{index:03d}.jpg" for index in range(20)])
    tens = range(0, 200, 10)
    for name in ("Abuse001", "Abuse028"):
        write_pictures(tmp_path / "Test/Abuse", [f"{name}_x264_{index}.png" for index in tens])
    # Also the only video of its class.
    normal = "Normal_Videos_003_x264"
    write_pictures(tmp_path / "Test/NormalVideos", [f"{normal}_{index}.png" for index in tens])
    assert [name for _, name in find_videos([tmp_path / "frames"])] == ["01_0014", "12_0142"]
    assert [name for _, name in find_videos(sorted((tmp_path / "frames").iterdir()))] == ["01_0014", "12_0142"]
    ucf = ["Abuse/Abuse001_x264", "Abuse/Abuse028_x264", f"NormalVideos/{normal}"]
    assert [name for _, name in find_videos([tmp_path / "Test"])] == ucf
    assert [name for _, name in find_videos([tmp_path / "Test/Abuse"])] == ["Abuse001_x264", "Abuse028_x264"]
    write_pictures(tmp_path / "two", [f"cam_{camera}_{index}.jpg" for camera in "ab" for index in range(3)])
    assert [name for _, name in find_videos([tmp_path / "two"])] == ["cam_a", "cam_b"]
    # As lines of a list, and again from the manifest.
    listing = tmp_path / "list.txt"
    listing.write_text(f"frames/01_0014\nTest/Abuse\nTest/NormalVideos/{normal}_%d.png\n")
    listed = ["01_0014", *ucf]
    assert sorted(name for _, name in find_videos([listing])) == sorted(listed)
    assert extract(tmp_path / "out", videos=[listing]).code == 0
    assert find_videos([tmp_path / "out/manifest.jsonl"]) == find_videos([listing])


def test_features_and_the_manifest_of_pictures(tmp_path):
    names = [f"{index}.png" for index in range(40)]
    folder = write_pictures(tmp_path / "frames/01_0014", names)
    outcome = extract(tmp_path / "out", "--dtype", "float32", videos=[tmp_path / "frames"])
    assert outcome.code == 0 and outcome.err.count("\n") == 1 and RATE_NOTE in outcome.err and "25" in outcome.err
    tower = image_tower(load_clip("toy", 64))
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    rows = [embed(tower, (plain_crop(frame, 0) / 255 - mean) / std) for frame in frames_of(names)[:32]]
    expected = np.array(rows).reshape(2, 16, -1).mean(axis=1)
    np.testing.assert_allclose(np.load(tmp_path / "out/01_0014__0.npy"), expected, atol=1e-5)
    record = lines(tmp_path / "out/manifest.jsonl")[-1]
    assert record["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    facts = [record[key] for key in ("frames", "fps", "times", "duration", "sha256")]
    assert facts == [40, 25, "frame rate", 1.6, None]
    assert "1 existed already" in extract(tmp_path / "out", "--dtype", "float32", videos=[tmp_path / "frames"]).out
    write_pictures(folder, ["40.png"])
    assert "video (" in extract(tmp_path / "out", "--dtype", "float32", videos=[tmp_path / "frames"]).err
    given = extract(tmp_path / "given", "--fps", "10", "--workers", "2", videos=[tmp_path / "frames"])
    assert given.code == 0 and RATE_NOTE not in given.err
    record = lines(tmp_path / "given/manifest.jsonl")[-1]
    assert (record["fps"], record["duration"]) == (10, 4.1)


WHOLE = [f"{index}.png" for index in range(20)]


@pytest.mark.parametrize(
    ("folders", "says"),
    [
        ({"a": [*WHOLE, "20.jpg", "21.jpg"]}, "a holds pictures of several kinds (20 .png, 2 .jpg)"),
        ({"a": [*WHOLE, "mask_0.bmp", "mask_1.bmp"]}, "a holds pictures of several kinds (20 .png, 2 .bmp)"),
        ({"a": WHOLE, "a/masks": WHOLE}, "a holds numbered pictures, and so does"),
        ({"a": [*WHOLE, "007.png"]}, "007.png and 7.png have the same number"),
        ({"a": ["street.png", "house.png"]}, "numbered pictures: 000.jpg, 001.jpg"),
        ({"a": ["cover1.png"]}, "no videos below"),
    ],
)
def test_folders_that_are_not_clear_are_one_line(tmp_path, folders, says):
    for folder, names in folders.items():
        write_pictures(tmp_path / "frames" / folder, names)
    outcome = extract(tmp_path / "out", videos=[tmp_path / "frames"])
    assert outcome.code == 2 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert says in outcome.err and not (tmp_path / "out").exists()


def test_missing_numbers_are_told_and_every_tenth_is_not_missing(tmp_path):
    write_pictures(tmp_path / "gap/a", [name for name in WHOLE if name not in ("7.png", "9.png")])
    write_pictures(tmp_path / "gap/b", [name for name in WHOLE if name != "1.png"])
    write_pictures(tmp_path / "tens/c", [f"{index}.png" for index in range(0, 200, 10)])
    outcome = extract(tmp_path / "out", "--fps", "30", videos=[tmp_path / "gap"])
    (warning,) = outcome.err.splitlines()
    assert outcome.code == 0 and "a/%d.png lacks number 7 (and 1 more videos like it)" in warning
    assert [line["frames"] for line in lines(tmp_path / "out/manifest.jsonl")[2:]] == [18, 19]
    outcome = extract(tmp_path / "tens_out", "--fps", "3", videos=[tmp_path / "tens"])
    # Annotations count the frames of the original video.
    assert outcome.err == "" and "--frames-per-snippet 160\n" in outcome.out
    assert lines(tmp_path / "tens_out/manifest.jsonl")[-1]["step"] == 10


def test_pictures_beside_videos_stay_what_they_are(tmp_path, capsys):
    """Covers, and figures that detect has written."""
    write_video(tmp_path / "cam_1.mp4", 20)
    write_pictures(tmp_path, ["cam_1.png", "cam_2.png"])
    assert [name for _, name in find_videos([tmp_path])] == ["cam_1"] and capsys.readouterr().err == ""
    write_pictures(tmp_path / "frames", WHOLE)
    assert [name for _, name in find_videos([tmp_path])] == ["cam_1"]
    assert f"pass {tmp_path / 'frames'} if" in capsys.readouterr().err
    write_pictures(tmp_path / "shadows", ["._0.png", "._1.png", "0.png", "1.png"])
    assert len(list(read_frames(find_videos([tmp_path / "shadows"])[0][0]))) == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "vadclip.pt"
    write_model(path, "vadclip")
    return ["--checkpoint", path, "--device", "cpu"]


def test_detect_scores_pictures_like_the_video_of_them(tmp_path, model):
    folder = write_pictures(tmp_path / "frames/Abuse001_x264", [f"img_{index}.png" for index in range(40)])
    out = tmp_path / "out"
    outcome = detect([folder, *model, "--annotated", "--output", out])
    assert outcome.code == 0 and outcome.err.count("\n") == 1 and f"{RATE_NOTE}: 30 a second" in outcome.err
    found = json.loads((out / "Abuse001_x264.json").read_text())
    video = [found["video"][key] for key in ("frames_read", "fps", "times", "seconds")]
    assert video == [40, 30, "frame rate", pytest.approx(40 / 30, abs=1e-5)]
    assert len(list(read_frames(out / "Abuse001_x264_annotated.mp4"))) == 40
    before = (out / "Abuse001_x264.json").stat().st_mtime_ns
    assert detect([folder, *model, "--annotated", "--output", out]).code == 0
    assert (out / "Abuse001_x264.json").stat().st_mtime_ns == before
    # Another rate is another result; without --annotated there is no video to show.
    assert detect([tmp_path / "frames", *model, "--fps", 10, "--output", out]).code == 0
    found = json.loads((out / "Abuse001_x264.json").read_text())
    assert (found["video"]["seconds"], found["snippets"]["end"]) == (4, [1.6, 3.2, 4])
    assert "<video" not in (out / "Abuse001_x264.html").read_text()


def test_a_picture_that_cannot_be_read_costs_its_video_alone(tmp_path, model):
    for name in ("bad", "cut", "good"):
        write_pictures(tmp_path / "frames" / name, WHOLE)
    (tmp_path / "frames/bad/0.png").write_text("This is no picture.")
    (tmp_path / "frames/bad/1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    content = (tmp_path / "frames/cut/17.png").read_bytes()
    (tmp_path / "frames/cut/17.png").write_bytes(content[: len(content) // 2])
    flags = ["--fps", 30, "--output", tmp_path / "out"]
    outcome = detect([tmp_path / "frames", *model, *flags])
    assert outcome.code == 1 and "Traceback" not in outcome.err and len(outcome.err.splitlines()) == 3
    assert "0.png is not a picture of 8 bits that can be read" in outcome.err
    assert "after 17 of 20 frames (17.png is not a picture" in outcome.err
    assert json.loads((tmp_path / "out/cut.json").read_text())["video"]["frames_read"] == 17
    assert extract(tmp_path / "f", "--fps", "30", videos=[tmp_path / "frames"]).code == 1
    assert sorted(path.name for path in (tmp_path / "f").glob("*.npy")) == ["good__0.npy"]
    assert read_shape(tmp_path / "f/good__0.npy") == (1, 64)
    (tmp_path / "frames/bad/0.png").unlink()
    with pytest.raises(BrokenVideo, match=r"1\.png is not a picture"):
        list(read_frames(tmp_path / "frames/bad/%d.png"))
    # Cut off at 255, a thermal picture would be white.
    Image.fromarray(np.full((48, 64), 3000, np.uint16)).save(tmp_path / "frames/good/3.png")
    with pytest.raises(BrokenVideo, match="after 3 of 20 frames"):
        list(read_frames(tmp_path / "frames/good/%d.png"))


def test_pictures_that_are_gone_are_one_line(tmp_path, model):
    listing = tmp_path / "list.txt"
    write_pictures(tmp_path / "good", WHOLE)
    listing.write_text("absent/%d.png\ngood/%d.png\ngood/img_%d.png\n")
    outcome = extract(tmp_path / "out", "--fps", "30", videos=[listing])
    assert outcome.code == 1 and outcome.err.count("video not found") == 2 and "Traceback" not in outcome.err
    outcome = detect([listing, *model, "--fps", 30, "--output", tmp_path / "found"])
    assert outcome.code == 1 and outcome.err.count("video not found") == 2 and "Traceback" not in outcome.err
