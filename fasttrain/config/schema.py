"""Every setting there is, as frozen dataclasses. `Recipe` is the whole of a run; the others are its parts."""

import math
from dataclasses import dataclass, field

from fasttrain.losses.base import Loss

AUTOAUGMENT_POLICIES = ("none", "imagenet", "imagenet-24")
RANDAUGMENT_OPERATIONS = 8  # at most
IMAGE_SIZES = (8, 4096)  # least and most pixels of a square image's side
DECODERS = ("auto", "cpu", "gpu", "gpu-region", "gpu-hardware")  # pipelines/decoders.py says what they do
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
# Of pixels scaled to 0 … 1; every network is trained and evaluated on pixels normalised by these.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _require(holds: bool, key: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{key} must be {rule}, not {value!r}")


@dataclass(frozen=True)
class DataConfig:
    """Where the images are. No `train` folder means the demo set; no `val` means DIR/val where DIR/train is used.

    on_bad: what a training image that cannot be decoded does: `stop` ends the run, `skip` trains on the next image of
    its class (by name, that can be decoded) in its place. Validation always stops.
    """

    train: tuple[str, ...] = ()
    val: str = ""
    on_bad: str = "stop"

    def __post_init__(self) -> None:
        _require(self.on_bad in ("stop", "skip"), "on_bad", "stop or skip", self.on_bad)


@dataclass(frozen=True)
class OptimConfig:
    """SGD with momentum; a warm-up from 0, then a cosine to 0, both per step, or steps.

    The peak learning rate is lr_scale · lr · global batch / lr_batch (linear scaling), or lr_scale · lr where lr_batch
    is 0. schedule `step` multiplies the rate by step_factor at the start of each epoch of step_epochs, which count
    from the start of the run. decay_norm_bias=false takes weight decay off every parameter with at most one dimension
    (biases, norm weights). impl: whose kernels take the step, `torch` or, where it is installed, `apex`; the step is
    the same.
    """

    lr: float = 0.1
    lr_batch: int = 256
    lr_scale: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_norm_bias: bool = True
    warmup_epochs: float = 1.0
    schedule: str = "cosine"
    step_epochs: tuple[int, ...] = (30, 60, 90)
    step_factor: float = 0.1
    impl: str = "torch"

    def __post_init__(self) -> None:
        _require(self.impl in ("torch", "apex"), "impl", "torch or apex", self.impl)
        _require(self.lr > 0, "lr", "above 0", self.lr)
        _require(self.lr_scale > 0, "lr_scale", "above 0", self.lr_scale)
        _require(self.schedule in ("cosine", "step"), "schedule", "cosine or step", self.schedule)
        _require(all(each >= 1 for each in self.step_epochs), "step_epochs", "epochs from 1 on", self.step_epochs)
        _require(0 < self.step_factor < 1, "step_factor", "in (0, 1)", self.step_factor)
        _require(self.lr_batch >= 0, "lr_batch", "0 or more", self.lr_batch)
        _require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        _require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        _require(self.warmup_epochs >= 0, "warmup_epochs", "0 or more", self.warmup_epochs)


@dataclass(frozen=True)
class AugmentConfig:
    """Per image: a random resized crop (area as a share of the image, aspect ratio log-uniform), a horizontal flip
    with probability `flip`, then a policy, then random erasing.

    autoaugment: one sub-policy of AutoAugment; `imagenet` has all 25 of the paper, `imagenet-24` leaves out the last,
    as the DeepBlueAI report does. randaugment: so many operations of RandAugment instead (0: none), each at
    randaugment_magnitude (0 … 30). warps: interpolation of rotations, shears and translations, `nearest` as in the
    implementations of the papers' time, or `linear`. erase: probability with which a rectangle (area as a share of the
    crop, aspect ratio log-uniform) gets ImageNet's mean colour.
    """

    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    autoaugment: str = "imagenet"
    randaugment: int = 0
    randaugment_magnitude: int = 9
    warps: str = "nearest"
    erase: float = 0.0
    erase_area: tuple[float, float] = (0.02, 0.33)
    erase_ratio: tuple[float, float] = (0.3, 3.3)

    def __post_init__(self) -> None:
        for part in ("crop", "erase"):
            low, high = getattr(self, f"{part}_area")
            _require(0 < low <= high <= 1, f"{part}_area", "two rising shares in (0, 1]", (low, high))
            low, high = getattr(self, f"{part}_ratio")
            _require(0 < low <= high, f"{part}_ratio", "two rising numbers above 0", (low, high))
        for key in ("flip", "erase"):
            _require(0 <= getattr(self, key) <= 1, key, "in [0, 1]", getattr(self, key))
        rule = f"one of {', '.join(AUTOAUGMENT_POLICIES)}"
        _require(self.autoaugment in AUTOAUGMENT_POLICIES, "autoaugment", rule, self.autoaugment)
        _require(self.warps in ("nearest", "linear"), "warps", "nearest or linear", self.warps)
        most = RANDAUGMENT_OPERATIONS
        _require(0 <= self.randaugment <= most, "randaugment", f"0 to {most} operations", self.randaugment)
        in_bins = 0 <= self.randaugment_magnitude <= 30
        _require(in_bins, "randaugment_magnitude", "0 to 30", self.randaugment_magnitude)
        alone = self.autoaugment == "none" or not self.randaugment
        _require(alone, "autoaugment", "none where randaugment takes its place", self.autoaugment)


@dataclass(frozen=True)
class MixConfig:
    """Per batch: CutMix with probability `cutmix`, its λ drawn from Beta(cutmix_alpha, cutmix_alpha), or mixup with
    probability `mixup` and λ from Beta(mixup_alpha, mixup_alpha), or neither."""

    cutmix: float = 0.5
    cutmix_alpha: float = 1.0
    mixup: float = 0.0
    mixup_alpha: float = 0.2

    def __post_init__(self) -> None:
        for key in ("cutmix", "mixup"):
            _require(0 <= getattr(self, key) <= 1, key, "a probability in [0, 1]", getattr(self, key))
            alpha = getattr(self, f"{key}_alpha")
            _require(alpha > 0, f"{key}_alpha", "above 0", alpha)
        _require(
            self.cutmix + self.mixup <= 1, "mixup", f"at most {1 - self.cutmix:g}: cutmix has the rest", self.mixup
        )

    @property
    def kinds(self) -> set[bool]:
        """The kinds of batches that there are: mixed ones (True), others (False)."""
        share = self.cutmix + self.mixup
        return {True} if math.isclose(share, 1) else {True, False} if share else {False}


@dataclass(frozen=True)
class InitConfig:
    """Where weights come from: random, or those of a checkpoint (its folder, `last` or `best`, or a run's folder),
    the averaged ones where it has such, unless averaged=false.

    A recipe whose losses do not converge from random weights refuses to start without such, unless force_scratch.
    """

    weights: str = ""
    averaged: bool = True
    force_scratch: bool = False


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average of the weights, evaluated and saved beside them, with the given decay a step (0:
    none). In the first steps it is the plain mean of the weights so far: decay min(1 − 1/(step + 1), decay)."""

    decay: float = 0.0

    def __post_init__(self) -> None:
        _require(0 <= self.decay < 1, "decay", "in [0, 1)", self.decay)


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every `every_epochs` epochs and at the end, and every `every_steps` steps (0: none between). The
    newest `keep`, the best, and that of every `archive_epochs`-th epoch (0: none) are kept.

    on_error: what a full or vanished disk does: `stop` ends the run, `go_on` says so and trains on to the next save.
    The last checkpoint of a run has to be written in either case.
    """

    every_epochs: int = 1
    every_steps: int = 0
    keep: int = 2
    archive_epochs: int = 0
    on_error: str = "stop"

    def __post_init__(self) -> None:
        _require(self.every_epochs >= 1, "every_epochs", "1 or more", self.every_epochs)
        _require(self.every_steps >= 0, "every_steps", "0 or more", self.every_steps)
        _require(self.keep >= 1, "keep", "1 or more", self.keep)
        _require(self.archive_epochs >= 0, "archive_epochs", "0 or more", self.archive_epochs)
        _require(self.on_error in ("stop", "go_on"), "on_error", "stop or go_on", self.on_error)


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores over the validation images every `every_epochs` epochs and at the end. `best` is the best of the
    checkpoints whose weights were evaluated: one of another epoch, or from within one, has no scores."""

    every_epochs: int = 1

    def __post_init__(self) -> None:
        _require(self.every_epochs >= 1, "every_epochs", "1 or more", self.every_epochs)


@dataclass(frozen=True)
class GuardConfig:
    """A step whose loss or gradient is not finite changes nothing. After `patience` such steps in a row the run goes
    back to its last checkpoint from before them and on with the images that come after, at most `rewinds` times; then
    it ends with a report."""

    patience: int = 10
    rewinds: int = 2

    def __post_init__(self) -> None:
        _require(self.patience >= 1, "patience", "1 or more steps", self.patience)
        _require(self.rewinds >= 0, "rewinds", "0 or more", self.rewinds)


@dataclass(frozen=True)
class ResumeConfig:
    """allow: names of what may differ from the checkpoint that a run resumes from: `data`, `classes`, keys of the
    recipe such as `optim.lr`, or parts of it such as `optim`."""

    allow: tuple[str, ...] = ()


@dataclass(frozen=True)
class MachineConfig:
    """How to run, not what to train: none of this changes the order of samples, and only `decoder` their pixels.

    workers: DALI's threads a rank (0: this rank's share of the cores, on a GPU less two, which the loop and the
    decoder's own threads need).
    decoder: what turns files into pixels on a GPU: `cpu`, `gpu` (nvJPEG, whole images), `gpu-region` (nvJPEG, the crop
    alone) or `gpu-hardware` (the GPU's JPEG engine as well; hardware_load is DALI's hw_decoder_load, a share of a
    batch); `auto` is the fastest that is known to be correct with the installed versions, and `fasttrain doctor --gpu`
    tries them all. The pixels of two decoders differ by less than one level of 255 on average.
    compile: torch.compile, `auto` is on for CUDA; `graphs` also replays whole steps as CUDA graphs, on one GPU, where
    the host cannot keep up with it; the memory that a step takes is then its own, and evaluation's comes on top.
    align: fill up TResNet's widths to multiples of 8 by channels that stay 0, for tensor cores; the network's function
    and its checkpoints stay the same; `auto` is on for a TResNet on a GPU in bf16 or fp16.
    log_steps: steps between two log points; the host waits for the device there and, besides, only where a step is
    recorded to be replayed. hash_batches: log a hash of every step's images, in
    their order over all ranks, and wait for them. hang_timeout: seconds without progress after which a run on several
    ranks ends and names the rank that is behind (0: never). tensorboard: write its files, where it is installed.
    """

    device: str = "auto"
    workers: int = 0
    decoder: str = "auto"
    hardware_load: float = 0.65
    compile: str = "auto"
    align: str = "auto"
    log_steps: int = 20
    hash_batches: bool = False
    hang_timeout: float = 1800.0
    tensorboard: bool = True

    def __post_init__(self) -> None:
        _require(self.device in ("auto", "cpu", "cuda"), "device", "auto, cpu or cuda", self.device)
        _require(self.workers >= 0, "workers", "0 or more", self.workers)
        _require(self.decoder in DECODERS, "decoder", f"one of {', '.join(DECODERS)}", self.decoder)
        _require(0 <= self.hardware_load <= 1, "hardware_load", "a share in [0, 1]", self.hardware_load)
        _require(self.align in ("auto", "on", "off"), "align", "auto, on or off", self.align)
        modes = ("auto", "on", "off", "graphs")
        _require(self.compile in modes, "compile", "auto, on, off or graphs", self.compile)
        _require(self.log_steps >= 1, "log_steps", "1 or more", self.log_steps)
        _require(self.hang_timeout >= 0, "hang_timeout", "0 or more seconds", self.hang_timeout)


@dataclass(frozen=True)
class Recipe:
    """A run.

    batch_size is global: images a step over all ranks. Where a loss wants several views of each image, the network sees
    that many rows an image; batch, learning rate and images a second go by images. images_per_class makes batches of
    that many images of each of batch_size / images_per_class classes (0: images at random). micro_batch is images
    whose rows a rank puts through the network at once (0: its whole share of the batch); a smaller one accumulates
    gradients. precision `auto` is bf16 on a GPU that has it (fp16 on an older one) and fp32 on a CPU. zero_gamma starts
    the last norm of each residual block at 0, in networks where timm does that; false starts all norms at 1.
    """

    name: str
    arch: str
    image_size: int = 224
    batch_size: int = 128
    images_per_class: int = 0
    micro_batch: int = 0
    epochs: int = 90
    seed: int = 0
    precision: str = "auto"
    zero_gamma: bool = True
    losses: tuple[Loss, ...] = ()
    init: InitConfig = field(default_factory=InitConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        inside = self.name.isprintable() and not {"", ".", ".."} & set(self.name.split("/"))
        _require(inside, "name", "a printable text, and lead to a folder inside of runs/", self.name)
        _require(bool(self.arch), "arch", "the name of a network", self.arch)
        least, most = IMAGE_SIZES
        _require(least <= self.image_size <= most, "image_size", f"{least} to {most} pixels", self.image_size)
        _require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)
        _require(self.images_per_class >= 0, "images_per_class", "0 or more", self.images_per_class)
        _require(self.micro_batch >= 0, "micro_batch", "0 or more", self.micro_batch)
        _require(self.epochs >= 1, "epochs", "1 or more", self.epochs)
        _require(0 <= self.seed < 2**63, "seed", "in [0, 2^63)", self.seed)
        _require(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}", self.precision)
        names = [loss.name for loss in self.losses]
        classifies = any(loss.classifies for loss in self.losses)
        _require(classifies, "losses", "cross_entropy or another that trains the classifier, alone or not", names)
        for loss in self.losses:
            _require(loss.weight >= 0, f"losses.{loss.name}.weight", "0 or more", loss.weight)
            if loss.groups:
                rule = f"2 or more with the loss {loss.name}, and a divisor of batch_size"
                _require(self.images_per_class >= 2, "images_per_class", rule, self.images_per_class)
            if loss.unmixed:
                share = self.mix.cutmix + self.mix.mixup
                rule = f"below 1 together with mix.mixup: the loss {loss.name} takes images that are not mixed"
                _require(share < 1, "mix.cutmix", rule, share)
            if loss.averaged:
                _require(self.ema.decay > 0, "ema.decay", f"above 0 with the loss {loss.name}", self.ema.decay)

    @property
    def views(self) -> int:
        """Augmented views of each image that the network sees."""
        return max([1, *(loss.views for loss in self.losses)])

    @property
    def aside(self) -> int:
        """Further views, which are never mixed: the averaged network's, where a loss asks for it."""
        return int(any(loss.averaged for loss in self.losses))

    @property
    def peak_lr(self) -> float:
        scale = self.batch_size / self.optim.lr_batch if self.optim.lr_batch else 1.0
        return self.optim.lr_scale * self.optim.lr * scale
