"""Videos for tests, and features computed plainly: one frame and one crop at a time, as the protocol reads."""

from fractions import Fraction

import av
import cv2
import numpy as np
import torch

MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


def picture(index, size=(64, 48), still=False):
    """Frame of a made-up video, (H, W, 3) uint8: coarse noise that moves by a pixel a frame, and a number's shade."""
    width, height = size
    noise = np.random.default_rng(3).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    frame = cv2.resize(noise, size, interpolation=cv2.INTER_NEAREST)
    return frame if still else np.roll(frame, (index, 2 * index), (0, 1))


def write_video(
    path, frames=20, codec="libx264", rate=30, size=(64, 48), times=None, rotation=None, still=False, **options
):
    """Write a video and return its path; ``times`` are those of the frames in milliseconds."""
    rate = Fraction(rate).limit_denominator(100_000)
    with av.open(str(path), "w", options=options) as file:
        stream = file.add_stream(codec, rate=rate, options={"x265-params": "log-level=none"} if "265" in codec else {})
        (stream.width, stream.height), stream.pix_fmt = size, "yuv444p" if size[0] % 2 else "yuv420p"
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, time in enumerate(times or range(frames)):
            frame = av.VideoFrame.from_ndarray(picture(index, size, still), format="rgb24")
            frame.pts = time
            if times:
                frame.time_base = Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def write_sound(path, cover=False):
    """A second of silence, with a cover image or without."""
    with av.open(str(path), "w") as file:
        sound = file.add_stream("aac", rate=44100)
        if cover:
            image = file.add_stream("mjpeg", rate=1)
            image.width, image.height, image.pix_fmt = 64, 48, "yuvj420p"
            image.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts = 44100, 0
        file.mux(sound.encode(frame) + sound.encode())
        if cover:
            file.mux(image.encode(av.VideoFrame.from_ndarray(picture(0), format="rgb24")) + image.encode())
    return path


def opencv_frames(path):
    """Frames as the released code got them, turned to RGB."""
    capture = cv2.VideoCapture(str(path))
    while (read := capture.read())[0]:
        yield read[1][:, :, ::-1].copy()


def plain_crop(frame, crop):
    """One crop of a frame, with the numbers of the protocol."""
    canvas = cv2.resize(frame, (340, 256))
    top, left = {0: (16, 58), 1: (0, 0), 2: (0, 116), 3: (32, 0), 4: (32, 116)}[crop % 5]
    cut = canvas[top : top + 224, left : left + 224]
    return np.fliplr(cut) if crop >= 5 else cut


@torch.no_grad()
def embed(tower, image):
    """One image (R, R, 3) through the tower."""
    return tower(torch.from_numpy(image.astype(np.float32).transpose(2, 0, 1))[None])[0].double().numpy()


def plain_rows(tower, chunks, crop):
    """The mean embedding of each chunk's frames."""
    pixels = [[(plain_crop(frame, crop) / 255 - MEAN) / STD for frame in frames] for frames in chunks]
    return np.array([np.mean([embed(tower, image) for image in images], axis=0) for images in pixels])


def plain_event_rows(tower, chunks, crop, threshold=10):
    """Rows of a block of chunks, normalised by the block's maximum."""
    # Whole numbers: the protocol's weights end in ties that rounding would decide.
    grey = [[plain_crop(frame, crop).astype(np.int64) @ [2989, 5870, 1140] for frame in frames] for frames in chunks]
    counts = np.array([(abs(np.diff(shades, axis=0)) > threshold * 10_000).sum(axis=0) for shades in grey])
    return np.array([embed(tower, np.stack([image] * 3, axis=2)) for image in counts / max(counts.max(), 1)])
