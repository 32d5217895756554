"""The training loop: one for every method, dataset and protocol, resumable at any step."""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from clipfusionvad.data.loaders import BagDataset, BatchSampler, load_batches
from clipfusionvad.engine.checkpoint import (
    FORMAT,
    ModelFile,
    current_hparams,
    load_model_file,
    model_content,
    state_without_clip,
)
from clipfusionvad.engine.device import autocast
from clipfusionvad.engine.distributed import (
    SYNC_BATCHNORMS,
    any_rank,
    gather_rows,
    rank_rng,
    rank_slice,
    rank_slices,
    sync_batchnorm,
)
from clipfusionvad.engine.optim import LAST_WEIGHTS, Schedule, make_optimizer, make_scheduler
from clipfusionvad.engine.run_folder import BEST, LAST, PREVIOUS, NoLog, RunLog
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import link_or_copy, write_torch
from clipfusionvad.io.foreign_checkpoints import read_checkpoint
from clipfusionvad.io.rank import is_main, rank_info
from clipfusionvad.io.signals import stop_on_signals
from clipfusionvad.models import Method
from clipfusionvad.models.base import VADOutput

#: Steps after which the losses of a GPU are fetched; it works ahead in between.
GPU_LOG_EVERY = 25
# Videos of a batch that are named when its loss is not finite.
_VIDEOS_NAMED = 8


class Stopped(Exception):
    """Training was asked to stop and has saved its state."""


@dataclass
class Progress:
    """Where a training stands; ``batch`` counts the finished batches of ``epoch``, ``evaluations`` all so far."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    evaluations: int = 0
    eval_mode: bool = False
    best_score: float = 0.0
    best_step: int = 0


_PROGRESS = (int, int, int, int, bool, float, int)


class TrainingStep(nn.Module):
    """The losses of a batch of which each process has its rows."""

    def __init__(self, model: Method, device: torch.device, precision: str):
        super().__init__()
        self.info, self.device, self.precision = rank_info(), device, precision
        if self.info.world_size > 1:
            sync_batchnorm(model, device)
            self.group_of_one, _ = dist.new_subgroups(1)
            # DistributedDataParallel warns on stderr where it finds no unused parameter.
            self.unused = nn.Parameter(torch.zeros(1))
        self.model = model.to(device)

    def forward(self, visual: Tensor, lengths: Tensor, targets: Tensor, count: int, step: int) -> Mapping[str, Tensor]:
        """Return the loss terms of the whole batch of ``count`` rows."""
        with autocast(self.device, self.precision):
            if self.info.world_size == 1:
                output = self.model(visual, lengths)
            else:
                output, lengths, targets = self._forward_rows(visual, lengths, targets, count, step)
        return self.model.losses(output, targets, lengths)

    def _forward_rows(
        self, visual: Tensor, lengths: Tensor, targets: Tensor, count: int, step: int
    ) -> tuple[VADOutput, Tensor, Tensor]:
        # Fewer rows than processes: each process computes the whole batch, as a single process would.
        shared = count >= self.info.world_size
        for module in self.model.modules():
            if isinstance(module, SYNC_BATCHNORMS):
                module.process_group = None if shared else self.group_of_one
        # Dropout differs between the rows; the losses draw the same numbers in all processes.
        with rank_rng(self.device, 1 + step * self.info.world_size + (self.info.rank if shared else 0)):
            output = self.model(visual, lengths)
        if not shared:
            return output, lengths, targets
        sizes = [rows.stop - rows.start for rows in rank_slices(count, self.info.world_size)]
        parts = {field.name: getattr(output, field.name) for field in fields(output)}
        joined = {
            name: gather_rows(part, sizes)
            for name, part in parts.items()
            if isinstance(part, Tensor) and name not in output.replicated
        }
        return replace(output, **joined), gather_rows(lengths, sizes), gather_rows(targets, sizes)


class Trainer:
    """Trains ``model`` on the batches of ``batch_sampler``.

    ``evaluate`` scores the model and returns metrics, of which ``schedule.select`` picks the best weights
    (strictly greater than before, starting at 0; "last": the newest). ``hparams`` describe the model in its files.
    Of several processes each has a trainer, and all of them take the same decisions.
    """

    def __init__(
        self,
        model: Method,
        bags: BagDataset,
        batch_sampler: BatchSampler,
        schedule: Schedule,
        evaluate: Callable[[Method], dict[str, Any]],
        hparams: Mapping[str, Any],
        device: torch.device,
        precision: str = "fp32",
        workers: int = 0,
    ):
        self.model, self.bags, self.batch_sampler, self.schedule = model.to(device), bags, batch_sampler, schedule
        self.evaluate, self.hparams = evaluate, hparams
        self.device, self.workers = device, workers
        self.training_step: nn.Module = TrainingStep(model, device, precision)
        self.optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], schedule)
        self.scheduler = make_scheduler(self.optimizer, schedule)
        self.progress = Progress()
        self.best_state: dict[str, Tensor] | None = None
        self.last_state: dict[str, Tensor] | None = None
        self.stop = threading.Event()
        #: What its messages start with, where it is one of several.
        self.label = ""
        #: Names of the services that its curves go to (``trackers.TRACKERS``).
        self.trackers: Sequence[str] = ()
        self._sums: Mapping[str, int] = {}
        # Whether ``last.pt`` is of this process, and so worth keeping.
        self._has_saved = False
        self._pending: list[tuple[int, np.ndarray, dict[str, Tensor], Tensor, float]] = []
        self._log_every = 1 if device.type == "cpu" else GPU_LOG_EVERY

    def fit(self, folder: Path, checkpoint_path: Path | None = None) -> None:
        """Train to the end, recording in ``folder``; then ``best_state`` and ``last_state`` hold the weights.

        ``best_state`` is None where no evaluation ever scored above 0. SIGINT and SIGTERM raise ``Stopped``
        after the step in progress, with everything saved.
        """
        self.wrap_data_parallel()
        with stop_on_signals(self.stop, second_interrupts=rank_info().world_size == 1):
            self._fit(folder, checkpoint_path)

    def wrap_data_parallel(self) -> None:
        """Average gradients over the processes from here on, starting with the weights of rank 0."""
        if rank_info().world_size > 1:
            # Ablations leave parameters unused.
            self.training_step = DistributedDataParallel(self.training_step, find_unused_parameters=True)

    def _fit(self, folder: Path, checkpoint_path: Path | None) -> None:
        log: RunLog | NoLog = NoLog()
        if is_main():
            log = RunLog(folder, self.progress.step, self.progress.evaluations, self._sums, self.trackers)
        try:
            self.save(log, folder, checkpoint_path)
            while self.progress.epoch < self.schedule.max_epoch:
                self._train_epoch(log, folder, checkpoint_path)
                self._end_epoch(log, folder)
                self.save(log, folder, checkpoint_path)
        finally:
            log.close()
        if self.last_state is None:
            self.last_state = state_without_clip(self.model)
        if self.schedule.select == LAST_WEIGHTS:
            self.best_state, self.progress.best_step = self.last_state, self.progress.step

    @property
    def final_states(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Once trained: the last weights, and the best (the last where no evaluation ever scored above 0)."""
        if self.last_state is None:
            raise ValueError("the training has not ended")
        return self.last_state, self.best_state or self.last_state

    def _train_epoch(self, log: RunLog | NoLog, folder: Path, checkpoint_path: Path | None) -> None:
        progress, batches = self.progress, self.batch_sampler.epoch(self.progress.epoch)
        self.model.train(not progress.eval_mode)
        place = progress.epoch, progress.batch
        on_gpu = self.device.type == "cuda"
        loader = load_batches(self.bags, batches, self.workers, *place, rank_slice, pin=on_gpu)
        title = f"{self.label}epoch {progress.epoch + 1}/{self.schedule.max_epoch}"
        totals: list[float] = []
        # Its processes end with it, also where an error keeps this frame alive.
        with (
            contextlib.closing(loader),
            tqdm(total=len(batches), initial=progress.batch, desc=title, unit="step", disable=None) as bar,
        ):
            for batch in loader:
                rows = batches[progress.batch]
                losses = self._step(*batch, len(rows))
                progress.batch += 1
                progress.step += 1
                lr = self.optimizer.param_groups[0]["lr"]
                self._pending.append((progress.step, rows, losses, self._gradient_norm(), lr))
                due = self._evaluation_due(progress.batch - 1, len(rows))
                full = due or progress.batch == len(batches) or len(self._pending) >= self._log_every
                # Several processes only ask each other now and then: a GPU works ahead in between.
                ask = full or rank_info().world_size == 1
                stop = ask and any_rank(self.stop.is_set())
                if full or stop:
                    totals += self._log_losses(log, bar)
                if due:
                    self._keep_if_best(log, folder)
                    # Evaluation has put the model into eval mode.
                    progress.eval_mode = self.schedule.paper
                    self.model.train(not progress.eval_mode)
                if due or stop:
                    self.save(log, folder, checkpoint_path)
                if stop:
                    raise Stopped
        if totals:
            tqdm.write(f"{title}: loss {sum(totals) / len(totals):.4f}")

    def _step(self, visual: Tensor, lengths: Tensor, targets: Tensor, count: int) -> dict[str, Tensor]:
        """One optimizer step on a batch of ``count`` rows, of which these are this process's part.

        The loss terms stay on the device, so that a GPU need not wait for their values.
        """
        visual, lengths, targets = (tensor.to(self.device, non_blocking=True) for tensor in (visual, lengths, targets))
        terms = self.training_step(visual, lengths, targets, count, self.progress.step)
        self.optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer.step()
        return {name: term.detach() for name, term in terms.items()}

    def _gradient_norm(self) -> Tensor:
        """Of the last step, on the device; not finite where a gradient is not, or is too large to be squared."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _log_losses(self, log: RunLog | NoLog, bar: tqdm) -> list[float]:
        """Write the losses of the steps since the last call; their sums.

        ``UserError`` for a step whose loss or gradient is not finite. Weights are saved after this only.
        """
        pending, self._pending = self._pending, []
        values = torch.stack([torch.stack([*losses.values(), norm]) for _, _, losses, norm, _ in pending]).tolist()
        for (step, rows, losses, _, lr), (*row, norm) in zip(pending, values, strict=True):
            terms = dict(zip(losses, row, strict=True))
            if not all(map(math.isfinite, row)):
                raise self._diverged(f"loss is not finite at step {step} ({terms})", rows)
            if not math.isfinite(norm):
                raise self._diverged(f"loss is finite at step {step} ({terms}), but not its gradient", rows)
            log.log_step(step, self.progress.epoch, terms, lr)
        bar.set_postfix({name: f"{value:.4f}" for name, value in terms.items()}, refresh=False)
        bar.update(len(pending))
        return [sum(row[:-1]) for row in values]

    def _diverged(self, what: str, rows: np.ndarray) -> UserError:
        videos = list(dict.fromkeys(self.bags.entries[row].video for row in rows))
        more = f" and {len(videos) - _VIDEOS_NAMED} more" if len(videos) > _VIDEOS_NAMED else ""
        return UserError(
            f"{self.label}{what}; nothing of this step is saved: lower --lr, or look at the features of its videos, "
            f"{', '.join(videos[:_VIDEOS_NAMED])}{more} ('python -m clipfusionvad doctor' does)"
        )

    def _evaluation_due(self, index: int, samples: int) -> bool:
        """Whether batch ``index`` of an epoch, of that many samples, is followed by an evaluation."""
        return bool(self.schedule.eval_every) and index > 0 and index * samples % self.schedule.eval_every == 0

    def _end_epoch(self, log: RunLog | NoLog, folder: Path) -> None:
        self._step_scheduler()
        batches = self.batch_sampler.epoch(self.progress.epoch)
        if not any(self._evaluation_due(index, len(rows)) for index, rows in enumerate(batches)):
            self._keep_if_best(log, folder)
        if self.progress.epoch + 1 == self.schedule.max_epoch:
            self.last_state = state_without_clip(self.model)
        if self.schedule.paper and self.best_state is not None and self.schedule.select != LAST_WEIGHTS:
            self.model.load_state_dict(self.best_state, strict=False)
        self.progress.epoch += 1
        self.progress.batch, self.progress.eval_mode = 0, False

    def _keep_if_best(self, log: RunLog | NoLog, folder: Path) -> None:
        metrics = self.evaluate(self.model)
        select = next(iter(metrics)) if self.schedule.select == LAST_WEIGHTS else self.schedule.select
        score = metrics[select]
        improved = self.schedule.select == LAST_WEIGHTS or score > self.progress.best_score
        if improved:
            self.progress.best_score, self.progress.best_step = score, self.progress.step
            self.best_state = state_without_clip(self.model)
            if is_main():
                write_torch(folder / BEST, model_content(self.hparams, self.best_state, step=self.progress.step))
        log.log_evaluation(
            {
                "step": self.progress.step,
                "epoch": self.progress.epoch,
                "improved": improved,
                "metrics": metrics,
            }
        )
        self.progress.evaluations += 1
        mark = "  *" if improved else ""
        tqdm.write(f"{self.label}step {self.progress.step}: {select} {score:.4f}{mark}")

    def save(self, log: RunLog | NoLog, folder: Path, checkpoint_path: Path | None) -> None:
        """Write the whole state to ``last.pt``: it alone decides where a resumed run goes on.

        The state before becomes ``previous.pt``, in case the last one gets damaged.
        """
        if not is_main():
            return
        log.flush()
        content = model_content(
            self.hparams,
            state_without_clip(self.model),
            progress=asdict(self.progress),
            optimizer_state_dict=self.optimizer.state_dict(),
            scheduler_state_dict=self.scheduler.state_dict(),
            best_state_dict=self.best_state,
            last_state_dict=self.last_state,
            rng_state=torch.get_rng_state(),
            device_rng_state=torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            same_run=self._same_run,
            run=str(folder.resolve()),
            records=dict(log.sums),
        )
        if self._has_saved:
            link_or_copy(folder / LAST, folder / PREVIOUS)
        write_torch(folder / LAST, content)
        self._has_saved = True
        if checkpoint_path is not None:
            link_or_copy(folder / LAST, checkpoint_path)

    def resume(self, path: Path) -> None:
        """Continue from a state that ``save`` wrote, or from a training checkpoint of the original code.

        Raises ``UserError`` for what is none, or that of another run; ``Damaged`` before anything has changed.
        """
        content = read_checkpoint(path, "checkpoint")
        if not isinstance(content, dict) or "optimizer_state_dict" not in content:
            raise UserError(f"{path} is no training checkpoint (it holds no optimizer state)")
        restore = self._restore if content.get("format") == FORMAT else self._resume_released
        try:
            restore(content, path)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path} is not a state that a training can go on from ({error!r})") from error

    def _restore(self, content: Mapping[str, Any], path: Path) -> None:
        """Take over a state of ours."""
        saved = {**content["same_run"], "model": current_hparams(content["same_run"]["model"])}
        differing = [key for key, value in self._same_run.items() if saved.get(key) != value]
        if differing:
            raise UserError(
                f"{path} is the state of a run with another {' and '.join(differing)}: "
                f"resume it with the options that its options.yaml records"
            )
        self._load_model(content["model_state_dict"], path)
        self.optimizer.load_state_dict(content["optimizer_state_dict"])
        self.scheduler.load_state_dict(content["scheduler_state_dict"])
        self.progress = Progress(**content["progress"])
        if not all(isinstance(value, kind) for value, kind in zip(astuple(self.progress), _PROGRESS, strict=True)):
            raise ValueError(f"progress {content['progress']}")
        self.best_state, self.last_state = content["best_state_dict"], content["last_state_dict"]
        # States of older versions say nothing of the records.
        self._sums = content.get("records", {})
        torch.set_rng_state(content["rng_state"])
        if self.device.type == "cuda" and content["device_rng_state"] is not None:
            torch.cuda.set_rng_state(content["device_rng_state"], self.device)

    def _resume_released(self, content: Mapping[str, Any], path: Path) -> None:
        """{epoch, model_state_dict, optimizer_state_dict, ap}: go on after that epoch with its weights as best."""
        absent = [key for key in ("epoch", "ap", "model_state_dict") if key not in content]
        if absent:
            raise UserError(f"{path} is no training checkpoint (it holds no {absent[0]})")
        state = content["model_state_dict"]
        self._load_model(state, path)
        # Their optimizer numbers all parameters in the order of the state dict, frozen CLIP included.
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        names = [key for key in state if not key.endswith(buffers)]
        moments = {names[index]: value for index, value in content["optimizer_state_dict"]["state"].items()}
        own = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        merged = self.optimizer.state_dict()
        merged["state"] = {index: moments[name] for index, name in enumerate(own) if name in moments}
        self.optimizer.load_state_dict(merged)
        self.progress = Progress(epoch=int(content["epoch"]) + 1, best_score=float(content["ap"]))
        for _ in range(self.progress.epoch):
            self._step_scheduler()
        self.best_state = state_without_clip(self.model)

    def _step_scheduler(self) -> None:
        with warnings.catch_warnings():
            # A resumed training may end an epoch before it has made a step of its own.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()

    @cached_property
    def _same_run(self) -> dict[str, Any]:
        """What must not change when a run is resumed; it may be made longer."""
        videos = [(entry.path.name, entry.label) for entry in self.bags.entries]
        batches = hashlib.sha256(repr((videos, [batch.tolist() for batch in self.batch_sampler.epoch(0)])).encode())
        hparams = {key: value for key, value in self.hparams.items() if key != "clip"}
        # A cosine falls to its end, so a longer one has other rates from the start.
        may_differ = () if self.schedule.lr_schedule == "cosine" else ("max_epoch",)
        schedule = {key: value for key, value in asdict(self.schedule).items() if key not in may_differ}
        schedule |= {"milestones": list(schedule["milestones"]), "betas": list(schedule["betas"])}
        return {"model": hparams, "schedule": schedule, "training list or batch order": batches.hexdigest()}

    def _load_model(self, state: dict[str, Tensor], path: Path) -> None:
        load_model_file(self.model, ModelFile(str(path), state))
