"""Write a trained model for other programs: ONNX, torch.export, safetensors, or as the original code loads it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from clipfusionvad.cli.parser import Parser
from clipfusionvad.datasets import Dataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.models import method_names
from clipfusionvad.tools.export import SUFFIXES

# The rest is imported after the command line is parsed: it needs torch, --help does not.
if TYPE_CHECKING:
    from clipfusionvad.tools.export.forms import TrainedModel


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    from clipfusionvad.io.files import check_writable
    from clipfusionvad.tools.export.card import card_path, write_card
    from clipfusionvad.tools.export.forms import RELEASED, form_of

    form, path = form_of(args.output), Path(args.output)
    trained, dataset = _load(args, released=form is RELEASED)
    for written in (path, card_path(path)):
        check_writable(written)
    checked = form.write(path, trained)
    write_card(path, trained, dataset, args.checkpoint, form, checked)
    print(f"wrote {path}: {trained.model.name} on {dataset.title}, {form.title}")
    if checked:
        print(checked)
    print(f"what it is and how to run it: {card_path(path)}")
    return 0


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad export", description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="best.pt or last.pt of a run, a final model file, or a released one with --dataset")
    add("--output", required=True, help=f"the file to write; its suffix sets the form: {', '.join(SUFFIXES)}")
    add("--clip", help="CLIP model name or file (default: the CLIP of the training)")
    add("--method", choices=method_names(), help="of a file that does not name its method")
    add("--dataset", metavar="NAME", help="of a file that does not name its dataset: sets classes and options")
    add("--config", help="YAML file of model options, for a released file with options other than published")
    add("--normal-centroid", "--calibration", help="calibration.pt of a run, for a released file without it")
    add("--train-list", help="training list instead, whose normal videos' features are read")
    return parser


def _load(args: Namespace, released: bool) -> tuple[TrainedModel, Dataset]:
    """Return the model in a file, with what is known of it, and its dataset."""
    from clipfusionvad.cli.trained_model import open_checkpoint
    from clipfusionvad.engine.checkpoint import make_hparams, read_model_file
    from clipfusionvad.engine.model_setup import load_model
    from clipfusionvad.report.table import check_metrics
    from clipfusionvad.tools.export.forms import TrainedModel

    flags = {name: getattr(args, name) for name in ("config", "clip", "normal_centroid", "train_list")}
    if released and not read_model_file(args.checkpoint).hparams:
        raise UserError(f"{args.checkpoint} is in the released form already")
    settings, file = open_checkpoint(args.checkpoint, args.method, args.dataset, flags)
    if file.metrics is not None:
        check_metrics(file.metrics, f"metrics in {args.checkpoint}")
    model, clip = load_model(settings, file)
    hparams = make_hparams(model, clip, settings.dataset, settings.options())
    return TrainedModel(model, clip, hparams, file.metrics), settings.dataset
