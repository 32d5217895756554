"""Every frame of any video, upright and in order; one clear line for a file that is not a video."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from made_videos import opencv_frames, picture, write_sound, write_video

from clipfusionvad.extraction.decode import BrokenVideo, missing_bytes, read_frames
from clipfusionvad.io.errors import UserError

KINDS = {
    "h264.mp4": {},
    "hevc.mp4": {"codec": "libx265", "rate": Fraction(2700003, 100000)},
    "odd.mkv": {"size": (65, 47)},
    "mpeg4.avi": {"codec": "mpeg4", "rate": Fraction(30067, 1000)},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25},
    "h264.ts": {},
    "vfr.mp4": {"times": [33 * index + 10 * (index % 3) for index in range(20)]},
}


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_that_opencv_reads(tmp_path, name):
    path, infos = write_video(tmp_path / name, **KINDS[name]), []
    frames = read_frames(path, infos.append)
    assert not infos
    first = next(frames)
    assert len(infos) == 1 and first.dtype == np.uint8
    np.testing.assert_array_equal([first, *frames], list(opencv_frames(path)))
    (info,) = infos
    assert (info.height, info.width) == first.shape[:2] and info.frames in (20, None)
    assert info.fps == pytest.approx(float(KINDS[name].get("rate", info.fps)), rel=1e-5)
    # Lossy, but neither another picture nor blue for red.
    if name == "h264.mp4":
        assert np.corrcoef(first[..., 0].ravel(), picture(0)[..., 0].ravel())[0, 1] > 0.8


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_a_display_matrix_turns_frames_upright(tmp_path, rotation, turns):
    """Counter-clockwise by so many quarters, as the container says it is to be shown."""
    path, infos = write_video(tmp_path / "phone.mp4", 3, rotation=rotation, size=(64, 32)), []
    lying = list(read_frames(write_video(tmp_path / "lying.mp4", 3, size=(64, 32))))
    frames = list(read_frames(path, infos.append))
    np.testing.assert_array_equal(frames, [np.rot90(frame, turns) for frame in lying])
    assert (infos[0].width, infos[0].height) == frames[0].shape[1::-1]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_a_cut_off_file_breaks_off_where_its_frames_end(tmp_path, name, share):
    options = {"codec": "mpeg4"} if "avi" in name else {"movflags": "faststart"} if "mp4" in name else {}
    whole = write_video(tmp_path / name, 150, **options)
    assert missing_bytes(whole) == 0 and len(list(read_frames(whole))) == 150
    content, frames = whole.read_bytes(), []
    cut = tmp_path / f"cut_{name}"
    cut.write_bytes(content[: int(len(content) * share)])
    assert missing_bytes(cut) > 0
    with pytest.raises(BrokenVideo, match="breaks off after") as caught:
        frames.extend(read_frames(cut))
    assert 0 < len(frames) < 150 and f"after {len(frames)}" in str(caught.value)
    assert "mkv" in name or "of 150" in str(caught.value)


def damage(path):
    """Within the file."""
    content = bytearray(write_video(path, 150).read_bytes())
    middle = len(content) // 3
    content[middle : middle + 200] = bytes(byte ^ 0x5A for byte in content[middle : middle + 200])
    path.write_bytes(content)


def cut_before_the_first_frame(path):
    content = write_video(path.with_suffix(".avi"), codec="mpeg4").read_bytes()
    path.write_bytes(content[: content.index(b"movi") + 4])


def write_half(path):
    whole = write_video(path.with_name("whole.mp4"), 50).read_bytes()  # its index is at the end
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("make", "words", "kind"),
    [
        (damage, r"breaks off after \d+ of 150 frames", BrokenVideo),
        (cut_before_the_first_frame, "holds no frame that can be decoded", BrokenVideo),
        (lambda path: path.write_text("no video\n" * 100), "not a video", UserError),
        (Path.touch, "is empty", UserError),
        (Path.mkdir, "is a folder", UserError),
        (write_sound, "has no video stream", UserError),
        (lambda path: write_sound(path, cover=True), "has no video stream", UserError),
        (lambda path: None, "not found", UserError),
        (write_half, "without its index", UserError),
    ],
)
def test_a_file_that_is_not_a_whole_video_is_one_line(tmp_path, make, words, kind):
    make(tmp_path / "a.mp4")
    with pytest.raises(UserError, match=words) as caught:
        list(read_frames(tmp_path / "a.mp4"))
    assert caught.type is kind and "a.mp4" in str(caught.value) and "\n" not in str(caught.value)
