"""Flags of the training and test scripts, and what goes under them.

Precedence: option file < the method's own defaults < configs/METHOD_DATASET.yaml < demo < checkpoint (test only)
< --config < command line. argparse owns names, types and choices; everything that a YAML file says is handed to it
as command-line tokens, so that both are checked alike.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

from clipfusionvad.data.features import FRAMES_PER_SNIPPET
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.loggers import TRACKERS
from clipfusionvad.io.argtypes import (
    fraction,
    layers,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    rate,
    size,
)
from clipfusionvad.io.errors import EXIT_BAD_INPUT, UserError, error_line, nearest
from clipfusionvad.io.files import read_yaml
from clipfusionvad.io.option import add_arguments
from clipfusionvad.models import Method, current_options, find_method, method_names, variants_of
from clipfusionvad.tools.demo import demo_defaults

# One file for each method and dataset that were published together, and more: within the package where it is installed,
# beside it in the repository.
_HERE = Path(__file__).resolve().parents[1]
CONFIGS = next(
    (folder for folder in (_HERE / "configs", _HERE.parent / "configs") if folder.is_dir()), _HERE / "configs"
)
# Value of --gt-path where nobody has annotated the test videos.
NO_TRUTH = "none"
# Options of many methods, shown with those of every model.
SHARED = ("embed_dim", "visual_length", "visual_width")
# Flags of one invocation, which a run's record must not carry on.
NOT_RECORDED = {"config", "use_checkpoint", "overwrite", "metrics_json"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and that takes no abbreviated flags."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.context = ""

    def error(self, message: str) -> NoReturn:
        print(error_line(f"{self.context}{message}"), file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)

    # argparse also takes a namespace to fill, which nobody here has.
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        args = sys.argv[1:] if args is None else list(args)
        for word in args:
            # Bytes that are no UTF-8 come as surrogates; they could not be printed or recorded again.
            if not word.isascii() and word != word.encode("utf-8", "replace").decode("utf-8") or "\0" in word:
                self.error(f"{word!r} is not text")
        return super().parse_known_args(args)

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unknown argument {unknown[0]!r}{nearest(unknown[0], flags)}")
        return parsed


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults that say something, once."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        untold = action.default is None or action.default == [] or isinstance(action, argparse._StoreTrueAction)
        return action.help if untold or "(default" in (action.help or "") else super()._get_help_string(action)


def parse_options(
    argv: Sequence[str] | None,
    dataset: Dataset,
    defaults: Mapping[str, Any],
    stored: Mapping[str, Any] | None = None,
) -> argparse.Namespace:
    """Parse a script's command line over its option file.

    ``defaults`` are the lines of the option file, ``stored`` the options that a checkpoint was trained with.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    early = Parser(add_help=False)
    early.add_argument("--config")
    early.add_argument("--method")
    early.add_argument("--variant")
    early.add_argument("--demo", action="store_true")
    known, _ = early.parse_known_args(argv)
    config = read_config(known.config) if known.config else {}
    name = str(known.method or config.get("method") or defaults["method"])
    variant = known.variant or config.get("variant")
    if variant is not None:
        name = current_options({"method": name, "variant": variant})["method"]
    method = find_method(name)

    parser = build_parser(dataset, method)
    own = {action.dest for action in parser._actions}
    _set_defaults(parser, method.option_defaults())
    for key in defaults:
        if key not in own and not _methods_with(key):
            raise UserError(f"option file of {dataset.name}: unknown option {key!r}{nearest(key, own)}")
    _set_defaults(parser, defaults)
    _set_defaults(parser, method.defaults)
    _set_defaults(parser, published_options(parser, name, dataset))
    if known.demo or config.get("demo"):
        _set_defaults(parser, demo_defaults(dataset, name))
        _set_defaults(parser, method.demo)
    if stored:
        said = {key: value for key, value in stored.items() if value is not None}
        parsed = parser.parse_args(config_tokens(parser, said, "what the model file says"))
        _set_defaults(parser, {key: getattr(parsed, key) for key in said})
    parser.set_defaults(method=name, select=_known_metric(parser.get_default("select"), method))
    tokens = config_tokens(parser, config, f"config {known.config}") if config else []
    args = parser.parse_args(tokens + argv)
    # An older --variant may have been given beside --method.
    args.method = name
    vars(args).pop("variant", None)
    _cross_check(args, dataset)
    return args


def _set_defaults(parser: Parser, layer: Mapping[str, Any]) -> None:
    """Put a layer over those before it; lines for other methods are left out."""
    own = {action.dest for action in parser._actions}
    parser.set_defaults(**{key: value for key, value in layer.items() if key in own})


def _metrics(method: type[Method]) -> list[str]:
    return [f"{metric}{branch}" for branch in range(1, method.branches + 1) for metric in ("auc", "ap")]


def _known_metric(select: str, method: type[Method]) -> str:
    """A dataset selects by the branch that its first method is best with; others may have no such branch."""
    first = select[:-1] + "1"
    return first if select not in _metrics(method) and first in _metrics(method) else select


def published_options(parser: Parser, method: str, dataset: Dataset) -> dict[str, Any]:
    """What the published pair of a method and a dataset sets: ``configs/METHOD_DATASET.yaml``, if there is one."""
    path = CONFIGS / f"{method}_{dataset.name}.yaml"
    if not path.is_file():
        return {}
    content = read_config(str(path))
    parsed = parser.parse_args(config_tokens(parser, content, f"config {path}"))
    return {key: getattr(parsed, key) for key in content}


def read_config(path: str) -> dict[str, Any]:
    """A YAML file of flat ``option: value`` lines; dashes and underscores in names are the same.

    ``configs/NAME`` that is not there is the one that comes with the package.
    """
    content = read_yaml(_packaged(path) or path, "config")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config {path} must hold lines of the form 'option: value'")
    return current_options({str(key).replace("-", "_"): value for key, value in content.items()})


def _packaged(path: str) -> str | None:
    """The file of ours that ``configs/NAME`` means in a folder without such a file."""
    top, *inner = Path(path).parts or [""]
    own = CONFIGS.joinpath(*inner)
    return str(own) if top == "configs" and not Path(path).exists() and own.is_file() else None


def config_tokens(parser: Parser, config: Mapping[str, Any], where: str) -> list[str]:
    """The command-line tokens that say what a config says, checked by the parser itself."""
    named = [action for action in parser._actions if action.option_strings and action.dest != "help"]
    # By all their names: an option may have an older one.
    actions = {flag.removeprefix("--").replace("-", "_"): action for action in named for flag in action.option_strings}
    actions = {key: action for key, action in actions.items() if not key.startswith("no_") or action.dest == key}
    tokens: list[str] = []
    for key, value in config.items():
        if key not in actions or key == "config":
            others = _methods_with(key)
            hint = f" (an option of {', '.join(others)})" if others else nearest(key, actions.keys() - {"config"})
            raise UserError(f"{where}: unknown key {key!r}{hint}")
        tokens += _tokens(actions[key], value, f"{where}: {key}")
    parser.context = f"{where}: "
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
    if isinstance(value, list | tuple) and action.nargs in (None, "?"):
        raise UserError(f"{where} takes one value, not a list")
    items = value if isinstance(value, list | tuple) else [value]
    for item in items:
        if isinstance(item, bool) or item is None:
            raise UserError(f"{where} cannot be {item!r}")
        if not isinstance(item, str | int | float | date):
            raise UserError(f"{where} cannot be a {type(item).__name__}")
    if action.nargs not in (None, "?"):
        return [flag, *map(str, items)]
    return [f"{flag}={value}"]


def _methods_with(option: str) -> list[str]:
    return [name for name in method_names() if option in find_method(name).option_names()]


def record(args: argparse.Namespace) -> dict[str, Any]:
    """The resolved options as a run keeps them: plain values that are a valid --config again."""
    return {key: value for key, value in sorted(vars(args).items()) if key not in NOT_RECORDED and value is not None}


def build_parser(dataset: Dataset, method: type[Method]) -> Parser:
    """All flags for one dataset and one method, without the option file's defaults."""
    script = Path(sys.argv[0]).suffix == ".py" and Path(sys.argv[0]).stem != "__main__"
    parser = Parser(
        usage="%(prog)s [options]" if script else f"clipfusionvad COMMAND --dataset {dataset.name} [options]",
        description=f"{method.name} on {dataset.title}; --method NAME --help shows the options of another method.",
        formatter_class=_Help,
    )
    _add_model(parser.add_argument_group("model"), method)
    own = [option for name, option in method.declared_options().items() if name not in SHARED]
    add_arguments(parser.add_argument_group(f"method: {method.name}"), own)
    _add_data(parser.add_argument_group("data"), dataset, method)
    _add_training(parser.add_argument_group("training"), method)
    _add_learning_rate(parser.add_argument_group("learning rate"))
    _add_run(parser.add_argument_group("run"))
    return parser


def _add_model(group: argparse._ArgumentGroup, method: type[Method]) -> None:
    group.add_argument("--method", choices=method_names(), default=method.name, help="which detector")
    unread = "" if method.needs_clip else " (this method reads none)"
    group.add_argument("--clip", default="ViT-B/16", help=f"CLIP model name, local file, or 'toy'{unread}")
    group.add_argument("--classes-num", type=size, help="number of classes, the normal one included")
    group.add_argument("--embed-dim", type=size, help=f"width of CLIP's text tower{unread}")
    if "visual_length" in method.option_names():
        group.add_argument("--visual-length", type=size, help="snippets in a model input")
    group.add_argument("--visual-width", type=size, help="width of the visual features")
    if variants := variants_of(method.name):
        names = ", ".join(f"--variant {variant} for --method {name}" for variant, name in variants.items())
        group.add_argument("--variant", choices=list(variants), help=f"older names of methods: {names}")


def _add_data(group: argparse._ArgumentGroup, dataset: Dataset, method: type[Method]) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--dataset", choices=[dataset.name], default=dataset.name, help=argparse.SUPPRESS)
    group.add_argument("--train-list", help="CSV (path,label) of training features")
    group.add_argument("--test-list", help="CSV (path,label) of test features")
    group.add_argument(
        "--gt-path",
        help="frame-level truth (.npy), or one keyed annotation file (.csv, .json), or 'none': whole videos are judged",
    )
    group.add_argument("--gt-segment-path", help="segments of each test video (.npy)")
    group.add_argument("--gt-label-path", help="labels of those segments (.npy)")
    group.add_argument("--feature-root", help="where to look for listed features that are not where the list says")
    if len(method.streams) > 1:
        group.add_argument(
            "--stream-folders",
            nargs="+",
            default=list(method.streams),
            help=f"word in a folder's name for each of {', '.join(method.streams)}; lists name files of the first",
        )
    group.add_argument(
        "--frames-per-snippet",
        type=size,
        default=FRAMES_PER_SNIPPET,
        help="frames that one feature row stands for",
    )
    group.add_argument("--check", action=switch, default=True, help="read and check every feature before the start")
    group.add_argument("--packed", action=switch, default=True, help="read what 'pack' has packed, where it has")
    group.add_argument("--packed-dir", help="where pack's --output has put it (default: beside the lists)")
    group.add_argument(
        "--workers",
        type=layers,
        help="processes that load training features that are not packed (default: none on a CPU, up to 8 for a GPU)",
    )


def _add_training(group: argparse._ArgumentGroup, method: type[Method]) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--seed", type=non_negative_int, help="seed of weights and batch order")
    group.add_argument(
        "--seeds",
        type=non_negative_int,
        nargs="+",
        help="in place of --seed: train with each of these side by side, and report mean and deviation",
    )
    group.add_argument("--max-epoch", type=positive_int, help="epochs")
    group.add_argument("--batch-size", type=positive_int, help="videos in a batch; with --balanced, of each kind")
    group.add_argument("--balanced", action=switch, help="as many normal as anomalous videos in a batch")
    group.add_argument(
        "--cycle",
        action=switch,
        default=False,
        help="with --balanced, use the scarcer kind again until the other one is used up",
    )
    group.add_argument("--optimizer", choices=["adamw", "adam"], default="adamw", help="which optimizer")
    group.add_argument("--betas", type=rate, nargs=2, default=[0.9, 0.999], help="its two decay rates")
    group.add_argument("--weight-decay", type=non_negative_float, default=0.01, help="its weight decay")
    group.add_argument(
        "--eval-every",
        type=non_negative_int,
        help="samples between evaluations, counted anew each epoch; 0: after each epoch",
    )
    group.add_argument(
        "--select",
        choices=[*_metrics(method), "last"],
        help="metric that picks the best checkpoint; last: none does, the last weights are taken",
    )
    group.add_argument(
        "--protocol",
        choices=["paper", "clean"],
        default="paper",
        help="paper: select on the test set, as released; clean: on a held-out part of the training list",
    )
    group.add_argument("--holdout", type=fraction, default=0.1, help="held-out share of training videos (clean)")


def _add_learning_rate(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--lr", type=positive_float, help="learning rate")
    group.add_argument(
        "--lr-schedule", choices=["milestones", "cosine"], default="milestones", help="how it changes by epoch"
    )
    group.add_argument("--scheduler-rate", type=positive_float, help="milestones: factor at each of them")
    group.add_argument(
        "--scheduler-milestones", type=positive_int, nargs="*", help="milestones: epochs that end in a drop"
    )
    group.add_argument("--warmup-epochs", type=non_negative_int, default=0, help="cosine: epochs that rise to --lr")


def _add_run(group: argparse._ArgumentGroup) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--config", help="YAML file of options")
    group.add_argument("--demo", action="store_true", help="small made-up data and a toy CLIP, on a CPU in minutes")
    group.add_argument("--output-dir", help="folder of the run (default: a new one under runs/)")
    group.add_argument("--model-path", help="final model: written by training, read by testing")
    group.add_argument("--checkpoint-path", help="resumable state, beside the run folder's last.pt")
    group.add_argument(
        "--normal-centroid",
        "--calibration",
        help="calibration.pt of a run, for a released model file that lacks it; --calibration is its older name",
    )
    group.add_argument("--use-checkpoint", action=switch, default=False, help="resume an interrupted training")
    group.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    group.add_argument("--metrics-json", help="write the metrics to this file")
    group.add_argument(
        "--track", nargs="+", choices=list(TRACKERS), help="send the curves there too, besides TensorBoard"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    group.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast")
    group.add_argument(
        "--deterministic",
        action=switch,
        default=False,
        help="same bits from the same seed on a GPU too, somewhat slower (a CPU gives them anyway)",
    )
    group.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=["default", "reduce-overhead", "max-autotune"],
        help="torch.compile the model, in one of its modes; reduce-overhead uses CUDA graphs",
    )


def _cross_check(args: argparse.Namespace, dataset: Dataset) -> None:
    if args.classes_num != len(dataset.classes):
        raise UserError(f"--classes-num {args.classes_num}, but {dataset.title} has {len(dataset.classes)} classes")
    if args.deterministic and args.compile == "max-autotune":
        raise UserError("--deterministic and --compile max-autotune: kernels picked by their speed differ by run")
    twice = [seed for seed in args.seeds or () if args.seeds.count(seed) > 1]
    if twice:
        raise UserError(f"--seeds names {twice[0]} more than once")
