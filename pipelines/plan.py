"""The plan: which images make a batch, and every random draw. Pure functions of (seed, epoch, image) and (seed, epoch,
step); there is no state, so any batch of any epoch can be had at once, on any rank.
"""

import math
from collections.abc import Callable
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
from fasttrain.pipelines.philox import IMAGE, ORDER, STEP, generator, passing_generator, uniforms
from fasttrain.utils.errors import UserError

_TRIES = 10
CROP_DRAWS = 2 * _TRIES + 2
_VIEW_SHIFT = 8  # a view's stream is that of images plus its number, beyond all other streams
_Choose = Callable[[NDArray[np.float64]], tuple[NDArray[np.int32], NDArray[np.float32]]]


class Draws(NamedTuple):
    """How each of n images is augmented.

    crop: int32 [n, 4], (top, left, height, width) in pixels of the stored image. flip: bool [n].
    op: int32 [n, slots] and strength: float32 [n, slots], the policy's operations, in their order.
    erased: int32 [n, 4], a box in pixels of the crop once it has its size; where nothing is erased it is empty.
    """

    crop: NDArray[np.int32]
    flip: NDArray[np.bool_]
    op: NDArray[np.int32]
    strength: NDArray[np.float32]
    erased: NDArray[np.int32]


def image_draws(
    seed: int,
    epoch: int,
    images: NDArray[np.int64],
    sizes: NDArray[np.int32],
    augment: AugmentConfig,
    size: int,
    view: int = 0,
) -> Draws:
    """Draws for a view of images (numbers in the index, int64 [n]) of the given sizes (int32 [n, 2], height and
    width), to become size x size pixels."""
    choose, count = _policy(augment)
    rest = CROP_DRAWS + 1 + count
    u = uniforms(seed, IMAGE + (view << _VIEW_SHIFT), epoch, images, rest + erasing.DRAWS * bool(augment.erase))
    crop = random_resized_crop(u[:CROP_DRAWS], sizes, augment.crop_area, augment.crop_ratio)
    flip = u[CROP_DRAWS] < augment.flip
    op, strength = choose(u[CROP_DRAWS + 1 : rest])
    erased = np.zeros((len(images), 4), np.int32)
    if augment.erase:
        erased = erasing.boxes(u[rest:], size, augment.erase, augment.erase_area, augment.erase_ratio)
    return Draws(crop, flip, op, strength, erased)


def operations_of(augment: AugmentConfig) -> int:
    """How many operations an image goes through, one after another."""
    return augment.randaugment or (0 if augment.autoaugment == "none" else len(autoaugment.POLICY[0]))


def _policy(augment: AugmentConfig) -> tuple[_Choose, int]:
    """What turns uniforms [count, n] into operations and strengths [n, slots], and count."""
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
    """Boxes int32 [n, 4] (top, left, height, width), distributed as torchvision's RandomResizedCrop has them.

    Ten tries of an area (a uniform share of the image's) and an aspect ratio (log-uniform), the first that fits,
    placed uniformly; where none fits, the largest central box within the ratios. u: uniforms [22, n].
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

    lost = ~fits.any(0)
    if lost.any():
        w_back = np.where(width > ratio[1] * height, np.rint(height * ratio[1]), width)
        h_back = np.where(width < ratio[0] * height, np.rint(width / ratio[0]), height)
        w, h = np.where(lost, w_back, w), np.where(lost, h_back, h)
        top = np.where(lost, (height - h) // 2, top)
        left = np.where(lost, (width - w) // 2, left)
    return np.stack([top, left, h, w], axis=1).astype(np.int32)


@lru_cache(maxsize=4)  # two epochs overlap while batches are prefetched, in training and in a benchmark
def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order in which an epoch takes the images 0 … count−1, int64 [count], read-only."""
    order = generator(seed, ORDER, epoch).permutation(count)
    order.setflags(write=False)
    return order


class Box(NamedTuple):
    """CutMix's box of a step, in pixels: rows top … bottom−1 and columns left … right−1."""

    top: int
    bottom: int
    left: int
    right: int


def cutmix_box(rng: np.random.Generator, size: int, alpha: float) -> Box:
    """A box in an image of size x size pixels: λ ~ Beta(α, α), sides size·√(1−λ), the centre uniform over pixels,
    clipped to the image (Yun et al. 2019)."""
    half = int(size * math.sqrt(1 - rng.beta(alpha, alpha))) // 2
    y, x = rng.integers(size, size=2).tolist()
    return Box(max(y - half, 0), min(y + half, size), max(x - half, 0), min(x + half, size))


def step_mix(seed: int, epoch: int, step: int, size: int, mix: MixConfig) -> Box | float | None:
    """What the global step mixes by: CutMix's box, mixup's λ ~ Beta(α, α) (Zhang et al. 2018), or None."""
    rng = passing_generator(seed, STEP, epoch, step)
    choice = rng.random()
    if choice < mix.cutmix:
        return cutmix_box(rng, size, mix.cutmix_alpha)
    if choice < mix.cutmix + mix.mixup:
        return float(rng.beta(mix.mixup_alpha, mix.mixup_alpha))
    return None


@dataclass(frozen=True)
class Plan:
    """What rank `rank` of `world` does at every step of a run over `count` images.

    Each epoch takes the global batches one after another from its own order and drops the last partial batch; with
    `groups` the batches are P x K ones. A rank has an equal, contiguous share of each, in micro-batches of
    `micro_batch` images. With `shift` every step takes what belongs to the step so many later.

    A micro-batch has a row for each of `views` augmented views of its images, and for `ema_views` further ones that are
    never mixed: first view 0 of each image, then view 1 of each, and so on.
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
    views: int = 1
    ema_views: int = 0
    world: int = 1
    rank: int = 0
    shift: int = 0

    @classmethod
    def of(cls, recipe: Recipe, index: Index, world: int = 1, rank: int = 0) -> "Plan":
        """The plan of a recipe; UserError where batches cannot be made, or do not divide among ranks."""
        batch, micro, k = recipe.batch_size, recipe.micro_batch, recipe.images_per_class
        if len(index) < batch:
            least = f"{len(index)} images are fewer than one batch of {batch}"
            raise UserError(f"{least}; set --batch-size {len(index)} or less")
        if batch % world:
            raise UserError(f"batch_size {batch} does not divide among {world} ranks; set a multiple of {world}")
        share = batch // world
        if micro and share % micro:
            raise UserError(
                f"micro_batch {micro} does not divide a rank's {share} images of a batch; set a divisor of {share}"
            )
        if any(loss.projection_head for loss in recipe.losses) and (micro or share) * world < 2:
            raise UserError("there is nothing to contrast one image with; set --batch-size or micro_batch to 2 or more")
        groups = Groups.of(index, k, batch) if k else None
        if k and (micro or share) % k:
            raise UserError(
                f"a rank's {micro or share} images at once are not a multiple of images_per_class {k}, so that a "
                f"class would be cut in two; set another {'micro_batch' if micro else '--batch-size'}"
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
            views=recipe.views,
            ema_views=recipe.ema_views,
            world=world,
            rank=rank,
        )

    @property
    def views_total(self) -> int:
        """How many views of an image there are, mixed or not."""
        return self.views + self.ema_views

    @property
    def steps_per_epoch(self) -> int:
        return self.groups.batches if self.groups else self.count // self.batch_size

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def micro_batches(self) -> int:
        """Micro-batches a rank puts through the network in one step."""
        return self.batch_size // self.world // self.micro_batch

    def epoch_and_step(self, step: int) -> tuple[int, int]:
        """Epoch of the images of a step, and the step's position in it."""
        return divmod(step + self.shift, self.steps_per_epoch)

    def images(self, step: int, micro: int) -> NDArray[np.int64]:
        """Numbers of the images in this rank's micro-batch `micro` of global step `step`, int64 [micro_batch]."""
        epoch, position = self.epoch_and_step(step)
        start = position * self.batch_size + self.rank * (self.batch_size // self.world) + micro * self.micro_batch
        order = self.groups.order(self.seed, epoch) if self.groups else epoch_order(self.seed, epoch, self.count)
        return order[start : start + self.micro_batch]

    def draws(self, step: int, images: NDArray[np.int64], sizes: NDArray[np.int32], view: int = 0) -> Draws:
        epoch, _ = self.epoch_and_step(step)
        return image_draws(self.seed, epoch, images, sizes, self.augment, self.image_size, view)

    def mix_params(self, step: int, micro: int) -> tuple[NDArray[np.float32], bool]:
        """The mix kernel's table for the rows of this rank's micro-batch, and whether this step mixes at all.

        The box, or λ, is the global step's own; the partners are a permutation of the rows that are mixed.
        """
        epoch, position = self.epoch_and_step(step)
        by = step_mix(self.seed, epoch, position, self.image_size, self.mix)
        params = mix_kernel.plain_params(self.micro_batch * self.views_total)
        if by is None:
            return params, False
        part = 1 + self.rank * self.micro_batches + micro
        mixed = params[: self.micro_batch * self.views]
        rng = passing_generator(self.seed, STEP, epoch, position, part)
        mixed[:, mix_kernel.PARTNER] = rng.permutation(len(mixed))
        if isinstance(by, Box):
            mixed[:, mix_kernel.MODE] = mix_kernel.CUTMIX
            mixed[:, mix_kernel.BOX] = by
        else:
            mixed[:, mix_kernel.MODE] = mix_kernel.MIXUP
            mixed[:, mix_kernel.LAM] = by
        return params, True
