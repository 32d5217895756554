"""A parity case of the field's baselines: inputs and results of the original program, and how close is close."""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipfusionvad.engine.checkpoint import ModelFile, load_model_file, read_model_file
from clipfusionvad.engine.config import TrainingConfig
from clipfusionvad.engine.optimizer import make_optimizer
from clipfusionvad.models import Method, create_model


class BaselineCase:
    """One folder: ``config.json``, ``inputs.npz``, ``outputs.npz``, ``checkpoint.pth``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.outputs = np.load(folder / "outputs.npz")
        self.inputs = np.load(folder / "inputs.npz")
        classes = self.inputs["text_table"] if "text_table" in self.inputs.files else range(2)
        self.prompts = [f"class {number}" for number, _ in enumerate(classes)]

    def input(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.inputs[name]).float()

    @property
    def targets(self) -> torch.Tensor:
        """(2B, 2) multi-hot."""
        return torch.nn.functional.one_hot(torch.from_numpy(self.inputs["labels"]).long(), 2).float()

    def build(self, **options: Any) -> Method:
        """Our model with the original's weights, whose method its file must show."""
        file = read_model_file(self.folder / "checkpoint.pth")
        assert file.method == self.config["method"]
        model = create_model(file.method, self.prompts, "toy", **options)
        load_model_file(model, ModelFile(file.path, file.state))
        assert {k: list(v.shape) for k, v in model.to_released(model.state_dict()).items()} == self.config["state_dict"]
        return model

    def check(self, key: str, ours: Any, relative: float = 0) -> None:
        """Assert that an array equals the recorded one within the noise of float32, or ``relative`` to its largest."""
        recorded, ours = self.outputs[key], torch.as_tensor(ours).detach().numpy()
        noise = self.config["float_noise"][key]
        allowed = max(10 * noise["abs"], 2e-6 * max(1, noise["scale"]), relative * noise["scale"])
        assert ours.shape == recorded.shape, f"{key} has the shape {ours.shape}, not {recorded.shape}"
        off = np.abs(ours - recorded).max(initial=0)
        assert off <= allowed, f"{key} is off by {off:.2e}, rounding explains {allowed:.2e}"

    def check_all(self, group: str, ours: Mapping[str, Any], relative: float = 0) -> None:
        """Check every recorded array of a group; each must be given, without its group's name."""
        recorded = {key.removeprefix(f"{group}/") for key in self.outputs.files if key.startswith(f"{group}/")}
        assert recorded <= ours.keys(), f"{group}: {sorted(recorded - ours.keys())} not compared"
        for name in recorded:
            self.check(f"{group}/{name}", ours[name], relative)

    @contextlib.contextmanager
    def dropout(self, masked: bool):
        """Switch dropout off or, ``masked``, let each take the next recorded mask."""
        masks = iter([self.inputs[name] for name in sorted(self.inputs.files) if name.startswith("mask/")])

        def dropout(values, p=0.5, training=True, inplace=False):
            if not masked or not training:
                return values
            return values * torch.from_numpy(next(masks)).reshape(values.shape).to(values) / (1 - p)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "dropout", dropout)
            yield
        assert not masked or next(masks, None) is None, "a recorded mask was not used"

    def gradients(self, model: Method) -> dict[str, torch.Tensor]:
        """The gradients, but for those of which the recorded ones are noise."""
        named = {name: parameter.grad for name, parameter in model.named_parameters()}
        for name in self.config["parameters_with_zero_true_gradient"]:
            named[name] = self.outputs[f"grad/{name}"]
        return named

    def steps(
        self, model: Method, losses: Callable[[int], Mapping[str, torch.Tensor]], clip: float | None = None
    ) -> list[dict[str, float]]:
        """Take an optimizer step on each of the recorded batches; return the losses before each."""
        config = self.config["optimizer"]
        optimizer = make_optimizer(model, training_config(config))
        found = []
        for step in range(len(self.inputs["steps_visual"])):
            terms = losses(step)
            found.append({name: float(value.detach()) for name, value in terms.items()})
            optimizer.zero_grad()
            sum(terms.values()).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        return found

    def check_final(self, model: Method) -> None:
        state = model.state_dict()
        for name in self.config["parameters_with_zero_true_gradient"]:
            state[name] = self.outputs[f"final/{name}"]
        self.check_all("final", state)


def training_config(optimizer: Mapping[str, Any]) -> TrainingConfig:
    """The options that stand for an optimizer as the cases record it."""
    needed = {"seed": 0, "max_epoch": 1, "batch_size": 1, "balanced": True, "eval_every": 0, "select": "auc1"}
    needed |= {"scheduler_rate": 0.1, "scheduler_milestones": ()}
    betas = tuple(optimizer.get("betas", (optimizer.get("rho", 0.9), 0.999)))
    kind = {"optimizer": optimizer["name"].lower(), "weight_decay": optimizer["weight_decay"], "betas": betas}
    return TrainingConfig(**needed, **kind, lr=optimizer["lr"])
