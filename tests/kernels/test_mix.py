"""The mix kernel's CPU path and reference, against naive loops in float64 and timm's CutMix."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data import Mixup

from fasttrain.kernels import mix

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def naive(images: np.ndarray, params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels float64 [B, C, H, W] and each image's exact own share, pixel by pixel."""
    batch, height, width, channels = images.shape
    pixels = np.zeros((batch, channels, height, width))
    share = np.zeros(batch)
    for b in range(batch):
        partner, mode, top, bottom, left, right, lam = params[b]
        own_count = 0
        for y in range(height):
            for x in range(width):
                own = images[b, y, x].astype(np.float64)
                other = images[int(partner), y, x].astype(np.float64)
                inside = top <= y < bottom and left <= x < right
                value = own
                if mode == mix.CUTMIX and inside:
                    value = other
                elif mode == mix.MIXUP:
                    value = float(lam) * own + (1 - float(lam)) * other
                own_count += not inside
                pixels[b, :, y, x] = (value / 255 - MEAN) / STD
        share[b] = {mix.PLAIN: 1.0, mix.CUTMIX: own_count / (height * width), mix.MIXUP: float(lam)}[int(mode)]
    return pixels, share


@st.composite
def cases(draw):
    batch, height, width = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    images = rng.integers(0, 256, (batch, height, width, 3)).astype(np.uint8)
    params = mix.plain_params(batch)
    params[:, mix.PARTNER] = rng.permutation(batch)
    params[:, mix.MODE] = rng.integers(0, 3, batch)
    for b in range(batch):  # includes empty boxes and boxes of the full image
        params[b, mix.TOP], params[b, mix.BOTTOM] = np.sort(rng.integers(0, height + 1, 2))
        params[b, mix.LEFT], params[b, mix.RIGHT] = np.sort(rng.integers(0, width + 1, 2))
    params[:, mix.LAM] = rng.random(batch)
    return images, params


@given(cases())
@settings(max_examples=80, deadline=None)
def test_equals_a_naive_loop(case):
    images, params = case
    result = mix.mix(torch.from_numpy(images), torch.from_numpy(params), MEAN, STD, torch.float32)
    pixels, share = naive(images, params)
    np.testing.assert_allclose(result.images.double().numpy(), pixels, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(result.lam.numpy(), share.astype(np.float32))
    np.testing.assert_array_equal(result.partner.numpy(), params[:, mix.PARTNER].astype(np.int64))
    assert result.images.dtype == torch.float32 and result.partner.dtype == torch.int64


@given(cases(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@settings(max_examples=80, deadline=None)
def test_the_cpu_path_is_bit_equal_to_the_reference(case, dtype):
    images, params = map(torch.from_numpy, case)
    ours, theirs = (f(images, params, MEAN, STD, dtype) for f in (mix.mix, mix.reference))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype and one.stride() == other.stride()


@pytest.mark.parametrize("mode", [mix.PLAIN, mix.CUTMIX, mix.MIXUP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mixing_all_images_at_once_equals_the_reference(monkeypatch, mode, dtype):
    """Bit-equal to the reference, whether or not the batch counts as fitting into the cache."""
    images, table = torch.randint(0, 256, (6, 7, 5, 3), dtype=torch.uint8), mix.plain_params(6)
    table[:, mix.PARTNER] = np.random.default_rng(0).permutation(6)
    table[:, mix.MODE], table[:, mix.BOX], table[:, mix.LAM] = mode, (1, 5, 2, 4), 0.3
    case = images, torch.from_numpy(table), MEAN, STD, dtype
    for cached in (images.numel(), images.numel() - 1):
        monkeypatch.setattr(mix, "_CACHED", cached)
        for one, other in zip(mix.mix(*case), mix.reference(*case), strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype and one.stride() == other.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_result_is_channels_last_and_cast_once(dtype):
    images = torch.randint(0, 256, (4, 6, 5, 3), dtype=torch.uint8)
    params = torch.from_numpy(mix.plain_params(4))
    result = mix.mix(images, params, MEAN, STD, dtype).images
    assert result.dtype == dtype and result.is_contiguous(memory_format=torch.channels_last)
    exact = mix.mix(images, params, MEAN, STD, torch.float32).images
    assert torch.equal(result, exact.to(dtype))


def test_agrees_with_timm_cutmix():
    """timm's batch CutMix of the same normalized images, with its box and its partner (the reversed batch)."""
    size, batch = 32, 8
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)
    theirs = Mixup(mixup_alpha=0, cutmix_alpha=1.0, prob=1.0, label_smoothing=0.0, num_classes=batch)
    for seed in range(20):
        np.random.seed(seed)
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        normalized = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
        before = normalized.clone()
        mixed, targets = theirs(normalized, torch.arange(batch))
        changed = (mixed != before).any(1).any(0)  # the box, where any image differs from its partner
        rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
        params = mix.plain_params(batch)
        params[:, mix.PARTNER] = np.arange(batch)[::-1]
        params[:, mix.MODE] = mix.CUTMIX
        if len(rows):
            params[:, mix.BOX] = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        ours = mix.mix(images, torch.from_numpy(params), MEAN, STD, torch.float32)
        torch.testing.assert_close(ours.images, mixed, rtol=0, atol=2e-6)
        torch.testing.assert_close(ours.lam.double(), targets.diagonal().double(), rtol=0, atol=1e-6)


def small_case() -> tuple[torch.Tensor, torch.Tensor]:
    params = mix.plain_params(4)
    params[:, mix.PARTNER] = (1, 2, 3, 0)
    params[:, mix.MODE] = (0, 1, 2, 1)
    params[:, mix.BOX] = (1, 4, 2, 5)
    params[:, mix.LAM] = 0.25
    return torch.randint(0, 256, (4, 6, 5, 3), dtype=torch.uint8), torch.from_numpy(params)


@given(st.lists(st.tuples(st.sampled_from([4, 5]), st.booleans()), max_size=25))
@settings(max_examples=40, deadline=None)
def test_results_in_use_never_change(calls):
    """Memory is reused, but not while a tensor (even a view) refers to it."""
    kept = []
    for size, keep in calls:
        images = torch.randint(0, 256, (2, size, 8, 3), dtype=torch.uint8)
        params = torch.from_numpy(mix.plain_params(2))
        result = mix.mix(images, params, MEAN, STD, torch.bfloat16).images
        if keep:
            kept.append((result[1:, :2], images))
    for view, images in kept:
        params = torch.from_numpy(mix.plain_params(2))
        assert torch.equal(view, mix.reference(images, params, MEAN, STD, torch.bfloat16).images[1:, :2])


def test_unused_memory_is_reused():
    images, params = small_case()
    addresses = set()
    for _ in range(20):
        addresses.add(mix.mix(images, params, MEAN, STD, torch.float32).images.data_ptr())
    assert len(addresses) == 1


def test_opcheck():
    images, params = small_case()
    torch.library.opcheck(torch.ops.fasttrain.mix.default, (images, params, list(MEAN), list(STD), torch.bfloat16))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph_with_the_same_results(dynamic):
    def step(images, params):
        mixed = mix.mix(images, params, MEAN, STD, torch.float32)
        return mixed.images * 2, mixed.partner + 1, mixed.lam

    case = small_case()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for one, other in zip(step(*case), compiled(*case), strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


def test_autocast_has_no_effect():
    images, params = small_case()
    with torch.autocast("cpu", torch.bfloat16):
        inside = mix.mix(images, params, MEAN, STD, torch.float32)
    plain = mix.mix(images, params, MEAN, STD, torch.float32)
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(plain, inside, strict=True))


def test_cpu_tensors_take_the_cpu_path(monkeypatch):
    paths = []
    on_cpu = mix.on_cpu
    monkeypatch.setattr(mix, "on_cpu", lambda *args: paths.append("cpu") or on_cpu(*args))
    monkeypatch.setattr(mix, "launch", lambda *args: paths.append("triton"))
    mix.mix(*small_case(), MEAN, STD, torch.float32)
    assert paths == ["cpu"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(4, 6, 5, 3)}, "contiguous uint8"),
        ({"images": torch.zeros(4, 3, 6, 5, dtype=torch.uint8).permute(0, 2, 3, 1)}, "contiguous uint8"),
        ({"images": torch.zeros(4, 6, 5, 5, dtype=torch.uint8)}, "at most 4"),
        ({"images": torch.zeros(4, 6, 5, 1, dtype=torch.uint8)}, "as many means and stds"),
        ({"params": torch.zeros(4, 6)}, r"float32 \[4, 7\]"),
        ({"params": torch.zeros(4, 7, dtype=torch.float64)}, "float32"),
        ({"dtype": torch.float64}, "dtype must be one of"),
    ],
)
def test_other_shapes_and_dtypes_raise(change, message):
    images, params = small_case()
    arguments = {"images": images, "params": params, "mean": MEAN, "std": STD, "dtype": torch.float32} | change
    with pytest.raises(ValueError, match=message):
        mix.mix(**arguments)
