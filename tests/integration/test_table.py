"""The table command: what it finds, what it says of it, in which forms, and what it refuses."""

import csv
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from refusal import snapshot
from scipy import stats
from small_report import made_test, write_test
from small_runs import OPTIONS, best, table, two_settings, write_run

from clipfusionvad.datasets import DATASETS, UCF, Convention
from clipfusionvad.engine.evaluator import evaluate
from clipfusionvad.report.table import RANKING
from clipfusionvad.tools.sweep.table import compare_cells, differences_text
from clipfusionvad.tools.tables.compare import compare, difference_text, read_test_result


def read_csv(text):
    return list(csv.DictReader(io.StringIO(text)))


def csv_rows(*argv, resamples=0):
    """The rows of a table of the best weights by setting and metric."""
    done = table(*argv, "--format", "csv", "--weights", "best", "--bootstrap", resamples)
    assert done.code == 0, done.err
    return {(row["cell"], row["metric"]): row for row in read_csv(done.out)}


@pytest.fixture(autouse=True)
def small_benchmark(monkeypatch):
    """The benchmark's test set has as many videos as these runs have tested."""
    monkeypatch.setitem(DATASETS, "ucf", replace(UCF, conventions=(Convention("floor16", "floor", 24),)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return two_settings(tmp_path_factory.mktemp("runs"))


def test_mean_deviation_and_interval_are_those_of_scipy_and_the_papers_figure_stands_beside_them(runs):
    rows = csv_rows(runs)
    for name in ("full", "better"):
        values = 100 * best(runs / name, "ap1")
        row = rows[name, "ap1"]
        low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
        expected = {"mean": values.mean(), "std": values.std(ddof=1), "low": low, "high": high}
        assert {key: float(row[key]) for key in expected} == pytest.approx(expected)
        assert (row["n"], row["interval"]) == ("3", "seeds")
        released = [found["average"] for found in best(runs / name, "map_released")]
        assert float(rows[name, "map_released@average"]["mean"]) == pytest.approx(np.mean(released))
    # The changed setting of an ablation is not what was published.
    assert {cell for (cell, _), row in rows.items() if row["paper"]} == {"full"}
    row = rows["full", "auc1"]
    assert float(row["paper"]) == pytest.approx(88.02) and row["source"]
    assert row["inside"] == str(float(row["low"]) <= 88.02 <= float(row["high"]))
    assert float(rows["full", "map_released@average"]["paper"]) == 6.68


def test_seeds_trained_before_and_after_an_option_came_are_of_one_setting(tmp_path):
    write_run(tmp_path / "a/seed1", 1)
    write_run(tmp_path / "a/seed2", 2, weight_decay=0.01, visual_layers=2)
    write_run(tmp_path / "a/seed3", 3, weight_decay=0.2)
    counts = [row["n"] for (_, metric), row in csv_rows(tmp_path).items() if metric == "auc1"]
    assert counts == ["2", "1"]


def test_only_what_may_be_compared_has_a_papers_figure_beside_it(tmp_path, monkeypatch):
    write_run(tmp_path / "demo", 1, demo=True)
    write_run(tmp_path / "toy", 1, clip="toy")
    write_run(tmp_path / "clean", 1, protocol="clean")
    rows = csv_rows(tmp_path)
    judged = {("clean", metric) for metric in ("auc1", "ano_auc1", "map_released@average")}
    assert {place for place, row in rows.items() if row["paper"]} == judged
    assert rows["demo", "auc1"]["data"] == "UCF-Crime (demo)"
    text = table(tmp_path / "demo", tmp_path / "toy", "--bootstrap", 0).out
    assert "not shown for demo: the data are made up" in text and "not shown for toy: the weights of CLIP" in text
    assert "88.02" not in text and "[paper 88.02]" in table(tmp_path / "clean", "--bootstrap", 0).out
    # A part of the test set.
    monkeypatch.setitem(DATASETS, "ucf", UCF)
    part = table(tmp_path / "clean", "--bootstrap", 0)
    assert "24 videos were tested; the test set of UCF-Crime has 290" in part.out and "88.02" not in part.out
    refused(tmp_path, tmp_path / "clean", "--store", tmp_path / "s.csv", "--data", "full", says="24 videos were tested")


def test_a_single_run_is_judged_over_its_videos(runs):
    run = runs / "full" / "seed1"
    rows = csv_rows(run, "--bootstrap-seed", 4, resamples=50)
    tested, values = read_test_result(run), []
    scores, videos = tested.scores, tested.videos
    for counts in np.random.default_rng(4).multinomial(24, np.full(24, 1 / 24), 50):
        copies = np.repeat(np.arange(24), counts)
        truth = videos.truth.only(copies)
        part = type(videos)([videos.entries[i] for i in copies], videos.dataset, 4, truth)
        values.append(evaluate([scores[i] for i in copies], part))
    for metric in (f"{name}{branch}" for name in RANKING for branch in (1, 2)):
        row = rows["full", metric]
        low, high = np.nanquantile([100 * value[metric] for value in values], [0.025, 0.975])
        assert (row["interval"], row["std"]) == ("videos", "")
        assert (float(row["low"]), float(row["high"])) == pytest.approx((low, high)), metric
    assert "videos: of this one run" in table(run, "--bootstrap", 20).out


def test_differences_are_paired_by_seed(runs):
    full, better = ([runs / name / f"seed{seed}" for seed in (1, 2, 3)] for name in ("full", "better"))
    shuffled = [better[2], better[0], better[1]]
    one = {found.metric: found for found in compare(full, shuffled, resamples=300)}
    gaps = 100 * (best(runs / "better", "auc1") - best(runs / "full", "auc1"))
    auc = one["auc1"]
    assert auc.difference == pytest.approx(gaps.mean()) and auc.seeds == 3
    assert (auc.seed_low, auc.seed_high) == pytest.approx(stats.t.interval(0.95, 2, gaps.mean(), stats.sem(gaps)))
    assert auc.seed_p == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue)
    # It knows the truth: no resample says otherwise.
    assert auc.low > 0 and auc.p == pytest.approx(2 / 301)
    assert auc.low < auc.difference < auc.high
    (single,) = compare(full[:1], better[:1], ["map_average"], resamples=20)
    assert single.other == pytest.approx(best(runs / "better", "map_average")[0]) and single.seed_p is None
    # Equal runs do not differ.
    equal = compare(full[:2], full[:2], resamples=50)
    assert {(one.difference, one.low, one.high, one.p, one.seed_p) for one in equal} == {(0, 0, 0, 1, 1)}
    text = difference_text(equal)
    assert "50 paired resamples of the test videos" in text and "paired t over the seeds" in text


def test_a_star_claims_only_what_was_tested(runs):
    """Resamples of the videos are always there; a test over seeds takes two of them."""
    seeds = {name: [runs / name / f"seed{seed}" for seed in (1, 2, 3)] for name in ("full", "better")}
    several = differences_text("full", compare_cells("full", seeds))
    assert "\n* p < 0.05 for the test videos and for the seeds:\n- auc1: better +" in several
    assert "seeds: 95 % interval by paired t" in several
    firsts = {name: folders[:1] for name, folders in seeds.items()}
    single = differences_text("full", compare_cells("full", firsts))
    assert "\n* p < 0.05 for the test videos; with one seed, differences between seeds are not tested:\n" in single
    assert "- auc1: better +" in single and "for the seeds" not in single and "paired t" not in single
    mixed = differences_text("full", compare_cells("full", seeds | {"late": seeds["better"][2:]}))
    assert "and for the seeds; late: one seed, so for the test videos only:" in mixed
    assert "paired t" not in difference_text(compare(seeds["full"][:1], seeds["better"][:1], ["auc1"], resamples=20))


def test_a_row_that_cannot_be_resampled_is_shown_and_says_why(runs, tmp_path):
    scores, videos = made_test(24)
    ranked = write_test(tmp_path / "bare", scores, type(videos)(videos.entries, videos.dataset, 4, None))
    write_run(tmp_path / "whole", 1)
    damaged = write_run(tmp_path / "damaged", 2, noise=0.1, lr=0.3)
    path = tmp_path / "damaged" / "scores.npz"
    path.write_bytes(path.read_bytes()[:500])
    rows = csv_rows(tmp_path, resamples=50)
    alone = csv_rows(tmp_path / "whole", resamples=50)["whole", "auc1"]
    assert (rows["whole", "auc1"]["low"], rows["whole", "auc1"]["note"]) == (alone["low"], "") and alone["low"]
    for name, metrics, why in (("bare", ranked, "rank whole videos"), ("damaged", damaged, "not readable")):
        row = rows[name, "auc1"]
        assert float(row["mean"]) == pytest.approx(100 * metrics["auc1"])
        assert (row["low"], row["interval"], row["inside"]) == ("", "", "") and why in row["note"]
    # The paper's AUC is one of frames.
    assert not rows["bare", "auc1"]["paper"]
    done = table(tmp_path, "--bootstrap", 20)
    assert done.code == 0 and re.search("^bare: frames have no truth: .*whole videos", done.out, re.MULTILINE)
    assert "bare is not compared with" in done.err


def test_an_ablation_says_which_settings_differ(runs):
    done = table(runs, "--bootstrap", 200)
    assert done.code == 0, done.err
    section = done.out[done.out.index("AUC, coarse branch: difference from full") :]
    cells = [cell.strip() for cell in re.search(r"^\| better.*$", section, re.MULTILINE).group().strip("|").split("|")]
    gap = 100 * (best(runs / "better", "auc1") - best(runs / "full", "auc1")).mean()
    assert cells[1:3] == ["3", f"{gap:+.2f}"]
    assert "not corrected for the number of comparisons" in done.out
    other = table(runs, "--bootstrap", 20, "--reference", runs / "better")
    assert "difference from better" in other.out and "difference from full" not in other.out


@pytest.mark.parametrize("by", ["method", "dataset", "cell"])
@pytest.mark.parametrize("columns", [80, 130])
def test_what_is_printed_fits_the_terminal(runs, monkeypatch, columns, by):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = table(runs, "--rows", by, "--bootstrap", 20).out
    assert max(len(line) for line in out.splitlines() if line.startswith("|")) <= columns


def test_tables_of_methods_and_of_datasets_hold_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    metrics = write_run(tmp_path / "one", 1)
    write_run(tmp_path / "two", 1, method="iefvad")
    number = f"{100 * metrics['ap1']:.2f} (1)"
    by_method, by_dataset = (table(tmp_path, "--rows", by, "--bootstrap", 0).out for by in ("method", "dataset"))
    assert re.search(rf"^\| vadclip .*{re.escape(number)}", by_method, re.MULTILINE)
    assert re.search(rf"^\| UCF-Crime .*{re.escape(number)}", by_dataset, re.MULTILINE)


@pytest.mark.parametrize("form", ["markdown", "csv"])
def test_what_is_written_is_whole(runs, tmp_path, form):
    path = tmp_path / "deep" / "table.out"
    done = table(runs, "--format", form, "--output", path, "--bootstrap", 20)
    assert done.code == 0 and str(path) in done.out
    text = path.read_text()
    if form == "csv":
        rows = read_csv(text)
        assert {row["cell"] for row in rows} == {"full", "better"}
        gap = next(row for row in rows if (row["cell"], row["metric"], row["weights"]) == ("better", "auc1", "best"))
        assert gap["reference"] == "full" and float(gap["difference_difference"]) > 0
        assert {row["reference"] for row in rows if row["weights"] == "last"} == {""}
    else:
        for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_runs_are_found_once_and_named_apart(tmp_path):
    write_run(tmp_path / "a" / "run" / "seed1", 1)
    write_run(tmp_path / "a" / "run" / "seed2", 2, noise=0.1)
    write_run(tmp_path / "b" / "run", 1, lr=0.2)
    write_run(tmp_path / "c", 2)
    done = table(tmp_path / "a", tmp_path, "--format", "csv", "--bootstrap", 0)
    assert {(row["cell"], row["n"]) for row in read_csv(done.out)} == {("a/run", "2"), ("b/run", "1")}
    assert "c is the same setting and seed as" in done.err and "counted once" in done.err


def test_a_test_of_a_released_model_can_be_compared(tmp_path):
    write_test(tmp_path / "released", *made_test(24), options=OPTIONS)
    write_run(tmp_path / "own", 5, sees=0.5)
    done = table(tmp_path, "--reference", tmp_path / "released", "--bootstrap", 50, "--metrics", "auc1")
    assert done.code == 0, done.err
    assert "difference from released" in done.out
    refused(tmp_path, tmp_path / "released", "--weights", "last", says="no run has last weights")
    # They are not seeds of one setting, whatever options they share.
    assert all(re.search(rf"^\| {name} ", done.out, re.MULTILINE) for name in ("released", "own"))


def refused(folder, *argv, says):
    before = snapshot(folder)
    done = table(*argv)
    assert done.code == 2, done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and says in done.err, done.err
    assert snapshot(folder) == before


def test_runs_and_options_that_make_no_table_are_refused(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path, says="give the folders of runs")
    refused(tmp_path, tmp_path / "empty", says="holds no finished run")
    refused(tmp_path, tmp_path / "nowhere", says="no such folder")
    refused(tmp_path, runs, "--reference", "fulk", says="did you mean 'full'?")
    refused(tmp_path, runs, "--metrics", "auc", says="no run has a metric 'auc'")
    refused(tmp_path, runs, "--output", tmp_path / "empty", says="it is a folder")
    refused(tmp_path, runs, "--readme", tmp_path / "page.md", says="results store")


def test_runs_on_other_videos_or_truth_are_not_paired(runs, tmp_path):
    scores, videos = made_test(24)
    fewer = type(videos)(videos.entries[:20], videos.dataset, 4, videos.truth.only(range(20)))
    write_test(tmp_path / "fewer", scores[:20], fewer, options=OPTIONS)
    moved = replace(videos.truth, frames=[np.roll(frames, 1) for frames in videos.truth.frames])
    write_test(tmp_path / "moved", scores, type(videos)(videos.entries, videos.dataset, 4, moved), options=OPTIONS)
    one = runs / "full" / "seed1"
    for name, what in (("fewer", "videos"), ("moved", "truth")):
        argv = [one, tmp_path / name, "--reference", one, "--bootstrap", 20]
        refused(tmp_path, *argv, says=f"were tested on different {what}")


def test_damaged_runs_are_refused(runs, tmp_path):
    write_run(tmp_path / "run", 1)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for name, content, says in (
        ("metrics.json", b"{}", "neither best nor last"),
        ("metrics.json", b'{"best": {"auc1": "x"}}', "not a number"),
        ("options.yaml", b"- 1", "name no method and dataset"),
    ):
        (tmp_path / "run" / name).write_bytes(content)
        refused(tmp_path, tmp_path / "run", "--bootstrap", 20, says=says)
        (tmp_path / "run" / name).write_bytes(whole[name])
    (tmp_path / "run" / "scores.npz").unlink()
    assert table(tmp_path / "run", "--bootstrap", 20).code == 0
    two = runs / "full"
    refused(tmp_path, tmp_path / "run", two, "--reference", two, "--rows", "cell", says="holds no scores.npz")


def test_seeds_without_a_pair_are_a_warning_and_an_error_where_the_reference_was_given(runs, tmp_path):
    for seed in (8, 9):
        write_run(tmp_path / "other" / f"seed{seed}", seed, lr=3)
    asked = [runs / "full", tmp_path / "other", "--bootstrap", 20]
    refused(tmp_path, *asked, "--reference", runs / "full", says="no seed in common")
    done = table(*asked)
    assert done.code == 0 and "is not compared with" in done.err and "no seed in common" in done.err
    assert "paired" not in done.out


def test_the_store_keeps_the_newest_of_each_and_readme_shows_it(runs, tmp_path):
    store, page = tmp_path / "results.csv", tmp_path / "README.md"
    page.write_text("before\n<!-- results: begin -->\nold\n<!-- results: end -->\nafter\n")
    write_run(tmp_path / "demo" / "seed1", 1, demo=True)
    assert table(tmp_path / "demo", "--store", store, "--bootstrap", 0).code == 0
    first = read_csv(store.read_text())
    assert {row["data"] for row in first} == {"demo"}
    assert table("--store", store, "--readme", page).code == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "None of them was measured here" in " ".join(text.split()) and "not measured" in text

    for name in ("better", "full"):
        flags = ["--store", store, "--data", "full", "--readme", page, "--bootstrap", 0]
        assert table(runs / name, *flags).code == 0
    rows = read_csv(store.read_text())
    assert [row for row in rows if row["data"] == "demo"] == first
    (auc,) = (row for row in rows if (row["data"], row["metric"]) == ("full", "auc1"))
    mean = 100 * best(runs / "full", "auc1").mean()
    assert float(auc["mean"]) == pytest.approx(mean, abs=1e-4) and auc["n"] == "3"
    line = re.search(r"^\| vadclip +\| UCF-Crime +\| AUC .*$", page.read_text(), re.MULTILINE).group()
    assert f"{mean:.2f}" in line and "88.02" in line
    assert "None of them was measured here" not in " ".join(page.read_text().split())


def test_the_store_refuses_what_would_mislead(runs, tmp_path):
    write_run(tmp_path / "demo", 1, demo=True)
    store = tmp_path / "results.csv"
    flags = ["--store", store, "--bootstrap", 0]
    written = ["--output", tmp_path / "table.md"]
    refused(tmp_path, runs / "full", *flags, *written, says="say by --data what its videos are")
    refused(tmp_path, runs / "full", *flags, "--data", "demo", says="is not of the demo")
    refused(tmp_path, tmp_path / "demo", *flags, "--data", "full", says="cannot be stored as anything else")
    write_run(tmp_path / "smooth", 1, smooth=5.0)
    smooth = tmp_path / "smooth" / "metrics.json"
    smooth.write_text(
        json.dumps({name: found | {"smooth": 5.0} for name, found in json.loads(smooth.read_text()).items()})
    )
    refused(tmp_path, tmp_path / "smooth", *flags, "--data", "full", says="are smoothed over time")
    refused(tmp_path, runs, *flags, "--data", "full", says="are two settings of vadclip ucf full")
    store.write_text("a,b\n1,2\n")
    refused(tmp_path, tmp_path / "demo", *flags, says="has no column")
    page = tmp_path / "page.md"
    page.write_text("no marks")
    store.unlink()
    assert table(tmp_path / "demo", *flags).code == 0
    refused(tmp_path, "--store", store, "--readme", page, says="needs one line")
