"""Compare two feature arrays of one video and name the most likely cause of a difference.

Each cause is a hypothesis that pairs rows that should agree, and it is accepted only if they then do. A difference
that no hypothesis explains is named by its size and its kind.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from clipfusionvad.tools.features.order import name_order

IDENTICAL = "identical"
SAME = "same within half precision"
# Relative difference of a row that half precision explains: 3e-4 if only storage uses it, more if the encoder does.
EXACT = 2e-3
# A hypothesis under which rows do not quite agree must leave less than this share of their difference.
CLEAR = 0.6
MAX_SHIFT = 16
# Correlation of changes (see ``_relations``) above which two arrays show one video; unrelated ones are below 0.2.
ALIKE = 0.25
# Largest share of a difference that is the same in all rows with other frames; another resize or crop: 0.7 to 1.
FIXED = 0.4
# Rows on which hypotheses are tried.
TRIED_ROWS = 4096
STRIDES = (8, 16, 32, 64)


@dataclass(frozen=True)
class Comparison:
    """Figures of two arrays over their common rows, and the likely cause of a difference with its evidence.

    ``norm_ratio`` is the mean of ‖b‖ / ‖a‖, ``offset`` the k for which row i + k of A is most similar to row i of B
    (0 if one array has twice the rows of the other). Figures are NaN if the widths differ.
    """

    rows: tuple[int, int]
    cause: str
    evidence: str
    agree: bool
    mean_cosine: float = float("nan")
    min_cosine: float = float("nan")
    norm_ratio: float = float("nan")
    max_difference: float = float("nan")
    offset: int = 0


#: A hypothesis: rows (n, D) of A and of B that should agree, its name and its evidence.
_Pairing = tuple[np.ndarray, np.ndarray, str, str]
#: Numbers and rows of the other crops of a video.
_Crops = Iterable[tuple[int | None, np.ndarray]]


def compare_rows(a: np.ndarray, b: np.ndarray, crop: int | None = None, crops: _Crops = ()) -> Comparison:
    """Compare features ``a`` (n, D) with ``b`` (m, E), presumably of the same video.

    ``crop`` is A's; ``crops`` yields number and rows of the other crops in B, if needed. Zeros mean a missing row.
    """
    rows, shared = (len(a), len(b)), min(len(a), len(b))
    if a.shape[1] != b.shape[1]:
        return Comparison(rows, "other model", f"A has {a.shape[1]} numbers a row, B {b.shape[1]}", agree=False)
    a, b = a.astype(np.float32), b.astype(np.float32)
    x, y = a[:shared], b[:shared]
    cause, evidence = _find_cause(a, b, crop, crops)
    agree, cosines = cause in (IDENTICAL, SAME), 1 - _row_distances(x, y) ** 2 / 2
    figures = cosines.mean(), cosines.min(), _norm_ratios(x, y).mean(), np.abs(x - y).max()
    mean, lowest, ratio, largest = map(float, figures)
    offset = 0 if agree else min([0, *_shifts(len(a), len(b))], key=lambda shift: _distance(*_shifted(a, b, shift)))
    return Comparison(rows, cause, evidence, agree, mean, lowest, ratio, largest, offset)


def _find_cause(a: np.ndarray, b: np.ndarray, crop: int | None, crops: _Crops) -> tuple[str, str]:
    if np.array_equal(a, b):
        return IDENTICAL, f"all {len(a)} rows are equal"
    shared, parts = min(len(a), len(b)), []
    x, y = a[:shared], b[:shared]
    left = plain = _distance(x, y)
    if plain > EXACT and (found := _best_pairing(a, b, crop, crops)):
        x, y, name, says = found
        left = _distance(x, y)
        parts.append((name, f"{says} (rows differ by {left:.2g} instead of {plain:.2g})"))
    equal = _row_distances(x, y) <= EXACT
    # The scale is judged on rows that agree in direction, if there are any.
    judged = equal if equal.any() else slice(None)
    scale = _scale(x[judged], y[judged], EXACT if equal.any() else left)
    if left > EXACT and not (scale and scale[0] == "normalised per frame" and 1 - left**2 / 2 > 0.99):
        parts.append(_what_is_left(x, y))
    if scale:
        parts.append(scale)
    if plain <= EXACT and (more := abs(len(a) - len(b))):
        name = "rows differ by one (tail rule)" if more == 1 else "one is cut short"
        longer = "A" if len(a) > len(b) else "B"
        parts.append((name, f"the first {shared} rows agree, {longer} has {_rows(more)} more"))
    if not parts:
        largest = (np.linalg.norm(b - a, axis=1) / np.maximum(np.linalg.norm(a, axis=1), 1e-12)).max()
        return SAME, f"rows differ by {largest:.1e} of their length at most"
    return " + ".join(name for name, _ in parts), "; ".join(says for _, says in parts)


def _best_pairing(a: np.ndarray, b: np.ndarray, crop: int | None, crops: _Crops) -> _Pairing | None:
    """Return the simplest hypothesis that fits nearly as well as the best one; None if none fits."""
    found = [(_distance(*pairing[:2]), pairing) for pairing in _pairings(a, b)]
    if not found or min(left for left, _ in found) > EXACT:
        found += [(_distance(*pairing[:2]), pairing) for pairing in _crop_pairings(a, crop, crops)]
    best, tried = min((left for left, _ in found), default=np.inf), min(len(a), len(b), TRIED_ROWS)
    distances = _row_distances(a[:tried], b[:tried])
    mostly_equal = np.mean(distances <= EXACT) >= 0.5
    if best > EXACT and (mostly_equal or best > CLEAR * np.sqrt(np.mean(distances**2))):
        return None
    return next(pairing for left, pairing in found if left <= 2 * best + 1e-4)


def _pairings(a: np.ndarray, b: np.ndarray) -> Iterator[_Pairing]:
    """Yield hypotheses about the rows of two arrays, the simplest first."""
    for shift in _shifts(len(a), len(b)):
        yield *_shifted(a, b, shift), f"shifted by {_rows(abs(shift))}", f"A's row i{shift:+d} is B's row i"
    if len(a) == len(b):
        yield from _orders(a, b)
    if len(a) >= 2 * len(b):
        for frames, rows, cause, says in _reductions(a, b):
            yield frames, rows, cause, says.format("B", "A")
    elif len(b) >= 2 * len(a):
        for frames, rows, cause, says in _reductions(b, a):
            yield rows, frames, cause, says.format("A", "B")


def _orders(a: np.ndarray, b: np.ndarray) -> Iterator[_Pairing]:
    """Yield hypotheses that one array has the rows of the other (n, D) in another order."""
    for first in (0, 1):
        order = name_order(len(a), first)
        for rows, name, other in ((order, "B", "A"), (np.argsort(order), "A", "B")):
            says = f"{name} has {other}'s rows in the order of file names, {'0, 1' if first == 0 else '1'}, 10, 11, …"
            yield a[rows], b, f"rows of {name} sorted as text", says
    if len(a) <= TRIED_ROWS:
        cosines = _unit(b) @ _unit(a).T
        # Every row of each must be one of the other.
        if min(cosines.max(axis=0).min(), cosines.max(axis=1).min()) >= 1 - EXACT**2 / 2:
            says = "all rows of one are rows of the other, but not at the same places"
            yield a[cosines.argmax(axis=1)], b, "rows in another order", says


def _reductions(frames: np.ndarray, rows: np.ndarray) -> Iterator[_Pairing]:
    """Yield ways to make ``rows`` from ``frames``: (reduced, rows, cause, text with places for both names)."""
    near = {stride for stride in STRIDES if abs(len(frames) / stride - len(rows)) <= 1}
    ratio, rows = round(len(frames) / len(rows)), rows[:TRIED_ROWS]
    for stride in sorted({ratio} | near, key=lambda stride: stride != 16):
        cause, middle = f"means of {stride} frames", stride // 2
        yield *_means(frames, rows, stride, 0), cause, f"{{0}} has the mean of every {stride} rows of {{1}}"
        for frame in sorted(range(stride), key=lambda frame: (frame not in (0, middle), frame)):
            which = "the middle one" if frame == middle else f"number {frame}"
            chosen = frames[frame::stride][: len(rows)]
            name = f"one frame instead of the mean ({which} of {stride})"
            yield chosen, rows[: len(chosen)], name, f"{{0}} has every {stride}th row of {{1}}, from row {frame} on"
        for shift in sorted({*range(1 - stride, stride)} - {0}, key=abs):
            says = f"{{0}} has means of {stride} rows of {{1}} that start {abs(shift)} rows "
            says += "later" if shift > 0 else "earlier"
            yield *_means(frames, rows, stride, shift), f"{cause}, shifted by {abs(shift)} frames", says


def _means(frames: np.ndarray, rows: np.ndarray, stride: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    if shift < 0:
        # The first of these means would start before the video.
        rows, shift = rows[1:], shift + stride
    count = max(0, min((len(frames) - shift) // stride, len(rows)))
    blocks = frames[shift : shift + count * stride].reshape(count, stride, frames.shape[1])
    return blocks.mean(axis=1), rows[:count]


def _crop_pairings(a: np.ndarray, crop: int | None, crops: _Crops) -> Iterator[_Pairing]:
    own, of = ("A", "") if crop is None else (f"A's crop {crop}", f" for {crop}")
    for number, other in crops:
        if other.shape[1] == a.shape[1]:
            mirrors = crop is not None and number is not None and abs(crop - number) == 5
            name = f"other crop ({number}{of}{', mirrored' if mirrors else ''})"
            shared = min(len(a), len(other), TRIED_ROWS)
            yield a[:shared], other[:shared].astype(np.float32), name, f"{own} is most like B's crop {number}"


def _scale(a: np.ndarray, b: np.ndarray, tolerance: float) -> tuple[str, str] | None:
    """Name a difference between the lengths of rows; None if they agree."""
    ratios, norms = _norm_ratios(a, b), {"A": np.linalg.norm(a, axis=1), "B": np.linalg.norm(b, axis=1)}
    if np.abs(ratios - 1).max() <= 2 * tolerance:
        return None
    ranges = " and ".join(f"{norm.min():.4g} to {norm.max():.4g}" for norm in norms.values())
    unit = [name for name, norm in norms.items() if np.abs(norm - 1).max() <= EXACT]
    if len(unit) == 1:
        return "L2-normalised", f"{unit[0]}'s rows have length 1 (norms {ranges})"
    for name, other in ("AB", "BA"):
        # The mean of vectors of length 1 is slightly shorter than 1.
        if norms[name].max() <= 1 + EXACT and norms[name].mean() > 0.85 and norms[other].mean() > 1.5:
            says = f"{name}'s norms are a little below 1, as of means over frames of length 1 (norms {ranges})"
            return "normalised per frame", says
    if abs(ratios.mean() - 1) <= 0.03 and tolerance > EXACT:
        return None
    if ratios.std() / ratios.mean() <= tolerance:
        return "other scale", f"B is {ratios.mean():.4g} times as long as A"
    return "other scale by row", f"norms are {ranges}"


def _what_is_left(a: np.ndarray, b: np.ndarray) -> tuple[str, str]:
    """Name a difference in direction that no pairing of rows explains, by its size and its kind."""
    equal = _row_distances(a, b) <= EXACT
    if equal.mean() >= 0.5:
        first = int(np.argmin(equal))
        name = "last row differs (tail rule)" if first == len(a) - 1 else "some rows differ"
        return name, f"{int(equal.sum())} of {len(a)} rows agree, the first that does not is row {first}"
    cosine = 1 - _distance(a, b) ** 2 / 2
    if cosine >= 0.9 and (
        found := _single_frames(a, b, "longer") or _shifted_means(a, b) or _single_frames(a, b, "rougher")
    ):
        return found
    says = f"mean cosine {cosine:.4f}, "
    if cosine >= 0.97:
        says += f"{100 * _fixed_part(a, b):.0f} % of the difference is the same in all rows"
        return "other resize or decoder", says
    alike = _relations(a, b)
    says += f"the changes from row to row resemble one another with r = {alike:.2f}"
    if cosine < 0.5:
        return ("other model" if alike >= ALIKE else "other model or video"), says
    return ("other crop or preprocessing" if alike >= ALIKE else "other video"), says


def _single_frames(a: np.ndarray, b: np.ndarray, what: str) -> tuple[str, str] | None:
    """Recognise single frames against means: they are longer, and change more ("rougher"), in no fixed direction."""
    if len(a) < 8 or (fixed := _fixed_part(a, b)) > FIXED:
        return None
    size = np.square(b - a).sum()
    if what == "longer":
        longer = np.square(b).sum(axis=1) - np.square(a).sum(axis=1)
        surplus = longer.sum() / size
        if np.mean(longer * surplus > 0) <= 0.7:
            return None
    else:
        surplus = (np.square(np.diff(b, axis=0)).sum() - np.square(np.diff(a, axis=0)).sum()) / (2 * size)
    if not 0.4 <= abs(surplus) <= 3:
        return None
    frame, mean = "BA" if surplus > 0 else "AB"
    says = (
        f"{frame} is {what} than {mean} by {abs(surplus):.2f} of their difference, which changes from row to row "
        f"(its fixed part is {fixed:.2f}), as single frames are compared with their means"
    )
    return f"one frame instead of the mean ({frame})", says


def _fixed_part(a: np.ndarray, b: np.ndarray) -> float:
    """Return the share of the difference that is the same in all rows: 0 to 1."""
    difference = b - a
    return float(np.linalg.norm(difference.mean(axis=0)) / np.sqrt(np.square(difference).sum(axis=1).mean()))


def _shifted_means(a: np.ndarray, b: np.ndarray) -> tuple[str, str] | None:
    """Recognise means that start some frames later: they lie between a row and the next one."""
    before = _distance(a, b)
    ways = [(*_way_to_next(a, b), "next"), (*_way_to_next(a[::-1], b[::-1]), "previous")]
    (other, _, _), (share, left, way) = sorted(ways)
    # Noise in A only seems to point to both neighbours.
    if not 0.03 <= share <= 0.97 or other > share / 2 or left > 0.95 * before:
        return None
    frames = max(1, round(16 * share))
    says = (
        f"B's rows lie {share:.2f} of the way from A's to the {way} one "
        f"(rows then differ by {left:.2g} instead of {before:.2g})"
    )
    return f"shifted by about {frames} frame{'s' if frames > 1 else ''} of 16", says


def _way_to_next(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return how far B's rows lie on the way from A's to the next ones, 0 to 1, and the distance that remains."""
    step = a[1:] - a[:-1]
    share = float((step * (b[:-1] - a[:-1])).sum() / max(np.square(step).sum(), 1e-12))
    return share, _distance(a[:-1] + share * step, b[:-1])


def _shifts(a: int, b: int) -> list[int]:
    """Return offsets under which at least half of the rows, and three, overlap, the smallest first.

    The list is empty if one array has twice the rows of the other.
    """
    if max(a, b) >= 2 * min(a, b):
        return []
    least = max(3, min(a, b) // 2)
    possible = [k for k in range(-MAX_SHIFT, MAX_SHIFT + 1) if k and min(a - max(k, 0), b - max(-k, 0)) >= least]
    return sorted(possible, key=abs)


def _shifted(a: np.ndarray, b: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = a[max(shift, 0) : TRIED_ROWS], b[max(-shift, 0) : TRIED_ROWS]
    shared = min(len(a), len(b))
    return a[:shared], b[:shared]


def _relations(a: np.ndarray, b: np.ndarray) -> float:
    """Correlate the cosines of changes from row to row (rows drift slowly): high for one video in any model or crop."""
    chosen = np.linspace(0, len(a) - 2, min(len(a) - 1, 256)).astype(int)
    upper = np.triu_indices(len(chosen), 1)
    if len(upper[0]) < 3:
        return 0.0
    changes = (_unit(np.diff(rows, axis=0)[chosen]) for rows in (a, b))
    found = np.corrcoef([(unit @ unit.T)[upper] for unit in changes])[0, 1]
    return float(found) if np.isfinite(found) else 0.0


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _row_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return distances (n,) of rows scaled to length 1: 0 for equal directions, √2 for unrelated ones."""
    return np.linalg.norm(_unit(a) - _unit(b), axis=1)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(_row_distances(a, b))))) if len(a) else np.inf


def _norm_ratios(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return ‖b‖ / ‖a‖ (n,); 1 where both rows are missing."""
    return (np.linalg.norm(b, axis=1) + 1e-12) / (np.linalg.norm(a, axis=1) + 1e-12)


def _rows(count: int) -> str:
    return f"{count} row{'s' if count != 1 else ''}"
