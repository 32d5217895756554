"""The training loop: one for every method, dataset and protocol, resumable at any step."""

import contextlib
import hashlib
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from clipfusionvad.data.loaders import BagDataset, BatchSampler, load_batches
from clipfusionvad.engine import checkpoint, evaluator
from clipfusionvad.engine.config import LAST_WEIGHTS, TrainingConfig, default_options
from clipfusionvad.engine.device import autocast
from clipfusionvad.engine.distributed import gather_objects, gather_rows, rank_slice, sync_batchnorm
from clipfusionvad.engine.loggers import RunLog
from clipfusionvad.engine.optimizer import have_moved, make_optimizer, make_scheduler, trained_weights
from clipfusionvad.engine.run_folder import BEST, LAST, PREVIOUS
from clipfusionvad.io.errors import UserError, stop_on_signals, warn
from clipfusionvad.io.files import link_or_copy, write_torch
from clipfusionvad.io.foreign_checkpoints import find_state_dict, read_checkpoint, without_prefix
from clipfusionvad.io.progress import ProgressBar
from clipfusionvad.io.rank import is_main, rank_info
from clipfusionvad.models import Method
from clipfusionvad.models.base import VADOutput

#: Steps between two transfers of losses from a GPU: each transfer waits until the GPU has finished.
GPU_LOG_EVERY = 25
# Videos of a batch that are named when its loss is not finite.
_VIDEOS_NAMED = 8


class Stopped(Exception):
    """A signal stopped the training; its state is saved."""


@dataclass
class Progress:
    """How far a training is: ``batch`` finished batches of ``epoch``, ``evaluations`` in all epochs."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    evaluations: int = 0
    eval_mode: bool = False
    best_score: float = 0.0
    best_step: int = 0


class TrainingStep(nn.Module):
    """Compute the losses of a batch, of which each process holds some rows."""

    def __init__(self, model: Method, device: torch.device, precision: str):
        super().__init__()
        self.device, self.precision = device, precision
        if rank_info().world_size > 1:
            self.norms = sync_batchnorm(model, device)
            self.group_of_one, _ = dist.new_subgroups(1)
            # DistributedDataParallel warns on stderr where it finds no unused parameter.
            self.unused = nn.Parameter(torch.zeros(1, device=device))
        self.model = model.to(device)

    def forward(self, visual: Tensor, lengths: Tensor, targets: Tensor, count: int, step: int) -> Mapping[str, Tensor]:
        """Return the loss terms of the whole batch of ``count`` rows."""
        rank, size = rank_info()[:2]
        if size == 1:
            return self.model.losses(self._forward(visual, lengths), targets, lengths)
        # Where there are fewer rows than processes, each process computes the whole batch as a single process would.
        shared = count >= size
        for norm in self.norms:
            norm.process_group = None if shared else self.group_of_one
        # Dropout differs between the processes, but their losses draw the same random numbers.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed((torch.initial_seed() + 1 + step * size + rank * shared) % 2**63)
            output = self._forward(visual, lengths)
        if shared:
            gather = partial(gather_rows, own=rank_slice(count), count=count)
            parts = {field.name: getattr(output, field.name) for field in fields(output)}
            per_row = {name: part for name, part in parts.items() if name not in output.replicated and part is not None}
            output = replace(output, **{name: gather(part) for name, part in per_row.items()})
            lengths, targets = gather(lengths), gather(targets)
        return self.model.losses(output, targets, lengths)

    def _forward(self, visual: Tensor, lengths: Tensor) -> VADOutput:
        with autocast(self.device, self.precision):
            return self.model(visual, lengths)


class Trainer:
    """Train ``model`` on the batches of ``batch_sampler``.

    ``evaluate`` scores the model on the ``selection_set``; ``config.select`` names the metric that selects the best
    weights (strictly greater than before, starting at 0; "last": the newest weights). An evaluation follows batch i of
    an epoch where i · samples is a multiple of ``config.eval_every`` and i > 0 (released code), or else the epoch.

    ``config.restarts`` keeps two habits of VadCLIP's loop: the rest of an epoch after an evaluation in it trains in
    eval mode (BatchNorm uses and keeps its running statistics), and every epoch ends by loading the best weights so
    far, while the optimizer goes on. Several processes have a trainer each and take the same decisions.
    """

    def __init__(
        self,
        model: Method,
        bags: BagDataset,
        batch_sampler: BatchSampler,
        config: TrainingConfig,
        evaluate: Callable[[Method], dict[str, Any]],
        hparams: Mapping[str, Any],
        device: torch.device,
        precision: str = "fp32",
        workers: int = 0,
    ):
        self.model, self.bags, self.batch_sampler, self.config = model, bags, batch_sampler, config
        self.evaluate, self.hparams, self.device, self.workers = evaluate, hparams, device, workers
        self.training_step: nn.Module = TrainingStep(model, device, precision)
        self.optimizer = make_optimizer(model, config, model.stable_branch, model.stable_steps)
        self.scheduler = make_scheduler(self.optimizer, config)
        self.progress = Progress()
        self.selection_set: evaluator.VideoDataset
        self.best_state: dict[str, Tensor] | None = None
        self.last_state: dict[str, Tensor] | None = None
        #: Precedes its messages, for one of several trainings.
        self.label = ""
        #: Names of the services that get its curves (``loggers.TRACKERS``).
        self.trackers: Sequence[str] = ()
        self._stop = threading.Event()
        self._log: RunLog | None = None
        self._checksums: Mapping[str, int] = {}
        # Whether this process wrote ``last.pt``, so that it is worth keeping as ``previous.pt``.
        self._has_saved = False
        # Steps whose losses may still be on the GPU: number, rows of the training list, losses, gradient norm, rate.
        self._pending: list[tuple[int, np.ndarray, Mapping[str, Tensor], Tensor, float]] = []

    def fit(self, folder: Path, checkpoint_path: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Train to the end and record in ``folder``; return the last weights and the best ones.

        The best are the last where no evaluation scored above 0. On SIGINT and SIGTERM a step ends, then ``Stopped``.
        """
        self.folder, self.checkpoint_path = folder, checkpoint_path
        self.wrap_data_parallel()
        with contextlib.ExitStack() as stack:
            stack.enter_context(stop_on_signals(self._stop, second_interrupts=rank_info().world_size == 1))
            if is_main():
                progress = self.progress
                self._log = RunLog(folder, progress.step, progress.evaluations, self._checksums, self.trackers)
                stack.callback(self._log.close)
            self._save()
            before = trained_weights(self.model) if self.progress.step == 0 else None
            while self.progress.epoch < self.config.max_epoch:
                rate = self.optimizer.param_groups[0]["lr"]
                self._train_epoch()
                # The first epoch of a warm-up may have the rate 0.
                if before and (rate or not self.config.lr):
                    if not have_moved(before, trained_weights(self.model)) and is_main():
                        warn(f"{self.label}--lr {rate:g} is too low: an epoch did not change the weights")
                    before = None
                self._end_epoch()
                self._save()
        self.last_state = self.last_state or checkpoint.state_without_clip(self.model)
        if self.config.select == LAST_WEIGHTS:
            self.best_state, self.progress.best_step = self.last_state, self.progress.step
        elif self.best_state is None and is_main():
            warn(f"{self.label}{self.config.select} was never above 0: the last weights are the final model")
        return self.last_state, self.best_state or self.last_state

    def wrap_data_parallel(self) -> None:
        """Let several processes average their gradients, starting with the weights of rank 0."""
        if rank_info().world_size > 1:
            # Ablations leave parameters unused.
            self.training_step = DistributedDataParallel(self.training_step, find_unused_parameters=True)

    def _train_epoch(self) -> None:
        progress, batches = self.progress, self.batch_sampler.epoch(self.progress.epoch)
        self.model.train(not progress.eval_mode)
        on_gpu, totals = self.device.type == "cuda", list[float]()
        loader = load_batches(self.bags, batches, self.workers, progress.epoch, progress.batch, rank_slice, pin=on_gpu)
        title = f"{self.label}epoch {progress.epoch + 1}/{self.config.max_epoch}"
        with (
            # The loading processes end here, also where an error keeps this frame alive.
            contextlib.closing(loader),
            ProgressBar(total=len(batches), initial=progress.batch, desc=title, unit="step") as bar,
        ):
            for batch in loader:
                rows = batches[progress.batch]
                losses, norm = self._step(*batch, len(rows))
                progress.batch += 1
                progress.step += 1
                self._pending.append((progress.step, rows, losses, norm, self.optimizer.param_groups[0]["lr"]))
                due = self.evaluation_due(progress.batch - 1, len(rows))
                log_now = not on_gpu or due or progress.batch == len(batches) or len(self._pending) >= GPU_LOG_EVERY
                # Several processes only ask each other when they log: asking at every step would make the GPUs wait.
                stop = (log_now or rank_info().world_size == 1) and any(gather_objects(self._stop.is_set()))
                if log_now or stop:
                    totals += self._log_losses(bar)
                if due:
                    self._keep_if_best()
                    # The evaluation has put the model into eval mode.
                    progress.eval_mode = self.config.restarts
                    self.model.train(not progress.eval_mode)
                if due or stop:
                    self._save()
                if stop:
                    raise Stopped
        if totals:
            tqdm.write(f"{title}: loss {sum(totals) / len(totals):.4f}")

    def _step(self, visual: Tensor, lengths: Tensor, targets: Tensor, count: int) -> tuple[dict[str, Tensor], Tensor]:
        """Take a step on this process's rows of a batch of ``count``; return loss terms and gradient norm.

        They stay on the device: a GPU does not wait. The norm is infinite, too, where its square overflows."""
        batch = (tensor.to(self.device, non_blocking=True) for tensor in (visual, lengths, targets))
        losses = self.training_step(*batch, count, self.progress.step)
        self.optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        trained = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([found for p in trained if (found := p.grad) is not None])
        if self.config.clip_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(trained, self.config.clip_grad_norm, norm)
        self.optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}, norm

    def _log_losses(self, bar: ProgressBar) -> list[float]:
        """Log the steps since the last call and return their total losses.

        Raises ``UserError`` for a step whose loss or gradient is not finite; weights are only saved after this check.
        """
        pending, self._pending = self._pending, []
        values = torch.stack([torch.stack([*losses.values(), norm]) for _, _, losses, norm, _ in pending]).tolist()
        totals = []
        for (step, rows, terms, _, lr), (*row, norm) in zip(pending, values, strict=True):
            losses, finite = dict(zip(terms, row, strict=True)), all(map(math.isfinite, row))
            if not (finite and math.isfinite(norm)):
                what = "is finite" if finite else "is not finite"
                videos = list(dict.fromkeys(self.bags.entries[row].video for row in rows))
                more = f" and {len(videos) - _VIDEOS_NAMED} more" if len(videos) > _VIDEOS_NAMED else ""
                raise UserError(
                    f"{self.label}loss {what} at step {step} ({losses}){', but not its gradient' if finite else ''}; "
                    f"this step is not saved: lower --lr, or check the features of its videos with "
                    f"'python -m clipfusionvad doctor': {', '.join(videos[:_VIDEOS_NAMED])}{more}"
                )
            if self._log:
                self._log.log_step(step, self.progress.epoch, losses, lr)
            totals.append(sum(row))
        bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)
        bar.update(len(pending))
        return totals

    def evaluation_due(self, index: int, samples: int) -> bool:
        """Return whether an evaluation follows batch ``index`` of an epoch, which has that many samples."""
        return bool(self.config.eval_every) and index > 0 and index * samples % self.config.eval_every == 0

    def _end_epoch(self) -> None:
        self._step_scheduler()
        batches = self.batch_sampler.epoch(self.progress.epoch)
        if not any(self.evaluation_due(index, len(rows)) for index, rows in enumerate(batches)):
            self._keep_if_best()
        self.progress.epoch += 1
        self.progress.batch, self.progress.eval_mode = 0, False
        if self.progress.epoch == self.config.max_epoch:
            self.last_state = checkpoint.state_without_clip(self.model)
        if self.config.restarts and self.best_state is not None and self.config.select != LAST_WEIGHTS:
            self.model.load_state_dict(self.best_state, strict=False)

    def _keep_if_best(self) -> None:
        """Evaluate the model, log the metrics, and keep the weights where they are the best so far."""
        metrics, progress = self.evaluate(self.model), self.progress
        takes_last = self.config.select == LAST_WEIGHTS
        select = next(iter(metrics)) if takes_last else self.config.select
        score = metrics[select]
        improved = takes_last or score > progress.best_score
        if improved:
            progress.best_score, progress.best_step = score, progress.step
            self.best_state = checkpoint.state_without_clip(self.model)
            if is_main():
                content = checkpoint.model_content(self.hparams, self.best_state, self.model, step=progress.step)
                write_torch(self.folder / BEST, content)
        if self._log:
            record = {"step": progress.step, "epoch": progress.epoch, "improved": improved, "metrics": metrics}
            self._log.log_evaluation(record)
        progress.evaluations += 1
        tqdm.write(f"{self.label}step {progress.step}: {select} {score:.4f}{'  *' if improved else ''}")

    def _save(self) -> None:
        """Write the whole state to ``last.pt``, from which a run resumes; the state before becomes ``previous.pt``."""
        if self._log is None:
            return
        self._log.flush()
        content = checkpoint.model_content(
            self.hparams,
            checkpoint.state_without_clip(self.model),
            self.model,
            progress=asdict(self.progress),
            optimizer_state_dict=self.optimizer.state_dict(),
            scheduler_state_dict=self.scheduler.state_dict(),
            best_state_dict=self.best_state,
            last_state_dict=self.last_state,
            rng_state=torch.get_rng_state(),
            device_rng_state=torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            same_run=self._same_run,
            run=str(self.folder.resolve()),
            records=self._log.checksums,
        )
        if self._has_saved:
            link_or_copy(self.folder / LAST, self.folder / PREVIOUS)
        write_torch(self.folder / LAST, content)
        self._has_saved = True
        if self.checkpoint_path is not None:
            link_or_copy(self.folder / LAST, self.checkpoint_path)

    def resume(self, path: Path) -> None:
        """Continue from a state that ``fit`` saved, or from a training checkpoint of the original code.

        Raises ``UserError`` for other files and for the state of another run, ``Damaged`` before anything has changed.
        """
        content = read_checkpoint(path, "checkpoint")
        if not isinstance(content, dict) or "optimizer_state_dict" not in content:
            raise UserError(
                f"{path} holds no optimizer state (optimizer_state_dict): start from its weights with --init-from"
            )
        resume = self._resume_ours if content.get("format") == checkpoint.FORMAT else self._resume_released
        try:
            resume(content, path)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path} does not hold a state from which a training can continue ({error!r})") from error

    def _resume_ours(self, content: Mapping[str, Any], path: Path) -> None:
        saved = dict(content["same_run"])
        now, later = self._same_run, default_options(self.hparams["method"])
        model = checkpoint.current_hparams(saved["model"])
        options = checkpoint.completed(model["options"], now["model"]["options"], later)
        saved["model"] = checkpoint.completed(model, now["model"], later) | {"options": options}
        saved["schedule"] = checkpoint.completed(saved["schedule"], now["schedule"], later)
        differing = [key for key, value in now.items() if saved.get(key) != value]
        if differing:
            raise UserError(
                f"{path} is the state of a run with another {' and '.join(differing)}: "
                f"resume it with the options in its options.yaml"
            )
        checkpoint.load_model_file(self.model, checkpoint.ModelFile(str(path), content["model_state_dict"]))
        self.optimizer.load_state_dict(content["optimizer_state_dict"])
        self.scheduler.load_state_dict(content["scheduler_state_dict"])
        self.progress = Progress(**content["progress"])
        if list(map(type, astuple(self.progress))) != list(map(type, astuple(Progress()))):
            raise ValueError(f"progress {content['progress']}")
        self.best_state, self.last_state = content["best_state_dict"], content["last_state_dict"]
        # States of older versions hold no checksums of the records.
        self._checksums = content.get("records", {})
        torch.set_rng_state(content["rng_state"])
        if self.device.type == "cuda" and content["device_rng_state"] is not None:
            torch.cuda.set_rng_state(content["device_rng_state"], self.device)

    def _resume_released(self, content: Mapping[str, Any], path: Path) -> None:
        """Continue after the epoch of {epoch, model_state_dict, optimizer_state_dict, ap}; its weights are the best."""
        if absent := [key for key in ("epoch", "ap", "model_state_dict") if key not in content]:
            raise UserError(f"{path} is not a training checkpoint: it holds no {absent[0]}")
        state = find_state_dict(content, path, "checkpoint")
        state = without_prefix(state, lambda known: not self.model.state_dict().keys().isdisjoint(known))
        checkpoint.load_model_file(self.model, checkpoint.ModelFile(str(path), state))
        # The released optimizer numbers all parameters in the order of the state dict, frozen CLIP included.
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        names = [key for key in state if not key.endswith(buffers)]
        moments = {names[index]: value for index, value in content["optimizer_state_dict"]["state"].items()}
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        merged = {index: moments[name] for index, name in enumerate(trained) if name in moments}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": merged})
        self.progress = Progress(epoch=int(content["epoch"]) + 1, best_score=float(content["ap"]))
        for _ in range(self.progress.epoch):
            self._step_scheduler()
        self.best_state = checkpoint.state_without_clip(self.model)

    def _step_scheduler(self) -> None:
        with warnings.catch_warnings():
            # A resumed training may end an epoch before it has taken a step.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()

    @cached_property
    def _same_run(self) -> dict[str, Any]:
        """What a resumed run must have in common with the saved state; only the number of epochs may differ."""
        videos = [(entry.path.name, entry.label) for entry in self.bags.entries]
        batches = hashlib.sha256(repr((videos, [batch.tolist() for batch in self.batch_sampler.epoch(0)])).encode())
        hparams = {key: value for key, value in self.hparams.items() if key != "clip"}
        config = self.config
        names = ("lr", "lr_schedule", "warmup_epochs", "eval_every", "select", "optimizer", "weight_decay")
        schedule = {name: getattr(config, name) for name in (*names, "clip_grad_norm")}
        schedule |= {"betas": list(config.betas), "milestones": list(config.scheduler_milestones)}
        schedule |= {"rate": config.scheduler_rate, "paper": config.restarts}
        # A cosine falls until its last epoch: with more epochs all rates differ.
        schedule |= {"max_epoch": config.cosine_epochs or config.max_epoch} if config.lr_schedule == "cosine" else {}
        return {"model": hparams, "schedule": schedule, "training list or batch order": batches.hexdigest()}
