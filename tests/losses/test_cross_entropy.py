"""Cross entropy against torch's, a naive loop in float64, and gradcheck."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fasttrain import recipes
from fasttrain.config import toml
from fasttrain.losses.base import Batch, Classes, Output
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.utils.errors import UserError


def batch_of(labels, other=None, lam=None) -> Batch:
    mixed = other is not None
    ones = torch.ones(len(labels))
    return Batch(labels, other if mixed else labels, lam if lam is not None else ones, mixed)


def output_of(logits) -> Output:
    return Output(logits, logits)


@given(st.integers(1, 9), st.integers(2, 40), st.floats(0, 0.9), st.integers(0, 2**31 - 1), st.floats(0.01, 30))
@settings(max_examples=60, deadline=None)
def test_equals_torch_with_its_definition_of_smoothing(batch, classes, smoothing, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(classes, (batch,), generator=generator)
    torch_smoothing = smoothing * classes / (classes - 1)
    if torch_smoothing > 1:
        return
    ours = CrossEntropy(smoothing)(output_of(logits), batch_of(labels)).loss
    theirs = F.cross_entropy(logits, labels, label_smoothing=torch_smoothing)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9, abs=1e-9)


@given(st.integers(1, 6), st.integers(2, 12), st.floats(0, 0.5), st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_equals_a_naive_loop_for_mixed_labels(batch, classes, smoothing, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64) * 4
    labels, other = (torch.randint(classes, (batch,), generator=generator) for _ in range(2))
    lam = torch.rand(batch, generator=generator, dtype=torch.float64)
    expected = 0.0
    for row in range(batch):
        total = math.log(sum(math.exp(v) for v in logits[row].tolist()))
        for label, share in ((int(labels[row]), float(lam[row])), (int(other[row]), 1 - float(lam[row]))):
            for k in range(classes):
                q = 1 - smoothing if k == label else smoothing / (classes - 1)
                expected -= share * q * (float(logits[row, k]) - total) / batch
    ours = CrossEntropy(smoothing)(output_of(logits), batch_of(labels, other, lam)).loss
    assert ours.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(st.integers(1, 6), st.integers(2, 12), st.floats(0, 0.5), st.floats(0, 3), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_class_weights_and_logit_adjustment_equal_a_naive_loop(batch, classes, smoothing, tau, mixed, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64) * 4
    labels, other = (torch.randint(classes, (batch,), generator=generator) for _ in range(2))
    lam = torch.rand(batch, generator=generator, dtype=torch.float64) if mixed else torch.ones(batch)
    weights, shares = (torch.rand(classes, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2))
    shares /= shares.sum()
    expected = 0.0
    for row in range(batch):
        adjusted = [float(logits[row, k]) + tau * math.log(shares[k]) for k in range(classes)]
        total = math.log(sum(map(math.exp, adjusted)))
        for label, share in ((int(labels[row]), float(lam[row])), (int(other[row]), 1 - float(lam[row]))):
            for k in range(classes):
                q = 1 - smoothing if k == label else smoothing / (classes - 1)
                expected -= share * float(weights[label]) * q * (adjusted[k] - total) / batch
    given_batch = batch_of(labels, other, lam) if mixed else batch_of(labels)
    given_batch = given_batch._replace(class_weights=weights, log_shares=shares.log())
    loss = CrossEntropy(smoothing, class_weights="auto", logit_adjustment=tau)
    assert loss(output_of(logits), given_batch).loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    plain = CrossEntropy(smoothing)(output_of(logits), given_batch).loss
    assert torch.equal(plain, CrossEntropy(smoothing)(output_of(logits), given_batch._replace(class_weights=None)).loss)


def test_class_weights_equal_torch_without_smoothing():
    logits, labels, weights = (
        torch.randn(9, 4, dtype=torch.float64),
        torch.arange(9) % 4,
        torch.tensor([1.0, 2, 0.5, 4]),
    )
    loss = CrossEntropy(0.0, class_weights={"a": 2.0})(
        output_of(logits), batch_of(labels)._replace(class_weights=weights)
    )
    theirs = F.cross_entropy(logits, labels, weight=weights.double(), reduction="sum") / 9
    assert loss.loss.item() == pytest.approx(theirs.item())


def test_class_weights_by_effective_number_and_by_name():
    images = torch.tensor([500.0, 50.0, 5.0], dtype=torch.float64)
    classes = Classes(("cat", "dog", "emu"), images, images / images.sum())
    effective = [sum(0.99**power for power in range(int(count))) for count in images.tolist()]  # the paper's series
    found = CrossEntropy(class_weights="auto", effective_beta=0.99).class_weights_for(classes)
    ratios = [effective[0] / each for each in effective]
    assert (found / found[0]).tolist() == pytest.approx(ratios)
    assert float((found.double() * classes.shares).sum()) == pytest.approx(1)  # the mean over the images
    named = CrossEntropy(class_weights={"emu": 8.0}).class_weights_for(classes)
    assert (named / named[0]).tolist() == pytest.approx([1, 1, 8])
    assert CrossEntropy().class_weights_for(classes) is None
    with pytest.raises(
        UserError, match=r"class_weights names 'gnu', which is not a class of the images; they have cat"
    ):
        CrossEntropy(class_weights={"gnu": 2.0}).class_weights_for(classes)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("class_weights=balanced", "class_weights must be none, auto or a table of classes, not 'balanced'"),
        ("class_weights={cat=0}", "class_weights.cat must be above 0"),
        ("class_weights={cat='x'}", "losses.cross_entropy.class_weights.cat must be a number"),
        ("class_weights=2", "class_weights must be a word or a table of numbers, not 2"),
        ("effective_beta=1", "effective_beta must be in"),
        ("logit_adjustment=-1", "logit_adjustment must be in"),
    ],
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(UserError, match=re.escape(message)):
        toml.override(recipes.for_arch("resnet18"), f"losses.cross_entropy.{setting}")


def test_a_table_of_class_weights_survives_toml():
    recipe = toml.override(recipes.for_arch("resnet18"), "losses.cross_entropy.class_weights={'n01 .x' = 2, dog = 0.5}")
    assert recipe.losses[0].class_weights == {"n01 .x": 2.0, "dog": 0.5}
    for comments in (False, True):
        assert toml.from_toml(toml.to_toml(recipe, comments)) == recipe
    assert toml.override(recipe, "losses.cross_entropy.class_weights=auto").losses[0].class_weights == "auto"


def test_gradcheck():
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    labels, other = torch.tensor([0, 3, 6, 2]), torch.tensor([1, 3, 0, 5])
    lam = torch.tensor([0.25, 1.0, 0.5, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: CrossEntropy(0.1)(output_of(x), batch_of(labels, other, lam)).loss, logits
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_float32_and_is_finite_at_large_logits(dtype):
    logits = torch.tensor([[6e4, -6e4, 0.0], [-6e4, 6e4, 6e4]], dtype=dtype, requires_grad=True)
    loss = CrossEntropy(0.1)(output_of(logits), batch_of(torch.tensor([1, 0]))).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


def test_weight_and_smoothing():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    plain = CrossEntropy(0.1)(output_of(logits), batch_of(labels)).loss
    assert torch.equal(CrossEntropy(0.1, weight=2.0)(output_of(logits), batch_of(labels)).loss, 2 * plain)
    with pytest.raises(ValueError, match="smoothing"):
        CrossEntropy(1.0)
