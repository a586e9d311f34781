"""Every setting there is, as frozen dataclasses. `Recipe` is the whole of a run; the others are its parts."""

from dataclasses import dataclass, field

from fasttrain.batch import Loss

AUTOAUGMENT_POLICIES = ("none", "imagenet", "imagenet-24")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
# Of pixels scaled to 0 … 1; every network is trained and evaluated on pixels normalised by these.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _require(holds: bool, key: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{key} must be {rule}, not {value!r}")


@dataclass(frozen=True)
class Data:
    """Where the images are. No `train` folder means the demo set; no `val` means DIR/val where DIR/train is used."""

    train: tuple[str, ...] = ()
    val: str = ""


@dataclass(frozen=True)
class Optim:
    """SGD with momentum; warm-up from 0 and a cosine to 0, both per step.

    The peak learning rate is lr · global batch / lr_batch (linear scaling), or lr itself where lr_batch is 0.
    decay_norm_bias=false takes weight decay off every parameter with at most one dimension (biases, norm weights).
    """

    lr: float = 0.1
    lr_batch: int = 256
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_norm_bias: bool = True
    warmup_epochs: float = 1.0

    def __post_init__(self) -> None:
        _require(self.lr > 0, "lr", "above 0", self.lr)
        _require(self.lr_batch >= 0, "lr_batch", "0 or more", self.lr_batch)
        _require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        _require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        _require(self.warmup_epochs >= 0, "warmup_epochs", "0 or more", self.warmup_epochs)


@dataclass(frozen=True)
class Augment:
    """Per image: a random resized crop (area as a share of the image, aspect ratio log-uniform), a horizontal flip
    with probability `flip`, then one sub-policy of AutoAugment: `imagenet` has all 25 of the paper, `imagenet-24`
    leaves out the last, as the DeepBlueAI report does."""

    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    autoaugment: str = "imagenet"

    def __post_init__(self) -> None:
        low, high = self.crop_area
        _require(0 < low <= high <= 1, "crop_area", "two rising shares in (0, 1]", self.crop_area)
        low, high = self.crop_ratio
        _require(0 < low <= high, "crop_ratio", "two rising numbers above 0", self.crop_ratio)
        _require(0 <= self.flip <= 1, "flip", "in [0, 1]", self.flip)
        rule = f"one of {', '.join(AUTOAUGMENT_POLICIES)}"
        _require(self.autoaugment in AUTOAUGMENT_POLICIES, "autoaugment", rule, self.autoaugment)


@dataclass(frozen=True)
class Mix:
    """Per batch: CutMix with probability `cutmix`, its λ drawn from Beta(cutmix_alpha, cutmix_alpha)."""

    cutmix: float = 0.5
    cutmix_alpha: float = 1.0

    def __post_init__(self) -> None:
        _require(0 <= self.cutmix <= 1, "cutmix", "a probability in [0, 1]", self.cutmix)
        _require(self.cutmix_alpha > 0, "cutmix_alpha", "above 0", self.cutmix_alpha)


@dataclass(frozen=True)
class Save:
    """A checkpoint every `every_epochs` epochs and at the end; the newest `keep` and the best are kept."""

    every_epochs: int = 1
    keep: int = 2

    def __post_init__(self) -> None:
        _require(self.every_epochs >= 1, "every_epochs", "1 or more", self.every_epochs)
        _require(self.keep >= 1, "keep", "1 or more", self.keep)


@dataclass(frozen=True)
class Machine:
    """How to run, not what to train: none of this changes the order of samples or their pixels.

    workers: DALI's threads a rank (0: this rank's share of the cores). compile: torch.compile, `auto` is on for CUDA.
    log_steps: steps between two log points; the host waits for the device there and nowhere else.
    """

    device: str = "auto"
    workers: int = 0
    compile: str = "auto"
    log_steps: int = 20

    def __post_init__(self) -> None:
        _require(self.device in ("auto", "cpu", "cuda"), "device", "auto, cpu or cuda", self.device)
        _require(self.workers >= 0, "workers", "0 or more", self.workers)
        _require(self.compile in ("auto", "on", "off"), "compile", "auto, on or off", self.compile)
        _require(self.log_steps >= 1, "log_steps", "1 or more", self.log_steps)


@dataclass(frozen=True)
class Recipe:
    """A run.

    batch_size is global: images a step over all ranks. micro_batch is images a rank puts through the network at once
    (0: its whole share of the batch); a smaller one accumulates gradients. precision `auto` is bf16 on a GPU that has
    it (fp16 on an older one) and fp32 on a CPU.
    """

    name: str
    arch: str
    image_size: int = 224
    batch_size: int = 128
    micro_batch: int = 0
    epochs: int = 90
    seed: int = 0
    precision: str = "auto"
    losses: tuple[Loss, ...] = ()
    optim: Optim = field(default_factory=Optim)
    augment: Augment = field(default_factory=Augment)
    mix: Mix = field(default_factory=Mix)
    save: Save = field(default_factory=Save)
    data: Data = field(default_factory=Data)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        _require(bool(self.name), "name", "a text", self.name)
        _require(bool(self.arch), "arch", "the name of a network", self.arch)
        _require(8 <= self.image_size <= 4096, "image_size", "8 to 4096 pixels", self.image_size)
        _require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)
        _require(self.micro_batch >= 0, "micro_batch", "0 or more", self.micro_batch)
        _require(self.epochs >= 1, "epochs", "1 or more", self.epochs)
        _require(0 <= self.seed < 2**63, "seed", "in [0, 2^63)", self.seed)
        _require(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}", self.precision)
        _require(len(self.losses) > 0, "losses", "at least one loss", self.losses)

    @property
    def peak_lr(self) -> float:
        scale = self.batch_size / self.optim.lr_batch if self.optim.lr_batch else 1.0
        return self.optim.lr * scale
