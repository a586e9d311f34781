"""The plan: which images are in each batch, and every random draw.

All are pure functions of (seed, epoch, sample) or (seed, epoch, step). There is no state, so any rank can compute any
batch of any epoch directly. A sample is an image and how often the epoch has drawn it before (see `sampling`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain.config.schema import AugmentConfig, MixConfig, Recipe
from fasttrain.data.index import Index
from fasttrain.kernels import mix as mix_kernel
from fasttrain.pipelines import autoaugment, erasing, randaugment
from fasttrain.pipelines.groups import Groups
from fasttrain.pipelines.philox import IMAGE, ORDER, STEP, generator, reused_generator, uniforms
from fasttrain.pipelines.sampling import Sampling
from fasttrain.utils.errors import UserError

UNBOUNDED = 2**31  # steps of a run that ends by time, before its length is fitted
_TRIES = 10
CROP_DRAWS = 2 * _TRIES + 2
_VIEW_SHIFT = 8  # a view's stream is IMAGE + (view << 8), above all other streams
_Choose = Callable[[NDArray[np.float64]], tuple[NDArray[np.int32], NDArray[np.float32]]]


class Draws(NamedTuple):
    """How each of n images is augmented.

    crop: int32 [n, 4], (top, left, height, width) in pixels of the stored image. flip: bool [n].
    op: int32 [n, slots] and strength: float32 [n, slots], the policy's operations, in their order.
    erased: int32 [n, 4], (top, left, height, width) in pixels of the resized crop; zeros where nothing is erased.
    """

    crop: NDArray[np.int32]
    flip: NDArray[np.bool_]
    op: NDArray[np.int32]
    strength: NDArray[np.float32]
    erased: NDArray[np.int32]


def image_draws(
    seed: int,
    epoch: int,
    samples: NDArray[np.int64],
    sizes: NDArray[np.int32],
    augment: AugmentConfig,
    size: int,
    view: int = 0,
) -> Draws:
    """Draws for one view of n samples, int64 [n]. sizes: int32 [n, 2], the heights and widths of their images. size:
    the side of the resized crop, in pixels."""
    choose, count = _policy(augment)
    policy_end = CROP_DRAWS + 1 + count
    u = uniforms(seed, IMAGE + (view << _VIEW_SHIFT), epoch, samples, policy_end + erasing.DRAWS * bool(augment.erase))
    crop = random_resized_crop(u[:CROP_DRAWS], sizes, augment.crop_area, augment.crop_ratio)
    flip = u[CROP_DRAWS] < augment.flip
    op, strength = choose(u[CROP_DRAWS + 1 : policy_end])
    erased = np.zeros((len(samples), 4), np.int32)
    if augment.erase:
        erased = erasing.boxes(u[policy_end:], size, augment.erase, augment.erase_area, augment.erase_ratio)
    return Draws(crop, flip, op, strength, erased)


def operations_per_image(augment: AugmentConfig) -> int:
    """How many operations are applied to each image, one after another."""
    return augment.randaugment or (0 if augment.autoaugment == "none" else len(autoaugment.POLICY[0]))


def _policy(augment: AugmentConfig) -> tuple[_Choose, int]:
    """The function from uniforms [count, n] to operations and strengths [n, slots]; and count."""
    if augment.randaugment:
        slots = augment.randaugment
        choose = partial(randaugment.choose, slots=slots, magnitude=augment.randaugment_magnitude)
        return choose, randaugment.draws(slots)
    if augment.autoaugment != "none":
        return partial(autoaugment.choose, policy=augment.autoaugment), autoaugment.DRAWS
    return lambda u: (np.zeros((u.shape[1], 0), np.int32), np.zeros((u.shape[1], 0), np.float32)), 0


def random_resized_crop(
    u: NDArray[np.float64], sizes: NDArray[np.int32], area: tuple[float, float], ratio: tuple[float, float]
) -> NDArray[np.int32]:
    """Boxes int32 [n, 4] (top, left, height, width), with the distribution of torchvision's RandomResizedCrop.

    Ten tries draw an area (a uniform share of the image's) and an aspect ratio (log-uniform). The first box that fits
    is placed uniformly; if none fits, the largest central box within the ratios is used. u: uniforms [CROP_DRAWS, n].
    """
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    target = height * width * (area[0] + (area[1] - area[0]) * u[:_TRIES])
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + (high - low) * u[_TRIES : 2 * _TRIES])
    w_try, h_try = np.rint(np.sqrt(target * aspect)), np.rint(np.sqrt(target / aspect))
    fits = (0 < w_try) & (w_try <= width) & (0 < h_try) & (h_try <= height)
    first, column = fits.argmax(0), np.arange(len(sizes))
    w, h = w_try[first, column], h_try[first, column]
    top = np.floor(u[2 * _TRIES] * (height - h + 1))
    left = np.floor(u[2 * _TRIES + 1] * (width - w + 1))

    fallback = ~fits.any(0)
    if fallback.any():
        w_largest = np.where(width > ratio[1] * height, np.rint(height * ratio[1]), width)
        h_largest = np.where(width < ratio[0] * height, np.rint(width / ratio[0]), height)
        w, h = np.where(fallback, w_largest, w), np.where(fallback, h_largest, h)
        top = np.where(fallback, (height - h) // 2, top)
        left = np.where(fallback, (width - w) // 2, left)
    return np.stack([top, left, h, w], axis=1).astype(np.int32)


@lru_cache(maxsize=4)  # two epochs overlap while batches are prefetched, in training and in a benchmark
def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of the images 0 … count−1 in an epoch, int64 [count], read-only."""
    order = generator(seed, ORDER, epoch).permutation(count)
    order.setflags(write=False)
    return order


class Box(NamedTuple):
    """A step's CutMix box, in pixels: rows top … bottom−1 and columns left … right−1."""

    top: int
    bottom: int
    left: int
    right: int


def cutmix_box(rng: np.random.Generator, size: int, alpha: float) -> Box:
    """A box in an image of size x size pixels: λ ~ Beta(α, α), sides size·√(1−λ), a center that is uniform over pixels;
    clipped to the image (Yun et al. 2019)."""
    half = int(size * math.sqrt(1 - rng.beta(alpha, alpha))) // 2
    y, x = rng.integers(size, size=2).tolist()
    return Box(max(y - half, 0), min(y + half, size), max(x - half, 0), min(x + half, size))


def step_mix(seed: int, epoch: int, step: int, size: int, mix: MixConfig) -> Box | float | None:
    """How the global step mixes: CutMix's box, mixup's λ ~ Beta(α, α) (Zhang et al. 2018), or None for not at all."""
    rng = reused_generator(seed, STEP, epoch, step)
    choice = rng.random()
    if choice < mix.cutmix:
        return cutmix_box(rng, size, mix.cutmix_alpha)
    if choice < mix.cutmix + mix.mixup:
        return float(rng.beta(mix.mixup_alpha, mix.mixup_alpha))
    return None


@dataclass(frozen=True)
class Plan:
    """The images and draws of rank `rank` of `world` for every step of a run over `count` images.

    Each epoch splits its own order of the images into global batches and drops the last partial batch; with `groups`
    the batches are P x K, and with `sampling` some images are drawn more often than others. Each rank has an equal,
    contiguous share of a batch, in micro-batches of `micro_batch` images. Each step uses the images and draws of the
    step `shift` steps later.

    A micro-batch has one row per image and view: first view 0 of each image, then view 1 of each, and so on. There are
    `views` views, then `ema_views` more that are never mixed.

    length: the steps of a run that does not end after `epochs`; 0: it does.
    """

    seed: int
    count: int
    image_size: int
    batch_size: int
    micro_batch: int
    epochs: int
    augment: AugmentConfig
    mix: MixConfig
    groups: Groups | None = None
    sampling: Sampling | None = None
    views: int = 1
    ema_views: int = 0
    world: int = 1
    rank: int = 0
    shift: int = 0
    length: int = 0

    @classmethod
    def of(cls, recipe: Recipe, index: Index, world: int = 1, rank: int = 0) -> "Plan":
        """The plan of a recipe. Raises UserError where its batches cannot be made, or do not divide among ranks."""
        batch, micro, k = recipe.batch_size, recipe.micro_batch, recipe.images_per_class
        if len(index) < batch:
            raise UserError(
                f"{len(index)} images are fewer than one batch of {batch}; set --batch-size {len(index)} or less"
            )
        if batch % world:
            raise UserError(f"batch_size {batch} does not divide among {world} ranks; set a multiple of {world}")
        share = batch // world
        if micro and share % micro:
            raise UserError(
                f"micro_batch {micro} does not divide a rank's {share} images per batch; set a divisor of {share}"
            )
        if any(loss.projection_head for loss in recipe.losses) and (micro or share) * world < 2:
            raise UserError(
                "a contrastive loss needs two or more images at once; set --batch-size or micro_batch to 2 or more"
            )
        balance = recipe.data.balance
        groups = Groups.of(index, k, batch, balance) if k else None
        if k and (micro or share) % k:
            raise UserError(
                f"a rank's {micro or share} images at once are not a multiple of images_per_class {k}, which would "
                f"split a class's images; set another {'micro_batch' if micro else '--batch-size'}"
            )
        return cls(
            seed=recipe.seed,
            count=len(index),
            image_size=recipe.image_size,
            batch_size=batch,
            micro_batch=micro or share,
            epochs=recipe.epochs,
            augment=recipe.augment,
            mix=recipe.mix,
            groups=groups,
            sampling=None if k else Sampling.of(index, balance),
            views=recipe.views,
            ema_views=recipe.ema_views,
            world=world,
            rank=rank,
            length=UNBOUNDED if recipe.budget else 0,
        )

    @property
    def views_total(self) -> int:
        """Number of views per image, mixed or not."""
        return self.views + self.ema_views

    @property
    def steps_per_epoch(self) -> int:
        return self.groups.batches if self.groups else self.count // self.batch_size

    @property
    def steps(self) -> int:
        return self.length or self.epochs * self.steps_per_epoch

    @property
    def bounded(self) -> bool:
        """Whether the number of steps is known."""
        return self.steps < UNBOUNDED

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches per rank and step."""
        return self.batch_size // self.world // self.micro_batch

    def epoch_and_step(self, step: int) -> tuple[int, int]:
        """The epoch from which a step takes its images, and the step's position in that epoch."""
        return divmod(step + self.shift, self.steps_per_epoch)

    def images(self, step: int, micro: int) -> NDArray[np.int64]:
        """The indices of the images in this rank's micro-batch `micro` of global step `step`, int64 [micro_batch]."""
        return self.image_of(self.samples(step, micro))

    def image_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The indices of the samples' images."""
        return samples % self.count

    def samples(self, step: int, micro: int) -> NDArray[np.int64]:
        """The samples in this rank's micro-batch `micro` of global step `step`, int64 [micro_batch]."""
        epoch, position = self.epoch_and_step(step)
        start = position * self.batch_size + self.rank * (self.batch_size // self.world) + micro * self.micro_batch
        return self._order(epoch)[start : start + self.micro_batch]

    def class_shares(self, index: Index) -> NDArray[np.float64]:
        """The share of each class in the images that the run draws, float64 [K]."""
        if self.groups:
            return self.groups.groups / self.groups.groups.sum()
        times = None if self.sampling is None else self.sampling.times
        return np.bincount(index.labels, times, len(index.classes)) / len(index)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The samples of an epoch in the order of its batches."""
        if self.groups:
            return self.groups.order(self.seed, epoch)
        if self.sampling:
            return self.sampling.order(self.seed, epoch)
        return epoch_order(self.seed, epoch, self.count)

    def draws(self, step: int, samples: NDArray[np.int64], sizes: NDArray[np.int32], view: int = 0) -> Draws:
        """The draws of one view of samples, of whose images `sizes` are the heights and widths, int32 [n, 2]."""
        epoch, _ = self.epoch_and_step(step)
        return image_draws(self.seed, epoch, samples, sizes, self.augment, self.image_size, view)

    def all_draws(self, step: int, samples: NDArray[np.int64], sizes: NDArray[np.int32]) -> list[Draws]:
        """The draws of every view, mixed or not."""
        return [self.draws(step, samples, sizes, view) for view in range(self.views_total)]

    @staticmethod
    def region(views: Sequence[Draws]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The smallest region of each image that holds the crops of all views: (top, left) and (height, width) in
        pixels of the stored image, int32 [n, 2] each."""
        start = np.min([draws.crop[:, :2] for draws in views], 0)
        end = np.max([draws.crop[:, :2] + draws.crop[:, 2:] for draws in views], 0)
        return start, end - start

    def mix_params(self, step: int, micro: int) -> tuple[NDArray[np.float32], bool]:
        """The mix kernel's table for the rows of this rank's micro-batch, and whether this step mixes.

        All ranks and micro-batches of a step share its box or λ. The partners are a permutation of the mixed rows.
        """
        epoch, position = self.epoch_and_step(step)
        mixing = step_mix(self.seed, epoch, position, self.image_size, self.mix)
        params = mix_kernel.plain_params(self.micro_batch * self.views_total)
        if mixing is None:
            return params, False
        part = 1 + self.rank * self.micro_batches + micro
        mixed = params[: self.micro_batch * self.views]
        rng = reused_generator(self.seed, STEP, epoch, position, part)
        mixed[:, mix_kernel.PARTNER] = rng.permutation(len(mixed))
        if isinstance(mixing, Box):
            mixed[:, mix_kernel.MODE] = mix_kernel.CUTMIX
            mixed[:, mix_kernel.BOX] = mixing
        else:
            mixed[:, mix_kernel.MODE] = mix_kernel.MIXUP
            mixed[:, mix_kernel.LAM] = mixing
        return params, True
