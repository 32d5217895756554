"""Write a trained model for other programs: ONNX, torch.export, safetensors, or as the original code loads it."""

from pathlib import Path

from clipfusionvad.cli.parser import Parser
from clipfusionvad.io.errors import UserError
from clipfusionvad.models import method_names

RELEASED = "released form"
FORMS = {".onnx": "ONNX", ".pt2": "torch.export", ".safetensors": "safetensors", ".pth": RELEASED, ".pt": RELEASED}


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    # These need torch, --help does not.
    from clipfusionvad.cli.trained_model import open_checkpoint
    from clipfusionvad.engine.checkpoint import read_model_file
    from clipfusionvad.tools.export import export_model

    path, checkpoint = Path(args.output), args.checkpoint
    if not (form := FORMS.get(path.suffix.lower())):
        known = ", ".join(f"{suffix} ({form})" for suffix, form in FORMS.items())
        raise UserError(f"--output {path}: unknown suffix; the suffixes are {known}")
    if form == RELEASED and not read_model_file(checkpoint).hparams:
        raise UserError(f"{checkpoint} is in the released form already")
    flags = {name: getattr(args, name) for name in ("config", "clip", "normal_centroid", "train_list")}
    settings, file = open_checkpoint(checkpoint, args.method, args.dataset, flags)
    model, card, checked = export_model(path, settings, file, form)
    print(f"wrote {path}: {model.name} on {settings.dataset.title}, {form}")
    if checked:
        print(checked)
    print(f"what it is and how to run it: {card}")
    return 0


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad export", description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="best.pt or last.pt of a run, a final model file, or a released one with --dataset")
    add("--output", required=True, help=f"the file to write; its suffix sets the form: {', '.join(FORMS)}")
    add("--clip", help="CLIP model name or file (default: the CLIP of the training)")
    add("--method", choices=method_names(), help="method of a file that does not name it")
    add("--dataset", metavar="NAME", help="dataset of a file that does not name it; sets classes and options")
    add("--config", help="YAML file of model options, for a released file with options other than published")
    add("--normal-centroid", "--calibration", help="calibration.pt of a run, for a released file without it")
    add("--train-list", help="instead of that: the training list, whose normal videos give the centroid")
    return parser
