"""Options of training, of a run, and of the device; and all options of a command together."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from clipfusionvad.data.config import DataConfig
from clipfusionvad.datasets import Dataset
from clipfusionvad.io.option import MOST_SMOOTH, Option, declared_options
from clipfusionvad.models import ModelConfig, find_method, method_names

#: The value of ``TrainingConfig.select`` that takes the last weights instead of the best ones.
LAST_WEIGHTS = "last"
_SEEDS = "in place of --seed: train with each of these, and report mean and deviation"
_PROTOCOL = "paper: select on the test set, as released; clean: on a held-out part of the training list"
_RESTART = "paper: an epoch ends with the best weights so far, and after an evaluation it trains on in eval mode"
#: The value of ``TrainingConfig.smooth`` that lets a training choose it.
AUTO = "auto"
_SMOOTH = "smooth scores over time: a Gaussian's standard deviation in snippets; auto: choose it on held-out videos"
_MODES = ("default", "reduce-overhead", "max-autotune")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained and selected."""

    seed: Annotated[int, Option("seed of weights and batch order", minimum=0)]
    seeds: Annotated[tuple[int, ...] | None, Option(_SEEDS, minimum=0, nonempty=True)] = None
    max_epoch: Annotated[int, Option("epochs", minimum=1)]
    batch_size: Annotated[int, Option("videos in a batch; with --balanced, of each kind", minimum=1)]
    balanced: Annotated[bool, Option("as many normal as anomalous videos in a batch")]
    cycle: Annotated[bool, Option("with --balanced, repeat the smaller kind until the larger one is used up")] = False
    optimizer: Annotated[str, Option("optimizer", choices=("adamw", "adam", "adadelta"))] = "adamw"
    betas: Annotated[tuple[float, float], Option("decay rates of the moments", minimum=0, below=1)] = (0.9, 0.999)
    weight_decay: Annotated[float, Option("weight decay of the optimizer", minimum=0)] = 0.01
    clip_grad_norm: Annotated[float | None, Option("largest norm of the gradient (default: any)", above=0)] = None
    eval_every: Annotated[int, Option("samples between evaluations in an epoch; 0: after each epoch", minimum=0)]
    select: Annotated[str, Option("metric that selects the best checkpoint; last: the last one is taken")]
    protocol: Annotated[str, Option(_PROTOCOL, choices=("paper", "clean"))] = "paper"
    restart_from_best: Annotated[bool, Option(_RESTART)] = True
    holdout: Annotated[float, Option("held-out share of training videos (clean)", above=0, below=1)] = 0.1
    smooth: Annotated[float | str, Option(_SMOOTH, minimum=0, maximum=MOST_SMOOTH, word=AUTO, metavar="SIGMA")] = 0.0
    lr: Annotated[float, Option("learning rate", above=0)]
    lr_schedule: Annotated[str, Option("how the rate changes", choices=("milestones", "cosine"))] = "milestones"
    scheduler_rate: Annotated[float, Option("milestones: factor at each of them", above=0)]
    scheduler_milestones: Annotated[tuple[int, ...], Option("milestones: epochs that end in a drop", minimum=1)]
    warmup_epochs: Annotated[int, Option("cosine: epochs in which the rate rises to --lr", minimum=0)] = 0
    cosine_epochs: Annotated[
        int | None, Option("cosine: epoch in which the rate reaches 0 (default: --max-epoch)", minimum=1)
    ] = None

    @property
    def restarts(self) -> bool:
        """Whether the released loop's two habits are kept: ``restart_from_best`` under the protocol "paper"."""
        return self.protocol == "paper" and self.restart_from_best


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run starts from and what it writes."""

    config: Annotated[str | None, Option("YAML file of options", recorded=False)] = None
    demo: Annotated[bool, Option("small synthetic data and a toy CLIP: minutes on a CPU")] = False
    output_dir: Annotated[str | None, Option("folder of the run (default: a new one under runs/)")] = None
    model_path: Annotated[str, Option("final model: written by training, read by testing")]
    checkpoint_path: Annotated[str, Option("resumable state, beside the run folder's last.pt")]
    normal_centroid: Annotated[str | None, Option("calibration.pt of a run", aliases=("--calibration",))] = None
    init_from: Annotated[
        str | None, Option("start from the weights in this model file or run folder, with a new optimizer")
    ] = None
    use_checkpoint: Annotated[bool, Option("resume an interrupted training", recorded=False)] = False
    overwrite: Annotated[bool, Option("start anew in a folder that holds a run", recorded=False)] = False
    metrics_json: Annotated[str | None, Option("write the metrics to this file", recorded=False)] = None
    track: Annotated[tuple[str, ...] | None, Option("also send the curves to these trackers", nonempty=True)] = None


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """What the model runs on."""

    device: Annotated[str, Option("auto, cpu, cuda, cuda:1, …")] = "auto"
    precision: Annotated[str, Option("bf16: autocast", choices=("fp32", "bf16"))] = "fp32"
    deterministic: Annotated[bool, Option("the same seed gives the same bits on a GPU too; somewhat slower")] = False
    compile: Annotated[str | None, Option("torch.compile the model in a mode", choices=_MODES, const="default")] = None


#: The configs whose fields are options, by the title of their group in --help.
CONFIGS: dict[str, type] = dict(
    model=ModelConfig, data=DataConfig, training=TrainingConfig, run=RunConfig, device=DeviceConfig
)


@dataclass(frozen=True)
class Settings:
    """All options of a command that trains or scores, resolved."""

    dataset: Dataset
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    run: RunConfig
    device: DeviceConfig

    @classmethod
    def from_options(cls, options: Mapping[str, Any], dataset: Dataset, method_options: Sequence[str]) -> Settings:
        """Sort flat options into their configs; lists become tuples."""
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        values["options"] = {name: options[name] for name in method_options}
        configs = {
            title: config(**{field.name: values[field.name] for field in fields(config) if field.name in values})
            for title, config in CONFIGS.items()
        }
        return cls(dataset, **configs)

    def options(self) -> dict[str, Any]:
        """Return all options as one flat mapping, with lists in place of tuples."""
        flat: dict[str, Any] = {"dataset": self.dataset.name, **self.model.options}
        for title, declared in CONFIGS.items():
            flat |= {name: getattr(getattr(self, title), name) for name in declared_options(declared)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items()}

    def record(self) -> dict[str, Any]:
        """Return what a run records: plain values that are a valid --config again."""
        return recorded(self.options())


def default_options(method: str) -> dict[str, Any]:
    """Return the defaults that the configs and a method declare, as ``recorded`` has them.

    They are the values of options that a record lacks because it was made before the program had them.
    """
    declared = {name: one for config in CONFIGS.values() for name, one in declared_options(config).items()}
    declared |= find_method(method).declared_options() if method in method_names() else {}
    given = {name: one.default for name, one in declared.items() if one.default is not inspect.Parameter.empty}
    return recorded({name: list(value) if isinstance(value, tuple) else value for name, value in given.items()})


def recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a run records, sorted: without those of one invocation and those that are not set."""
    declared = {name: found for config in CONFIGS.values() for name, found in declared_options(config).items()}
    kept = [key for key in sorted(options) if key not in declared or declared[key].option.recorded]
    return {key: options[key] for key in kept if options[key] is not None}
