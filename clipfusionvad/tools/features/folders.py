"""Compare two feature files, or the files of two folders, and print a table and the causes of differences."""

from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from clipfusionvad.data.features import load_features
from clipfusionvad.data.lists import split_crop
from clipfusionvad.io.errors import EXIT_BAD_INPUT, UserError, warn
from clipfusionvad.io.files import check_writable, walk_files, write_json
from clipfusionvad.io.npy import read_array
from clipfusionvad.io.option import Option
from clipfusionvad.tools.features.centroid import agreement, read_centroid, spread, what_differs
from clipfusionvad.tools.features.compare import compare_rows

SHOWN = 20
COLUMNS = {
    "mean_cosine": ("cosine", ".4f"),
    "min_cosine": ("lowest", ".4f"),
    "norm_ratio": ("norm B/A", ".4g"),
    "max_difference": ("max diff", ".2g"),
    "offset": ("offset", "d"),
    "cause": ("likely cause", "s"),
}


def compare_features(
    a: Path,
    b: Path,
    *,
    output: Annotated[str | None, Option("write all figures to this file (.json)", metavar="FILE")] = None,
    limit: Annotated[int | None, Option("compare only N pairs, spread evenly", minimum=1, metavar="N")] = None,
) -> int:
    """Compare and print the result; return the exit code: 0 if all agree, 1 if not, 2 if a file is unreadable.

    If one side is a centroid file, the mean of each file of the other side is compared with it.
    """
    if output:
        check_writable(output)
    for features, other in ((a, b), (b, a)):
        if _is_centroid(other, features):
            return _compare_means(features, other, output, limit)
    pairs = spread(find_pairs(a, b), limit)
    results = []
    for one, other, others in tqdm(pairs, "comparing", unit="file", disable=None, leave=False):
        try:
            x, y = (load_features(path, may_miss=True) for path in (one, other))
            # A generator: other crops are read only if they may explain a difference.
            crops = ((split_crop(path.stem)[1], load_features(path, may_miss=True)) for path in others)
            found = asdict(compare_rows(x, y, split_crop(one.stem)[1], crops))
            name = one.name if one == a else str(one.relative_to(a))
            results.append({"file": name, "a": str(one), "b": str(other), **found})
        except UserError as error:
            warn(str(error))
    if not results:
        raise UserError(f"none of the {len(pairs)} pairs of files could be read")
    # The worst come first, before them those without figures (NaN: other widths).
    results.sort(key=lambda item: (item["agree"], np.nan_to_num(item["mean_cosine"], nan=-2)))
    causes, agree = Counter(item["cause"] for item in results), all(item["agree"] for item in results)
    overall = _print_results(results, causes)
    if output:
        write_json(output, {"agree": agree, "overall": overall, "causes": dict(causes), "pairs": results})
        print(f"figures of all {len(results)} pairs in {output}")
    return EXIT_BAD_INPUT if len(results) < len(pairs) else 0 if agree else 1


def _is_centroid(path: Path, other: Path) -> bool:
    """Whether a file holds a mean of features: (D,), or (1, D) beside a folder or a file with more rows."""
    if not path.is_file() or not other.exists():
        return False
    shape = read_array(path, "feature file").shape
    return len(shape) == 1 or (shape[:-1] == (1,) and (other.is_dir() or len(read_array(other, "feature file")) > 1))


def _compare_means(features: Path, centroid_file: Path, output: str | None, limit: int | None) -> int:
    """Compare the mean of each file, and the mean of those, with a centroid; return the exit code."""
    import pandas as pd  # here: the command's --help does not need it

    centroid = read_centroid(centroid_file)
    files = [features] if features.is_file() else spread(sorted(walk_files(features, ".npy")), limit)
    if not files:
        raise UserError(f"no feature files (.npy) below {features}")
    means, results = list[np.ndarray](), list[dict[str, Any]]()
    for file in tqdm(files, "reading", unit="file", disable=None, leave=False):
        try:
            mean = read_centroid(file)
            if len(mean) != len(centroid):
                raise UserError(f"{file} has {len(mean)} numbers a row, {centroid_file} {len(centroid)}: other models")
        except UserError as error:
            warn(str(error))
            continue
        means.append(mean)
        cosine, ratio = agreement(mean, centroid)
        name = file.name if file == features else str(file.relative_to(features))
        results.append({"file": name, "cosine": cosine, "norm_ratio": ratio})
    if not means:
        raise UserError(f"none of the {len(files)} files can be compared with {centroid_file}")
    results.sort(key=lambda item: item["cosine"])
    cosine, ratio = agreement(np.mean(means, axis=0), centroid)
    differs = what_differs(cosine, ratio)
    titles = {"norm_ratio": "norm / centroid's"}
    print(pd.DataFrame(results[:SHOWN]).rename(columns=titles).to_string(index=False, float_format="{:.3f}".format))
    if len(results) > SHOWN:
        print(f"… and {len(results) - SHOWN} more with higher cosines (--output writes all)")
    says = f"mean of {len(means)} file{'s' if len(means) > 1 else ''}: cosine {cosine:.3f} with {centroid_file}"
    print(f"\n{says}, {ratio:.3g} times its length: {differs or 'this fits features of one model'}")
    if output:
        overall = {"cosine": cosine, "norm_ratio": ratio}
        write_json(output, {"agree": not differs, "overall": overall, "cause": differs, "files": results})
        print(f"figures of all {len(results)} files in {output}")
    return EXIT_BAD_INPUT if len(means) < len(files) else 1 if differs else 0


def find_pairs(a: Path, b: Path) -> list[tuple[Path, Path, list[Path]]]:
    """Pair the files of two folders by relative path, else by NAME__k, else by video.

    A pair has the other crops of its video in B as third. Two single files form a pair under any names. Warns of files
    without a counterpart. Raises ``UserError`` if nothing pairs.
    """
    for path in (a, b):
        if not path.exists():
            raise UserError(f"not found: {path}")
    if a.is_file() != b.is_file():
        kinds = ["file" if path.is_file() else "folder" for path in (a, b)]
        raise UserError(f"give two files or two folders: {a} is a {kinds[0]}, {b} is a {kinds[1]}")
    if a.is_file():
        right, paired = sorted(b.parent.glob("*.npy")), {a: b}
    else:
        left, right = list(walk_files(a, ".npy")), list(walk_files(b, ".npy"))
        for folder, files in ((a, left), (b, right)):
            if not files:
                raise UserError(f"no feature files (.npy) below {folder}")
        paired = _pair_files(left, right, a, b)
        if not paired:
            first = f"(the first are {left[0].name} and {right[0].name})"
            raise UserError(f"no file below {a} matches one below {b}, neither by path nor by name {first}")
        for folder, alone in ((a, set(left) - paired.keys()), (b, set(right) - set(paired.values()))):
            if alone:
                warn(f"{len(alone)} files below {folder} are not compared, the first is {min(alone).name}")
    crops = defaultdict(list)
    for path in right:
        crops[_video(path)].append(path)
    return [(x, y, [crop for crop in crops[_video(y)] if crop != y]) for x, y in paired.items()]


def _pair_files(left: list[Path], right: list[Path], a: Path, b: Path) -> dict[Path, Path]:
    """Pair files by one key after another; a paired file is not considered again."""
    paired: dict[Path, Path] = {}
    for key in (Path.relative_to, lambda path, root: path.name, lambda path, root: _video(path)):
        taken, candidates = set(paired.values()), dict[Any, Path]()
        for path in right:
            if path not in taken:
                candidates.setdefault(key(path, b), path)
        paired |= {path: other for path in left if path not in paired and (other := candidates.pop(key(path, a), None))}
    return paired


def _video(path: Path) -> str:
    return split_crop(path.stem)[0]


def _print_results(results: list[dict[str, Any]], causes: Counter[str]) -> dict[str, float]:
    """Print the worst pairs, the figures of all, and each cause with its evidence; return the figures of all."""
    import pandas as pd  # here: the command's --help does not need it

    table = pd.DataFrame(results)
    rows, known = pd.DataFrame(table["rows"].tolist(), columns=["rows A", "rows B"]), table["mean_cosine"].notna()
    shown = pd.concat([table["file"].str[-50:], rows], axis=1)
    for key, (title, digits) in COLUMNS.items():
        shown[title] = table[key].map(f"{{:{digits}}}".format)
    print(shown.head(SHOWN).to_string(index=False))
    if len(results) > SHOWN:
        print(f"… and {len(results) - SHOWN} more that are not worse (--output writes all)")
    figures, weights = table.loc[known, list(COLUMNS)[:4]], rows.min(axis=1)[known]
    means = figures.mul(weights, axis=0).sum(min_count=1) / weights.sum()
    found = {"mean_cosine": means, "min_cosine": figures.min(), "norm_ratio": means, "max_difference": figures.max()}
    overall = {name: float(values[name]) for name, values in found.items()}
    says = "mean cosine {:.4f}, lowest {:.4f}, norm B/A {:.4g}, largest difference {:.2g}"
    print("\nall rows: " + says.format(*overall.values()))
    counted = ", ".join(f"{count} × {cause}" for cause, count in causes.most_common())
    print(f"{len(results)} pair{'s' if len(results) > 1 else ''} compared: {counted}")
    for cause, _ in causes.most_common():
        worst = next(item for item in results if item["cause"] == cause)
        print(f"  {cause}: {worst['evidence']} ({worst['file']})")
    return overall
