"""Write a trained model in the form that the original project's code loads."""

from __future__ import annotations

from clipfusionvad.commands.load import load_model, parse_over_model
from clipfusionvad.commands.prepare import option_file_of
from clipfusionvad.engine.checkpoint import dataset_of, read_model_file, released_state
from clipfusionvad.errors import UserError
from clipfusionvad.files import check_writable, write_torch
from clipfusionvad.options import Parser


def main(argv: list[str]) -> int:
    parser = Parser(prog="clipfusionvad export", description=__doc__)
    parser.add_argument("checkpoint", help="a best.pt or last.pt of a run, or a final model file")
    parser.add_argument("--output", required=True, help="the file to write: a bare state dict with CLIP inside")
    parser.add_argument("--clip", help="CLIP model name or file (default: the one it was trained with)")
    args = parser.parse_args(argv)

    file = read_model_file(args.checkpoint)
    if not file.made or file.method is None:
        raise UserError(f"{args.checkpoint} is no file of ours: it is in the released form already")
    check_writable(args.output)
    dataset = dataset_of(file)
    tokens = [f"--method={file.method}", f"--model-path={args.checkpoint}"]
    tokens += [f"--clip={args.clip}"] if args.clip else []
    options, file = parse_over_model(tokens, option_file_of(dataset))
    model, clip = load_model(options, dataset, file)
    write_torch(args.output, released_state(model, clip))
    print(f"wrote {args.output}: {file.method} on {dataset.title} in the released form")
    return 0
