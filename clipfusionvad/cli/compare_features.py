"""Tell whether two sets of features agree, and what made them differ if not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from clipfusionvad.cli.options import Parser
from clipfusionvad.data.features import load_features
from clipfusionvad.data.lists import split_crop
from clipfusionvad.io.argtypes import positive_int
from clipfusionvad.io.errors import EXIT_BAD_INPUT, UserError, warn
from clipfusionvad.io.files import check_writable, walk_files, write_json
from clipfusionvad.tools.features.compare import Comparison, compare_rows

SHOWN = 20


@dataclass(frozen=True)
class Pair:
    """Two files of one video, and the other crops of it that B has."""

    name: str
    a: Path
    b: Path
    crops: tuple[Path, ...] = ()


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    if args.output:
        check_writable(args.output)

    pairs, notes = find_pairs(Path(args.a), Path(args.b))
    if args.limit and args.limit < len(pairs):
        pairs = [pairs[index] for index in np.linspace(0, len(pairs) - 1, args.limit).astype(int)]
    results, unreadable = _compare_all(pairs)
    for note in notes:
        warn(note)
    print(_table(results))
    print(_summary(results))
    if args.output:
        write_json(args.output, _record(results))
        print(f"figures of all {len(results)} pairs in {args.output}")
    if unreadable:
        return EXIT_BAD_INPUT
    return 0 if all(result.agree for _, result in results) else 1


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad compare-features", description=__doc__)
    parser.add_argument("a", metavar="A", help="feature file (.npy) or folder of them")
    parser.add_argument("b", metavar="B", help="the same, to compare with; files are paired by path, else by NAME__k")
    parser.add_argument("--output", metavar="FILE", help="write all figures to this file (.json)")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="compare N pairs only, spread evenly")
    return parser


def _compare_all(pairs: list[Pair]) -> tuple[list[tuple[Pair, Comparison]], int]:
    """Every pair with its comparison, the worst first, and how many could not be read (said as warnings)."""
    results, unreadable = [], 0
    for pair in tqdm(pairs, "comparing", unit="file", disable=None, leave=False):
        try:
            results.append((pair, compare_pair(pair)))
        except UserError as error:
            unreadable += 1
            warn(str(error))
    if not results:
        raise UserError(f"none of the {len(pairs)} pairs of files could be read")
    # Without figures (NaN, other widths) comes before everything.
    return sorted(results, key=lambda item: (item[1].agree, np.nan_to_num(item[1].mean_cosine, nan=-2))), unreadable


def compare_pair(pair: Pair) -> Comparison:
    """Compare two files; the video's other crops are read only where they may explain a difference."""
    a, b = (load_features(path, may_miss=True) for path in (pair.a, pair.b))
    crops = ((split_crop(path.stem)[1], load_features(path, may_miss=True)) for path in pair.crops)
    return compare_rows(a, b, split_crop(pair.a.stem)[1], crops)


def find_pairs(a: Path, b: Path) -> tuple[list[Pair], list[str]]:
    """Pairs of files in two folders by relative path, else by NAME__k, else the first crops of a video; and notes.

    Two files are a pair whatever their names. Raises ``UserError`` where nothing pairs.
    """
    for path in (a, b):
        if not path.exists():
            raise UserError(f"not found: {path}")
    if a.is_file() and b.is_file():
        return [Pair(a.name, a, b, tuple(_other_crops(b)))], []
    if a.is_file() or b.is_file():
        raise UserError(f"give two files or two folders: {a} is a {_kind(a)}, {b} is a {_kind(b)}")
    left, right = list(walk_files(a, ".npy")), list(walk_files(b, ".npy"))
    for folder, files in ((a, left), (b, right)):
        if not files:
            raise UserError(f"no feature files (.npy) below {folder}")
    crops: dict[str, list[Path]] = {}
    for path in right:
        crops.setdefault(_video(path), []).append(path)
    paired = dict(_paired(left, right, a, b))
    if not paired:
        raise UserError(
            f"no file below {a} has its like below {b}: neither paths nor names agree "
            f"(the first are {left[0].name} and {right[0].name})"
        )
    pairs = [
        Pair(str(one.relative_to(a)), one, other, tuple(path for path in crops[_video(other)] if path != other))
        for one, other in paired.items()
    ]
    alone = {a: [path for path in left if path not in paired], b: list(set(right) - set(paired.values()))}
    notes = [
        f"{len(files)} files below {folder} are not compared, the first is {min(files).name}"
        for folder, files in alone.items()
        if files
    ]
    return pairs, notes


def _paired(left: list[Path], right: list[Path], a: Path, b: Path) -> Iterator[tuple[Path, Path]]:
    """Pairs by one key after the other; a file that has found its like is not looked at again."""
    keys: list[Callable[[Path, Path], Any]] = [
        lambda path, root: path.relative_to(root),
        lambda path, root: path.name,
        lambda path, root: _video(path),
    ]
    for key in keys:
        known: dict[Any, Path] = {}
        for path in right:
            known.setdefault(key(path, b), path)
        found = {path: other for path in left if (other := known.pop(key(path, a), None))}
        yield from found.items()
        taken = set(found.values())
        left, right = [path for path in left if path not in found], [path for path in right if path not in taken]


def _video(path: Path) -> str:
    return split_crop(path.stem)[0]


def _other_crops(path: Path) -> list[Path]:
    """The other crops of a video beside one of them."""
    if split_crop(path.stem)[1] is None:
        return []
    files = path.parent.glob("*.npy")
    return sorted(
        file for file in files if file != path and _video(file) == _video(path) and split_crop(file.stem)[1] is not None
    )


def _kind(path: Path) -> str:
    return "file" if path.is_file() else "folder"


def _table(results: list[tuple[Pair, Comparison]]) -> str:
    shown = results[:SHOWN]
    width = max(len("file"), *(min(len(pair.name), 50) for pair, _ in shown))
    lines = [
        f"{'file':{width}} {'rows A':>7} {'rows B':>7} {'cosine':>7} {'lowest':>7} {'norm B/A':>8} "
        f"{'max diff':>8} {'offset':>6}  likely cause"
    ]
    lines += [
        f"{pair.name[-50:]:{width}} {found.rows[0]:7d} {found.rows[1]:7d} {found.mean_cosine:7.4f} "
        f"{found.min_cosine:7.4f} {found.norm_ratio:8.4g} {found.max_difference:8.2g} {found.offset:6d}  {found.cause}"
        for pair, found in shown
    ]
    if len(results) > SHOWN:
        lines.append(f"… and {len(results) - SHOWN} more, none of them worse (--output writes all)")
    return "\n".join(lines)


def _summary(results: list[tuple[Pair, Comparison]]) -> str:
    """All pairs together, the number of them by cause, and the evidence for each cause in the pair it is worst in."""
    overall = _overall(results)
    lines = [
        f"\nall rows: mean cosine {overall['mean_cosine']:.4f}, lowest {overall['min_cosine']:.4f}, "
        f"norm B/A {overall['norm_ratio']:.4g}, largest difference {overall['max_difference']:.2g}"
    ]
    causes = Counter(found.cause for _, found in results)
    counted = ", ".join(f"{count} × {cause}" for cause, count in causes.most_common())
    lines.append(f"{len(results)} pair{'s' if len(results) > 1 else ''} compared: {counted}")
    for cause, _ in causes.most_common():
        pair, found = next(item for item in results if item[1].cause == cause)
        lines.append(f"  {cause}: {found.evidence} ({pair.name})")
    return "\n".join(lines)


def _overall(results: list[tuple[Pair, Comparison]]) -> dict[str, float]:
    """Figures over the rows of all pairs that have any."""
    figures = [found for _, found in results if found.mean_cosine == found.mean_cosine]
    if not figures:
        return dict.fromkeys(("mean_cosine", "min_cosine", "norm_ratio", "max_difference"), float("nan"))
    weights = [min(found.rows) for found in figures]
    return {
        "mean_cosine": float(np.average([found.mean_cosine for found in figures], weights=weights)),
        "min_cosine": min(found.min_cosine for found in figures),
        "norm_ratio": float(np.average([found.norm_ratio for found in figures], weights=weights)),
        "max_difference": max(found.max_difference for found in figures),
    }


def _record(results: list[tuple[Pair, Comparison]]) -> dict[str, Any]:
    return {
        "agree": all(found.agree for _, found in results),
        "overall": _overall(results),
        "causes": dict(Counter(found.cause for _, found in results)),
        "pairs": [{"file": pair.name, "a": str(pair.a), "b": str(pair.b), **asdict(found)} for pair, found in results],
    }
