"""Where ReFLIP-VAD's DistilBERT comes from, and that nothing in a folder is run."""

import json
import pickle

import pytest
import torch

from clipfusionvad.io.errors import UserError
from clipfusionvad.models.layers.distilbert import DEFAULT, DistilBert

transformers = pytest.importorskip("transformers", reason="DistilBERT needs: pip install transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "car", "accident", "shop", "##lift", "##ing"]
CONFIG = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "vocab_size": len(WORDS)}
CONFIG |= {"max_position_embeddings": 16, "model_type": "distilbert"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    """Calls a function in place of the download; none may happen until a test sets it."""

    def answer_with(download):
        monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    answer_with(lambda *args, **kwargs: pytest.fail("the network was asked"))
    return answer_with


def weights(folder, seed):
    torch.manual_seed(seed)
    return DistilBert.find(str(folder)).build().state_dict()


def same(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_toy_is_the_same_every_time_and_tells_words_apart(hub):
    toy = DistilBert.find("toy")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = toy.build().eval(), toy.build()
    assert torch.equal(before, torch.get_rng_state()) and same(one, other.state_dict())
    ids = toy.tokens(["normal", "Car accident", "x"])
    assert ids.shape == (3, 2 + len("caraccident")) and (ids != 1).all()
    assert ids[2].tolist()[3:] == [0] * (ids.shape[1] - 3)
    states = one(ids).last_hidden_state.mean(1)
    assert (states[0] - states[1]).abs().max() > 0.1


def test_a_folder_gives_shape_and_words(folder, hub):
    found = DistilBert.find(str(folder))
    model = found.build()
    assert model.config.dim == 8 and len(model.transformer.layer) == 1
    assert found.tokens(["car accident", "Shoplifting", "fire"]).tolist() == [
        [2, 5, 6, 3, 0],
        [2, 7, 8, 9, 3],
        [2, 1, 3, 0, 0],
    ]


@pytest.mark.parametrize("prefix", ["", "distilbert."])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_weights_are_read_from_either_file_with_or_without_a_head(folder, kind, prefix, hub):
    wanted = weights(folder, 1)
    stored = {prefix + key: value for key, value in wanted.items()} | {"vocab_transform.weight": torch.zeros(8, 8)}
    if kind == "model.safetensors":
        from safetensors.torch import save_file

        save_file(stored, folder / kind)
    else:
        torch.save(stored, folder / kind)
    torch.manual_seed(2)
    assert same(DistilBert.find(str(folder)).build(), wanted)


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("code in a weights file was run",))


def test_a_pickle_is_refused_without_running_it(folder):
    torch.save({"embeddings": Malicious()}, folder / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(UserError, match="could run foreign code; refused"):
        DistilBert.find(str(folder)).build()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "DistilBERT's config not found"),
        ("config.json", "{", "config.json is not readable JSON"),
        ("config.json", '{"model_type": "bert"}', "does not describe a DistilBERT"),
        ("config.json", json.dumps(CONFIG | {"n_heads": 3}), "makes no DistilBERT"),
        ("config.json", json.dumps(CONFIG | {"dim": "wide"}), "makes no DistilBERT"),
        ("model.safetensors", "cut", "not a readable safetensors file"),
        ("pytorch_model.bin", "text", "not a readable torch file"),
    ],
)
def test_a_broken_folder_is_one_line(folder, name, content, message):
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        DistilBert.find(str(folder)).build()


def test_words_need_a_vocabulary_and_weights_the_shapes_of_the_config(folder):
    (folder / "vocab.txt").unlink()
    torch.save(weights(folder, 1), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="has no vocab.txt"):
        DistilBert.find(str(folder)).tokens(["car"])
    (folder / "config.json").write_text(json.dumps(CONFIG | {"hidden_dim": 12}))
    with pytest.raises(UserError, match="do not fit its config.json at transformer.layer.0.ffn.lin1.weight"):
        DistilBert.find(str(folder)).build()


def test_a_name_is_fetched_once_and_must_bring_weights(folder, hub):
    asked = []
    hub(lambda name, allow_patterns: asked.append((name, allow_patterns)) or folder)
    with pytest.raises(UserError, match=f"--prompt-encoder {DEFAULT}: that model has no model.safetensors"):
        DistilBert.find(DEFAULT)
    from safetensors.torch import save_file

    wanted = weights(folder, 3)
    save_file(wanted, folder / "model.safetensors")
    found = DistilBert.find(DEFAULT)
    assert same(found.build(), wanted) and len(found.tokens(["car"])) == 1
    assert len(asked) == 2 and not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked[0][1])


@pytest.mark.parametrize("error", [OSError("no network\nmore"), ValueError("no such name"), ConnectionError("offline")])
def test_what_cannot_be_fetched_is_one_line(error, hub):
    def fail(*args, **kwargs):
        raise error

    hub(fail)
    message = "'distilbrt' is neither a folder nor a model that could be downloaded"
    with pytest.raises(UserError, match=message) as caught:
        DistilBert.find("distilbrt")
    assert "\n" not in str(caught.value)
