"""Make CLIP features of videos, as the released ones were made or with corrections."""

from __future__ import annotations

import argparse
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from tqdm import tqdm

from clipfusionvad.cli.options import Parser
from clipfusionvad.extraction.decode import probe
from clipfusionvad.extraction.extract import Outcome, check_model
from clipfusionvad.extraction.jobs import Job, Model, find_videos, take_shard
from clipfusionvad.extraction.manifest import MANIFEST, Manifest
from clipfusionvad.extraction.snippets import ExtractOptions
from clipfusionvad.io.argtypes import non_negative_float, positive_int, size
from clipfusionvad.io.errors import UserError, run_main, warn
from clipfusionvad.io.files import check_writable
from clipfusionvad.io.locks import hold
from clipfusionvad.io.provenance import code
from clipfusionvad.models.clip import TOY

_ENGINES = {"local": "clipfusionvad.extraction.local_engine", "ray": "clipfusionvad.extraction.ray_engine"}


def main(argv: list[str]) -> int:
    parser = make_parser()
    return run_main(lambda: _extract(parser.parse_args(argv)))


def _extract(args: Namespace) -> int:
    jobs = _jobs(args)
    check_writable(Path(args.output, MANIFEST))
    # Shards work in one folder by design; each of them is there once, and none beside a run for all.
    with hold(args.output, shared=args.shard is not None):
        with hold(args.output, ".lock-{}-of-{}".format(*args.shard)) if args.shard else nullcontext():
            return _extract_jobs(args, jobs)


def _extract_jobs(args: Namespace, jobs: Sequence[Job]) -> int:
    manifest = Manifest(args.output, args.shard)
    # A shard may have no videos. For the others: a model that is not there would fail every video.
    fingerprint = check_model(jobs[0].model) if jobs else ""
    pending = jobs if args.overwrite else _pending(jobs, manifest, fingerprint)
    for job in pending:
        manifest.append(job.name, "begun", {"source": job.source})
    started, frames, failed = time.perf_counter(), 0, 0
    try:
        for outcome in _outcomes(args, pending):
            frames += _note(outcome, manifest)
            failed += outcome.record is None
    except KeyboardInterrupt:
        print(f"what is finished is kept in {args.output}; the same command goes on from there", file=sys.stderr)
        raise
    _conclude(args, jobs, len(jobs) - len(pending), frames, failed, time.perf_counter() - started)
    return 1 if failed else 0


def _jobs(args: Namespace) -> list[Job]:
    """The jobs of this shard."""
    if args.ray_address and args.engine != "ray":
        raise UserError("--ray-address is for --engine ray")
    options = ExtractOptions(
        stride=args.stride,
        reduce=args.reduce,
        crops=tuple(args.crop_ids or range(args.crops)),
        stream=args.stream,
        event_threshold=args.event_threshold,
        event_scope=args.event_scope,
        event_empty=args.event_empty,
        tail=args.tail,
        resize=args.resize,
    )
    model = Model(args.clip, args.embed_dim, args.device, args.precision, args.batch_size)
    if args.stream == "event":
        if args.event_clip is None:
            warn(f"event images go through --clip {args.clip}, which knows pictures; --event-clip names their encoder")
        model = replace(model, clip=args.event_clip or args.clip)
    found = find_videos(args.videos)
    jobs = [Job(source, name, args.output, options, model, args.dtype) for source, name in found]
    return take_shard(jobs, *args.shard) if args.shard else jobs


def _pending(jobs: Sequence[Job], manifest: Manifest, fingerprint: str) -> list[Job]:
    """The jobs whose files are not there yet; raises ``UserError`` if files are there that were made otherwise."""
    pending, others = [], []
    for job in jobs:
        try:
            if not manifest.is_done(job, fingerprint):
                pending.append(job)
        except UserError as error:
            others.append(error)
    if others:
        more = f" (and {len(others) - 1} more videos like it)" if len(others) > 1 else ""
        raise UserError(f"{others[0]}{more}: name another --output, or replace them with --overwrite")
    return pending


def _outcomes(args: Namespace, jobs: Sequence[Job]) -> Iterator[Outcome]:
    """Run the jobs under a progress bar."""
    if not jobs:
        return
    run = import_module(_ENGINES[args.engine]).run
    with _Progress(jobs) as progress:
        cluster = {"address": args.ray_address} if args.ray_address else {}
        with closing(run(jobs, args.workers, progress.add, **cluster)) as outcomes:
            for outcome in outcomes:
                progress.finish(outcome)
                yield outcome


def _note(outcome: Outcome, manifest: Manifest) -> int:
    """Put an outcome on record and, if it is a failure, on the screen; returns the frames that were extracted."""
    job = outcome.job
    if outcome.record:
        manifest.append(job.name, "done", outcome.record | {"code": code()})
        return outcome.record["frames"]
    manifest.append(job.name, "failed", {"source": job.source, "error": outcome.error})
    tqdm.write(f"failed: {outcome.error}", file=sys.stderr)
    return 0


def _conclude(args: Namespace, jobs: Sequence[Job], there: int, frames: int, failed: int, seconds: float) -> None:
    made = len(jobs) - there - failed
    rate = f", {frames / seconds:.0f} frames/s" if frames else ""
    print(f"{made} videos extracted ({frames} frames in {seconds:.0f} s{rate}), {there} were there already")
    if made + there:
        length = 1 if args.reduce == "none" else args.stride
        rows = "" if length == 16 else f" --frames-per-snippet {length}"
        print(f"features in {args.output}, how they were made in {args.output}/manifest*.jsonl")
        print(f"next, lists: python -m clipfusionvad lists --dataset NAME --features {args.output} --output list{rows}")
    if failed:
        print(f"{failed} of {len(jobs)} videos failed", file=sys.stderr)


class _Progress:
    """A bar in frames. How many there will be is told by the first video, then by the frames and bytes so far."""

    def __init__(self, jobs: Sequence[Job]):
        self.sizes = {job.name: job.bytes or 1 for job in jobs}
        self.all, self.bytes, self.finished, self.partial = sum(self.sizes.values()), 0, 0, 0
        self.bar = tqdm(desc="extract", unit="frame", disable=None)
        with suppress(UserError):
            self._expect(probe(jobs[0].source).frames or 0, self.sizes[jobs[0].name])

    def add(self, frames: int) -> None:
        """Frames of the video under way."""
        self.partial += frames
        self.bar.update(frames)

    def finish(self, outcome: Outcome) -> None:
        self.bar.update(max(0, (outcome.record or {}).get("frames", 0) - self.partial))
        self.partial = 0
        self.finished += 1
        size = self.sizes[outcome.job.name]
        if outcome.record:
            self.bytes += size
        else:
            self.all -= size
        self._expect(self.bar.n, self.bytes)
        self.bar.set_postfix_str(f"{self.finished} of {len(self.sizes)} videos")

    def _expect(self, frames: int, size: int) -> None:
        """So many frames were, or will be, in so many bytes."""
        if frames and size:
            self.bar.total = round(frames * self.all / size)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.bar.close()


def make_parser() -> Parser:
    parser = Parser(
        prog="clipfusionvad extract",
        description="Make CLIP features of videos: one file NAME__k.npy for each crop of each video.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--videos",
        required=True,
        nargs="+",
        metavar="PATH",
        help="folders, video files, .txt lists of them, or a manifest.jsonl; what lies in a subfolder keeps it",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for features and manifest")
    _add_protocol(parser.add_argument_group("protocol"))
    _add_events(parser.add_argument_group("event stream"))
    _add_running(parser.add_argument_group("running"))
    return parser


def _add_protocol(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--clip", default="ViT-B/16", help="CLIP model name, local file, or 'toy'")
    group.add_argument("--embed-dim", type=size, default=512, help=f"width of the features of --clip {TOY}")
    group.add_argument(
        "--crops", type=int, choices=[1, 5, 10], default=10, help="1: centre, 5: with corners, 10: and mirrored"
    )
    group.add_argument("--crop-ids", type=int, nargs="+", metavar="K", help="these crops instead, 0 to 9")
    group.add_argument("--stride", type=size, default=16, help="frames that make a row")
    group.add_argument(
        "--reduce",
        choices=["mean", "middle", "none"],
        default="mean",
        help="mean of their embeddings, the middle frame alone, or none: a row for every frame",
    )
    group.add_argument(
        "--tail",
        choices=["released", "floor", "ceil"],
        default="floor",
        help="frames left at the end: dropped; released: so is a row left alone behind blocks of 32; ceil: kept",
    )
    group.add_argument(
        "--resize",
        choices=["released", "clip"],
        default="released",
        help="released: to 340x256 before cropping; clip: CLIP's own preprocessing, which has crops 0 and 5 only",
    )
    group.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="type of the stored rows")


def _add_events(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--stream", choices=["rgb", "event"], default="rgb", help="pictures, or synthetic event images")
    group.add_argument("--event-clip", metavar="CLIP", help="their encoder: a file of event-CLIP or of CLIP, or a name")
    group.add_argument(
        "--event-threshold", type=non_negative_float, default=10, help="change of grey (0..255) that is an event"
    )
    group.add_argument(
        "--event-scope", choices=["block", "chunk"], default="block", help="over what images are normalised together"
    )
    group.add_argument(
        "--event-empty",
        choices=["zero", "nan"],
        default="zero",
        help="where nothing moves: a black image, or NaN rows as in some released features",
    )


def _add_running(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--workers", type=positive_int, default=1, help="processes that take one video after another")
    group.add_argument("--shard", type=_shard, metavar="I/N", help="do the i-th of n parts, counted from 1")
    group.add_argument("--engine", choices=sorted(_ENGINES), default="local", help="ray: on a Ray cluster")
    group.add_argument("--ray-address", metavar="HOST:PORT", help="its address, or auto; without: Ray on this machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    group.add_argument(
        "--precision", choices=["fp32", "fp16", "bf16"], default="fp32", help="arithmetic of the encoder"
    )
    group.add_argument("--batch-size", type=positive_int, default=64, help="pictures encoded at once")
    group.add_argument("--overwrite", action="store_true", help="replace features that are there")


def _shard(text: str) -> tuple[int, int]:
    try:
        number, of = map(int, text.split("/"))
    except ValueError:
        number = of = 0
    if not 1 <= number <= of:
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, got {text!r}")
    return number, of
