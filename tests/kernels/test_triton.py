"""The Triton kernels against the references, on a GPU (pytest -m gpu) and in Triton's interpreter, where a test of the
default suite runs all of this file's cases. They are also compiled ahead of time for three generations of GPUs.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fasttrain.kernels import mix, triplet

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
on_device = pytest.mark.gpu  # or in the interpreter
on_gpu_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not support it")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (torch.float16, torch.bfloat16)
# Property tests use few examples on a GPU, where each new shape takes seconds to compile.


@pytest.mark.parametrize(
    ("cases", "least"), [("gpu and not slow", 60), pytest.param("gpu and slow", 1, marks=pytest.mark.slow)]
)
def test_all_cases_pass_in_the_interpreter(cases, least):
    """Triton reads TRITON_INTERPRET when a kernel is decorated, so this needs a new process."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", cases, "-p", "no:cacheprovider", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least, done.stdout[-500:]


# ------------------------------------------------------------------------------------------------------------- mix


def mix_case(shape: Sequence[int], channels: int, seed: int) -> tuple[Tensor, Tensor]:
    batch, height, width = shape
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (batch, height, width, channels)).astype(np.uint8)
    params = mix.plain_params(batch)
    params[:, mix.PARTNER] = rng.permutation(batch)
    params[:, mix.MODE] = rng.integers(0, 3, batch)
    for b in range(batch):
        params[b, mix.TOP], params[b, mix.BOTTOM] = np.sort(rng.integers(0, height + 1, 2))
        params[b, mix.LEFT], params[b, mix.RIGHT] = np.sort(rng.integers(0, width + 1, 2))
    params[:, mix.LAM] = rng.random(batch)
    return torch.from_numpy(images).to(DEVICE), torch.from_numpy(params).to(DEVICE)


def check_mix(case: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    images, params = case
    channels = images.shape[3]
    mean, std = (0.48, 0.45, 0.4, 0.5)[:channels], (0.22, 0.23, 0.24, 0.25)[:channels]
    pixels, partner, lam = mix.launch(images, params, mean, std, dtype)
    expected = mix.reference(images, params, mean, std, dtype)
    assert pixels.dtype == dtype and pixels.shape == expected.images.shape
    assert pixels.stride() == expected.images.stride()
    if (
        INTERPRETED and dtype == torch.bfloat16
    ):  # the interpreter truncates where a GPU rounds: one unit in the last place
        bits = [images.contiguous().view(torch.int16).int() for images in (pixels, expected.images)]
        assert (bits[0] - bits[1]).abs().max() <= 1
    else:
        assert torch.equal(pixels, expected.images)
    assert torch.equal(partner, expected.partner) and torch.equal(lam, expected.lam)


SHAPES = [(1, 1, 1), (3, 7, 5), (2, 16, 16), (4, 9, 32), (1, 33, 17), (5, 12, 10), (2, 56, 40)]


@on_device
@pytest.mark.parametrize("dtype", mix.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mix_equals_the_reference(shape, dtype):
    check_mix(mix_case(shape, 3, sum(shape)), dtype)


@on_device
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_mix_with_other_channels(channels):
    check_mix(mix_case((3, 10, 12), channels, channels), torch.float16)


@on_device
@given(
    st.integers(1, 4), st.integers(1, 20), st.integers(1, 20), st.sampled_from(mix.DTYPES), st.integers(0, 2**32 - 1)
)
@settings(max_examples=40 if INTERPRETED else 8, deadline=None)
def test_mix_equals_the_reference_at_any_shape(batch, height, width, dtype, seed):
    check_mix(mix_case((batch, height, width), 3, seed), dtype)


@on_device
def test_mix_boxes_at_every_column():
    """Boxes with edges inside the groups of bytes that a thread moves."""
    images, params = mix_case((2, 4, 16), 3, 0)
    for left in range(17):
        for right in range(left, 17):
            params[:, mix.MODE] = mix.CUTMIX
            params[:, mix.BOX] = torch.tensor([1.0, 3.0, left, right])
            check_mix((images, params), torch.float16)


# --------------------------------------------------------------------------------------------------------- triplet


def triplet_case(
    batch: int, width: int, classes: int, dtype: torch.dtype = torch.float32, seed=0, pool=0, before=0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchors, labels, candidates and their labels. With pool > 0, candidates from row `before` are the anchors."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(max(batch, pool), width, generator=generator).to(dtype)
    labels = torch.randint(0, classes, (len(rows),), generator=generator)
    anchors, own = rows[before : before + batch].clone().to(DEVICE), labels[before : before + batch].clone().to(DEVICE)
    return (anchors, own, rows.to(DEVICE), labels.to(DEVICE)) if pool else (anchors, own, anchors, own)


def check_triplet(case, offset=0, margin=0.3, squared=False, gather=False):
    """Indices, distances, loss and gradients against the reference in float64."""
    anchors, own, pool, labels = case
    stats, valid, distances, indices, slopes = triplet.launch(
        anchors, own, pool, labels, offset, margin, squared, upcast=INTERPRETED
    )
    inputs = (anchors, pool) if gather else (anchors,)
    exact_inputs = [rows.detach().cpu().double().requires_grad_() for rows in inputs]
    extra = {"candidates": exact_inputs[1], "candidate_labels": labels.cpu(), "self_offset": offset} if gather else {}
    exact = triplet.reference(exact_inputs[0], own.cpu(), margin=margin, squared=squared, **extra)
    assert torch.equal(indices.cpu(), torch.stack([exact.i_pos, exact.i_neg]))
    close: dict[str, Any] = {"rtol": 2e-5, "atol": 1e-6}
    torch.testing.assert_close(distances.cpu().double(), torch.stack([exact.d_pos, exact.d_neg]).detach(), **close)
    exact_stats = torch.stack([exact.loss, exact.active, exact.mean_pos, exact.mean_neg]).detach()
    torch.testing.assert_close(stats.cpu().double(), exact_stats, **close)
    assert valid.item() == exact.valid.item()

    upstream = torch.full((4,), 1.5, device=DEVICE)
    gradients = triplet.launch_gradient(upstream, anchors, pool if gather else None, indices, slopes, valid)
    (1.5 * exact.loss).backward()
    tolerance: dict[str, Any] = (
        {"rtol": 1e-4, "atol": 1e-6} if anchors.dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    )
    for ours, theirs in zip(gradients, exact_inputs, strict=False):
        expected = theirs.grad if theirs.grad is not None else torch.zeros_like(theirs)
        torch.testing.assert_close(ours.cpu().double(), expected, **tolerance)


@on_device
@pytest.mark.parametrize("margin", [0.3, 50.0, None])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 1, 1), (7, 5, 2), (16, 16, 4), pytest.param((33, 70, 6), marks=pytest.mark.slow)]
)
def test_triplet_equals_the_reference(shape, squared, margin):
    check_triplet(triplet_case(*shape), margin=margin, squared=squared)


@on_device
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(9, 8, 3), (40, 65, 5)])
def test_triplet_in_half_precision(shape, dtype):
    check_triplet(triplet_case(shape[0], shape[1], shape[2], dtype))


@on_device
@pytest.mark.parametrize(("batch", "pool", "before"), [(4, 12, 0), (5, 21, 9), (17, 40, 23)])
def test_triplet_over_a_gathered_set(batch, pool, before):
    check_triplet(triplet_case(batch, 12, 4, pool=pool, before=before), offset=before, gather=True)


@on_device
@given(st.integers(1, 40), st.integers(1, 80), st.integers(1, 8), st.integers(0, 10**6))
@settings(max_examples=25 if INTERPRETED else 8, deadline=None)
def test_triplet_equals_the_reference_at_any_shape(batch, width, classes, seed):
    check_triplet(triplet_case(batch, width, classes, seed=seed))


@on_device
@given(st.integers(2, 24), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=25 if INTERPRETED else 8, deadline=None)
def test_triplet_takes_the_first_of_equals(batch, width, classes, seed):
    """Integers in a small range: many ties and duplicates, and exact arithmetic."""
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randint(-2, 3, (batch, width), generator=generator).float().to(DEVICE)
    labels = torch.randint(0, classes, (batch,), generator=generator).to(DEVICE)
    indices = triplet.launch(anchors, labels, anchors, labels, 0, 0.3, True, INTERPRETED)[3].cpu()
    exact = triplet.reference(anchors.cpu().double(), labels.cpu(), squared=True)
    assert torch.equal(indices, torch.stack([exact.i_pos, exact.i_neg]))


@on_device
@pytest.mark.slow  # in the interpreter
def test_triplet_with_the_tiles_of_large_batches():
    anchors, own, *_ = triplet_case(1024, 8, 64)
    indices = triplet.launch(anchors, own, anchors, own, 0, 0.3, False, INTERPRETED)[3].cpu()
    exact = triplet.reference(anchors.cpu().double(), own.cpu())
    assert torch.equal(indices, torch.stack([exact.i_pos, exact.i_neg]))


@on_device
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 5, 20])
def test_triplet_propagates_nonfinite_embeddings(bad, row):
    anchors, own, *_ = triplet_case(21, 6, 3)
    anchors[row, 3] = bad
    stats, valid, _, indices, slopes = triplet.launch(anchors, own, anchors, own, 0, 0.3, False, INTERPRETED)
    assert not stats[0].isfinite() and ((indices >= -1) & (indices < 21)).all()
    gradient, _ = triplet.launch_gradient(torch.ones(4, device=DEVICE), anchors, None, indices, slopes, valid)
    assert not gradient.isfinite().all()


@on_device
def test_triplet_survives_a_common_offset():
    anchors, own, *_ = triplet_case(64, 32, 8)
    far = anchors * 0.01 + 30
    indices = triplet.launch(far, own, far, own, 0, 0.3, False, INTERPRETED)[3].cpu()
    exact = triplet.reference(far.cpu().double(), own.cpu())
    assert torch.equal(indices, torch.stack([exact.i_pos, exact.i_neg]))


@on_device
def test_triplet_is_deterministic():
    anchors, own, *_ = triplet_case(50, 30, 5)
    runs = [triplet.launch(anchors, own, anchors, own, 0, 0.3, False, INTERPRETED) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


# ------------------------------------------------------------------------------------------------- on a GPU only


def launched_kernels(function) -> list[str]:
    """Names of the kernels that a function launches, from the profiler."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in kernels if not name.startswith(("Memcpy", "Memset"))]


@on_device
@on_gpu_only
def test_operators_use_triton_with_few_launches():
    images, params = mix_case((4, 32, 32), 3, 0)
    assert launched_kernels(lambda: mix.mix(images, params, MEAN, STD, torch.bfloat16)) == ["mix_kernel"]
    anchors, own, *_ = triplet_case(64, 128, 8, dtype=torch.bfloat16)
    forward = launched_kernels(lambda: triplet.batch_hard_triplet(anchors, own))
    assert forward == ["mine_kernel", "loss_kernel", "mean_kernel"]
    _, valid, _, indices, slopes = triplet.launch(anchors, own, anchors, own, 0, 0.3, False)
    upstream = torch.ones(4, device=DEVICE)
    backward = launched_kernels(lambda: triplet.launch_gradient(upstream, anchors, None, indices, slopes, valid))
    assert backward == ["gradient_kernel"]


@on_device
@on_gpu_only
def test_nothing_waits_for_the_device():
    images, params = mix_case((4, 32, 32), 3, 0)
    anchors, own, *_ = triplet_case(64, 128, 8)
    anchors.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mix.mix(images, params, MEAN, STD, torch.bfloat16)
        triplet.batch_hard_triplet(anchors, own).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_device
@on_gpu_only
def test_mix_and_triplet_replay_in_a_cuda_graph():
    images, params = mix_case((4, 24, 24), 3, 0)
    anchors, own, *_ = triplet_case(64, 96, 8)
    anchors.requires_grad_()

    def step():
        mixed = mix.mix(images, params, MEAN, STD, torch.float16)
        loss = triplet.batch_hard_triplet(anchors, own, margin=5.0).loss
        (gradient,) = torch.autograd.grad(loss, anchors)
        return mixed.images, mixed.lam, loss.detach(), gradient

    warmup_stream = torch.cuda.Stream()
    with torch.cuda.stream(warmup_stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    new_images, new_params = mix_case((4, 24, 24), 3, 1)
    images.copy_(new_images)
    params.copy_(new_params)
    with torch.no_grad():
        anchors.copy_(torch.randn_like(anchors))
    graph.replay()
    torch.cuda.synchronize()
    for ours, expected in zip(captured, step(), strict=True):
        assert torch.equal(ours, expected)


@on_device
@on_gpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [128, 1024])
def test_triplet_at_full_width(batch, dtype):
    """With real tile sizes and dots (TF32 x 3, native bf16), the distances of the mined pairs equal those of the true
    hardest pairs, in float64, up to rounding."""
    anchors, own, *_ = triplet_case(batch, 2048, batch // 4, dtype=dtype)
    output = triplet.batch_hard_triplet(anchors, own)
    rows = anchors.double()
    exact = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    same = own[:, None] == own[None]
    others = same & ~torch.eye(batch, dtype=torch.bool, device=DEVICE)
    far = exact.masked_fill(~others, 0).amax(1)
    near = exact.masked_fill(same, math.inf).amin(1)
    # Mining may take either of two pairs with distances that differ by less than the rounding of 2048 products' sum.
    torch.testing.assert_close(output.d_pos.double(), far, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.d_neg.double(), near, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------- ahead of time


@pytest.mark.skipif(INTERPRETED, reason="the interpreter binds arguments in its own way")
def test_triton_binds_the_arguments_of_every_launch(monkeypatch):
    """Triton generates the function that binds a launch's arguments, and the arguments' names may clash with its own:
    `params` broke every launch with Triton 3.6. The patched launches stop before they need a GPU."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bound = []

    def bind(kernel, *args, grid, warmup, **options):
        values, *_ = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **options)
        assert list(values) == list(kernel.arg_names)
        for argument, value in zip(args, values.values(), strict=False):
            assert argument is value
        bound.append(kernel.__name__)

    monkeypatch.setattr(triton.JITFunction, "run", bind)
    mix.launch(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2, 7), MEAN, STD, torch.bfloat16)
    rows, labels = torch.zeros(8, 16), torch.arange(8) // 2
    _, valid, _, indices, slopes = triplet.launch(rows, labels, rows, labels, 0, 0.3, False)
    for pool in (None, rows):
        triplet.launch_gradient(torch.ones(4), rows, pool, indices, slopes, valid)
    assert {*bound} == {"mix_kernel", "mine_kernel", "loss_kernel", "mean_kernel", "gradient_kernel"}


def mix_signature(dtype: str, group: int):
    types = ["*u8", "*fp32", f"*{dtype}", "*i64", "*fp32", "i32", *["fp32"] * 8]
    return mix.mix_kernel, types, {"WIDTH": 224, "CHANNELS": 3, "GROUP": group, "GROUPS": 1024 // group}


def mine_signature(dtype: str, b: int, n: int, d: int):
    types = [f"*{dtype}", "*i64", f"*{dtype}", "*i64", "*fp32", "*i32", *["i32"] * 4]
    is_float32 = dtype == "fp32"
    constants = {"D": 2048, "BLOCK_B": b, "BLOCK_N": n, "BLOCK_D": d, "CENTRED": is_float32, "UPCAST": is_float32}
    return triplet.mine_kernel, types, constants


def compiled_kernels():
    """(name, kernel, argument types, constants, warps) as `launch` compiles them for real sizes."""
    for dtype, group in (("fp32", 4), ("fp16", 8), ("bf16", 8), ("bf16", 1)):
        yield f"mix-{dtype}-{group}", *mix_signature(dtype, group), 4
    for dtype in ("fp32", "bf16"):
        yield f"mine-small-{dtype}", *mine_signature(dtype, 16, 16, 64), 2
        yield f"mine-large-{dtype}", *mine_signature(dtype, 64, 128, 32), 8
        rows = [f"*{dtype}"] * 2
        for soft, squared in ((False, False), (True, True)):
            types = [*rows, "*fp32", "*i32", "*fp32", "*i64", "*fp32", "*fp32", "i32", "i32", "fp32"]
            constants = {"D": 2656, "BLOCK_T": 16, "BLOCK_D": 1024, "SOFT": soft, "SQUARED": squared}
            yield f"loss-{dtype}-{soft}-{squared}", triplet.loss_kernel, types, constants, 4
        for itself in (True, False):
            types = [*rows, "*i64", "*fp32", "*i64", "*fp32", *rows, "i32"]
            constants = {"BATCH": 256, "D": 2656, "BLOCK_D": 1024, "CHUNK": 32, "ITSELF": itself}
            yield f"gradient-{dtype}-{itself}", triplet.gradient_kernel, types, constants, 4
    yield "mean", triplet.mean_kernel, ["*fp32", "*i64", "*fp32", "*fp32", "*i64"], {"BATCH": 256, "BLOCK": 1024}, 4


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("case", list(compiled_kernels()), ids=lambda case: case[0])
def test_kernels_compile_without_spills_and_fit(case, tmp_path):
    """For sm_80, sm_90 and sm_100: a block's shared memory is within the 99 KiB that all of them have, and no registers
    are spilled."""
    _, kernel, types, constants, warps = case
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    pointers = {(position,): [["tt.divisibility", 16]] for position, kind in enumerate(types) if kind.startswith("*")}
    for capability in (80, 90, 100):
        source = ASTSource(kernel, signature, constants, pointers)
        options = {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": False}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.metadata.shared <= 99 * 1024
        (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
        ).stdout
        stack = re.search(r"STACK:(\d+)", usage)
        assert stack and int(stack[1]) == 0, f"sm_{capability}: {usage}"
        local = re.search(r"LOCAL:(\d+)", usage)
        assert local and int(local[1]) == 0, f"sm_{capability}: {usage}"
