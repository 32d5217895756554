"""Every frame of any video, upright and in order; one clear line for a file that is not a video."""

import pickle
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from made_videos import opencv_frames, picture, write_sound, write_video

from clipfusionvad.extraction.decode import BrokenVideo, missing_bytes, probe, read_frames
from clipfusionvad.io.errors import UserError

KINDS = {
    "h264.mp4": {},
    "hevc.mp4": {"codec": "libx265", "rate": Fraction(2700003, 100000)},
    "odd.mkv": {"size": (65, 47), "pix_fmt": "yuv444p"},
    "mpeg4.avi": {"codec": "mpeg4", "rate": Fraction(30067, 1000)},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25},
    "h264.ts": {},
    "vfr.mp4": {"times": [33 * index + 10 * (index % 3) for index in range(20)]},
}


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_that_opencv_reads(tmp_path, name):
    path = write_video(tmp_path / name, **KINDS[name])
    ours, theirs = list(read_frames(path)), list(opencv_frames(path))
    assert len(ours) == 20
    np.testing.assert_array_equal(ours, theirs)
    info = probe(path)
    assert (info.height, info.width) == ours[0].shape[:2]
    if "rate" in KINDS[name]:
        assert info.fps == pytest.approx(float(KINDS[name]["rate"]), rel=1e-5)


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_a_display_matrix_turns_frames_upright(tmp_path, rotation, turns):
    """Counter-clockwise by so many quarters, as the container says it is to be shown."""
    path = write_video(tmp_path / "phone.mp4", 3, rotation=rotation, size=(64, 32))
    lying = list(read_frames(write_video(tmp_path / "lying.mp4", 3, size=(64, 32))))
    frames = list(read_frames(path))
    np.testing.assert_array_equal(frames, [np.rot90(frame, turns) for frame in lying])
    assert (probe(path).width, probe(path).height) == frames[0].shape[1::-1]


def test_one_frame_and_what_it_shows(tmp_path):
    path = write_video(tmp_path / "one.mp4", 1)
    (frame,) = read_frames(path)
    assert frame.dtype == np.uint8 and frame.flags.c_contiguous and probe(path).frames == 1
    # Lossy, but neither another picture nor blue for red.
    assert np.corrcoef(frame[..., 0].ravel(), picture(0)[..., 0].ravel())[0, 1] > 0.8


def test_info_comes_before_the_first_frame_and_once(tmp_path):
    seen = []
    frames = read_frames(write_video(tmp_path / "a.mp4", 5), seen.append)
    assert not seen
    next(frames)
    assert [info.frames for info in seen] == [5]
    assert len([*frames]) == 4 and len(seen) == 1


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
    read = len(frames)
    assert 0 < read < 150 and caught.value.frames == read
    assert f"after {read}" in str(caught.value) and ("mkv" in name or "of 150" in str(caught.value))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.frames) == (str(caught.value), read)


def test_damage_within_a_file_breaks_off_there(tmp_path):
    path = write_video(tmp_path / "a.mp4", 150)
    content = bytearray(path.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 200] = bytes(byte ^ 0x5A for byte in content[middle : middle + 200])
    path.write_bytes(content)
    with pytest.raises(BrokenVideo, match="of 150 frames") as caught:
        list(read_frames(path))
    assert 0 < caught.value.frames < 150


def test_a_file_that_ends_before_its_first_frame_is_said_to_hold_none(tmp_path):
    path = write_video(tmp_path / "a.avi", codec="mpeg4")
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"movi") + 4])
    with pytest.raises(BrokenVideo, match="holds no frame that can be decoded"):
        list(read_frames(path))


def write_half(path):
    whole = write_video(path.with_name("whole.mp4"), 50).read_bytes()  # its index is at the end
    path.write_bytes(whole[: len(whole) // 2])


def write_song(path):
    """Sound with a cover image."""
    with av.open(str(path), "w") as file:
        sound = file.add_stream("aac", rate=44100)
        cover = file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts = 44100, 0
        file.mux(sound.encode(frame) + sound.encode())
        picture_frame = av.VideoFrame.from_ndarray(picture(0), format="rgb24")
        file.mux(cover.encode(picture_frame) + cover.encode())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_text("no video\n" * 100), "not a video"),
        (Path.touch, "is empty"),
        (Path.mkdir, "is a folder"),
        (write_sound, "has no video stream"),
        (write_song, "has no video stream"),
        (lambda path: None, "not found"),
        (write_half, "without its index"),
    ],
)
def test_a_file_that_is_not_a_video_is_one_line(tmp_path, make, words):
    make(tmp_path / "a.mp4")
    for use in (probe, lambda path: list(read_frames(path))):
        with pytest.raises(UserError, match=words) as caught:
            use(tmp_path / "a.mp4")
        assert "a.mp4" in str(caught.value) and "\n" not in str(caught.value)
