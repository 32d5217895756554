"""Compare two feature files, or the files of two folders, and print a table and the causes of differences."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from clipfusionvad.data.features import load_features
from clipfusionvad.data.lists import split_crop
from clipfusionvad.io.errors import EXIT_BAD_INPUT, UserError, warn
from clipfusionvad.io.files import check_writable, walk_files, write_json
from clipfusionvad.io.option import Option
from clipfusionvad.tools.features.compare import compare_rows

SHOWN = 20


@dataclass(frozen=True)
class Pair:
    """Two files of one video, and the other crops of the video in B."""

    name: str
    a: Path
    b: Path
    crops: tuple[Path, ...] = ()


def compare_features(
    a: Path,
    b: Path,
    *,
    output: Annotated[str | None, Option("write all figures to this file (.json)", metavar="FILE")] = None,
    limit: Annotated[int | None, Option("compare only N pairs, spread evenly", minimum=1, metavar="N")] = None,
) -> int:
    """Compare two files or folders and print the result.

    Return the exit code: 0 if all agree, 1 if not, 2 if a file is unreadable.
    """
    if output:
        check_writable(output)
    pairs, notes = find_pairs(a, b)
    if limit and limit < len(pairs):
        pairs = [pairs[index] for index in np.linspace(0, len(pairs) - 1, limit).astype(int)]
    results, unreadable = _compare_all(pairs)
    for note in notes:
        warn(note)
    overall, causes = _overall(results), Counter(item["cause"] for item in results)
    agree = all(item["agree"] for item in results)
    print(_table(results))
    print(_summary(results, overall, causes))
    if output:
        write_json(output, {"agree": agree, "overall": overall, "causes": dict(causes), "pairs": results})
        print(f"figures of all {len(results)} pairs in {output}")
    return EXIT_BAD_INPUT if unreadable else 0 if agree else 1


def _compare_all(pairs: list[Pair]) -> tuple[list[dict[str, Any]], int]:
    """Return the record of every pair, the worst first, and the number of pairs that could not be read."""
    results, unreadable = [], 0
    for pair in tqdm(pairs, "comparing", unit="file", disable=None, leave=False):
        try:
            a, b = (load_features(path, may_miss=True) for path in (pair.a, pair.b))
            # A generator: other crops are read only if they may explain a difference.
            crops = ((split_crop(path.stem)[1], load_features(path, may_miss=True)) for path in pair.crops)
            found = compare_rows(a, b, split_crop(pair.a.stem)[1], crops)
            results.append({"file": pair.name, "a": str(pair.a), "b": str(pair.b), **asdict(found)})
        except UserError as error:
            unreadable += 1
            warn(str(error))
    if not results:
        raise UserError(f"none of the {len(pairs)} pairs of files could be read")
    # Pairs without figures (NaN: other widths) come first.
    return sorted(results, key=lambda item: (item["agree"], np.nan_to_num(item["mean_cosine"], nan=-2))), unreadable


def find_pairs(a: Path, b: Path) -> tuple[list[Pair], list[str]]:
    """Pair the files of two folders by relative path, else by NAME__k, else by video; return pairs and notes.

    Two single files form a pair under any names. Raises ``UserError`` if nothing pairs.
    """
    for path in (a, b):
        if not path.exists():
            raise UserError(f"not found: {path}")
    if a.is_file() and b.is_file():
        return [Pair(a.name, a, b, tuple(_other_crops(b)))], []
    if a.is_file() or b.is_file():
        kinds = ["file" if path.is_file() else "folder" for path in (a, b)]
        raise UserError(f"give two files or two folders: {a} is a {kinds[0]}, {b} is a {kinds[1]}")
    left, right = list(walk_files(a, ".npy")), list(walk_files(b, ".npy"))
    for folder, files in ((a, left), (b, right)):
        if not files:
            raise UserError(f"no feature files (.npy) below {folder}")
    paired = _pair_files(left, right, a, b)
    if not paired:
        raise UserError(
            f"no file below {a} has a counterpart below {b}: neither paths nor names agree "
            f"(the first are {left[0].name} and {right[0].name})"
        )
    crops: dict[str, list[Path]] = {}
    for path in right:
        crops.setdefault(_video(path), []).append(path)
    pairs = [
        Pair(str(one.relative_to(a)), one, other, tuple(path for path in crops[_video(other)] if path != other))
        for one, other in paired.items()
    ]
    single = {a: set(left) - paired.keys(), b: set(right) - set(paired.values())}
    notes = [
        f"{len(files)} files below {folder} are not compared, the first is {min(files).name}"
        for folder, files in single.items()
        if files
    ]
    return pairs, notes


def _pair_files(left: list[Path], right: list[Path], a: Path, b: Path) -> dict[Path, Path]:
    """Pair files by one key after another; a paired file is not considered again."""
    keys: list[Callable[[Path, Path], Any]] = [
        lambda path, root: path.relative_to(root),
        lambda path, root: path.name,
        lambda path, root: _video(path),
    ]
    paired: dict[Path, Path] = {}
    for key in keys:
        taken, candidates = set(paired.values()), dict[Any, Path]()
        for path in right:
            if path not in taken:
                candidates.setdefault(key(path, b), path)
        paired |= {path: other for path in left if path not in paired and (other := candidates.pop(key(path, a), None))}
    return paired


def _video(path: Path) -> str:
    return split_crop(path.stem)[0]


def _other_crops(path: Path) -> list[Path]:
    """Return the files of the other crops of a video that lie beside one of them."""
    if split_crop(path.stem)[1] is None:
        return []
    files = [file for file in path.parent.glob("*.npy") if split_crop(file.stem)[1] is not None]
    return sorted(file for file in files if file != path and _video(file) == _video(path))


def _table(results: list[dict[str, Any]]) -> str:
    import pandas as pd  # here: the command's --help does not need it

    table = pd.DataFrame(results[:SHOWN])
    columns = {"file": table["file"].str[-50:], "rows A": table["rows"].str[0], "rows B": table["rows"].str[1]}
    for title, key, digits in (
        ("cosine", "mean_cosine", ".4f"),
        ("lowest", "min_cosine", ".4f"),
        ("norm B/A", "norm_ratio", ".4g"),
        ("max diff", "max_difference", ".2g"),
        ("offset", "offset", "d"),
        ("likely cause", "cause", "s"),
    ):
        columns[title] = table[key].map(f"{{:{digits}}}".format)
    text = pd.DataFrame(columns).to_string(index=False)
    more = len(results) - SHOWN
    return f"{text}\n… and {more} more that are not worse (--output writes all)" if more > 0 else text


def _summary(results: list[dict[str, Any]], overall: dict[str, float], causes: Counter[str]) -> str:
    """Describe all pairs together, the number of pairs by cause, and each cause's evidence in its worst pair."""
    counted = ", ".join(f"{count} × {cause}" for cause, count in causes.most_common())
    lines = [
        f"\nall rows: mean cosine {overall['mean_cosine']:.4f}, lowest {overall['min_cosine']:.4f}, "
        f"norm B/A {overall['norm_ratio']:.4g}, largest difference {overall['max_difference']:.2g}",
        f"{len(results)} pair{'s' if len(results) > 1 else ''} compared: {counted}",
    ]
    for cause, _ in causes.most_common():
        worst = next(item for item in results if item["cause"] == cause)
        lines.append(f"  {cause}: {worst['evidence']} ({worst['file']})")
    return "\n".join(lines)


def _overall(results: list[dict[str, Any]]) -> dict[str, float]:
    """Return the figures over the rows of all pairs with figures."""
    found = [item for item in results if not np.isnan(item["mean_cosine"])]
    if not found:
        return dict.fromkeys(("mean_cosine", "min_cosine", "norm_ratio", "max_difference"), float("nan"))
    mean_cosine, norm_ratio = np.average(
        [(item["mean_cosine"], item["norm_ratio"]) for item in found], axis=0, weights=[min(i["rows"]) for i in found]
    )
    return {
        "mean_cosine": float(mean_cosine),
        "min_cosine": min(item["min_cosine"] for item in found),
        "norm_ratio": float(norm_ratio),
        "max_difference": max(item["max_difference"] for item in found),
    }
