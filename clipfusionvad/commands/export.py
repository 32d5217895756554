"""Write a trained model in the form that the original project's code loads."""

from __future__ import annotations

from clipfusionvad.clip import clip_in_checkpoint, load_clip
from clipfusionvad.engine.checkpoint import check_clip, dataset_of, load_model_file, read_model_file, released_state
from clipfusionvad.errors import UserError
from clipfusionvad.files import write_torch
from clipfusionvad.models import build_method, find_method
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
    dataset = dataset_of(file)
    options = file.made["options"]
    clip = None
    if find_method(file.method).needs_clip:
        inside = clip_in_checkpoint(file.state, file.path)
        clip = inside or load_clip(args.clip or file.made["clip"], options["embed_dim"])
    check_clip(file, clip)
    model = build_method(file.method, dataset.prompts, clip, **options)
    load_model_file(model, file)
    write_torch(args.output, released_state(model, clip))
    print(f"wrote {args.output}: {file.method} on {dataset.title} in the released form")
    return 0
