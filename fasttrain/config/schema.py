"""All settings, as frozen dataclasses. `Recipe` has the settings of a run; the others are its parts.

The line under each field documents it; `fasttrain recipes NAME` prints these lines.
"""

import math
from dataclasses import dataclass, field
from datetime import datetime

from fasttrain.config.choices import COMPILE_MODES, CRITERIA, DECODERS, DEVICES, LINKS, ON_BAD, PRECISIONS, TRACKERS
from fasttrain.losses.base import Loss

AUTOAUGMENT_POLICIES = ("none", "imagenet", "imagenet-24")
SCHEDULES = ("cosine", "step")
RANDAUGMENT_OPERATIONS = 8  # the maximum per image
IMAGE_SIZES = (8, 4096)  # minimum and maximum side of a square image, in pixels
# For pixels scaled to [0, 1]. Every network is trained and evaluated on pixels normalized with these.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _one_of(choices: tuple[str, ...]) -> str:
    return f"one of {', '.join(choices)}"


def _require(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{key} must be {rule}, not {value!r}")


@dataclass(frozen=True)
class DataConfig:
    """Where the images are."""

    train: tuple[str, ...] = ()
    """Folders or files of training images; none: the demo set."""
    val: str = ""
    """Folder or file of validation images; empty: DIR/val next to a DIR/train, or the file's split val."""
    on_bad: str = "stop"
    """A training image that cannot be decoded: stop ends the run, skip trains on the next image of its class."""
    links: str = "inside"
    """inside: take links to places inside the folder, and ignore others; follow: take all links."""
    max_megapixels: float = 179.0
    """The most pixels of an image, in millions. Larger ones are refused, because they may fill the memory."""
    folds: int = 0
    """Cross-validation: train on all but one of so many equal parts of the training images; 0: on all images."""
    fold: int = 0
    """The part to validate on, counted from 0, with folds."""
    balance: float = 0.0
    """How training images are drawn: 0 by image, 1 by class, between: a class of n images n^(1 − balance) times."""

    def __post_init__(self) -> None:
        _require(self.on_bad in ON_BAD, "on_bad", "stop or skip", self.on_bad)
        _require(self.links in LINKS, "links", "inside or follow", self.links)
        _require(self.max_megapixels > 0, "max_megapixels", "above 0", self.max_megapixels)
        _require(self.folds == 0 or 2 <= self.folds <= 1000, "folds", "0, or 2 to 1000", self.folds)
        _require(0 <= self.fold < max(1, self.folds), "fold", f"0 to {max(0, self.folds - 1)}", self.fold)
        _require(0 <= self.balance <= 1, "balance", "in [0, 1]", self.balance)


@dataclass(frozen=True)
class OptimConfig:
    """SGD with momentum, a warm-up from 0, then a schedule; both change the learning rate at every step."""

    lr: float = 0.1
    """Peak learning rate for a batch of lr_batch images; it scales linearly with the batch."""
    lr_batch: int = 256
    """Batch size that lr is for; 0: lr does not scale with the batch."""
    lr_scale: float = 1.0
    """Factor of the learning rate."""
    momentum: float = 0.9
    """Momentum, in [0, 1)."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 1e-4
    """Weight decay (L2, added to the gradient)."""
    decay_norm_bias: bool = True
    """Apply weight decay to biases and to the weights of norms too."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up from 0."""
    schedule: str = "cosine"
    """After the warm-up: cosine (down to 0) or step (times step_factor at each of step_epochs)."""
    step_epochs: tuple[int, ...] = (30, 60, 90)
    """Epochs at whose start schedule=step lowers the learning rate, counted from the start of the run."""
    step_factor: float = 0.1
    """Factor of the learning rate at each of step_epochs."""
    impl: str = "torch"
    """Fused SGD kernel: torch, or apex, which needs NVIDIA's apex. Both compute the same."""

    def __post_init__(self) -> None:
        _require(self.impl in ("torch", "apex"), "impl", "torch or apex", self.impl)
        _require(self.lr > 0, "lr", "above 0", self.lr)
        _require(self.lr_scale > 0, "lr_scale", "above 0", self.lr_scale)
        _require(self.schedule in SCHEDULES, "schedule", _one_of(SCHEDULES), self.schedule)
        _require(all(epoch >= 1 for epoch in self.step_epochs), "step_epochs", "epochs of 1 or more", self.step_epochs)
        _require(0 < self.step_factor < 1, "step_factor", "in (0, 1)", self.step_factor)
        _require(self.lr_batch >= 0, "lr_batch", "0 or more", self.lr_batch)
        _require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        _require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        _require(self.warmup_epochs >= 0, "warmup_epochs", "0 or more", self.warmup_epochs)


@dataclass(frozen=True)
class AugmentConfig:
    """Per image: a random resized crop, a horizontal flip, a policy (AutoAugment or RandAugment), random erasing."""

    crop_area: tuple[float, float] = (0.08, 1.0)
    """Minimum and maximum area of the crop, as a fraction of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Minimum and maximum width / height of the crop; the draw is log-uniform."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    autoaugment: str = "imagenet"
    """AutoAugment policy: imagenet (the paper's 25 sub-policies), imagenet-24 (without the last) or none."""
    randaugment: int = 0
    """Operations of RandAugment per image, instead of AutoAugment; 0: none."""
    randaugment_magnitude: int = 9
    """Magnitude of RandAugment, 0 … 30."""
    warps: str = "nearest"
    """Interpolation of rotations, shears and translations: nearest (as in the papers' code) or linear."""
    erase: float = 0.0
    """Probability of random erasing: a rectangle is filled with ImageNet's mean color."""
    erase_area: tuple[float, float] = (0.02, 0.33)
    """Minimum and maximum area of the rectangle, as a fraction of the crop's area."""
    erase_ratio: tuple[float, float] = (0.3, 3.3)
    """Minimum and maximum height / width of the rectangle; the draw is log-uniform."""

    def __post_init__(self) -> None:
        for part in ("crop", "erase"):
            low, high = getattr(self, f"{part}_area")
            _require(0 < low <= high <= 1, f"{part}_area", "two increasing fractions in (0, 1]", (low, high))
            low, high = getattr(self, f"{part}_ratio")
            _require(0 < low <= high, f"{part}_ratio", "two increasing numbers above 0", (low, high))
        for key in ("flip", "erase"):
            _require(0 <= getattr(self, key) <= 1, key, "in [0, 1]", getattr(self, key))
        rule = _one_of(AUTOAUGMENT_POLICIES)
        _require(self.autoaugment in AUTOAUGMENT_POLICIES, "autoaugment", rule, self.autoaugment)
        _require(self.warps in ("nearest", "linear"), "warps", "nearest or linear", self.warps)
        maximum = RANDAUGMENT_OPERATIONS
        _require(0 <= self.randaugment <= maximum, "randaugment", f"0 to {maximum} operations", self.randaugment)
        valid_magnitude = 0 <= self.randaugment_magnitude <= 30
        _require(valid_magnitude, "randaugment_magnitude", "0 to 30", self.randaugment_magnitude)
        one_policy = self.autoaugment == "none" or not self.randaugment
        _require(one_policy, "autoaugment", "none where randaugment is used instead", self.autoaugment)


@dataclass(frozen=True)
class MixConfig:
    """Per batch: CutMix, or mixup, or neither."""

    cutmix: float = 0.5
    """Probability that a batch gets CutMix."""
    cutmix_alpha: float = 1.0
    """λ of CutMix is drawn from Beta(cutmix_alpha, cutmix_alpha)."""
    mixup: float = 0.0
    """Probability that a batch gets mixup."""
    mixup_alpha: float = 0.2
    """λ of mixup is drawn from Beta(mixup_alpha, mixup_alpha)."""

    def __post_init__(self) -> None:
        for key in ("cutmix", "mixup"):
            _require(0 <= getattr(self, key) <= 1, key, "a probability in [0, 1]", getattr(self, key))
            alpha = getattr(self, f"{key}_alpha")
            _require(alpha > 0, f"{key}_alpha", "above 0", alpha)
        rule = f"at most {1 - self.cutmix:g} where cutmix is {self.cutmix:g}"
        _require(self.cutmix + self.mixup <= 1, "mixup", rule, self.mixup)

    @property
    def kinds(self) -> set[bool]:
        """The kinds of batches in a run: True for mixed ones, False for others."""
        share = self.cutmix + self.mixup
        return {True} if math.isclose(share, 1) else {True, False} if share else {False}


@dataclass(frozen=True)
class InitConfig:
    """Weights to start from."""

    weights: str = ""
    """A run's folder, a checkpoint, or a file of a timm network's weights; empty: random weights."""
    averaged: bool = True
    """Load a checkpoint's averaged weights where it has them."""
    force_scratch: bool = False
    """Allow random weights for losses that do not converge from them."""


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average of the weights, which is evaluated and saved too."""

    decay: float = 0.0
    """Decay per step; 0: no average. Step t uses min(1 − 1/t, decay), so it starts as the plain mean."""

    def __post_init__(self) -> None:
        _require(0 <= self.decay < 1, "decay", "in [0, 1)", self.decay)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and which checkpoints to keep. The last step of a run is always saved."""

    every_epochs: int = 1
    """Epochs between two saves."""
    every_steps: int = 0
    """Also save every N steps; 0: only at the ends of epochs."""
    keep: int = 2
    """Number of newest checkpoints to keep, besides the best."""
    archive_epochs: int = 0
    """Also keep the checkpoint of every N-th epoch permanently; 0: none."""
    on_error: str = "stop"
    """A checkpoint that cannot be written: stop ends the run, go_on continues (the last one must be written)."""

    def __post_init__(self) -> None:
        _require(self.every_epochs >= 1, "every_epochs", "1 or more", self.every_epochs)
        _require(self.every_steps >= 0, "every_steps", "0 or more", self.every_steps)
        _require(self.keep >= 1, "keep", "1 or more", self.keep)
        _require(self.archive_epochs >= 0, "archive_epochs", "0 or more", self.archive_epochs)
        _require(self.on_error in ("stop", "go_on"), "on_error", "stop or go_on", self.on_error)


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on the validation images. `best` is the best of the checkpoints whose weights were evaluated."""

    every_epochs: int = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    best: str = "top1"
    """The score that decides: top1, top5, balanced_accuracy, macro_f1, or the lowest log_loss or calibration_error."""
    patience: int = 0
    """Evaluations without a better score after which the run ends early; 0: it never does."""

    def __post_init__(self) -> None:
        _require(self.every_epochs >= 1, "every_epochs", "1 or more", self.every_epochs)
        _require(self.best in CRITERIA, "best", _one_of(CRITERIA), self.best)
        _require(self.patience >= 0, "patience", "0 or more", self.patience)


@dataclass(frozen=True)
class BudgetConfig:
    """A time after which a run ends, with its learning rate at 0, instead of after `epochs`."""

    seconds: float = 0.0
    """How long the run may take, from the start of its command, without the time between two commands; 0: any time."""
    until: str = ""
    """When the run ends, such as 2027-01-31T18:30+01:00; empty: at no given time."""

    def __post_init__(self) -> None:
        _require(self.seconds >= 0, "seconds", "0 or more", self.seconds)
        if self.until:
            try:
                aware = datetime.fromisoformat(self.until).tzinfo is not None
            except ValueError:
                aware = False
            _require(aware, "until", "a time with its zone, such as 2027-01-31T18:30+01:00", self.until)
            _require(not self.seconds, "seconds", "0 where until is set", self.seconds)

    def __bool__(self) -> bool:
        return bool(self.seconds or self.until)


@dataclass(frozen=True)
class GuardConfig:
    """A step whose loss or gradient is not finite changes nothing. After too many of them the run goes back."""

    patience: int = 10
    """Failed steps in a row after which the run goes back to the checkpoint before them, and skips their images."""
    rewinds: int = 2
    """How many times a run may go back before it ends with a report."""

    def __post_init__(self) -> None:
        _require(self.patience >= 1, "patience", "1 or more steps", self.patience)
        _require(self.rewinds >= 0, "rewinds", "0 or more", self.rewinds)


@dataclass(frozen=True)
class ResumeConfig:
    """What may differ from the checkpoint that a run resumes from."""

    allow: tuple[str, ...] = ()
    """Names such as data, classes, optim or optim.lr."""


@dataclass(frozen=True)
class MachineConfig:
    """How to run. None of this changes the order of the images, and only `decoder` changes their pixels slightly."""

    device: str = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    workers: int = 0
    """DALI threads per rank; 0: this rank's share of the cores, minus two on a GPU."""
    decoder: str = "auto"
    """On a GPU: cpu, gpu (nvJPEG), gpu-region, gpu-hardware (JPEG engine), or auto, the fastest known to be safe."""
    hardware_load: float = 0.65
    """Share of a batch that decoder=gpu-hardware gives to the JPEG engine."""
    compile: str = "auto"
    """torch.compile: auto (on for CUDA), on, off, or graphs, which also replays steps as CUDA graphs on one GPU."""
    align: str = "auto"
    """Pad TResNet's widths to multiples of 8: auto (on a GPU in bf16 or fp16), on, off. Checkpoints do not change."""
    log_steps: int = 20
    """Steps between two log points, where the host waits for the device."""
    hash_batches: bool = False
    """Log a hash of every step's images; slow."""
    hang_timeout: float = 1800.0
    """Seconds without progress after which a run on several ranks ends and names the rank that is behind; 0: never."""
    tensorboard: bool = True
    """Write TensorBoard files where TensorBoard is installed."""
    track: tuple[str, ...] = ()
    """Experiment trackers to log to as well: wandb:PROJECT, trackio:PROJECT, mlflow:EXPERIMENT."""
    preload: bool = False
    """Read all images' files once before the first step, where a disk is cold or slow."""
    stage: str = ""
    """A local folder to copy packs, shards and parquet files to, and read them from; empty: only addresses are."""

    def __post_init__(self) -> None:
        _require(self.device in DEVICES, "device", _one_of(DEVICES), self.device)
        _require(0 <= self.workers <= 1024, "workers", "between 0 and 1024", self.workers)
        _require(self.decoder in DECODERS, "decoder", _one_of(DECODERS), self.decoder)
        _require(0 <= self.hardware_load <= 1, "hardware_load", "a share in [0, 1]", self.hardware_load)
        _require(self.align in ("auto", "on", "off"), "align", "auto, on or off", self.align)
        _require(self.compile in COMPILE_MODES, "compile", _one_of(COMPILE_MODES), self.compile)
        _require(self.log_steps >= 1, "log_steps", "1 or more", self.log_steps)
        _require(self.hang_timeout >= 0, "hang_timeout", "0 or more seconds", self.hang_timeout)
        for tracker in self.track:
            name, _, project = tracker.partition(":")
            valid = name in TRACKERS and bool(project.strip()) and project.isprintable()
            _require(valid, "track", "wandb:PROJECT, trackio:PROJECT or mlflow:EXPERIMENT", tracker)
        _require(len({*self.track}) == len(self.track), "track", "a list of different trackers", list(self.track))


@dataclass(frozen=True)
class Recipe:
    """All settings of a run."""

    name: str
    """Name of the recipe; the run's folder is runs/NAME."""
    arch: str
    """Network, by timm's name."""
    image_size: int = 224
    """Side of the square training images, in pixels."""
    batch_size: int = 128
    """Images per step, over all ranks. With several views per image the network sees more rows."""
    images_per_class: int = 0
    """Images of each class in a batch, which has batch_size / images_per_class classes; 0: random images."""
    micro_batch: int = 0
    """Images per forward pass of a rank. Fewer than its share of the batch: gradients accumulate. 0: its share."""
    epochs: int = 90
    """Passes over the training images."""
    seed: int = 0
    """Seed of the weights and of every random draw."""
    precision: str = "auto"
    """auto (bf16 or fp16 on a GPU, fp32 on a CPU), bf16, fp16 or fp32."""
    zero_gamma: bool = True
    """Start the last norm of each residual block at 0 where timm does so; false: start all norms at 1."""
    losses: tuple[Loss, ...] = ()
    init: InitConfig = field(default_factory=InitConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        valid_name = self.name.isprintable() and not {"", ".", ".."} & set(self.name.split("/"))
        _require(valid_name, "name", "printable, and a path inside runs/", self.name)
        _require(bool(self.arch), "arch", "the name of a network", self.arch)
        smallest, largest = IMAGE_SIZES
        in_range = smallest <= self.image_size <= largest
        _require(in_range, "image_size", f"{smallest} to {largest} pixels", self.image_size)
        _require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)
        _require(self.images_per_class >= 0, "images_per_class", "0 or more", self.images_per_class)
        _require(self.micro_batch >= 0, "micro_batch", "0 or more", self.micro_batch)
        _require(self.epochs >= 1, "epochs", "1 or more", self.epochs)
        _require(0 <= self.seed < 2**63, "seed", "in [0, 2^63)", self.seed)
        _require(self.precision in PRECISIONS, "precision", _one_of(PRECISIONS), self.precision)
        fits = not self.budget or self.optim.schedule == "cosine"
        _require(fits, "optim.schedule", "cosine with a budget of time", self.optim.schedule)
        names = [loss.name for loss in self.losses]
        classifies = any(loss.classifies for loss in self.losses)
        _require(
            classifies, "losses", "cross_entropy or another that trains the classifier, alone or with others", names
        )
        for loss in self.losses:
            _require(loss.weight >= 0, f"losses.{loss.name}.weight", "0 or more", loss.weight)
            if loss.groups:
                rule = f"2 or more with the loss {loss.name}, and a divisor of batch_size"
                _require(self.images_per_class >= 2, "images_per_class", rule, self.images_per_class)
            if loss.unmixed:
                share = self.mix.cutmix + self.mix.mixup
                rule = f"below 1 together with mix.mixup: the loss {loss.name} takes images that are not mixed"
                _require(share < 1, "mix.cutmix", rule, share)
            if loss.reads_ema:
                _require(self.ema.decay > 0, "ema.decay", f"above 0 with the loss {loss.name}", self.ema.decay)

    @property
    def views(self) -> int:
        """Augmented views of each image that the network sees."""
        return max([1, *(loss.views for loss in self.losses)])

    @property
    def ema_views(self) -> int:
        """Further views per image, for the averaged network: 1 where a loss reads its logits, else 0. Never mixed."""
        return int(any(loss.reads_ema for loss in self.losses))

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up, for this batch size."""
        scale = self.batch_size / self.optim.lr_batch if self.optim.lr_batch else 1.0
        return self.optim.lr_scale * self.optim.lr * scale
