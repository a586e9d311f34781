"""The index of a data set's images: paths, labels and sizes, in a fixed order."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.stores import Merged, Selected, Store
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

MAX_WEIGHT = 1e9  # of an image


@dataclass(frozen=True, eq=False)
class Index:
    """N images of K classes.

    paths: N absolute paths of files; for an image in a container, the container's path, a colon and the image's id.
    ids: N strings, each path relative to its folder, with `/`. labels: int64 [N].
    sizes: int32 [N, 2], (height, width) as stored, before any EXIF rotation; 0 where a header cannot be read.
    classes: K names, sorted as text. problems: why an image has no size, by its number.
    store: the container that holds the images; None where each is a file. weights: float64 [N], how often each image is
    drawn, relative to others of its class, and its class relative to others; None: all alike.
    """

    paths: tuple[str, ...]
    ids: tuple[str, ...]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32]
    classes: tuple[str, ...]
    problems: Mapping[int, str] = field(default_factory=dict)
    store: Store | None = None
    weights: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, numbers: NDArray[np.int64]) -> "Index":
        """An index of some of the images, in this order, with all classes. numbers: int64 [n]."""
        position = {number: position for position, number in enumerate(numbers.tolist())}
        return Index(
            paths=tuple(self.paths[number] for number in position),
            ids=tuple(self.ids[number] for number in position),
            labels=self.labels[numbers],
            sizes=self.sizes[numbers],
            classes=self.classes,
            problems={position[number]: each for number, each in self.problems.items() if number in position},
            store=None if self.store is None else Selected(self.store, numbers),
            weights=None if self.weights is None else self.weights[numbers],
        )

    @property
    def encoded(self) -> bool:
        """Whether the images have to be decoded; if not, the store has their pixels."""
        return self.store is None or not self.store.decoded

    @property
    def files(self) -> Sequence[str]:
        """The paths of the files that are read."""
        return self.paths if self.store is None else self.store.files

    def fingerprint(self) -> str:
        """SHA-256 over classes, ids, labels and any weights: equal for the same images in another folder."""
        digest = hashlib.sha256("\0".join(self.classes + self.ids).encode(errors="surrogateescape"))
        digest.update(self.labels.astype("<i8").tobytes())
        if self.weights is not None:
            digest.update(self.weights.astype("<f8").tobytes())
        return digest.hexdigest()

    def fingerprint_of_sizes(self) -> str:
        """SHA-256 over the images' sizes, from which crops are planned."""
        return hashlib.sha256(self.sizes.astype("<i4").tobytes()).hexdigest()


class Samples(NamedTuple):
    """Images in the order of an index: by class, then by id. order: their positions before, int64 [N]."""

    ids: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    order: NDArray[np.int64]


def of_samples(
    ids: Sequence[str], labels: Sequence[str] | None, origin: object, classes: Sequence[str] | None = None
) -> Samples:
    """Sort images by their label and id. labels: class names; None: the images have none, and all labels are −1.
    classes: sorted; by default those of the labels. Raises UserError where an id is there twice."""
    twice = [image_id for image_id, count in Counter(ids).items() if count > 1]
    if twice:
        raise UserError(f"{printable(str(origin))} has two images with the name {printable(twice[0])}")
    classes = tuple(sorted(set(labels or ())) if classes is None else classes)
    position = {name: number for number, name in enumerate(classes)}
    numbers = np.array([-1] * len(ids) if labels is None else [position[name] for name in labels], np.int64)
    order = np.array(sorted(range(len(ids)), key=lambda row: (numbers[row], ids[row])), np.int64)
    return Samples(tuple(ids[row] for row in order.tolist()), numbers[order], classes, order)


def facts(index: Index | None, kind: str) -> dict[str, str]:
    """What must be the same on all ranks of an index of `kind` images, for `Ranks.require_same`."""
    if index is None:
        return {f"set of {kind} images": "none"}
    return {
        f"set of classes of the {kind} images": "\0".join(index.classes),
        f"set of {kind} images": index.fingerprint(),
        f"{kind} image size": index.fingerprint_of_sizes(),
    }


def require_classes(classes: Sequence[str], origin: object, other_classes: Sequence[str], other_origin: object) -> None:
    """Raises UserError that names a class which one origin (a folder, a checkpoint) has and the other has not."""
    ours, theirs = (classes, origin), (other_classes, other_origin)
    for (names, place), (other_names, other_place) in ((ours, theirs), (theirs, ours)):
        missing = sorted(set(names) - set(other_names))
        if missing:
            alike = {spelling(name): name for name in set(other_names) - set(names)}
            twin = alike.get(spelling(missing[0]))
            if twin is not None:
                raise UserError(
                    f"class {printable(missing[0])!r} in {printable(str(place))} and {printable(twin)!r} in "
                    f"{printable(str(other_place))} look alike but are spelled with different characters "
                    f"({missing[0]!a} and {twin!a}); rename one"
                )
            count = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            where = f"in {printable(str(place))} but not in {printable(str(other_place))}"
            raise UserError(f"class {printable(missing[0])!r}{count} is {where}; both need the same classes")


def spelling(name: str) -> str:
    """Equal for names that look alike: composed and decomposed letters, capitals, and surrounding spaces."""
    return unicodedata.normalize("NFC", name).strip().removeprefix("\ufeff").casefold()


def merge(indices: Sequence[Index], origins: Sequence[object]) -> Index:
    """One index of all images, in the order given. Raises UserError where the folders do not have the same classes."""
    first = indices[0]
    for index, origin in zip(indices[1:], origins[1:], strict=True):
        require_classes(first.classes, origins[0], index.classes, origin)
    starts = np.cumsum([0, *map(len, indices)]).tolist()
    return Index(
        paths=tuple(path for index in indices for path in index.paths),
        ids=tuple(image_id for index in indices for image_id in index.ids),
        labels=np.concatenate([index.labels for index in indices]),
        sizes=np.concatenate([index.sizes for index in indices]),
        classes=first.classes,
        store=_merged_store(indices, origins),
        weights=merge_weights(indices),
        problems={
            start + number: problem
            for start, index in zip(starts, indices, strict=False)
            for number, problem in index.problems.items()
        },
    )


def merge_weights(indices: Sequence[Index]) -> NDArray[np.float64] | None:
    """The weights of several indices one after another; None where none has any."""
    if all(index.weights is None for index in indices):
        return None
    return np.concatenate([np.ones(len(index)) if index.weights is None else index.weights for index in indices])


def _merged_store(indices: Sequence[Index], origins: Sequence[object]) -> Store | None:
    stores = [index.store for index in indices]
    if len(stores) == 1 or not any(stores):
        return stores[0]
    decoded = {store is not None and store.decoded for store in stores}
    if len(decoded) == 1:
        return Merged(stores, [index.paths for index in indices], decoded.pop())
    names = " and ".join(printable(str(origin)) for origin in origins)
    raise UserError(f"{names} cannot be used together: one holds decoded pixels and another image files")
