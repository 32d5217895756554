"""Compare two feature arrays of one video and name the most likely cause of a difference.

Each cause is a hypothesis that pairs rows that should agree, and it is accepted only if they then do. A difference
that no hypothesis explains is named by its size and its kind.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

IDENTICAL = "identical"
SAME = "same within half precision"
# Relative difference of a row that half precision explains: 3e-4 if only storage uses it, more if the encoder does.
EXACT = 2e-3
# A hypothesis under which rows do not quite agree must leave less than this share of their difference.
CLEAR = 0.6
MAX_SHIFT = 16
# Correlation of changes (see ``_relations``) above which two arrays show one video; for unrelated real videos it is
# below 0.2.
ALIKE = 0.25
# Largest share of a difference that is the same in all rows if other frames were used; with another resize or crop it
# is 0.7 to 1.
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


@dataclass(frozen=True)
class _Pairing:
    """A hypothesis: the rows a (n, D) and b (n, D) should agree. Without ``cause``: the rows in their order."""

    cause: str
    says: str
    a: np.ndarray
    b: np.ndarray

    @property
    def left(self) -> float:
        return _distance(self.a, self.b)


def compare_rows(
    a: np.ndarray, b: np.ndarray, crop: int | None = None, crops: Iterable[tuple[int | None, np.ndarray]] = ()
) -> Comparison:
    """Compare features ``a`` (n, D) with ``b`` (m, E), presumably of the same video.

    ``crop`` is A's crop number; ``crops`` yields numbers and rows of the video's other crops in B, and is consumed only
    if needed. A row of zeros means a missing one.
    """
    rows = (len(a), len(b))
    if a.shape[1] != b.shape[1]:
        return Comparison(rows, "other model", f"A has {a.shape[1]} numbers a row, B {b.shape[1]}", agree=False)
    a, b = a.astype(np.float32), b.astype(np.float32)
    shared = min(rows)
    cosines = 1 - _row_distances(a[:shared], b[:shared]) ** 2 / 2
    cause, evidence = _find_cause(a, b, crop, crops)
    agree = cause in (IDENTICAL, SAME)
    return Comparison(
        rows,
        cause,
        evidence,
        agree,
        mean_cosine=float(cosines.mean()),
        min_cosine=float(cosines.min()),
        norm_ratio=float(_norm_ratios(a[:shared], b[:shared]).mean()),
        max_difference=float(np.abs(a[:shared] - b[:shared]).max()),
        offset=0 if agree else _best_offset(a, b),
    )


def _find_cause(
    a: np.ndarray, b: np.ndarray, crop: int | None, crops: Iterable[tuple[int | None, np.ndarray]]
) -> tuple[str, str]:
    if np.array_equal(a, b):
        return IDENTICAL, f"all {len(a)} rows are equal"
    shared = min(len(a), len(b))
    plain = _Pairing("", "", a[:shared], b[:shared])
    chosen = plain if plain.left <= EXACT else _best_pairing(plain, a, b, crop, crops)
    left, parts = chosen.left, []
    if chosen is not plain:
        parts.append((chosen.cause, f"{chosen.says} (rows differ by {left:.2g} instead of {plain.left:.2g})"))
    equal = _row_distances(chosen.a, chosen.b) <= EXACT
    # The scale is judged on rows that agree in direction, if there are any.
    judged = equal if equal.any() else slice(None)
    scale = _scale(chosen.a[judged], chosen.b[judged], EXACT if equal.any() else left)
    if left > EXACT and not (scale and scale[0] == "normalised per frame" and _cosine(left) > 0.99):
        parts.append(_what_is_left(chosen.a, chosen.b))
    if scale:
        parts.append(scale)
    if chosen is plain and left <= EXACT and len(a) != len(b):
        parts.append(_length(len(a), len(b)))
    if not parts:
        largest = (np.linalg.norm(b - a, axis=1) / np.maximum(np.linalg.norm(a, axis=1), 1e-12)).max()
        return SAME, f"rows differ by {largest:.1e} of their length at most"
    return " + ".join(name for name, _ in parts), "; ".join(says for _, says in parts)


def _best_pairing(
    plain: _Pairing, a: np.ndarray, b: np.ndarray, crop: int | None, crops: Iterable[tuple[int | None, np.ndarray]]
) -> _Pairing:
    """Return the simplest hypothesis that fits nearly as well as the best one, or ``plain`` if none fits."""
    tried = _Pairing("", "", plain.a[:TRIED_ROWS], plain.b[:TRIED_ROWS])
    found = [(pairing, pairing.left) for pairing in _pairings(a, b)]
    if not found or min(left for _, left in found) > EXACT:
        found += [(pairing, pairing.left) for pairing in _crop_pairings(a, crop, crops)]
    if not found:
        return plain
    best = min(left for _, left in found)
    mostly_equal = np.mean(_row_distances(tried.a, tried.b) <= EXACT) >= 0.5
    if best > EXACT and (mostly_equal or best > CLEAR * tried.left):
        return plain
    return next(pairing for pairing, left in found if left <= 2 * best + 1e-4)


def _pairings(a: np.ndarray, b: np.ndarray) -> Iterator[_Pairing]:
    """Yield hypotheses about the rows of two arrays, the simplest first."""
    if len(a) >= 2 * len(b):
        yield from (_Pairing(c, s.format("B", "A"), x, y) for c, s, x, y in _reductions(a, b))
    elif len(b) >= 2 * len(a):
        yield from (_Pairing(c, s.format("A", "B"), y, x) for c, s, x, y in _reductions(b, a))
    else:
        for shift in _shifts(len(a), len(b)):
            x, y = _shifted(a[:TRIED_ROWS], b[:TRIED_ROWS], shift)
            yield _Pairing(f"shifted by {_rows(abs(shift))}", f"A's row i{shift:+d} is B's row i", x, y)


def _reductions(frames: np.ndarray, rows: np.ndarray) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Yield ways to make ``rows`` from ``frames``: (cause, text with places for both names, reduced, rows)."""
    ratio = round(len(frames) / len(rows))
    near = {stride for stride in STRIDES if abs(len(frames) / stride - len(rows)) <= 1}
    for stride in sorted({ratio} | near, key=lambda stride: stride != 16):
        cut = rows[:TRIED_ROWS]
        middle = stride // 2
        single = "one frame instead of the mean"
        yield (
            f"means of {stride} frames",
            f"{{0}} has the mean of every {stride} rows of {{1}}",
            *_means(frames, cut, stride, 0),
        )
        for frame in sorted(range(stride), key=lambda frame: (frame not in (0, middle), frame)):
            which = "the middle one" if frame == middle else f"number {frame}"
            yield (
                f"{single} ({which} of {stride})",
                f"{{0}} has every {stride}th row of {{1}}, from row {frame} on",
                *_every(frames, cut, stride, frame),
            )
        for shift in sorted({*range(1 - stride, stride)} - {0}, key=abs):
            yield (
                f"means of {stride} frames, shifted by {abs(shift)} frames",
                f"{{0}} has means of {stride} rows of {{1}} that start {abs(shift)} rows "
                f"{'later' if shift > 0 else 'earlier'}",
                *_means(frames, cut, stride, shift),
            )


def _means(frames: np.ndarray, rows: np.ndarray, stride: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    if shift < 0:
        # The first of these means would start before the video.
        rows, shift = rows[1:], shift + stride
    count = max(0, min((len(frames) - shift) // stride, len(rows)))
    blocks = frames[shift : shift + count * stride].reshape(count, stride, frames.shape[1])
    return blocks.mean(axis=1), rows[:count]


def _every(frames: np.ndarray, rows: np.ndarray, stride: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    chosen = frames[first::stride][: len(rows)]
    return chosen, rows[: len(chosen)]


def _crop_pairings(
    a: np.ndarray, crop: int | None, crops: Iterable[tuple[int | None, np.ndarray]]
) -> Iterator[_Pairing]:
    for number, other in crops:
        if other.shape[1] == a.shape[1]:
            mirrors = crop is not None and number is not None and abs(crop - number) == 5
            mirrored = ", mirrored" if mirrors else ""
            own = "A" if crop is None else f"A's crop {crop}"
            name = f"other crop ({number}{'' if crop is None else f' for {crop}'}{mirrored})"
            shared = min(len(a), len(other), TRIED_ROWS)
            yield _Pairing(name, f"{own} is most like B's crop {number}", a[:shared], other[:shared].astype(np.float32))


def _scale(a: np.ndarray, b: np.ndarray, tolerance: float) -> tuple[str, str] | None:
    """Name a difference between the lengths of rows; None if they agree."""
    ratios = _norm_ratios(a, b)
    if np.abs(ratios - 1).max() <= 2 * tolerance:
        return None
    norms = [np.linalg.norm(rows, axis=1) for rows in (a, b)]
    ranges = " and ".join(f"{norm.min():.4g} to {norm.max():.4g}" for norm in norms)
    units = [bool(np.abs(norm - 1).max() <= EXACT) for norm in norms]
    for name, unit, other in (("A", units[0], units[1]), ("B", units[1], units[0])):
        if unit and not other:
            return "L2-normalised", f"{name}'s rows have length 1 (norms {ranges})"
    # The mean of vectors of length 1 is slightly shorter than 1.
    averaged = [bool(norm.max() <= 1 + EXACT and norm.mean() > 0.85) for norm in norms]
    for name, mean, other in (("A", averaged[0], norms[1]), ("B", averaged[1], norms[0])):
        if mean and other.mean() > 1.5:
            says = f"{name}'s norms are a little below 1, as of means over frames of length 1 (norms {ranges})"
            return "normalised per frame", says
    spread = ratios.std() / ratios.mean()
    if abs(ratios.mean() - 1) <= 0.03 and tolerance > EXACT:
        return None
    if spread <= tolerance:
        return "other scale", f"B is {ratios.mean():.4g} times as long as A"
    return "other scale by row", f"norms are {ranges}"


def _what_is_left(a: np.ndarray, b: np.ndarray) -> tuple[str, str]:
    """Name a difference in direction that no pairing of rows explains, by its size and its kind."""
    distances = _row_distances(a, b)
    equal = distances <= EXACT
    cosine = _cosine(_distance(a, b))
    if equal.mean() >= 0.5:
        first = int(np.argmin(equal))
        last_only = first == len(a) - 1
        name = "last row differs (tail rule)" if last_only else "some rows differ"
        return name, f"{int(equal.sum())} of {len(a)} rows agree, the first that does not is row {first}"
    if cosine >= 0.9:
        found = _single_frames(a, b, "longer") or _shifted_means(a, b) or _single_frames(a, b, "rougher")
        if found:
            return found
    says = f"mean cosine {cosine:.4f}"
    if cosine >= 0.97:
        says += f", of the difference a share of {_fixed_part(a, b):.2f} is the same in all rows"
        return "other resize or decoder", says
    alike = _relations(a, b)
    says += f", the changes from row to row resemble one another with r = {alike:.2f}"
    if cosine < 0.5:
        return ("other model" if alike >= ALIKE else "other model or video"), says
    return ("other crop or preprocessing" if alike >= ALIKE else "other video"), says


def _single_frames(a: np.ndarray, b: np.ndarray, what: str) -> tuple[str, str] | None:
    """Recognise single frames against means: what a frame adds to the mean of its chunk has no fixed direction.

    It makes the row longer, and it makes the changes from row to row larger ("rougher").
    """
    if len(a) < 8 or (fixed := _fixed_part(a, b)) > FIXED:
        return None
    size = np.square(b - a).sum()
    if what == "longer":
        longer = np.square(b).sum(axis=1) - np.square(a).sum(axis=1)
        surplus = longer.sum() / size
        if np.mean(longer * surplus > 0) <= 0.7:
            return None
    else:
        changes = [np.square(np.diff(rows, axis=0)).sum() for rows in (a, b)]
        surplus = (changes[1] - changes[0]) / (2 * size)
    if not 0.4 <= abs(surplus) <= 3:
        return None
    frame, mean = ("B", "A") if surplus > 0 else ("A", "B")
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
    (later, left_later), (earlier, left_earlier) = _way_to_next(a, b), _way_to_next(a[::-1], b[::-1])
    share, other, left = (later, earlier, left_later) if later > earlier else (earlier, later, left_earlier)
    # Noise in A only seems to point to both neighbours.
    if not 0.03 <= share <= 0.97 or other > share / 2 or left > 0.95 * before:
        return None
    frames = max(1, round(16 * share))
    says = (
        f"B's rows lie {share:.2f} of the way from A's to the {'next' if later > earlier else 'previous'} one "
        f"(rows then differ by {left:.2g} instead of {before:.2g})"
    )
    return f"shifted by about {frames} frame{'s' if frames > 1 else ''} of 16", says


def _way_to_next(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return how far B's rows lie on the way from A's to the next ones, 0 to 1, and the distance that remains."""
    step = a[1:] - a[:-1]
    share = float((step * (b[:-1] - a[:-1])).sum() / max(np.square(step).sum(), 1e-12))
    return share, _distance(a[:-1] + share * step, b[:-1])


def _length(a: int, b: int) -> tuple[str, str]:
    longer = "A" if a > b else "B"
    name = "rows differ by one (tail rule)" if abs(a - b) == 1 else "one is cut short"
    return name, f"the first {min(a, b)} rows agree, {longer} has {_rows(abs(a - b))} more"


def _shifts(a: int, b: int) -> list[int]:
    """Return offsets under which at least half of the rows, and three, overlap; the smallest first."""
    least = max(3, min(a, b) // 2)
    possible = [k for k in range(-MAX_SHIFT, MAX_SHIFT + 1) if k and min(a - max(k, 0), b - max(-k, 0)) >= least]
    return sorted(possible, key=abs)


def _shifted(a: np.ndarray, b: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = a[max(shift, 0) :], b[max(-shift, 0) :]
    shared = min(len(a), len(b))
    return a[:shared], b[:shared]


def _best_offset(a: np.ndarray, b: np.ndarray) -> int:
    offsets = [0, *_shifts(len(a), len(b))] if max(len(a), len(b)) < 2 * min(len(a), len(b)) else [0]
    left = [_distance(*_shifted(a[:TRIED_ROWS], b[:TRIED_ROWS], shift)) for shift in offsets]
    return offsets[int(np.argmin(left))]


def _relations(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation between the cosines of A's changes from row to row and those of B's.

    It is high for one video under any model or crop. The rows themselves drift slowly, so any two videos are similar.
    """
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


def _cosine(distance: float) -> float:
    return 1 - distance**2 / 2


def _norm_ratios(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return ‖b‖ / ‖a‖ (n,); 1 where both rows are missing."""
    norms = [np.linalg.norm(rows, axis=1) for rows in (a, b)]
    return (norms[1] + 1e-12) / (norms[0] + 1e-12)


def _rows(count: int) -> str:
    return f"{count} row{'s' if count != 1 else ''}"
