"""Philox4x32-10, the counter-based random generator of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2,
3"), vectorized over counters in numpy. It has no state: the same counter and key always give the same four words."""

import threading

import numpy as np
from numpy.typing import NDArray

# Streams keep draws for different purposes independent: the order of an epoch, an image in an epoch, a step, a view at
# test time.
ORDER, IMAGE, STEP, VIEW = range(4)

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Random words, uint64 [4, ...] below 2^32, for counters uint64 [4, ...] below 2^32 and a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c2 = (p1 >> _HALF) ^ c1 ^ np.uint64(k0), (p0 >> _HALF) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def uniforms(seed: int, stream: int, epoch: int, items: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """`count` draws for each of n items, float64 [count, n] in the open interval (0, 1), in steps of 2^-32.

    A draw depends only on seed, stream, epoch, its item's number and its position. seed is below 2^64; stream, epoch
    and the items' numbers are below 2^32.
    """
    blocks = -(-count // 4)
    counter = np.empty((4, blocks, len(items)), np.uint64)
    counter[0] = items
    counter[1] = epoch
    counter[2] = np.arange(blocks, dtype=np.uint64)[:, None]
    counter[3] = stream
    words = philox4x32(counter, seed)  # [4, blocks, n]
    ordered = words.transpose(1, 0, 2).reshape(4 * blocks, len(items))[:count]
    return np.multiply(ordered + 0.5, 2.0**-32, dtype=np.float64)


def generator(seed: int, stream: int, epoch: int, step: int = 0, part: int = 0) -> np.random.Generator:
    """A new numpy generator for one purpose, for draws per step or per epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, epoch, step, part]))


class _Reused(threading.local):
    """One generator per thread, and the state that is set before its next draws."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=0)
        self.rng = np.random.Generator(self.bits)
        self.state = self.bits.state  # of an unused generator: it has no buffered words


_REUSED = _Reused()


def reused_generator(seed: int, stream: int, epoch: int, step: int = 0, part: int = 0) -> np.random.Generator:
    """Like `generator`, with the same draws, in a fifth of the time: it reseeds the thread's one generator, so draw
    from it before the thread's next call."""
    state = _REUSED.state
    state["state"]["key"][:] = seed, stream
    state["state"]["counter"][:] = 0, epoch, step, part
    _REUSED.bits.state = state
    return _REUSED.rng
