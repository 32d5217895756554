"""Show how much a model trusts image and event, and what happens when one of them is damaged."""

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated

from clipfusionvad.cli.options import find_option_file
from clipfusionvad.cli.parser import Parser
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import check_writable
from clipfusionvad.io.option import Option, add_arguments, declared_options, from_arguments

Levels = Annotated[tuple[float, ...], Option("shares of attenuated positions in an input", minimum=0, maximum=1)]


@dataclass(frozen=True)
class UncertaintyOptions:
    """How the analysis corrupts a modality, and how many figures it draws."""

    levels: Levels = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
    sweep_seed: Annotated[int, Option("seed that chooses these positions", minimum=0)] = 0
    curve_pictures: Annotated[int, Option("figures of curves for a class at most; 0: all", minimum=0)] = 10


def main(argv: list[str]) -> int:
    option_file, rest = find_option_file("uncertainty", argv)
    parser = make_parser()
    if {"-h", "--help"} & set(rest):
        # The options of testing follow, from its own parser.
        print(parser.format_help())
    own, rest = parser.parse_known_args(rest)

    from clipfusionvad.cli.trained_model import parse_over_checkpoint

    settings, file = parse_over_checkpoint(rest, option_file)
    if not settings.run.output_dir:
        raise UserError("--output-dir is needed: the folder for tables and figures")
    folder = Path(settings.run.output_dir)
    check_writable(folder / "uncertainty.csv")

    from clipfusionvad.engine.device import pick_device
    from clipfusionvad.engine.setup import read_test_set, restore_model
    from clipfusionvad.tools.demo import make_demo
    from clipfusionvad.tools.uncertainty import CURVES_FILE, write_analysis

    if settings.run.demo:
        make_demo(settings.dataset)
    model, _ = restore_model(settings, file)
    device = pick_device(settings.device.device)
    videos = read_test_set(settings.dataset, settings.model, settings.data)
    options = from_arguments(UncertaintyOptions, vars(own))
    table = write_analysis(folder, model.to(device), videos, device, settings.device.precision, *astuple(options))
    print(f"{model.name} on {settings.dataset.title}: {file.path}, {len(videos.entries)} test videos\n\n{table}\n")
    print(f"results in {folder}: tables (.csv), figures (.png, and curves/ by class), {CURVES_FILE} by snippet")
    return 0


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad uncertainty", description=__doc__, add_help=False, usage="%(prog)s [options]")
    add_arguments(parser.add_argument_group("analysis"), declared_options(UncertaintyOptions).values())
    return parser
