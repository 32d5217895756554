"""Flags of the training and test scripts, and the YAML files that go under them.

Precedence: option file < demo < checkpoint (test only) < --config < command line. argparse owns names, types
and choices; everything that a YAML file says is handed to it as command-line tokens, so that both are checked alike.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from clipfusionvad.argtypes import fraction, non_negative_int, positive_float, positive_int
from clipfusionvad.datasets import Dataset
from clipfusionvad.demo import demo_defaults
from clipfusionvad.errors import EXIT_BAD_INPUT, UserError, nearest
from clipfusionvad.models import find_method, method_names

SELECTION_METRICS = ("auc1", "ap1", "auc2", "ap2")
# Flags of one invocation, which a run's record must not carry on.
NOT_RECORDED = {"config", "use_checkpoint", "overwrite", "metrics_json"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and that takes no abbreviated flags."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.context = ""

    def error(self, message: str) -> NoReturn:
        print(f"error: {self.context}{message}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unknown argument {unknown[0]!r}{nearest(unknown[0], flags)}")
        return parsed


def parse_options(
    argv: Sequence[str] | None,
    dataset: Dataset,
    defaults: Mapping[str, Any],
    method_defaults: Mapping[str, Mapping[str, Any]] | None = None,
    stored: Mapping[str, Any] | None = None,
) -> argparse.Namespace:
    """Parse a script's command line over its option file.

    ``defaults`` are the lines of the option file, ``method_defaults`` what another method has instead,
    ``stored`` the options that a checkpoint was trained with.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    early = Parser(add_help=False)
    early.add_argument("--config")
    early.add_argument("--method")
    early.add_argument("--demo", action="store_true")
    known, _ = early.parse_known_args(argv)
    config = read_config(known.config) if known.config else {}
    method = known.method or config.get("method") or defaults["method"]

    parser = build_parser(dataset, str(method))
    layers = [defaults, (method_defaults or {}).get(method, {})]
    if known.demo or config.get("demo"):
        layers.append(demo_defaults(dataset, str(method)))
    layers.append(stored or {})
    own = {action.dest for action in parser._actions}
    for layer in layers:
        for key in layer:
            if key not in own and not _methods_with(key):
                raise UserError(f"option file of {dataset.name}: unknown option {key!r}{nearest(key, own)}")
        parser.set_defaults(**{key: value for key, value in layer.items() if key in own})
    tokens = config_tokens(parser, config, known.config) if config else []
    args = parser.parse_args(tokens + argv)
    _cross_check(args, dataset)
    return args


def read_config(path: str) -> dict[str, Any]:
    """A YAML file of flat ``option: value`` lines; dashes and underscores in names are the same."""
    if not Path(path).is_file():
        raise UserError(f"config not found: {path}")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    # ValueError: bytes that are no text, dates that are none.
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"config {path} is not readable YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config {path} must hold lines of the form 'option: value'")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def config_tokens(parser: Parser, config: Mapping[str, Any], path: str) -> list[str]:
    """The command-line tokens that say what a config says, checked by the parser itself."""
    actions = {action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"}
    tokens: list[str] = []
    for key, value in config.items():
        if key not in actions or key == "config":
            others = _methods_with(key)
            hint = f" (an option of {', '.join(others)})" if others else nearest(key, actions.keys() - {"config"})
            raise UserError(f"config {path}: unknown key {key!r}{hint}")
        tokens += _tokens(actions[key], value, f"config {path}: {key}")
    parser.context = f"config {path}: "
    parser.parse_args(tokens)
    parser.context = ""
    return tokens


def _tokens(action: argparse.Action, value: Any, where: str) -> list[str]:
    flag = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{where} must be true or false, not {value!r}")
        if value:
            return [flag]
        negative = [name for name in action.option_strings if name.startswith("--no-")]
        return negative[:1]
    if isinstance(value, bool) or isinstance(value, dict) or value is None:
        raise UserError(f"{where} cannot be {value!r}")
    if action.nargs in ("*", "+"):
        items = value if isinstance(value, list) else [value]
        return [flag, *map(str, items)]
    if isinstance(value, list):
        raise UserError(f"{where} takes one value, not a list")
    return [f"{flag}={value}"]


def _methods_with(option: str) -> list[str]:
    return [name for name in method_names() if option in find_method(name).option_names()]


def record(args: argparse.Namespace) -> dict[str, Any]:
    """The resolved options as a run keeps them: plain values that are a valid --config again."""
    return {key: value for key, value in sorted(vars(args).items()) if key not in NOT_RECORDED and value is not None}


def build_parser(dataset: Dataset, method: str) -> Parser:
    """All flags for one dataset and one method, without the option file's defaults."""
    parser = Parser(
        usage="%(prog)s [options]",
        description=f"{method} on {dataset.title}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model(parser.add_argument_group("model"), method)
    find_method(method).add_options(parser.add_argument_group(f"method: {method}"))
    _add_data(parser.add_argument_group("data"), dataset)
    _add_training(parser.add_argument_group("training"))
    _add_run(parser.add_argument_group("run"))
    return parser


def _add_model(group: argparse._ArgumentGroup, method: str) -> None:
    group.add_argument("--method", choices=method_names(), default=method, help="which detector")
    group.add_argument("--clip", default="ViT-B/16", help="CLIP model name, local file, or 'toy'")
    group.add_argument("--classes-num", type=positive_int, help="number of classes, the normal one included")
    group.add_argument("--embed-dim", type=positive_int, help="width of CLIP's text tower")
    group.add_argument("--visual-length", type=positive_int, help="snippets in a model input")
    group.add_argument("--visual-width", type=positive_int, help="width of the visual features")


def _add_data(group: argparse._ArgumentGroup, dataset: Dataset) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--dataset", choices=[dataset.name], default=dataset.name, help=argparse.SUPPRESS)
    group.add_argument("--train-list", help="CSV (path,label) of training features")
    group.add_argument("--test-list", help="CSV (path,label) of test features")
    group.add_argument("--gt-path", help="frame-level truth (.npy), or one keyed annotation file (.csv, .json)")
    group.add_argument("--gt-segment-path", help="segments of each test video (.npy)")
    group.add_argument("--gt-label-path", help="labels of those segments (.npy)")
    group.add_argument("--feature-root", help="where to look for listed features that are not where the list says")
    group.add_argument("--check", action=switch, default=True, help="read and check every feature before the start")
    group.add_argument("--workers", type=non_negative_int, default=0, help="processes that load training features")


def _add_training(group: argparse._ArgumentGroup) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--seed", type=non_negative_int, help="seed of weights and batch order")
    group.add_argument("--max-epoch", type=positive_int, help="epochs")
    group.add_argument("--batch-size", type=positive_int, help="videos in a batch; with --balanced, of each kind")
    group.add_argument("--balanced", action=switch, help="as many normal as anomalous videos in a batch")
    group.add_argument("--lr", type=positive_float, help="learning rate of AdamW")
    group.add_argument("--scheduler-rate", type=positive_float, help="factor of the learning rate at a milestone")
    group.add_argument("--scheduler-milestones", type=positive_int, nargs="*", help="epochs that end in a drop")
    group.add_argument(
        "--eval-every",
        type=non_negative_int,
        help="samples between evaluations, counted anew each epoch; 0: after each epoch",
    )
    group.add_argument("--select", choices=SELECTION_METRICS, help="metric that picks the best checkpoint")
    group.add_argument(
        "--protocol",
        choices=["paper", "clean"],
        default="paper",
        help="paper: select on the test set, as released; clean: on a held-out part of the training list",
    )
    group.add_argument("--holdout", type=fraction, default=0.1, help="held-out share of training videos (clean)")


def _add_run(group: argparse._ArgumentGroup) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--config", help="YAML file of options")
    group.add_argument("--demo", action="store_true", help="small made-up data and a toy CLIP, on a CPU in minutes")
    group.add_argument("--output-dir", help="folder of the run (default: a new one under runs/)")
    group.add_argument("--model-path", help="final model: written by training, read by testing")
    group.add_argument("--checkpoint-path", help="resumable state, beside the run folder's last.pt")
    group.add_argument("--use-checkpoint", action=switch, default=False, help="resume an interrupted training")
    group.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    group.add_argument("--metrics-json", help="write the metrics to this file")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    group.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast")


def _cross_check(args: argparse.Namespace, dataset: Dataset) -> None:
    if args.classes_num != len(dataset.classes):
        raise UserError(f"--classes-num {args.classes_num}, but {dataset.title} has {len(dataset.classes)} classes")
