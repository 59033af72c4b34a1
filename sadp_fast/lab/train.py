"""Training of one network by one method: the data set lives on the device, and so does all that an epoch computes."""

from __future__ import annotations

import math
import os
import pickle
import time
import warnings
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..memory.packed_spikes import packed_spikes
from ..memory.weight_casting import cast_weights_at_once
from ..nn.node import reset
from ..prune.graphed_step import GraphedStep
from ..prune.probabilities import relative_variance
from ..prune.sadp import SADP
from ..statistics.exact_norms import gradient_norms
from . import models
from .augmentation import crop_flip_normalise, draw_augmentation, draw_mixup, mixup
from .data import Dataset, described, differ
from .settings import AMP, EXACT, TrainConfig, device_kind
from .sources import sources

RISE = 0.05  # share of training in which the learning rate rises to its peak
REPORT_EVERY = 10  # steps between two reports of progress
EVALUATION_BATCH = 500
STATEFUL = ("model", "optimizer", "scaler", "sadp")  # the parts of a Trainer whose state a checkpoint holds


class TrainError(RuntimeError):
    """Training cannot resume or go on; the message is one sentence that says why and the remedy."""


@dataclass(frozen=True)
class Result:
    """One method's run: what it ran with, an entry an epoch (see `run`), and what sources trained it, in order."""

    config: TrainConfig
    history: list[dict[str, Any]]
    sources: list[str]


class Progress:
    """What `run` tells a viewer while it trains; this one shows nothing."""

    def step(self, epoch: int, share: float, step: int, loss: float | None, kept: float) -> None:
        """Every few steps: the running epoch, counted from 1, the share of it that is done, the step in it, the mean
        loss so far in it, and the share of the examples that it keeps."""

    def epoch(self, entry: dict[str, Any]) -> None:
        """After each epoch: its entry of the history."""


def run(
    config: TrainConfig, data: Dataset, out: Path, viewers: Sequence[Progress] = (), resume: bool = False
) -> Result:
    """Train one network on `data`, with a checkpoint in the folder `out` before the first and after every epoch.

    An entry of the history holds epoch, ratio (pruned share), steps, examples_trained (so far), lr (of the last step),
    loss (what was trained on, as the method weighs it), test_accuracy (0 to 1), test_loss (mean cross-entropy, without
    label smoothing), seconds, and relative_variance (None without pruning, or where it is infinite). Seconds hold
    everything that training and pruning do, but neither evaluation nor checkpoints. With `resume`, the checkpoint in
    `out`, if there is one, is continued. Raises TrainError.
    """
    trainer = Trainer(config, data)
    sadp, history, checkpoint = trainer.sadp, trainer.history, out / "checkpoint.pt"
    if resume and checkpoint.exists():
        trainer.load(checkpoint)
    else:
        trainer.save(checkpoint)
    for epoch in range(sadp.epoch, config.epochs):
        start = trainer.clock()
        loss = train_epoch(trainer, viewers)
        seconds = trainer.clock() - start
        ratio, (accuracy, test_loss) = sadp.ratios[epoch], trainer.evaluate()
        entry = {
            "epoch": epoch + 1,
            "ratio": ratio,
            "steps": loss.steps,
            "examples_trained": int(sadp.examples_trained),
            "lr": trainer.lr,
            "loss": loss.read(),
            "test_accuracy": accuracy,
            "test_loss": finite(test_loss),
            "seconds": seconds,
            "relative_variance": finite(relative_variance(sadp.scores, sadp.probabilities)) if ratio > 0 else None,
        }
        finish_epoch(trainer, entry, checkpoint, viewers)
    return Result(config, history, trainer.sources)


def train_epoch(trainer: Trainer, viewers: Sequence[Progress]) -> RunningMean:
    """Train for SADP's next epoch; the mean of its losses."""
    config, sadp = trainer.config, trainer.sadp
    epoch = sadp.epoch
    kept = 1 - sadp.ratios[epoch]
    planned_steps = max(1.0, kept * len(trainer.data.train_labels) / config.batch_size)
    loss = RunningMean(trainer.device)
    trainer.model.train()
    done, trained = sadp.progress, sadp.examples_trained
    for step, index in enumerate(sadp.batches(config.batch_size)):
        before, done = done, sadp.progress
        new, trained = sadp.examples_trained - trained, sadp.examples_trained
        loss.add(trainer.step(index, learning_rate(config.lr, (before + done) / 2)), new / config.batch_size)
        if step % REPORT_EVERY == 0:
            shown, share = loss.peek(), min((step + 0.5) / planned_steps, 1.0)
            for viewer in viewers:
                viewer.step(epoch + 1, share, step, shown, kept)
    return loss


def finish_epoch(trainer: Trainer, entry: dict[str, Any], checkpoint: Path, viewers: Sequence[Progress]) -> None:
    """Keep an epoch's entry and write the checkpoint, then tell the viewers; raises TrainError for a diverged loss."""
    if not math.isfinite(entry["loss"]):
        raise TrainError(f"the loss became {entry['loss']} in epoch {entry['epoch']}: lower --lr or change --amp")
    trainer.history.append(entry)
    if trainer.sources[-1] != sources():
        trainer.sources.append(sources())
    trainer.save(checkpoint)
    for viewer in viewers:
        viewer.epoch(entry)


def finite(value: float | Tensor) -> float | None:
    """The number, or None for what JSON cannot hold."""
    value = float(value)
    return value if math.isfinite(value) else None


def prepare(config: TrainConfig, data: Dataset) -> None:
    """Take some throw-away training steps and evaluate, so that kernels are compiled before any method's clock starts.

    Writes nothing; raises ValueError for a configuration that cannot run on this data set.
    """
    trainer = Trainer(config, data)
    trainer.throw_away_steps()
    trainer.evaluate(batches=1)
    trainer.clock()


def check(config: TrainConfig, data: Dataset) -> None:
    """Raise ValueError for settings that training on this data set cannot have."""
    count = len(data.train_labels)
    if config.batch_size > count:
        raise ValueError(
            f"the batch size {config.batch_size} is above the number of training examples, {count}: lower it"
        )
    if config.cutout > 0 and augmentation(config, data) == "none":
        raise ValueError(
            f"cutout is {config.cutout}, but examples of {data.name} are not augmented (by default only images with "
            "three colours are): set cutout to 0, or augment to crop-flip"
        )


def augmentation(config: TrainConfig, data: Dataset) -> str:
    """How training images are changed at random: "crop-flip", "crop" or "none"."""
    if config.augment != "auto":
        return config.augment
    return "crop-flip" if data.augmented else "none"


def learning_rate(peak: float, done: float) -> float:
    """Linear rise to the peak, then half a cosine down to 0; `done` is the share of training that lies behind.

    Training is counted in examples, not in epochs (`SADP.progress`): on epochs, a full-data tail would spend a large
    part of a pruned run's examples at a learning rate near 0.
    """
    if done < RISE:
        return peak * done / RISE
    return peak * 0.5 * (1 + math.cos(math.pi * (done - RISE) / (1 - RISE)))


class RunningMean:
    """Mean of an epoch's losses over its examples, summed on the device; only `read` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.total, self.steps, self.batches = torch.zeros((), device=device), 0, 0.0
        self.shown: float | None = None
        self.copy: tuple[Tensor, float, torch.cuda.Event | None] | None = None

    def add(self, loss: Tensor, share: float = 1.0) -> None:
        """A step's loss: the sum over its examples by the size of a batch, of which they are this share.

        Padding adds to the size, but not to the sum.
        """
        self.total += loss
        self.steps += 1
        self.batches += share

    def peek(self) -> float | None:
        """The newest mean that has reached the host (on a GPU that of an earlier call), without waiting."""
        if self.copy and (self.copy[2] is None or self.copy[2].query()):
            self.shown, self.copy = self.copy[0].item() / self.copy[1], None
        if self.copy is None:
            event = torch.cuda.Event() if self.total.is_cuda else None
            self.copy = self.total.to("cpu", non_blocking=True, copy=True), self.batches, event
            if event:
                event.record()
        return self.shown

    def read(self) -> float:
        return self.total.item() / (self.batches or 1.0)


def _spare_cublas_workspaces() -> None:
    """Keep cuBLAS from setting 64 MiB aside on a current GPU, for the classifier's small products.

    Its results are the same in every run with the first of these settings, too. Both are read when cuBLAS is first used
    in the process; what is set already stays.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "128")  # KiB: as many as the above


class Trainer:
    """A network with everything that its training carries from step to step.

    Raises ValueError for a configuration that cannot run on this data set.
    """

    def __init__(self, config: TrainConfig, data: Dataset) -> None:
        check(config, data)
        self.config, self.device = config, torch.device(config.device)
        _spare_cublas_workspaces()
        self.data, self.data_set = data.to(self.device), data.identity
        torch.manual_seed(config.seed)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        self.layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self.model = models.build(config.model, data.shape, data.num_classes, config.time_steps)
        self.model.to(device=self.device, memory_format=self.layout)  # type: ignore[call-overload]
        if config.amp != "off":
            cast_weights_at_once(self.model)
        count, pruning = len(data.train_labels), config.pruning()
        self.sadp = SADP(self.model, count, epochs=config.epochs, settings=pruning)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        # Fused on the GPU: a few kernels a step, and no wait for the host with a gradient scaler. Without one, the
        # whole step is a CUDA graph there, which reads the learning rate from a tensor.
        fused = self.device.type == "cuda"
        graphed = fused and config.amp != "fp16"
        self.lr, self.rate = config.lr, torch.tensor(config.lr, device=self.device) if graphed else None
        lr = config.lr if self.rate is None else self.rate
        weights, optimizer = self.model.parameters(), models.MODELS[config.model].optimizer
        decay = models.WEIGHT_DECAY[optimizer] if config.weight_decay is None else config.weight_decay
        self.optimizer: torch.optim.Optimizer
        if optimizer == "SGD":
            self.optimizer = torch.optim.SGD(weights, lr, momentum=0.9, nesterov=True, weight_decay=decay, fused=fused)
        else:
            self.optimizer = torch.optim.AdamW(weights, lr, weight_decay=decay, fused=fused, capturable=graphed)
        self.run_step = GraphedStep(self._step, self.sadp, [self.generator]) if graphed else self._step
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.history: list[dict[str, Any]] = []
        self.sources = [sources()]  # all that trained it, in order

    def inputs(self, images: Tensor, index: Tensor | None = None, draws: Tensor | None = None) -> Tensor:
        """What the network sees of uint8 images; see `crop_flip_normalise` for `index` and `draws`."""
        return crop_flip_normalise(
            images,
            index,
            draws,
            self.data.mean,
            self.data.std,
            cutout=0 if draws is None else self.config.cutout,
            dtype=AMP[self.config.amp],
            memory_format=self.layout,
        )

    def logits(self, x: Tensor) -> Tensor:
        """What the network says of its inputs."""
        with torch.autocast(self.device.type, AMP[self.config.amp], enabled=self.config.amp != "off"):
            return self.model(x)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of uint8 images as they are."""
        return self.logits(self.inputs(images))

    def step(self, index: Tensor, lr: float) -> Tensor:
        """One optimizer step on the training examples `index` [B]; the loss stays on the device."""
        self.lr = lr
        if self.rate is not None:
            self.rate.fill_(lr)
        else:
            self._set_rate(lr)
        return self.run_step(index)

    def _set_rate(self, lr: float | Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _draws(self, count: int) -> Tensor | None:
        """Random numbers for the augmentation of so many images; None where they stay as they are."""
        kind = augmentation(self.config, self.data)
        if kind == "none":
            return None
        draws = draw_augmentation(count, self.generator, cutout=self.config.cutout > 0)
        if kind == "crop":
            draws[2].zero_()  # which flips no image
        return draws

    def _step(self, index: Tensor) -> Tensor:
        # First of all, so that no gradient takes up memory while the activations do.
        self.optimizer.zero_grad(set_to_none=True)
        x, target = self.inputs(self.data.train_images, index, self._draws(len(index))), self.data.train_labels[index]
        if self.config.mixup > 0:
            x, target = mixup(x, target, draw_mixup(len(x), self.config.mixup, x.device), self.data.num_classes)
        if self.config.score == EXACT and self.sadp.wants_scores:
            self.sadp.give(gradient_norms(self.model, x, target, self.criterion))
        with packed_spikes() if self.config.low_memory else nullcontext():
            loss = self.sadp.loss(self.criterion, self.logits(x), target)
        # Not after the backward pass: a neuron keeps its input for as long as it may be asked for its potential.
        reset(self.model)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def throw_away_steps(self) -> None:
        """Two steps of the first epoch of each kind, whose results nobody wants.

        Epochs differ in whether they are drawn and in whether examples are scored in them: neurons that measure are
        other kernels. In the first step SADP reads the dataflow, in the second it measures by it.
        """
        first: dict[tuple[bool, bool], int] = {}
        for epoch, ratio in enumerate(self.sadp.ratios):
            first.setdefault((ratio > 0, self.sadp.takes_scores(epoch)), epoch)
        for epoch in first.values():
            self.sadp.skip_to(epoch)
            with closing(self.sadp.batches(self.config.batch_size)) as batches:
                for _, index in zip(range(2), batches, strict=False):
                    self.step(index, self.config.lr)

    @torch.no_grad()
    def evaluate(self, batches: int | None = None) -> tuple[float, float]:
        """Accuracy (0 to 1) and mean cross-entropy, not smoothed, of all test examples or of the first batches."""
        self.model.eval()
        labels, size = self.data.test_labels, min(EVALUATION_BATCH, len(self.data.test_labels))
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        starts = range(0, len(labels), size)[:batches]
        for start in starts:
            # The last batch starts earlier rather than being smaller, and counts its new examples only.
            first = min(start, len(labels) - size)
            output, wanted = self.forward(self.data.test_images[first : first + size]), labels[first : first + size]
            correct, losses = output.argmax(1) == wanted, cross_entropy(output.float(), wanted, reduction="none")
            sums += torch.stack([correct.double(), losses.double()])[:, start - first :].sum(1)
            reset(self.model)
        accuracy, loss = (sums / min(len(labels), size * len(starts))).tolist()
        return accuracy, loss

    def clock(self) -> float:
        """Seconds on a monotonic clock, once the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def save(self, path: Path) -> None:
        """Write the checkpoint whole or not at all."""
        state = {
            "config": asdict(self.config),
            "data_set": self.data_set,
            "history": self.history,
            "sources": self.sources,
            **{part: getattr(self, part).state_dict() for part in STATEFUL},
            "generator": self.generator.get_state(),
            "cpu_generator": torch.get_rng_state(),
            "device_generator": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same configuration, on any device of its kind.

        Raises TrainError, and warns where other code began it.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            saved, began, self.sources = state["config"], state["data_set"], list(state["sources"])
        except (OSError, EOFError, RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise TrainError(f"the checkpoint {path} is damaged ({error}): start a new run") from error
        own, saved = ({**c, "device": device_kind(c["device"])} for c in (asdict(self.config), saved))
        for field, value in own.items():
            if saved.get(field) != value:
                raise TrainError(
                    f"{field} is {value!r}, but the run in {path.parent} has {saved.get(field)!r}: "
                    "resume with that value, or start a new run"
                )
        if differ(self.data_set, {**began, "name": self.data_set["name"]}):  # files may be moved
            raise TrainError(
                f"the data set at hand is {described(self.data_set)}, but the run in {path.parent} began with "
                f"{described(began)}: resume with that one, or start a new run"
            )
        others = [name for name in dict.fromkeys(self.sources) if name != sources()]
        if others:
            warnings.warn(
                f"the run in {path.parent} was begun with other sources of sadp_fast ({', '.join(others)}, now "
                f"{sources()}) and goes on with these, whose networks may be others: start a new run to compare it",
                stacklevel=2,
            )
        self.history[:] = state["history"]
        try:
            for part in STATEFUL:
                getattr(self, part).load_state_dict(state[part])
        except ValueError as error:  # defaults that were others when the run began
            raise TrainError(f"the run in {path.parent} cannot go on, {error}: start a new run") from error
        if self.rate is not None:
            self._set_rate(self.rate)  # loading has put a copy there
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["cpu_generator"])
        if state["device_generator"] is not None:
            torch.cuda.set_rng_state(state["device_generator"], self.device)
