"""Options of the commands that train or score: their flags, and the layers that decide their values.

Layers, later ones override: the declaration < option file < configs/METHOD_DATASET.yaml, or configs/METHOD.yaml for a
pair that was not published, and the settings of --demo < the checkpoint under test < --config FILE < command line.
"""

import argparse
import importlib.util
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Protocol

from clipfusionvad.cli.parser import HelpFormatter, Parser, old_names
from clipfusionvad.datasets import DATASETS, Dataset, find_dataset
from clipfusionvad.engine.config import AUTO, CONFIGS, RunConfig, Settings
from clipfusionvad.engine.loggers import TRACKERS
from clipfusionvad.io import option as option_io
from clipfusionvad.io.errors import UserError, nearest, warn
from clipfusionvad.io.hub import pinned
from clipfusionvad.io.option import Declared, add_arguments, declared_options, find_config
from clipfusionvad.models import (
    Method,
    ModelConfig,
    current_options,
    find_method,
    method_names,
    read_options,
    variants_of,
)

_UNSET = object()


class OptionParser(Parser):
    """The flags of one dataset and one method. An unknown flag names the methods that have it."""

    dataset: Dataset
    method: type[Method]

    def unknown(self, flag: str) -> str:
        word = flag.partition("=")[0]
        return self.of_others(word, word.removeprefix("--")) or super().unknown(flag)

    def of_others(self, word: str, option: str) -> str:
        """Return the error for an option, typed as ``word``, that only other methods have; empty for any other one."""
        names = {option.replace("-", "_"), option.replace("-", "_").removeprefix("no_")}
        others = _methods_with(names, self.dataset)
        foreign = others and self.method.name not in others
        return f"{word} is an option of {', '.join(others)}, not of {self.method.name}" if foreign else ""

    @property
    def options(self) -> dict[str, argparse.Action]:
        """The actions of all options by name, also by the old name of a renamed one."""
        own = [action for action in self._actions if action.option_strings and action.default is not argparse.SUPPRESS]
        named = {flag[2:].replace("-", "_"): action for action in own for flag in old_names(action)}
        return named | {action.dest: action for action in own}

    def read(self, tokens: Sequence[str]) -> dict[str, Any]:
        """Return the options that are given in ``tokens``, without defaults."""
        empty = Namespace(**{action.dest: _UNSET for action in self._actions})
        return {key: value for key, value in vars(self.parse_args(tokens, empty)).items() if value is not _UNSET}

    def read_settings(self, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the values of a mapping, such as a YAML file, checked like flags; ``where`` begins every error."""
        tokens, self.context = config_tokens(self, settings, where), f"{where}: "
        values = self.read(tokens)
        self.context = ""
        return values


def parse_options(
    argv: Sequence[str] | None, dataset: Dataset, defaults: Mapping[str, Any], stored: Mapping[str, Any] | None = None
) -> Namespace:
    """Parse a command line over an option file (``defaults``) and the options of a checkpoint (``stored``)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    early = Parser(add_help=False)
    for flag in ("--config", "--method", "--variant"):
        early.add_argument(flag)
    early.add_argument("--demo", action=argparse.BooleanOptionalAction)
    early.add_argument("--show-options", action="store_true")
    known, _ = early.parse_known_args(argv)
    config = read_options(known.config) if known.config else {}
    name = str(known.method or config.get("method") or (stored or {}).get("method") or defaults["method"])
    variant = known.variant or config.get("variant")
    older, name = name, current_options({"method": name, "variant": variant})["method"]
    if known.variant is not None and name != older:
        warn(f"--variant {known.variant} is now called --method {name}")
    method = find_method(name)
    parser = build_parser(dataset, method)
    own = known_settings(defaults, parser)
    for key in defaults.keys() - own.keys():
        if not _methods_with({key}, dataset):
            raise UserError(f"option file of {dataset.name}: unknown option {key!r}{nearest(key, own)}")

    values = {action.dest: action.default for action in parser.options.values()}
    layers = dict.fromkeys(values, "declaration")

    def add_layer(layer: str, settings: Mapping[str, Any]) -> None:
        values.update(settings)
        layers.update(dict.fromkeys(settings, layer))

    # An option file may select by a branch that the method lacks.
    metrics, first = _metrics(method), f"{own.get('select')}"[:-1] + "1"
    if first in metrics and own["select"] not in metrics:
        own["select"] = first
    given = {key: value for key, value in own.items() if value is not None}
    add_layer("option file", parser.read_settings(given, f"option file of {dataset.name}"))
    # The file of the published pair of a method and a dataset, else the method's general settings, if any.
    paths = [option_io.CONFIGS / f"{stem}.yaml" for stem in (f"{name}_{dataset.name}", name)]
    path = next(filter(Path.is_file, paths), None)
    add_layer(f"configs/{path.name}" if path else "configs", settings_of_pair(parser, path))
    if config.get("demo") is True if known.demo is None else known.demo:
        from clipfusionvad.tools.demo import demo_settings

        if path and find_config(known.config or "").resolve() == path.resolve():
            config = {}  # read already; over the demo's small settings it would be the full size again
        if known.demo:
            # Only where the command line says so does a model of made-up data replace one of the user's.
            config = {key: value for key, value in config.items() if key not in ("model_path", "checkpoint_path")}
        add_layer("demo", known_settings(demo_settings(dataset, method), parser))
    if stored:
        # Those of another method than the one asked for are left to ``check_method``.
        saved = {key: value for key, value in known_settings(stored, parser).items() if value is not None}
        add_layer("checkpoint", parser.read_settings(saved, "options in the checkpoint"))
    add_layer(f"--config {known.config}", parser.read_settings(config, f"config {known.config}"))
    # --help prints what would be used.
    parser.set_defaults(**values)
    add_layer("command line", {key: value for key, value in parser.read(argv).items() if key in values})
    values["method"] = name
    args = Namespace(**values)
    if args.classes_num != len(dataset.classes):
        raise UserError(f"--classes-num {args.classes_num}, but {dataset.title} has {len(dataset.classes)} classes")
    if args.deterministic and args.compile == "max-autotune":
        raise UserError("--deterministic excludes --compile max-autotune, which may pick other kernels in each run")
    if args.smooth == AUTO and args.protocol != "clean":
        raise UserError(
            "--smooth auto needs held-out training videos, which only --protocol clean has: give that, "
            "or a number of snippets"
        )
    if twice := [seed for seed in args.seeds or () if args.seeds.count(seed) > 1]:
        raise UserError(f"--seeds names {twice[0]} more than once")
    if known.show_options:
        print(_table(values, layers))
        sys.exit(0)
    vars(args).update({key: pinned(value) for key, value in values.items() if isinstance(value, str)})
    return args


def known_settings(settings: Mapping[str, Any], parser: OptionParser) -> dict[str, Any]:
    """Return the settings that the parser knows."""
    known = parser.options
    return {key: value for key, value in settings.items() if key in known}


def config_tokens(parser: OptionParser, settings: Mapping[str, Any], where: str) -> list[str]:
    """Return the command-line tokens of some settings, such as those of a YAML file; ``where`` begins every error."""
    known, tokens = parser.options, []
    for key, value in settings.items():
        if key not in known or key == "config":
            unknown = f"unknown key {key!r}{nearest(key, known.keys() - {'config'})}"
            raise UserError(f"{where}: {parser.of_others(key, key) or unknown}")
        tokens += _tokens(known[key], value, f"{where}: {key}")
    return tokens


def _tokens(action: argparse.Action, value: Any, where: str) -> list[str]:
    flag = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{where} must be true or false, not {value!r}")
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    several = action.nargs not in (None, "?")
    if isinstance(value, list | tuple) and not several:
        raise UserError(f"{where} takes one value, not a list")
    items = value if isinstance(value, list | tuple) else [value]
    for item in items:
        if isinstance(item, bool) or item is None:
            raise UserError(f"{where} cannot be {item!r}")
        # Not the value: aliases make a long one of a few lines.
        if not isinstance(item, str | int | float | date):
            raise UserError(f"{where} cannot be a {type(item).__name__}")
    return [flag, *map(str, items)] if several else [f"{flag}={value}"]


def _methods_with(options: Set[str], dataset: Dataset) -> list[str]:
    """Return the methods that have one of some options."""
    return [name for name in method_names() if options & build_parser(dataset, find_method(name)).options.keys()]


def _metrics(method: type[Method]) -> list[str]:
    return [f"{metric}{branch}" for branch in range(1, method.branches + 1) for metric in ("auc", "ap")]


def settings_of_pair(parser: OptionParser, path: Path | None) -> dict[str, Any]:
    """Return the values in the file of a published pair."""
    return parser.read_settings(read_options(path), f"config {path}") if path else {}


def settings_of(args: Namespace, dataset: Dataset) -> Settings:
    """Return the configs that parsed options make."""
    return Settings.from_options(vars(args), dataset, find_method(args.method).option_names())


def build_parser(dataset: Dataset, method: type[Method]) -> OptionParser:
    """All flags for one dataset and one method, without the option file's defaults."""
    script = Path(sys.argv[0]).suffix == ".py" and Path(sys.argv[0]).stem != "__main__"
    parser = OptionParser(
        usage="%(prog)s [options]" if script else f"clipfusionvad COMMAND --dataset {dataset.name} [options]",
        description=f"{method.name} on {dataset.title}; --method NAME --help shows the options of another method.",
        formatter_class=HelpFormatter,
    )
    parser.dataset, parser.method = dataset, method
    parser.add_argument("--dataset", choices=[dataset.name], default=dataset.name, help=argparse.SUPPRESS)
    shared: set[str] = set()
    for title, config in CONFIGS.items():
        declared = _fitted(declared_options(config), method)
        group = parser.add_argument_group(title)
        add_arguments(group, declared)
        shared |= {option.name for option in declared}
        if config is ModelConfig:
            own = parser.add_argument_group(f"method: {method.name}")
            add_arguments(own, [option for option in method.declared_options().values() if option.name not in shared])
            if variants := variants_of(method.name):
                names = ", ".join(f"{variant} for --method {name}" for variant, name in variants.items())
                group.add_argument("--variant", choices=[*variants], default=argparse.SUPPRESS, help=f"older: {names}")
        if config is RunConfig:
            help = "print every option, its value and where it was set, and do nothing else"
            group.add_argument("--show-options", action="store_true", default=argparse.SUPPRESS, help=help)
    parser.set_defaults(method=method.name)
    return parser


def _fitted(options: Mapping[str, Declared], method: type[Method]) -> list[Declared]:
    """The options of a config with what depends on the method: choices, and which of them it reads."""
    choices = {"method": method_names(), "select": [*_metrics(method), "last"], "track": list(TRACKERS)}
    fitted = []
    for name, declared in options.items():
        option = replace(declared.option, choices=choices.get(name, declared.option.choices))
        if name in ("clip", "embed_dim") and not method.needs_clip:
            option = replace(option, help=f"{option.help} (not used by this method)")
        default = method.streams if name == "stream_folders" else declared.default
        if name != "stream_folders" or len(method.streams) > 1:
            fitted.append(replace(declared, option=option, default=default))
    return fitted


def _table(values: Mapping[str, Any], layers: Mapping[str, str]) -> str:
    """Every option, its value as it is typed, and the layer that set it."""
    rows = [("option", "value", "set by")]
    for name, value in sorted(values.items()):
        typed = " ".join(map(str, value)) if isinstance(value, list | tuple) else "" if value is None else str(value)
        rows.append((f"--{name.replace('_', '-')}", typed, layers[name]))
    first, second, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(f"{name:{first}}  {value:{second}}  {layer}" for name, value, layer in rows)


class OptionFile(Protocol):
    """What an option file such as ``ucf_option.py`` offers."""

    DATASET: Dataset

    def parse_args(self, argv: Sequence[str] | None = None, stored: Mapping[str, Any] | None = None) -> Namespace: ...


@dataclass
class GeneralOptions:
    """The options of a dataset without an option file."""

    DATASET: Dataset

    def parse_args(self, argv: Sequence[str] | None = None, stored: Mapping[str, Any] | None = None) -> Namespace:
        name, lists, truth = self.DATASET.name, self.DATASET.list_files, self.DATASET.truth_files
        model = {"method": "clipfusionvad", "classes_num": len(self.DATASET.classes), "embed_dim": 512}
        training = {"seed": 234, "max_epoch": 10, "batch_size": 64, "balanced": True, "eval_every": 0, "select": "auc1"}
        rates = {"lr": 2e-5, "scheduler_rate": 0.1, "scheduler_milestones": [4, 8], "visual_width": 512}
        written = {"model_path": f"model/model_{name}.pth", "checkpoint_path": f"model/checkpoint_{name}.pth"}
        files = {"train_list": lists["train"], "test_list": lists["test"], "gt_path": truth["frames"]}
        files |= {"gt_segment_path": truth["segments"], "gt_label_path": truth["labels"]}
        read = {key: f"list/{file}" for key, file in files.items()}
        return parse_options(argv, self.DATASET, model | training | rates | written | read, stored)


def option_file_of(dataset: Dataset) -> OptionFile:
    """Return the module ``NAME_option``, or the general options of a dataset that has none."""
    name = f"{dataset.name}_option"
    return importlib.import_module(name) if importlib.util.find_spec(name) else GeneralOptions(dataset)


def find_option_file(command: str, argv: Sequence[str]) -> tuple[OptionFile, list[str]]:
    """Return the option file of the dataset that ``--dataset`` names, and the rest of the command line."""
    parser = Parser(
        prog=f"clipfusionvad {command}",
        usage="%(prog)s --dataset NAME [options]",
        description=f"Defaults differ by dataset, options by method ({', '.join(method_names())}): "
        f"with --dataset and --method, --help lists them all.",
        add_help=False,
    )
    names = f"{', '.join(DATASETS)}, or a YAML file of your own"
    parser.add_argument("--dataset", metavar="NAME", help=names)
    known, rest = parser.parse_known_args(argv)
    if known.dataset is not None:
        return option_file_of(find_dataset(known.dataset)), rest
    if {"-h", "--help"} & set(rest):
        parser.print_help()
        sys.exit(0)
    parser.error(f"--dataset is needed, one of: {names}; with it, --help lists all options")
