"""From video files to feature rows: frames, crops, event images, chunks, and the plain way through CLIP."""

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from made_videos import MEAN, STD, opencv_frames, picture, plain_crop, plain_event_rows, write_sound, write_video
from PIL import Image

from clipfusionvad.extraction.decode import BrokenVideo, missing_bytes, read_frames
from clipfusionvad.extraction.encoder import ImageEncoder
from clipfusionvad.extraction.snippets import (
    ExtractOptions,
    SnippetEncoder,
    count_events,
    cut_windows,
    normalise_counts,
    to_canvas,
)
from clipfusionvad.io.errors import UserError
from clipfusionvad.models.clip import ClipWeights, image_tower, load_clip, openai_clip

SIZES = [(320, 240), (240, 320), (1280, 720), (64, 48), (65, 47), (340, 256), (224, 224)]
FRAMES = [picture(index, (320, 240)) for index in range(36)]

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


@pytest.mark.parametrize("size", SIZES)
def test_ten_crops_are_those_of_the_protocol(size):
    frames = [picture(index, size) for index in range(2)]
    canvases = np.stack([to_canvas(frame) for frame in frames])
    # The released code resized blue, green, red and turned that to red, green, blue.
    np.testing.assert_array_equal(canvases[0], cv2.resize(frames[0][..., ::-1].copy(), (340, 256))[..., ::-1])
    np.testing.assert_array_equal(to_canvas(canvases[0]), canvases[0])
    crops = cut_windows(canvases, range(10))
    assert crops.shape == (2, 10, 224, 224, 3) and crops.dtype == np.uint8
    np.testing.assert_array_equal(crops, [[plain_crop(frame, crop) for crop in range(10)] for frame in frames])
    np.testing.assert_array_equal(cut_windows(canvases, (7, 0, 5)), crops[:, [7, 0, 5]])


@pytest.mark.parametrize("size", SIZES)
def test_clip_crop_is_clips_own(size):
    openai_clip()
    from clip.clip import _transform

    frame = picture(0, size)
    canvas = to_canvas(frame, "clip")
    crop = cut_windows(canvas[None], (0, 5))[0]
    expected = _transform(224)(Image.fromarray(frame)).numpy().transpose(1, 2, 0)
    np.testing.assert_allclose((crop[0] / 255 - MEAN) / STD, expected, atol=1e-5)
    np.testing.assert_array_equal(crop[1], np.fliplr(crop[0]))
    np.testing.assert_array_equal(to_canvas(canvas, "clip"), canvas)


@given(arrays.arrays(np.uint8, st.tuples(*[st.integers(1, 9)] * 3, st.just(3))), st.sampled_from([0, 10, 25, 12.5]))
def test_events_are_changes_beyond_the_threshold(frames, threshold):
    grey = frames.astype(np.int64) @ [2989, 5870, 1140]
    expected = (abs(np.diff(grey, axis=0)) > threshold * 10_000).sum(axis=0)
    np.testing.assert_array_equal(count_events(frames, threshold), expected)


# 2989 · 2 + 5870 · 10 + 1140 · 31 = 100038 and one blue less is 98898: 10.0038 and 9.8898 of grey. 10 steps of every
# colour are 9.999 of grey, as the weights sum to 0.9999.
@pytest.mark.parametrize(
    ("colour", "threshold", "events"),
    [((2, 10, 31), 10, 1), ((2, 10, 30), 10, 0), ((10,) * 3, 10, 0), ((10,) * 3, 9.999, 0), ((10,) * 3, 9.99, 1)],
)
def test_a_change_of_exactly_the_threshold_is_none(colour, threshold, events):
    frame = np.zeros((1, 1, 3), np.uint8)
    assert count_events([frame, frame + np.array(colour, np.uint8)], threshold) == events


def test_counts_are_divided_by_the_maximum_of_a_crop():
    counts = np.zeros((2, 2, 3, 3), np.uint16)
    counts[0, 0, 1, 1], counts[1, 0, 0, 0], counts[1, 1, 2, 2] = 12, 6, 5
    for scope, expected in (("block", (1, 0.5, 1)), ("chunk", (1, 1, 1))):
        found = normalise_counts(counts, scope)
        assert found.dtype == np.float32 and not found[0, 1].any()
        assert (found[0, 0, 1, 1], found[1, 0, 0, 0], found[1, 1, 2, 2]) == expected
        # The second crop of the first chunk does not move: the XD-Violence script left it black, the others wrote NaN.
        assert np.isnan(normalise_counts(counts, scope, "nan")[0, 1]).all() == (scope == "chunk")
        assert np.isnan(normalise_counts(counts[:1, 1:], scope, "nan")).all()


class Numbers:
    """Stands for an encoder: the feature of a picture is the number in its first pixel."""

    dim, resolution, batch_size = 1, 224, 64

    def encode(self, images):
        high, low = images[:, 0, 0, 0].astype(np.float32), images[:, 0, 0, 1].astype(np.float32)
        return (256 * high + low)[:, None]


def numbered(count):
    """Canvases that hold their numbers, without the memory of so many pictures."""
    for index in range(count):
        yield np.broadcast_to(np.array([index // 256, index % 256, 0], np.uint8), (256, 340, 3))


def rows_of(count, options, block=None, cuts=()):
    snippets = SnippetEncoder(Numbers(), options, block)
    frames = list(numbered(count))
    parts = [snippets.add(frames[start:end]) for start, end in zip([0, *cuts], [*cuts, count], strict=True)]
    return np.concatenate([*parts, snippets.finish()], axis=1)


@pytest.mark.parametrize("frames", [0, 1, 15, 16, 17, 511, 512, 513, 528, 529])
def test_released_rows_are_whole_blocks_and_the_remainder_if_it_is_more_than_a_chunk(frames):
    blocks, left = divmod(frames, 512)
    expected = 7.5 + 16 * np.arange(32 * blocks + (left // 16 if left > 16 else 0))
    rows = rows_of(frames, ExtractOptions(tail="released", crops=(0, 3)))
    assert rows.shape == (2, len(expected), 1) and rows.dtype == np.float32
    np.testing.assert_allclose(rows[..., 0], [expected, expected])


@settings(max_examples=25)
@given(
    st.tuples(st.integers(0, 150), st.integers(1, 9), st.integers(1, 4)),
    st.sampled_from(["mean", "middle", "none"]),
    st.sampled_from(["floor", "ceil"]),
    st.lists(st.integers(0, 150), max_size=3),
)
def test_rows_depend_neither_on_blocks_nor_on_how_frames_arrive(sizes, reduce, tail, cuts):
    frames, stride, chunks = sizes
    cuts = sorted(min(cut, frames) for cut in cuts)
    rows = rows_of(frames, ExtractOptions(stride=stride, reduce=reduce, tail=tail), stride * chunks, cuts)
    groups = [range(start, min(start + stride, frames)) for start in range(0, frames, stride)]
    groups = [group for group in groups if len(group) == stride or tail == "ceil" or reduce == "none"]
    middle = [group[len(group) // 2] for group in groups]
    expected = {"mean": [np.mean(group) for group in groups], "middle": middle, "none": list(range(frames))}[reduce]
    np.testing.assert_allclose(rows[0, :, 0], expected, rtol=1e-6)


def test_rows_come_as_soon_as_their_block_is_full():
    snippets = SnippetEncoder(Numbers(), ExtractOptions(), 32)
    arrived = [snippets.add([frame]).shape[1] for frame in numbered(70)]
    assert [index for index, count in enumerate(arrived) if count] == [31, 63] and snippets.finish().shape[1] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(({"crops": crops}, "different numbers from 0 to 9") for crops in ((), (0, 0), (10,), (-1,))),
        ({"crops": (1,), "resize": "clip"}, "crop 0 and its mirror"),
        *(({"stream": "event", "reduce": reduce}, f"--reduce {reduce}") for reduce in ("none", "middle")),
        ({"stream": "event", "stride": 1}, "2 or more"),
    ],
)
def test_unusable_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        ExtractOptions(**options)


@pytest.fixture(scope="module")
def toy():
    return load_clip("toy", 64)


@pytest.fixture(scope="module")
def tower(toy):
    return image_tower(toy)


def extract(toy, frames, **options):
    snippets = SnippetEncoder(ImageEncoder(toy, "cpu", batch_size=48), ExtractOptions(**options))
    return np.concatenate([snippets.add(frames), snippets.finish()], axis=1)


def test_event_blocks_are_normalised_by_themselves(toy, tower):
    """33 chunks: the last one has a block of its own. The frame after it is dropped and does not count."""
    frames = [FRAMES[index % 3] if index >= 512 else FRAMES[index // 9 % 5] for index in range(528)]
    frames.append(np.zeros_like(frames[0]))
    rows = extract(toy, frames, stream="event", event_threshold=25)
    chunks = [frames[start : start + 16] for start in range(0, 528, 16)]
    expected = np.concatenate([plain_event_rows(tower, part, 0, 25) for part in (chunks[:32], chunks[32:])])
    np.testing.assert_allclose(rows[0], expected, atol=1e-5)
    alone = extract(toy, frames, stream="event", event_threshold=25, event_scope="chunk")
    np.testing.assert_allclose(alone[0, :1], plain_event_rows(tower, chunks[:1], 0, 25), atol=1e-5)
    np.testing.assert_allclose(alone[0, 32:], expected[32:], atol=1e-5)
    assert np.abs(alone[0, :32] - expected[:32]).max() > 1e-3


def test_other_sizes_of_towers_and_of_pictures(toy, tower):
    """A tower of another resolution gets pictures of its own size; other preprocessing makes other features."""
    first, rest = toy.state["visual.positional_embedding"].split([1, 49])
    grid = torch.nn.functional.interpolate(rest.T.reshape(1, 64, 7, 7), (9, 9), mode="bilinear").reshape(64, 81)
    bigger = ClipWeights({**toy.state, "visual.positional_embedding": torch.cat([first, grid.T])}, "bigger")
    assert ImageEncoder(bigger, "cpu").resolution == 288
    assert extract(bigger, FRAMES, crops=(0, 5), resize="clip").shape == (2, 2, 64)
    assert extract(bigger, FRAMES).shape == (1, 2, 64)
    assert np.abs(extract(toy, FRAMES, resize="clip") - extract(toy, FRAMES)).max() > 1e-3


def test_the_image_tower_is_openais_and_weights_without_one_are_refused(toy):
    openai_clip()
    from clip.model import CLIP, build_model

    official = build_model(dict(toy.state)).float()
    resnet = CLIP(64, 64, (1, 1, 1, 1), 16, None, 77, 100, 64, 1, 1).eval()
    pictures = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # build_model rounds weights to half precision.
        for theirs, size in ((official, 224), (resnet, 64)):
            ours, small = image_tower(ClipWeights(theirs.state_dict(), "official")), pictures[..., :size, :size]
            torch.testing.assert_close(ours(small), theirs.encode_image(small), atol=1e-5, rtol=1e-5)
            assert ours.input_resolution == size and not ours.training
            assert not any(parameter.requires_grad for parameter in ours.parameters())
    text_only = {key: value for key, value in toy.state.items() if not key.startswith("visual.")}
    with pytest.raises(UserError, match="without the image tower"):
        image_tower(ClipWeights(text_only, "text.pt"))


def test_bf16_is_close_and_leaves_weights_and_random_state_alone(toy):
    before, weights = torch.get_rng_state(), toy.state["visual.proj"].clone()
    pictures = np.stack([picture(index, (224, 224)) for index in range(4)])
    full, half = (ImageEncoder(toy, "cpu", precision).encode(pictures) for precision in ("fp32", "bf16"))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(toy.state["visual.proj"], weights) and toy.state["visual.proj"].dtype == torch.float32
    assert half.dtype == np.float32 and 0 < np.abs(full - half).max() < 0.1 * np.abs(full).max()
