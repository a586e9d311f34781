"""Batch-hard triplet loss (Hermans et al. 2017, arXiv 1703.07737): mining, distances, loss and gradient.

Contract of `batch_hard_triplet(embeddings, labels, *, candidates, candidate_labels, self_offset, margin, squared)`
    embeddings        [B, D] float32, float16 or bfloat16: the anchors
    labels            int64 [B]
    candidates        [N, D], of the anchors' dtype: where positives and negatives come from, for example a batch
                      gathered over ranks; default: the anchors themselves
    candidate_labels  int64 [N]
    self_offset       anchor i is candidate i + self_offset, which is never its own positive
    margin            of the hinge max(0, margin + d⁺ − d⁻); None: the soft margin ln(1 + exp(d⁺ − d⁻))
    squared           squared Euclidean distances instead of Euclidean ones
    returns           TripletOutput
    raises            ValueError for other shapes, dtypes or devices, or for no rows

The hardest positive is the farthest candidate with the anchor's label, the hardest negative the nearest one with
another label; among equals the first. An anchor that lacks either is left out. The loss is the mean over the other
anchors; without any it is 0 and still part of the graph. It is differentiable once, with respect to embeddings and
candidates; the other outputs are not. The root of a distance of 0 has gradient 0. Distances and loss are float32,
computed from direct differences, not from the mining's scores. An embedding that is not finite makes the loss of each
anchor that is compared with it not finite; indices stay in range. Autocast has no effect. The same input always gives
the same bits.

On a GPU: three launches forward, one backward, no B x N matrix in memory, and no waiting for the device. Mining
computes the scores ‖c‖² − 2·a·c tile by tile. It shifts float32 embeddings by the tile's first anchor, because the
subtraction would cancel once embeddings collapse, and multiplies them as three TF32 products. It multiplies
half-precision embeddings directly, with exact products and float32 sums. A half-precision Gram matrix would mine a
third of the anchors wrong.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TripletOutput(NamedTuple):
    """loss: float32 scalar. d_pos, d_neg: float32 [B], distances to the hardest positive and negative (squared with
    squared=True), 0 where there is none. i_pos, i_neg: int64 [B], their indices in the candidates, −1 where there is
    none. valid: int64 scalar, the number of anchors with both. Over those anchors: active, the share with a loss above
    0; mean_pos and mean_neg, the means of d_pos and d_neg; float32 scalars, 0 if there are none."""

    loss: Tensor
    d_pos: Tensor
    d_neg: Tensor
    i_pos: Tensor
    i_neg: Tensor
    valid: Tensor
    active: Tensor
    mean_pos: Tensor
    mean_neg: Tensor


def batch_hard_triplet(
    embeddings: Tensor,
    labels: Tensor,
    *,
    candidates: Tensor | None = None,
    candidate_labels: Tensor | None = None,
    self_offset: int = 0,
    margin: float | None = 0.3,
    squared: bool = False,
) -> TripletOutput:
    """Batch-hard triplet loss; see the contract at the top of this file."""
    if (candidates is None) != (candidate_labels is None):
        raise ValueError("candidates and candidate_labels must be given together")
    candidates = None if candidates is None else candidates.contiguous()
    stats, valid, distances, indices, _ = _triplet(
        embeddings.contiguous(), labels, candidates, candidate_labels, self_offset, margin, squared
    )
    values, (d_pos, d_neg), (i_pos, i_neg) = stats.detach(), distances.detach(), indices
    return TripletOutput(stats[0], d_pos, d_neg, i_pos, i_neg, valid[0], values[1], values[2], values[3])


def reference(
    embeddings: Tensor,
    labels: Tensor,
    *,
    candidates: Tensor | None = None,
    candidate_labels: Tensor | None = None,
    self_offset: int = 0,
    margin: float | None = 0.3,
    squared: bool = False,
) -> TripletOutput:
    """The contract above in plain torch, with the full [B, N, D] array of differences, in the embeddings' dtype
    (including float64). Autograd computes its gradients."""
    if candidates is None or candidate_labels is None:
        candidates, candidate_labels = embeddings, labels
    anchors, numbers = torch.arange(len(embeddings)), torch.arange(len(candidates))
    with torch.no_grad():
        distance = (embeddings[:, None] - candidates[None]).square().sum(2)
        same = labels[:, None] == candidate_labels[None]
        positive = same & (numbers[None] != anchors[:, None] + self_offset)
        i_pos = distance.masked_fill(~positive, -1).argmax(1).masked_fill(~positive.any(1), -1)
        i_neg = distance.masked_fill(same, torch.inf).argmin(1).masked_fill(same.all(1), -1)

    def distance_to(index: Tensor) -> Tensor:
        square = (embeddings - candidates[index.clamp(min=0)]).square().sum(1)
        if not squared:
            nonzero = square > 0
            square = torch.where(nonzero, torch.where(nonzero, square, 1).sqrt(), square)
        return torch.where(index >= 0, square, 0)

    d_pos, d_neg = distance_to(i_pos), distance_to(i_neg)
    both = (i_pos >= 0) & (i_neg >= 0)
    gap = d_pos - d_neg
    losses = torch.nn.functional.softplus(gap) if margin is None else (gap + margin).relu()
    count = both.sum()

    def mean(values: Tensor) -> Tensor:
        return torch.where(both, values, 0).sum() / count.clamp(min=1)

    active = mean((losses > 0).to(losses.dtype))
    return TripletOutput(mean(losses), d_pos, d_neg, i_pos, i_neg, count, active, mean(d_pos), mean(d_neg))


# ---------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _hardest(score, allowed, column, FARTHEST: tl.constexpr, NONE: tl.constexpr):
    """The greatest (or least) allowed score of each row, and the first column with it, or NONE if none is allowed.
    A score of nan wins, so that it reaches the loss."""
    worst = float("-inf") if FARTHEST else float("inf")
    best = float("inf") if FARTHEST else float("-inf")
    score = tl.where(score == score, score, best)
    score = tl.where(allowed, score, worst)
    top = tl.max(score, axis=1) if FARTHEST else tl.min(score, axis=1)
    first = tl.min(tl.where(allowed & (score == top[:, None]), column, NONE), axis=1)
    return top, first


@triton.jit
def mine_kernel(
    anchors,  # [B, D]
    labels,  # int64 [B]
    candidates,  # [N, D]
    candidate_labels,  # int64 [N]
    tops,  # float32 [2, tiles, B]: the hardest score in each tile of candidates, for positives and negatives
    firsts,  # int32 [2, tiles, B]: its candidate
    batch,
    count,
    self_offset,
    tiles,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CENTRED: tl.constexpr,  # shift by the tile's first anchor, then multiply as three TF32 products
    UPCAST: tl.constexpr,  # multiply in float32 (always where CENTRED)
):
    """One tile of anchors by candidates. Scores stay in registers; only each anchor's hardest are stored."""
    none: tl.constexpr = 2147483647
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = anchors + tl.program_id(0).to(tl.int64) * BLOCK_B * D
    row_live, column_live = row < batch, column < count
    dots = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    norms = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_live = d < D
        a = tl.load(
            anchors + row.to(tl.int64)[:, None] * D + d[None, :], mask=row_live[:, None] & d_live[None, :], other=0.0
        )
        c = tl.load(
            candidates + column.to(tl.int64)[:, None] * D + d[None, :],
            mask=column_live[:, None] & d_live[None, :],
            other=0.0,
        )
        if UPCAST:
            a, c = a.to(tl.float32), c.to(tl.float32)
        if CENTRED:
            center = tl.load(first + d, mask=d_live, other=0.0).to(tl.float32)
            center = tl.where(tl.abs(center) < float("inf"), center, 0.0)  # one bad row must not affect the others
            a, c = a - center[None, :], c - center[None, :]
        c_float = c.to(tl.float32)
        norms += tl.sum(c_float * c_float, axis=1)
        dots = tl.dot(a, tl.trans(c), dots, input_precision="tf32x3")
    score = norms[None, :] - 2 * dots

    own = tl.load(labels + row, mask=row_live, other=0)
    theirs = tl.load(candidate_labels + column, mask=column_live, other=0)
    same = own[:, None] == theirs[None, :]
    other_row = column[None, :] != row[:, None] + self_offset
    live = row_live[:, None] & column_live[None, :]
    far, far_index = _hardest(score, live & same & other_row, column[None, :], True, none)
    near, near_index = _hardest(score, live & (own[:, None] != theirs[None, :]), column[None, :], False, none)
    offset = tl.program_id(1) * batch + row
    tl.store(tops + offset, far, mask=row_live)
    tl.store(firsts + offset, far_index, mask=row_live)
    tl.store(tops + tiles * batch + offset, near, mask=row_live)
    tl.store(firsts + tiles * batch + offset, near_index, mask=row_live)


@triton.jit
def _hardest_tile(top, first, FARTHEST: tl.constexpr, NONE: tl.constexpr):
    """The first candidate with the hardest score among an anchor's tiles; NONE if there is none."""
    valid = first < NONE
    top = tl.where(valid, top, float("-inf") if FARTHEST else float("inf"))
    best = tl.max(top, axis=0) if FARTHEST else tl.min(top, axis=0)
    return tl.min(tl.where(valid & (top == best), first, NONE), axis=0)


@triton.jit
def loss_kernel(
    anchors,  # [B, D]
    candidates,  # [N, D]
    tops,  # float32 [2, tiles, B]
    firsts,  # int32 [2, tiles, B]
    distances,  # float32 [2, B]
    indices,  # int64 [2, B]
    losses,  # float32 [B]
    slopes,  # float32 [2, B]: factors of the differences (to positive, to negative) in the loss's gradient
    batch,
    tiles,
    margin,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOFT: tl.constexpr,
    SQUARED: tl.constexpr,
):
    """One anchor: its hardest pair among the tiles, their distances from direct differences, its loss and slopes."""
    none: tl.constexpr = 2147483647
    i = tl.program_id(0)
    t = tl.arange(0, BLOCK_T)
    offset = t * batch + i
    far = tl.load(tops + offset, mask=t < tiles, other=0.0)
    far_index = tl.load(firsts + offset, mask=t < tiles, other=none)
    near = tl.load(tops + tiles * batch + offset, mask=t < tiles, other=0.0)
    near_index = tl.load(firsts + tiles * batch + offset, mask=t < tiles, other=none)
    p = _hardest_tile(far, far_index, True, none)
    n = _hardest_tile(near, near_index, False, none)
    has_p, has_n = p < none, n < none
    p, n = tl.where(has_p, p, 0), tl.where(has_n, n, 0)

    sum_p = tl.zeros((BLOCK_D,), tl.float32)
    sum_n = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        live = d < D
        a = tl.load(anchors + i.to(tl.int64) * D + d, mask=live, other=0.0).to(tl.float32)
        to_p = a - tl.load(candidates + p.to(tl.int64) * D + d, mask=live, other=0.0).to(tl.float32)
        to_n = a - tl.load(candidates + n.to(tl.int64) * D + d, mask=live, other=0.0).to(tl.float32)
        sum_p += to_p * to_p
        sum_n += to_n * to_n
    d_p, d_n = tl.sum(sum_p, axis=0), tl.sum(sum_n, axis=0)
    if SQUARED:
        slope_p, slope_n = d_p * 0 + 2, d_n * 0 + 2
    else:
        d_p, d_n = tl.math.sqrt_rn(d_p), tl.math.sqrt_rn(d_n)
        slope_p = tl.where(d_p == 0, 0.0, 1 / d_p)
        slope_n = tl.where(d_n == 0, 0.0, 1 / d_n)
    gap = d_p - d_n
    if SOFT:
        tail = tl.exp(-tl.abs(gap))
        loss = tl.maximum(gap, 0.0) + tl.where(tail < 1e-4, tail, tl.log(1 + tail))
        active = 1 / (1 + tl.exp(-gap))
    else:
        hinge = gap + margin
        loss = tl.where(hinge <= 0, 0.0, hinge)  # not tl.maximum, which could drop nan
        active = tl.where(hinge <= 0, 0.0, tl.where(hinge > 0, 1.0, hinge))
    # A distance that is not finite must reach the loss, even where the hinge would hide it (an infinite negative one).
    finite = d_p + d_n < float("inf")
    loss, active = tl.where(finite, loss, d_p + d_n), tl.where(finite, active, float("nan"))
    both = has_p & has_n
    tl.store(distances + i, tl.where(has_p, d_p, 0.0))
    tl.store(distances + batch + i, tl.where(has_n, d_n, 0.0))
    tl.store(indices + i, tl.where(has_p, p, -1).to(tl.int64))
    tl.store(indices + batch + i, tl.where(has_n, n, -1).to(tl.int64))
    tl.store(losses + i, tl.where(both, loss, 0.0))
    tl.store(slopes + i, tl.where(both, active * slope_p, 0.0))
    tl.store(slopes + batch + i, tl.where(both, active * slope_n, 0.0))


@triton.jit
def mean_kernel(
    distances,  # float32 [2, B]
    indices,  # int64 [2, B]
    losses,  # float32 [B]
    stats,  # float32 [4]: loss, share of active anchors, mean distances to positives and negatives
    valid,  # int64 [1]
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The means over all valid anchors, computed by one program in a fixed order."""
    lane = tl.arange(0, BLOCK)
    loss = tl.zeros((BLOCK,), tl.float32)
    active = tl.zeros((BLOCK,), tl.float32)
    d_p = tl.zeros((BLOCK,), tl.float32)
    d_n = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, BATCH, BLOCK):
        i = start + lane
        live = i < BATCH
        p = tl.load(indices + i, mask=live, other=-1)
        n = tl.load(indices + BATCH + i, mask=live, other=-1)
        both = (p >= 0) & (n >= 0)
        anchor_loss = tl.load(losses + i, mask=both, other=0.0)
        loss += anchor_loss
        active += tl.where(both & (anchor_loss > 0), 1.0, 0.0)
        d_p += tl.load(distances + i, mask=both, other=0.0)
        d_n += tl.load(distances + BATCH + i, mask=both, other=0.0)
        count += both.to(tl.int32)
    total = tl.sum(count, axis=0)
    share = 1 / tl.maximum(total, 1).to(tl.float32)
    tl.store(stats + 0, tl.sum(loss, axis=0) * share)
    tl.store(stats + 1, tl.sum(active, axis=0) * share)
    tl.store(stats + 2, tl.sum(d_p, axis=0) * share)
    tl.store(stats + 3, tl.sum(d_n, axis=0) * share)
    tl.store(valid, total.to(tl.int64))


@triton.jit
def gradient_kernel(
    anchors,  # [B, D]
    candidates,  # [N, D]
    indices,  # int64 [2, B]
    slopes,  # float32 [2, B]
    valid,  # int64 [1]
    upstream,  # float32 [1]
    anchor_gradient,  # [B, D]
    candidate_gradient,  # [N, D]; the anchors' gradient if ITSELF
    count,
    BATCH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    ITSELF: tl.constexpr,  # the candidates are the anchors
):
    """One row of a gradient: the sum of its terms as an anchor and as the positive or negative of other anchors.
    Programs below `count` are candidates, the others anchors."""
    program = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = d < D
    total = tl.load(valid)
    scale = tl.load(upstream) / tl.maximum(total, 1).to(tl.float32)
    gradient = tl.zeros((BLOCK_D,), tl.float32)
    is_candidate = program < count
    if is_candidate:
        row = tl.load(candidates + program.to(tl.int64) * D + d, mask=live, other=0.0).to(tl.float32)
        lane = tl.arange(0, CHUNK)
        for start in range(0, BATCH, CHUNK):
            i = start + lane
            p = tl.load(indices + i, mask=i < BATCH, other=-1)
            n = tl.load(indices + BATCH + i, mask=i < BATCH, other=-1)
            hits = ((p == program) | (n == program)).to(tl.int32)
            if tl.sum(hits, axis=0) > 0:
                for offset in range(0, CHUNK):
                    j = start + offset
                    if tl.sum(tl.where(lane == offset, hits, 0), axis=0) > 0:
                        a = tl.load(anchors + tl.cast(j, tl.int64) * D + d, mask=live, other=0.0).to(tl.float32)
                        as_p = (tl.load(indices + j) == program).to(tl.float32)
                        as_n = (tl.load(indices + BATCH + j) == program).to(tl.float32)
                        weight = as_n * tl.load(slopes + BATCH + j) - as_p * tl.load(slopes + j)
                        gradient += tl.where(weight == 0, 0.0, weight * (a - row))
    if (program >= count) | ITSELF:
        i = program if ITSELF else program - count
        p = tl.load(indices + i)
        n = tl.load(indices + BATCH + i)
        a = tl.load(anchors + i.to(tl.int64) * D + d, mask=live, other=0.0).to(tl.float32)
        to_p = a - tl.load(candidates + tl.maximum(p, 0) * D + d, mask=live, other=0.0).to(tl.float32)
        to_n = a - tl.load(candidates + tl.maximum(n, 0) * D + d, mask=live, other=0.0).to(tl.float32)
        weight_p, weight_n = tl.load(slopes + i), tl.load(slopes + BATCH + i)
        # An anchor that is left out has gradient 0, even if a row is not finite.
        counted = (p >= 0) & (n >= 0) & ((weight_p != 0) | (weight_n != 0))
        gradient += tl.where(counted, weight_p * to_p - weight_n * to_n, 0.0)
    gradient *= scale
    if is_candidate:
        target = candidate_gradient + program.to(tl.int64) * D + d
        tl.store(target, gradient.to(candidate_gradient.dtype.element_ty), mask=live)
    else:
        target = anchor_gradient + (program - count).to(tl.int64) * D + d
        tl.store(target, gradient.to(anchor_gradient.dtype.element_ty), mask=live)


def launch(
    anchors: Tensor,
    labels: Tensor,
    candidates: Tensor,
    candidate_labels: Tensor,
    self_offset: int,
    margin: float | None,
    squared: bool,
    upcast: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The contract's forward pass in Triton, in three launches: stats [4] (loss, active, mean_pos, mean_neg), valid
    [1], distances [2, B], indices [2, B], slopes [2, B]. upcast: multiply half precision in float32 too."""
    batch, width = anchors.shape
    count = len(candidates)
    block_b, block_n, block_d, warps = (16, 16, 64, 2) if batch < 1024 else (64, 128, 32, 8)
    tiles = triton.cdiv(count, block_n)
    centered = anchors.dtype == torch.float32
    tops = anchors.new_empty((2, tiles, batch), dtype=torch.float32)
    firsts = anchors.new_empty((2, tiles, batch), dtype=torch.int32)
    mine_kernel[(triton.cdiv(batch, block_b), tiles)](
        anchors,
        labels,
        candidates,
        candidate_labels,
        tops,
        firsts,
        batch,
        count,
        self_offset,
        tiles,
        D=width,
        BLOCK_B=block_b,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        CENTRED=centered,
        UPCAST=centered or upcast,
        num_warps=warps,
        num_stages=2,
    )
    stats, valid, distances, indices, slopes = _empty(anchors)
    losses = anchors.new_empty(batch, dtype=torch.float32)
    loss_kernel[(batch,)](
        anchors,
        candidates,
        tops,
        firsts,
        distances,
        indices,
        losses,
        slopes,
        batch,
        tiles,
        0.0 if margin is None else margin,
        D=width,
        BLOCK_T=triton.next_power_of_2(tiles),
        BLOCK_D=min(1024, triton.next_power_of_2(width)),
        SOFT=margin is None,
        SQUARED=squared,
        num_warps=4,
    )
    mean_kernel[(1,)](distances, indices, losses, stats, valid, BATCH=batch, BLOCK=1024, num_warps=4)
    return stats, valid, distances, indices, slopes


def launch_gradient(
    upstream: Tensor, anchors: Tensor, candidates: Tensor | None, indices: Tensor, slopes: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """The contract's gradients in Triton, in one launch: of the anchors and of the candidates (empty if they are the
    anchors themselves). upstream: float32; its first element is the gradient of the loss."""
    batch, width = anchors.shape
    itself = candidates is None
    pool = anchors if candidates is None else candidates
    by_anchor = torch.empty_like(anchors)
    by_candidate = by_anchor if itself else torch.empty_like(pool)
    block = min(1024, triton.next_power_of_2(width))
    gradient_kernel[(len(pool) if itself else len(pool) + batch, triton.cdiv(width, block))](
        anchors,
        pool,
        indices,
        slopes,
        valid,
        upstream,
        by_anchor,
        by_candidate,
        len(pool),
        BATCH=batch,
        D=width,
        BLOCK_D=block,
        CHUNK=32,
        ITSELF=itself,
        num_warps=4,
    )
    return by_anchor, anchors.new_empty(0) if itself else by_candidate


def _empty(anchors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialized tensors for the results of the forward pass."""
    batch, floats = len(anchors), torch.float32
    return (
        anchors.new_empty(4, dtype=floats),
        anchors.new_empty(1, dtype=torch.int64),
        anchors.new_empty((2, batch), dtype=floats),
        anchors.new_empty((2, batch), dtype=torch.int64),
        anchors.new_empty((2, batch), dtype=floats),
    )


# ------------------------------------------------------------------------------------------------------------- CPU


def on_cpu(
    anchors: Tensor,
    labels: Tensor,
    candidates: Tensor,
    candidate_labels: Tensor,
    self_offset: int,
    margin: float | None,
    squared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same results as `launch`, with gathers and one float32 matrix product relative to the first anchor."""
    a, c = anchors.float(), candidates.float()
    center = a[0].nan_to_num(0, 0, 0)
    c_centered = c - center
    a_centered = c_centered if candidates is anchors else a - center
    score = torch.addmm(c_centered.square().sum(1), a_centered, c_centered.T, alpha=-2)
    same = labels[:, None] == candidate_labels[None]
    rows = torch.arange(len(a))
    positive = same & (torch.arange(len(c)) != rows[:, None] + self_offset)
    # Both return the first among equals, and prefer nan to all other scores.
    i_pos = torch.where(positive, score, -torch.inf).argmax(1)
    i_neg = torch.where(same, torch.inf, score).argmin(1)
    index = torch.stack([i_pos, i_neg])  # [2, B], like everything below
    has = torch.stack([positive[rows, i_pos], ~same[rows, i_neg]])
    distance = torch.linalg.vector_norm(c[index].sub_(a), dim=2)
    if squared:
        distance = distance.square()
        slope = torch.full_like(distance, 2)
    else:
        slope = torch.where(distance == 0, 0, 1 / distance)
    gap = distance[0] - distance[1]
    if margin is None:
        loss, active = torch.nn.functional.softplus(gap), gap.sigmoid()
    else:
        hinge = gap + margin
        loss, active = torch.where(hinge <= 0, 0, hinge), torch.where(hinge <= 0, 0, hinge / hinge)
    total = distance.sum(0)
    loss, active = torch.where(total < torch.inf, loss, total), torch.where(total < torch.inf, active, torch.nan)
    both = has.all(0)
    count = both.sum()
    values = torch.stack([loss, (loss > 0).float(), distance[0], distance[1]])
    stats = torch.where(both, values, 0).sum(1) / count.clamp(min=1)
    slopes = torch.where(both, active * slope, 0)
    return stats, count[None], torch.where(has, distance, 0), torch.where(has, index, -1), slopes


def gradient_on_cpu(
    upstream: Tensor, anchors: Tensor, candidates: Tensor | None, indices: Tensor, slopes: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Same results as `launch_gradient`."""
    a = anchors.float()
    c = a if candidates is None else candidates.float()
    counted = ((indices >= 0).all(0) & (slopes != 0).any(0)).nonzero()[:, 0]  # other anchors have gradient 0
    all_counted = len(counted) == len(a)
    index, slope, own = (indices, slopes, a) if all_counted else (indices[:, counted], slopes[:, counted], a[counted])
    weight = slope * (upstream[0] / valid.clamp(min=1))
    to_pos, to_neg = c[index].sub_(own).mul_(weight[..., None])
    pull = to_neg - to_pos
    by_anchor = pull if all_counted else torch.zeros_like(a).index_add_(0, counted, pull)
    by_candidate = by_anchor if candidates is None else torch.zeros_like(c)
    by_candidate.index_add_(0, index[0], to_pos).index_add_(0, index[1], to_neg, alpha=-1)
    empty = anchors.new_empty(0)
    return by_anchor.to(anchors.dtype), empty if candidates is None else by_candidate.to(anchors.dtype)


# -------------------------------------------------------------------------------------------------------- dispatch


def _check(anchors: Tensor, labels: Tensor, candidates: Tensor, candidate_labels: Tensor) -> None:
    for name, rows, row_labels in (("embeddings", anchors, labels), ("candidates", candidates, candidate_labels)):
        if rows.ndim != 2 or rows.dtype not in DTYPES or not rows.is_contiguous() or not rows.numel():
            expected = "contiguous, not empty, float32, float16 or bfloat16 [rows, D]"
            raise ValueError(f"{name} must be {expected}, not {rows.dtype} {list(rows.shape)}")
        if row_labels.dtype != torch.int64 or row_labels.shape != rows.shape[:1] or not row_labels.is_contiguous():
            found = f"{row_labels.dtype} {list(row_labels.shape)}"
            raise ValueError(f"labels of {name} must be contiguous int64 [{len(rows)}], not {found}")
    if candidates.dtype != anchors.dtype or candidates.shape[1] != anchors.shape[1]:
        raise ValueError(f"candidates must be {anchors.dtype} [N, {anchors.shape[1]}] like the embeddings")
    if len({tensor.device for tensor in (anchors, labels, candidates, candidate_labels)}) > 1:
        raise ValueError("embeddings, candidates and labels must be on one device")


@torch.library.custom_op("fasttrain::triplet", mutates_args=(), device_types="cuda")
def _triplet(
    anchors: Tensor,
    labels: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    self_offset: int,
    margin: float | None,
    squared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pool, pool_labels = (
        (anchors, labels) if candidates is None or candidate_labels is None else (candidates, candidate_labels)
    )
    _check(anchors, labels, pool, pool_labels)
    with torch.cuda.device_of(anchors):
        return launch(anchors, labels, pool, pool_labels, self_offset, margin, squared)


@_triplet.register_kernel("cpu")
def _(anchors, labels, candidates, candidate_labels, self_offset, margin, squared):
    pool, pool_labels = (anchors, labels) if candidates is None else (candidates, candidate_labels)
    _check(anchors, labels, pool, pool_labels)
    return on_cpu(anchors, labels, pool, pool_labels, self_offset, margin, squared)


@_triplet.register_fake
def _(anchors, labels, candidates, candidate_labels, self_offset, margin, squared):
    return _empty(anchors)


@torch.library.custom_op("fasttrain::triplet_backward", mutates_args=(), device_types="cuda")
def _triplet_backward(
    upstream: Tensor, anchors: Tensor, candidates: Tensor | None, indices: Tensor, slopes: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(anchors):
        return launch_gradient(upstream.contiguous(), anchors, candidates, indices, slopes, valid)


@_triplet_backward.register_kernel("cpu")
def _(upstream, anchors, candidates, indices, slopes, valid):
    return gradient_on_cpu(upstream, anchors, candidates, indices, slopes, valid)


@_triplet_backward.register_fake
def _(upstream, anchors, candidates, indices, slopes, valid):
    empty = anchors.new_empty(0) if candidates is None else torch.empty_like(candidates)
    return torch.empty_like(anchors), empty


def _setup_context(ctx, inputs, output):
    anchors, _, candidates, *_ = inputs
    _, valid, _, indices, slopes = output
    ctx.save_for_backward(anchors, candidates, indices, slopes, valid)


def _backward(ctx, upstream, *_):
    anchors, candidates, indices, slopes, valid = ctx.saved_tensors
    by_anchor, by_candidate = _triplet_backward(upstream, anchors, candidates, indices, slopes, valid)
    return by_anchor, None, None if candidates is None else by_candidate, None, None, None, None


_triplet.register_autograd(_backward, setup_context=_setup_context)
