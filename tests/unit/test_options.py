"""Flags, option files and configs: names and defaults of the original scripts, and their precedence."""

import importlib
import re
import runpy
from pathlib import Path

import pytest

from clipfusionvad import create_model
from clipfusionvad.cli.options import option_file_of
from clipfusionvad.datasets import find_dataset
from clipfusionvad.engine.config import recorded
from clipfusionvad.io.errors import UserError

# Names and defaults of the released option files of ClipFusionVAD.
SHARED = {"seed": 234, "embed_dim": 512, "visual_length": 256, "visual_width": 512, "visual_head": 1}
SHARED |= {"prompt_prefix": 10, "prompt_postfix": 10, "max_epoch": 10, "use_checkpoint": False, "scheduler_rate": 0.1}
SHARED |= {"checkpoint_path": "model/checkpoint.pth"}
UCF = {"visual_layers": 2, "attn_window": 8, "classes_num": 14, "batch_size": 64, "lr": 2e-5}
UCF |= {"scheduler_milestones": [4, 8], "model_path": "model/model_ucf.pth"}
UCF |= {"train_list": "list/ucf_CLIP_rgb.csv", "test_list": "list/ucf_CLIP_rgbtest.csv", "gt_path": "list/gt_ucf.npy"}
UCF |= {"gt_segment_path": "list/gt_segment_ucf.npy", "gt_label_path": "list/gt_label_ucf.npy"}
XD = {"visual_layers": 3, "attn_window": 64, "classes_num": 7, "batch_size": 96, "lr": 1e-5}
XD |= {"scheduler_milestones": [3, 6, 10], "model_path": "model/model_xd.pth"}
XD |= {"train_list": "list/xd_CLIP_rgb.csv", "test_list": "list/xd_CLIP_rgbtest.csv", "gt_path": "list/gt.npy"}
XD |= {"gt_segment_path": "list/gt_segment.npy", "gt_label_path": "list/gt_label.npy"}
RELEASED = {"ucf": SHARED | UCF, "xd": SHARED | XD}
DOCS = Path(__file__).resolve().parents[2] / "docs"
DATASETS = pytest.mark.parametrize("dataset", sorted(RELEASED))


def parse(dataset, *argv, **kwargs):
    return importlib.import_module(f"{dataset}_option").parse_args(list(argv), **kwargs)


def fails(capsys, dataset, *argv):
    """The single line that parsing ends with."""
    with pytest.raises(SystemExit) as stop:
        parse(dataset, *argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.fixture
def config(tmp_path):
    def write(text):
        (tmp_path / "config.yaml").write_text(text)
        return str(tmp_path / "config.yaml")

    return write


@DATASETS
def test_names_and_defaults_of_the_released_option_files(dataset):
    args = vars(parse(dataset))
    assert {name: args[name] for name in RELEASED[dataset]} == RELEASED[dataset]


def test_another_method_brings_its_own_defaults():
    assert parse("xd", "--method", "vadclip").visual_layers == 1
    assert parse("xd", "--method", "vadclip", "--visual-layers", "2").visual_layers == 2
    assert parse("ucf", "--method", "vadclip").visual_layers == 2


def test_default_below_config_below_flag(config):
    path = config("lr: 1e-3\nvisual-layers: 1\nscheduler_milestones: [2, 5]\ngraph: false\nmethod: vadclip\n")
    args = parse("ucf", "--config", path, "--lr", "5e-4")
    assert (args.lr, args.visual_layers, args.scheduler_milestones) == (5e-4, 1, [2, 5])
    assert (args.graph, args.method, args.batch_size) == (False, "vadclip", 64)
    assert parse("ucf", "--config", path, "--graph").graph is True
    assert parse("ucf", "--config", path, "--method", "clipfusionvad").method == "clipfusionvad"


def test_stored_options_lie_below_config_and_flags(config):
    stored = {"visual_layers": 4, "gam": False, "clip": "toy"}
    args = parse("ucf", "--config", config("visual-layers: 3\n"), "--gam", stored=stored)
    assert (args.visual_layers, args.gam, args.clip) == (3, True, "toy")


def test_config_values_are_checked_by_the_parser(config, capsys):
    for text in ("lr: fast", "max-epoch: 1.5", "select: auc3", "gam: true\nmethod: clipfusionvad\nprompts: none"):
        assert "config.yaml: argument --" in fails(capsys, "ucf", "--config", config(text))


def test_an_option_of_another_method_names_the_methods_that_have_it(config, capsys):
    for key in ("gam", "no-gam"):
        name = key.replace("-", "_")
        with pytest.raises(UserError, match=f"config.yaml: {name} is an option of clipfusionvad, not of vadclip"):
            parse("ucf", "--config", config(f"method: vadclip\n{key}: false"))
    for flag in ("--no-gam", "--gam"):
        error = fails(capsys, "ucf", "--method", "vadclip", flag)
        assert error == f"error: {flag} is an option of clipfusionvad, not of vadclip\n"
    # Not declared by a method, but for methods of several streams only.
    error = fails(capsys, "ucf", "--stream-folders", "rgb", "event")
    assert error == "error: --stream-folders is an option of iefvad, not of clipfusionvad\n"
    with pytest.raises(UserError, match="unknown key 'no_gam' .did you mean 'gam'"):
        parse("ucf", "--config", config("no-gam: true"))
    with pytest.raises(UserError, match="vadclip has no option 'gam', which is one of clipfusionvad; it has"):
        create_model("vadclip", ["normal", "fire"], clip="toy", embed_dim=64, gam=False)


def test_a_missing_config_names_a_near_one(config):
    path = config("lr: 1")
    for given, says in [
        ("configs/vadclip_ufc.yaml", "(did you mean configs/vadclip_ucf.yaml?)"),
        ("vadclip_ucf", "(did you mean configs/vadclip_ucf.yaml?)"),
        ("no_gamm.yaml", "(did you mean configs/ablations/no_gam.yaml?)"),
        (path.replace(".yaml", ".yml"), f"(did you mean {path}?)"),
        ("zzz.yaml", "(published pairs have configs/METHOD_DATASET.yaml)"),
    ]:
        with pytest.raises(UserError, match=re.escape(f"config not found: {given} {says}")):
            parse("ucf", "--config", given)


def test_an_unknown_label_names_the_dataset_it_belongs_to():
    for dataset, label, says in [
        ("shanghaitech", "Abuse", "unknown label 'Abuse' (a label of UCF-Crime: --dataset ucf); known: normal"),
        ("ucf", "B1-0-0", "unknown label 'B1-0-0' (a label of XD-Violence: --dataset xd); known"),
        ("xd", "Water_incident", "(a label of MSAD: --dataset msad)"),
        ("msad", "Testing_Normal_Videos_Anomaly", "(a label of UCF-Crime: --dataset ucf)"),
        ("ucf", "fighting", "(did you mean 'Fighting'?)"),
        ("xd", "vandalism", "(a label of UCF-Crime: --dataset ucf, or of MSAD: --dataset msad)"),
    ]:
        with pytest.raises(UserError, match=re.escape(says)):
            find_dataset(dataset).encode(label)


def shown(capsys, *argv, **kwargs):
    """What --show-options prints: the value and the layer of each option."""
    with pytest.raises(SystemExit) as stop:
        parse("ucf", *argv, "--show-options", **kwargs)
    assert stop.value.code == 0
    rows = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()[1:]]
    return {row[0]: row[1:] for row in rows}


def test_show_options_names_the_layer_that_set_each_value(config, capsys):
    path = config("max-epoch: 3\nbatch_size: 7\n")
    argv = ["--method", "anomalyclip", "--config", path, "--batch-size", "9"]
    options = shown(capsys, *argv, stored={"clip": "toy", "max_epoch": 2})
    assert options["--optimizer"] == ["adamw", "declaration"]
    assert options["--balanced"] == ["True", "option file"]
    assert options["--scheduler-milestones"] == ["4 8", "option file"]
    assert options["--weight-decay"] == ["0.2", "configs/anomalyclip_ucf.yaml"]
    assert options["--clip"] == ["toy", "checkpoint"]
    assert options["--max-epoch"] == ["3", f"--config {path}"]
    assert options["--batch-size"] == ["9", "command line"]
    assert shown(capsys, "--method", "anomalyclip", "--demo")["--emb-size"] == ["32", "demo"]


def test_settings_of_a_method_apply_where_its_pair_was_not_published():
    args = option_file_of(find_dataset("msad")).parse_args(["--method", "anomalyclip"])
    assert (args.seed, args.select, args.frames_per_snippet) == (1024, "last", 1)


def test_the_old_name_of_a_renamed_flag_is_accepted(config, capsys):
    assert parse("ucf", "--calibration", "a.pt").normal_centroid == "a.pt"
    assert "--calibration is now called --normal-centroid" in capsys.readouterr().err
    assert parse("ucf", "--config", config("calibration: b.pt")).normal_centroid == "b.pt"


@DATASETS
def test_a_run_record_is_a_config_that_says_the_same(dataset, config):
    import yaml

    first = parse(dataset, "--no-gam", "--lr", "3e-4", "--scheduler-milestones", "1", "2", "--output-dir", "x")
    again = parse(dataset, "--config", config(yaml.safe_dump(recorded(vars(first)))))
    assert recorded(vars(again)) == recorded(vars(first))


def test_the_tables_of_options_in_the_docs_are_those_of_the_declarations():
    """If this fails: python docs/options.py"""
    script = runpy.run_path(str(DOCS / "options.py"))
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert page.count("<!-- options of") == 13 and script["render"](page) == page
