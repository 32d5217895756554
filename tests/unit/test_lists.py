"""Reading lists and feature files: what is found, and what is said when it is not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfusionvad.data.features import check_features, load_features, read_shape
from clipfusionvad.data.lists import Entry, check_overlap, read_list, split_crop, write_list
from clipfusionvad.datasets import UCF, XD
from clipfusionvad.io.errors import UserError


def save(path, rows=2, dim=3, scale=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.full((rows, dim), scale, np.float16))
    return path


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["path,label", *lines]) + "\n")
    return path


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


@given(st.text(min_size=1).filter(lambda name: "\0" not in name), st.integers(0, 99))
def test_only_the_last_crop_suffix_is_cut(name, crop):
    assert split_crop(f"{name}__{crop}") == (name, crop)


@pytest.mark.parametrize("video", ["assault001", "v=S-7rR__#1_label_B4-0-0", "Bad.Boys.1995__#01-33-51_label_B2-0-0"])
@pytest.mark.parametrize("crop", [None, 5])
def test_video_and_crop_of_a_file(tmp_path, video, crop):
    entry = Entry(tmp_path / (f"{video}.npy" if crop is None else f"{video}__{crop}.npy"), "x", 2)
    assert (entry.video, entry.crop) == (video, crop)


def test_rows_are_file_lines_labels_are_stripped_and_what_is_written_is_read(tmp_path):
    file = save(tmp_path / "a.npy")
    path = write(tmp_path / "list.csv", f"{file}, Assault", "", f"{file},Normal")
    assert read_list(path, dataset=UCF) == [Entry(file, "Assault", 2), Entry(file, "Normal", 4)]
    entries = [Entry(save(tmp_path / f"v=a,b__#{k}__{k}.npy"), "B1-G-0", k + 2) for k in range(3)]
    write_list(path, entries)
    assert read_list(path, dataset=XD) == entries
    # Relative to the list, and to the folder above.
    beside, above = save(tmp_path / "list/sub/a.npy"), save(tmp_path / "features/b.npy")
    path = write(tmp_path / "list/l.csv", "sub/a.npy,Normal", "features/b.npy,Normal")
    assert [entry.path.resolve() for entry in read_list(path)] == [beside, above]


@pytest.mark.parametrize("listed", ["/home/x/UCF/Abuse/a.npy", "C:\\UCF\\Abuse\\a.npy", "UCF/../Abuse/a.npy"])
@pytest.mark.parametrize("folder, other", [("", "."), ("deep/er", "deep/er/Normal")])
def test_foreign_paths_are_found_by_their_longest_tail_below_the_root(tmp_path, listed, folder, other):
    wanted = save(tmp_path / "root" / folder / "Abuse/a.npy")
    save(tmp_path / "root" / other / "a.npy")
    path = write(tmp_path / "l.csv", f"{listed},Abuse")
    assert read_list(path, tmp_path / "root")[0].path == wanted


def test_linked_files_are_no_tie_linked_loops_end_and_a_tie_between_two_files_names_both(tmp_path):
    one, two = save(tmp_path / "root/p/a.npy"), tmp_path / "root/q/a.npy"
    two.parent.mkdir()
    two.symlink_to(one)
    (tmp_path / "root/q/loop").symlink_to(tmp_path / "root", target_is_directory=True)
    path = write(tmp_path / "l.csv", "/home/x/a.npy,Abuse")
    assert read_list(path, tmp_path / "root")[0].path.samefile(one)
    two.unlink()
    save(two)
    text = message(read_list, path, tmp_path / "root")
    assert str(one) in text and str(two) in text and "row 2" in text


def test_missing_files_are_counted_in_one_line_and_an_unknown_label_is_named(tmp_path):
    file = save(tmp_path / "a.npy")
    path = write(tmp_path / "l.csv", f"{file},Abuse", "/x/b.npy,Abuse", "c.npy,Abuse")
    text = message(read_list, path)
    assert "2 of 3" in text and "row 3: /x/b.npy" in text and "--feature-root" in text
    assert "--feature-root" in message(read_list, path, tmp_path)
    assert "no.csv" in message(read_list, tmp_path / "no.csv")
    assert "nowhere" in message(read_list, path, tmp_path / "nowhere")
    text = message(read_list, write(path, f"{file},Abuse", f"{file},RoadAccident"), dataset=UCF)
    assert "row 3" in text and "'RoadAccident'" in text and "'RoadAccidents'" in text


def test_a_root_that_is_not_needed_is_named(tmp_path, capsys):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "a.npy", np.zeros((1, 2)))
    for name, used in (("here", False), ("gone", True)):
        (tmp_path / "list.csv").write_text(f"path,label\n{name}/a.npy,Normal\n")
        (entry,) = read_list(tmp_path / "list.csv", str(tmp_path / "there"))
        assert entry.path.parent.name == ("there" if used else "here")
        assert ("is not used" in capsys.readouterr().err) != used


@pytest.mark.parametrize(
    "content, parts",
    [
        (b"", ["is empty"]),
        (b"path,label\n", ["no videos"]),
        (b"file,label\na,b\n", ["'path'", "file,label"]),
        (b"path,class\na,b\n", ["'label'"]),
        (b"path,label\n,Abuse\n", ["row 2", "path is empty"]),
        (b"path,label\n\na.npy,\n", ["row 3", "label is empty"]),
        (b"path,label\na.npy\n", ["row 2", "label is empty"]),
        (b"path,label\na,b.npy,Abuse\n", ["row 2", "3 cells"]),
        (b'path,label\n"a.npy,Abuse\n', ["row 2", "CSV"]),
        (b"path,label\na\0b,Abuse\n", ["not a text file"]),
    ],
)
def test_malformed_lists(tmp_path, content, parts):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    text = message(read_list, path)
    assert all(part in text for part in [*parts, str(path)])


@pytest.mark.parametrize("dtype, order", [(np.float16, "C"), (np.float32, "F"), (np.float64, "F"), (">f4", "C")])
def test_features_keep_values_and_dtype(tmp_path, dtype, order):
    array = np.asarray(np.random.default_rng(0).normal(size=(5, 4)), dtype=dtype, order=order)
    np.save(tmp_path / "a.npy", array)
    assert read_shape(tmp_path / "a.npy") == (5, 4)
    loaded = load_features(tmp_path / "a.npy", 4)
    assert loaded.dtype == np.dtype(dtype).newbyteorder("=") and loaded.flags.c_contiguous
    np.testing.assert_array_equal(loaded, array)


def npy_header(shape, descr="'<f2'"):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


@pytest.mark.parametrize(
    "content, part",
    [
        (np.ones((10, 32, 512), np.float16), "(10, 32, 512); one file holds one crop"),
        (np.ones(512, np.float32), "(512,)"),
        (np.ones((0, 512), np.float32), "no features"),
        (np.ones((2, 4), np.int64), "int64"),
        (np.array([[None, "x"]], dtype=object), "object"),
        (np.array([[1, 2], [1, np.nan], [np.inf, 1]], np.float16), "snippet 1 "),
        (np.ones((2, 5), np.float16), "dim 5"),
        (npy_header("(4, 2)") + bytes(15), "truncated"),
        (npy_header("(4, 2)") + bytes(17), "damaged"),
        (npy_header("(10**12, 512)"), "not a readable"),
        (npy_header("(1000000000000, 512)") + bytes(64), "truncated"),
        (npy_header("(-1, 512)"), "no features"),
        (npy_header("(2, 2)", "'no type'"), "not a readable"),
        (npy_header("(2, (")[:-40], "not a readable"),
        (b"", "not a readable"),
        (b"PK\x03\x04", "not a readable"),
    ],
)
def test_bad_features_name_the_file_and_damage_is_found_from_the_header(tmp_path, content, part):
    path = tmp_path / "bad.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
        assert part in message(read_shape, path)
    else:
        np.save(path, content, allow_pickle=True)
    text = message(load_features, path, 2)
    assert part in text and str(path) in text


# Parts of a damaged header may be Python text that its own parser warns about.


def entries_of(*paths):
    return [Entry(path, "Abuse", row) for row, path in enumerate(paths, 2)]


def test_check_features_counts_snippets_in_order_and_names_the_first_bad_row(tmp_path, capfd):
    entries = entries_of(*(save(tmp_path / f"{k}.npy", rows=k) for k in range(1, 30)))
    for read in (True, False):
        assert check_features(entries, 3, "l.csv", read) == list(range(1, 30))
    assert capfd.readouterr().err == "", "no bar in logs"
    narrow, empty = save(tmp_path / "b.npy", dim=2), save(tmp_path / "c.npy", rows=0)
    text = message(check_features, entries_of(save(tmp_path / "a.npy"), narrow, empty), 3, "train.csv")
    assert text.startswith("train.csv, row 3:") and str(narrow) in text and "1 other" in text
    # Values are read only when asked for.
    bad = entries_of(save(tmp_path / "a.npy", scale=np.nan))
    assert check_features(bad, 3, "l.csv", read=False) == [2]
    assert "NaN" in message(check_features, bad, 3, "l.csv")


def test_overlap_and_features_of_another_scale_are_warned_about(tmp_path, capsys):
    train = entries_of(tmp_path / "a__0.npy", tmp_path / "b__1.npy")
    check_overlap(train, entries_of(tmp_path / "other/b__5.npy", tmp_path / "c__5.npy"))
    assert capsys.readouterr().err.startswith("warning: 1 test videos")
    scales = {"plain": 1.0, "close": 2.0, "normalised": 0.1}
    entries = entries_of(*(save(tmp_path / f"{name}__0.npy", scale=scale) for name, scale in scales.items()))
    check_overlap(train, entries)
    check_features(entries[:2], 3, "a.csv")
    check_features(entries, 3, "a.csv", read=False)
    assert capsys.readouterr().err == ""
    assert check_features(entries, 3, "a.csv") == [2, 2, 2]
    warning = capsys.readouterr().err
    assert warning.startswith("warning: a.csv: features differ in scale")
    assert "normalised__0.npy" in warning and "close__0.npy" in warning
