"""Model files: ours, released ones, Lightning's, CLIP's, and states to resume from."""

import json
import random
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tiny import METHOD_FLAGS, Tiny

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.engine.checkpoint import read_model_file
from clipfusionvad.models.clip import load_clip
from clipfusionvad.models.layers.text import ClipTextTower
from fuzz.case import ALTERED, RIGHT, Case, read_or_refuse, require
from fuzz.mutate import damage, damage_archive, disturb, odd_value


def _compare(found: dict, wanted: dict, path: Path) -> str:
    """Right where the weights are those of the seed; altered where only a checksum could tell that they are not."""
    if _equal(found, wanted):
        return RIGHT
    # torch's older format has no checksums, and damage may have come with new ones.
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            require(archive.testzip() is None, "weights were altered, and a checksum would have told")
    return ALTERED


def _equal(found: dict, wanted: dict) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(value, wanted[key]) for key, value in found.items())


def _same_weights(path: Path, seed: Path) -> str:
    """The outcome of reading a damaged copy of ``seed``."""
    wanted = read_model_file(seed).state
    return read_or_refuse(lambda: read_model_file(path), lambda found: _compare(found.state, wanted, path))


def _export(case: Case, path: Path) -> str:
    return case.run("export", path, "--output", case.folder / "out.pth")


def _damaged(path: Path, rng: random.Random) -> bytes:
    content = path.read_bytes()
    return damage_archive(content, rng) if rng.random() < 0.5 else damage(content, rng)


def own(case: Case) -> str:
    """Damaged bytes of our own files; what is read must load into a model, or be refused."""
    method = case.rng.choice(["clipfusionvad", "vadclip", "anomalyclip", "iefvad"])
    seed = case.seeds / "models" / f"{method}.pth"
    path = case.put("model.pth", _damaged(seed, case.rng))
    return _export(case, path) if case.rng.random() < 0.1 else _same_weights(path, seed)


def safetensors(case: Case) -> str:
    """Bytes of a file of ours or of others, or its header, changed: the same model comes out, or a refusal."""
    rng, ours = case.rng, case.rng.random() < 0.8
    seed = case.seeds / "models" / ("iefvad.safetensors" if ours else "bare.safetensors")
    content = seed.read_bytes()
    path = case.put("model.safetensors", damage(content, rng) if rng.random() < 0.6 else _other_header(content, rng))
    kind = rng.random()
    if kind < 0.1:
        return _export(case, path)
    if kind < 0.15:
        return case.run("test", *case.test_flags("iefvad", "--model-path", path))
    wanted = read_model_file(seed)

    def check(found: Any) -> str:
        if _equal(found.state, wanted.state):
            require(found.hparams in (wanted.hparams, {}), f"says something else: {found.hparams}")
            return RIGHT
        # Without our words there is no hash.
        require(not found.hparams, "weights were altered, and the hash would have told")
        return ALTERED

    return read_or_refuse(lambda: read_model_file(path), check)


def _other_header(content: bytes, rng: random.Random) -> bytes:
    """The file with a part of its header replaced; also a part of the words, which are JSON in JSON."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    words = header.get("__metadata__")
    if words and rng.random() < 0.5:
        header["__metadata__"] = {name: json.dumps(disturb(json.loads(word), rng)) for name, word in words.items()}
    else:
        header = disturb(header, rng)
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed + content[8 + size :]


def contents(case: Case) -> str:
    """Our own files with other content, through the commands that read them."""
    rng, method = case.rng, case.rng.choice(["clipfusionvad", "anomalyclip", "iefvad", "iefvad", "iefvad"])
    content = torch.load(case.seeds / "models" / f"{method}.pth", weights_only=True)
    kind = rng.random()
    if kind < 0.5:
        content["hparams"] = disturb(content["hparams"], rng)
    elif kind < 0.6:
        content = {**content, rng.choice(list(content)): odd_value(rng)}
    else:
        content["model_state_dict"] = odd_state(content["model_state_dict"], rng)
    path = case.folder / "model.pth"
    torch.save(content, path)
    if rng.random() < 0.5:
        return _export(case, path)
    flags = case.test_flags(method)
    # The options that the file itself says are what is tried.
    kept = flags[: flags.index("--method") + 2] + flags[flags.index("--gt-path") :]
    if method == "iefvad":
        kept += ["--stream-folders", "features", "events"]
    return case.run("test", *kept)


def odd_state(state: dict, rng: random.Random) -> dict:
    """A state dict with one tensor changed, dropped or renamed."""
    state, key = dict(state), rng.choice(list(state))
    value = state[key]
    first = value.flatten()[:1]
    changes = [
        *(lambda dtype=dtype: value.to(dtype) for dtype in (torch.double, torch.complex64, torch.half, torch.bool)),
        *(lambda factor=factor: value.float() * factor for factor in (torch.nan, torch.inf, 1e38)),
        lambda: value.long(),
        lambda: value.to_sparse(),
        lambda: first.expand(2**40),
        lambda: first.expand(value.shape) if value.dim() and value.numel() else value,
        lambda: value[None],
        lambda: value.flatten(),
        lambda: torch.empty(value.shape, device="meta"),
        lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
        *(lambda item=item: item for item in (torch.empty(0), torch.tensor(1.0), "text", None)),
    ]
    kind = rng.random()
    if kind < 0.1:
        del state[key]
    elif kind < 0.2:
        state[rng.choice(["x", "clipmodel.x", 3, ("a", 1)])] = state.pop(key)
    else:
        state[key] = rng.choice(changes)()
    return state


def released(case: Case) -> str:
    """Files as the original projects released them."""
    rng, method = case.rng, case.rng.choice(list(METHOD_FLAGS))
    seed = case.seeds / "models" / f"{method}_released.pth"
    if rng.random() < 0.5:
        path = case.put("model.pth", _damaged(seed, rng))
    else:
        path = case.folder / "model.pth"
        torch.save(odd_state(torch.load(seed, weights_only=True), rng), path)
    if method == "iefvad" and rng.random() < 0.3:
        return case.run("test", *case.test_flags(method))
    wanted = read_model_file(seed)

    def check(found: Any) -> str:
        require(all(isinstance(value, torch.Tensor) for value in found.state.values()), "not tensors")
        dense = {
            key: value
            for key, value in found.state.items()
            if value.layout == torch.strided and not value.is_meta and not value.is_quantized and value.numel() < 10**7
        }
        return _compare(dense, wanted.state, path)

    return read_or_refuse(lambda: read_model_file(path), check)


def lightning(case: Case) -> str:
    seed = case.seeds / "models" / "lightning.ckpt"
    return _same_weights(case.put("last.ckpt", _damaged(seed, case.rng)), seed)


def clips(case: Case) -> str:
    rng = case.rng
    seed = case.seeds / "clips" / rng.choice(["plain.pt", "event.pt", "script.pt"])
    if rng.random() < 0.4 and seed.name == "plain.pt":
        path = case.folder / "clip.pt"
        torch.save(odd_state(torch.load(seed, weights_only=True), rng), path)
    else:
        path = case.put("clip.pt", _damaged(seed, rng))
    wanted = load_clip(str(seed))

    def read() -> Any:
        found = load_clip(str(path))
        ClipTextTower(found)
        return found

    return read_or_refuse(read, lambda found: _compare(found.state, wanted.state, path))


def resumed(case: Case) -> str:
    """A damaged or odd ``last.pt`` under --use-checkpoint."""
    rng = case.rng
    seed = case.seeds / "trained" / "run" / "last.pt"
    run = case.folder / "run"
    run.mkdir()
    if rng.random() < 0.4:
        (run / "last.pt").write_bytes(_damaged(seed, rng))
    else:
        content = torch.load(seed, weights_only=True)
        key = rng.choice(list(content))
        if rng.random() < 0.6 and isinstance(content[key], dict):
            plain = key not in ("model_state_dict", "best_state_dict", "last_state_dict")
            content[key] = disturb(content[key], rng) if plain else odd_state(content[key], rng)
        else:
            content[key] = odd_value(rng)
        torch.save(content, run / "last.pt")
    home = case.seeds / "trained"
    flags = Tiny("ucf", home, case.folder, []).train_flags("--use-checkpoint", "--max-epoch", 2, "--no-packed")
    return case.run("train", "--dataset", "ucf", *flags, main=until_training)


class Reached(Exception):
    """The training would begin now."""


def until_training(argv: list[str]) -> int:
    """Run a command up to the first step of a training."""
    try:
        with mock.patch("clipfusionvad.cli.training.start_run", side_effect=Reached):
            return package_main(argv)
    except Reached:
        return 0
