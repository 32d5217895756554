"""The LaTeX table of a paper: what is in its cells, what its caption says, and that it compiles."""

import re
import shutil
import subprocess

import pytest
from scipy import stats
from small_runs import best, table, two_settings, write_run

from clipfusionvad.report.formatting import Table, escape_latex, to_latex, to_markdown


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return two_settings(tmp_path_factory.mktemp("runs"))


def check_latex(text):
    depth = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        depth.append(name) if kind == "begin" else depth.remove(name)
    assert not depth and text.count(r"\toprule") == text.count(r"\bottomrule") > 0
    bare = re.sub(r"\\.", "", text)
    assert bare.count("{") == bare.count("}")
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        lines = [line for line in body.splitlines() if line.endswith((r"\\", r"\\[2pt]")) and "multicolumn" not in line]
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(columns) - 1}


def latex_lines(text):
    """The cells of a LaTeX table by line, marks of size and its rules aside."""
    plain = re.sub(r"\{\\scriptsize (.*?)\}", r"\1", text).replace(r" $\pm$ ", " ± ")
    return [re.split(r" *& *", line.partition(r" \\")[0]) for line in plain.splitlines() if r" \\" in line]


def test_the_table_of_a_paper_has_intervals_stars_and_a_caption_that_explains_them(runs, tmp_path):
    flags = ["--format", "latex", "--output", tmp_path / "my_ablation.tex", "--bootstrap", 200]
    assert table(runs, *flags, "--metrics", "auc1", "map_average").code == 0
    text = (tmp_path / "my_ablation.tex").read_text()
    check_latex(text)
    header, *lines = latex_lines(text)
    assert header == ["setting", "AUC", "mAP"] and [line[0] for line in lines] == ["full", "", "better", ""]
    for (name, value, _), (_, bounds, _), star in zip(lines[::2], lines[1::2], ("", "*"), strict=True):
        values = 100 * best(runs / name, "auc1")
        low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
        assert value == f"{values.mean():.2f} ± {values.std(ddof=1):.2f}{star}"
        assert bounds == f"[{low:.2f}, {high:.2f}]"
    assert r"\label{tab:my-ablation}" in text and r"\resizebox" in text and text.count(r"\begin{table}") == 1
    caption = re.search(r"\\caption\{(.*)\}$", text, re.MULTILINE).group(1)
    for said in ("UCF-Crime", "over 3 seeds", "protocol paper", "Compared with full: * p", "and for the seeds", "IoU"):
        assert said in caption
    assert "average precision" not in caption
    single = table(runs / "full" / "seed1", runs / "better" / "seed1", *flags, "--metrics", "ap1").out
    assert "One seed; best weights" in single and "step-wise average precision" in single
    assert "with one seed, differences between seeds are not tested" in single


def test_methods_over_datasets_are_grouped_and_seeds_counted_where_they_differ(tmp_path):
    metrics = write_run(tmp_path / "one", 1)
    write_run(tmp_path / "[two]" / "seed1", 1, dataset="xd")
    write_run(tmp_path / "[two]" / "seed2", 2, noise=0.1, dataset="xd")
    text = table(tmp_path, "--format", "latex", "--rows", "method", "--metrics", "auc1", "ap1", "--bootstrap", 20).out
    groups, header, line, _ = latex_lines(text)
    assert groups[1:] == [r"\multicolumn{2}{c}{XD-Violence}", r"\multicolumn{2}{c}{UCF-Crime}"]
    assert r"\cmidrule(lr){2-3}\cmidrule(lr){4-5}" in text and header == ["method", "AUC", "AP", "AUC", "AP"]
    assert line[3] == f"{100 * metrics['auc1']:.2f} (1)" and line[1].endswith(" (2)")
    cells = table(tmp_path, "--format", "latex", "--rows", "cell", "--bootstrap", 20).out
    # A bracket at the start of a line would be read as an option of the line before.
    assert "\n{}[two] (XD-Violence) & " in cells


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex compiles the table: install texlive")
def test_the_table_of_a_paper_compiles_and_fits_the_width_of_the_text(tmp_path):
    cells = ["99.99 ± 9.99*\n[99.99, 99.99]"] * 9
    hostile = [r"{\input} $#&%_^~<>", "* [star]", "[x] ± → − – …"]
    header, lines = ["x", *(f"a_{i % 2}\nb" for i in range(9))], [[name, *cells] for name in hostile]
    made = Table(header, lines, "a_b", note="5 % & $")
    (tmp_path / "table.tex").write_text(to_latex(made, "a b_#%\\"))
    head = r"\documentclass[twocolumn]{article}\usepackage{booktabs, graphicx}"
    (tmp_path / "page.tex").write_text(head + r"\begin{document}\input{table}\end{document}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Overfull" not in done.stdout, done.stdout[-2000:]


def test_names_are_escaped():
    hostile = Table(("x", "y"), ((r"{\input} $#", "1 ± 2 ~^"), ("a|b\n\x1b[31m", "")), "a_b & 50 %")
    check_latex(to_latex(hostile))
    assert escape_latex("a_b & 50 % ± {}") == r"a\_b \& 50 \% $\pm$ \{\}"
    assert r"\input" not in to_latex(hostile)
    assert r"a\|b ?[31m" in to_markdown(hostile, 80)
