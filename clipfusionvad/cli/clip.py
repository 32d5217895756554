"""Download CLIP, or check its file. Without a name, list OpenAI's models and which of them are downloaded."""

from clipfusionvad.cli.parser import Parser


def main(argv: list[str]) -> int:
    name = make_parser().parse_args(argv).name
    # These need torch, --help does not.
    from clipfusionvad.io.files import hash_file
    from clipfusionvad.io.hub import local_path
    from clipfusionvad.models.clip import TOY, load_clip, openai_files

    files = openai_files()
    if name is None:
        for model, (url, path, size, sha256) in files.items():
            state = "not here" if not path.is_file() else "here" if hash_file(path) == sha256 else "wrong checksum"
            print(f"{model:15} {state:15} {size:>17}  {url}")
        print(f"folder: {path.parent}; the long number in an address is the SHA-256; to download: clip NAME")
        return 0
    clip = load_clip(name)
    print(f"name         {clip.source}")
    if name != TOY:
        path = local_path(name) if local_path(name).is_file() else files[name][1]
        digest = hash_file(path)
        whose = next((f"that of OpenAI's {model}" for model in files if files[model][3] == digest), "not of OpenAI")
        print(f"file         {path}, {path.stat().st_size:,} bytes\nSHA-256      {digest}: {whose}")
    print(f"text tower   fingerprint {clip.fingerprint}, --embed-dim {clip.text_width}")
    image = f"fingerprint {clip.image_fingerprint}, --visual-width {clip.embed_dim}"
    print(f"image tower  {image if len(clip.text_tower.state) < len(clip.state) else 'none'}")
    return 0


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad clip", description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="OpenAI's name, a file, hf:owner/name/file, or toy")
    return parser
