"""Aligned TResNets, compared with timm's in float64; padded channels are always exactly 0."""

import copy
import gc
from dataclasses import replace

import pytest
import timm
import torch
from helpers import events, part_of, run, tiny
from timm.models.tresnet import TResNet
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.checkpoints import checkpoint
from fasttrain.config import schema
from fasttrain.config.schema import MixConfig, OptimConfig
from fasttrain.models import _init_norms_to_one
from fasttrain.models.aligned import align, cut, pad
from fasttrain.training.ema import Ema
from fasttrain.training.optim import sgd
from fasttrain.utils.errors import UserError

CLASSES = 7
# (v2, multiple). Widths are 35, 70, 140 and 280, with 70 in squeeze-and-excitation; for v2 32, 64, 128 and 256, with
# bottlenecks in all stages.
SHAPES = [(False, 8), (False, 64), (True, 64)]


def small_tresnet(v2: bool = False) -> TResNet:
    return TResNet(layers=[2, 2, 2, 1], num_classes=CLASSES, width_factor=0.55, v2=v2)


@torch.no_grad()
def randomize(network: TResNet) -> TResNet:
    """Convert to float64, and randomize norms, biases and statistics."""
    network.double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.3, 1.2)
            module.bias.normal_(0, 0.2)
            module.get_buffer("running_mean").normal_(0, 0.2)
            module.get_buffer("running_var").uniform_(0.5, 2)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.normal_(0, 0.2)
    return network


def pair(v2: bool = False, multiple: int = 8) -> tuple[TResNet, TResNet]:
    """timm's network and its aligned form, with the same weights."""
    torch.manual_seed(0)
    plain = randomize(small_tresnet(v2))
    aligned: TResNet = align(copy.deepcopy(plain), multiple)
    return plain, aligned


def images(count: int = 4, size: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in [*network.named_parameters(), *network.named_buffers()]}


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def split(tensor: Tensor, shape: torch.Size) -> tuple[Tensor, int]:
    """The first entries of each dimension, in this shape, and how many of the other entries are not 0 (or are NaN)."""
    corner = tensor[tuple(slice(0, length) for length in shape)]
    assert corner.shape == shape
    return corner, int(tensor.count_nonzero() - corner.count_nonzero())


def check(aligned: dict[str, Tensor], plain: dict[str, Tensor], exactly: bool = False) -> int:
    """Check that shared entries are equal and padded ones are 0. Returns the number of padded entries."""
    assert aligned.keys() == plain.keys()
    padded = 0
    for name, expected in plain.items():
        if name.endswith(".filt"):
            continue  # a constant: every channel has the same filter
        corner, strays = split(aligned[name], expected.shape)
        assert strays == 0, f"{name} has {strays} padded entries that are not 0"
        if exactly:
            assert torch.equal(corner, expected), name
        else:
            # Some gradients cancel to almost 0, so errors are relative to a tensor's largest entry.
            error = (corner - expected).abs().amax() / expected.abs().amax().clamp_min(1e-30)
            assert error < 1e-10 or torch.equal(corner, expected), f"{name}: {error}"
        padded += aligned[name].numel() - expected.numel()
    return padded


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().amax() / expected.abs().amax())


def widths(network: nn.Module) -> set[int]:
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    return {width for conv in convs for width in (conv.in_channels, conv.out_channels)}


@pytest.mark.parametrize(("v2", "multiple"), SHAPES)
@pytest.mark.parametrize("training", [False, True])
def test_output_equals_timm(v2, multiple, training):
    plain, aligned = pair(v2, multiple)
    for size in (64, 96):
        with torch.no_grad():
            expected, actual = (model.train(training)(images(size=size)) for model in (plain, aligned))
        assert relative_error(actual, expected) < 1e-10
    assert check(tensors(aligned), tensors(plain)) > 0  # the statistics too


@pytest.mark.parametrize(("v2", "multiple"), SHAPES)
def test_widths_are_multiples_except_input_and_features(v2, multiple):
    plain, aligned = pair(v2, multiple)
    assert any(width % multiple for width in widths(plain) - {48, plain.num_features})
    assert not any(width % multiple for width in widths(aligned) - {48, plain.num_features})
    assert aligned.num_features == plain.num_features and aligned.head.fc.weight.shape == plain.head.fc.weight.shape
    features = aligned.forward_intermediates(images(), intermediates_only=True)
    assert [tensor.shape[1] for tensor in features] == [stage["num_chs"] for stage in aligned.feature_info]


@pytest.mark.parametrize("arch", ["tresnet_m", "tresnet_v2_l"])
def test_networks_with_aligned_widths_do_not_change(arch):
    with torch.device("meta"):
        network = timm.create_model(arch)
    before = {name: id(p) for name, p in network.named_parameters()}
    assert align(network) is network
    assert {name: id(p) for name, p in network.named_parameters()} == before
    assert not network._state_dict_hooks and not network._load_state_dict_pre_hooks


@pytest.mark.parametrize(
    "settings",
    [
        OptimConfig(momentum=0.9, weight_decay=0.01),
        OptimConfig(momentum=0.9, weight_decay=0.01, decay_norm_bias=False, nesterov=True),
    ],
    ids=["decay on everything", "nesterov, no decay of norms"],
)
def test_training_equals_timm_and_padded_channels_stay_zero(settings):
    """Gradients, weights, momentum, statistics and averages, after each of five steps from random weights."""
    torch.manual_seed(0)
    plain = small_tresnet().double()  # the last norm weight of each block starts at 0
    aligned = align(copy.deepcopy(plain))
    both = (plain.train(), aligned.train())
    optimizers = [sgd(network, settings) for network in both]
    averages = [Ema(network, 0.9) for network in both]
    names = [name for name, _ in plain.named_parameters()]
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for step in range(1, 6):
        batch, labels = images(seed=step), torch.randint(CLASSES, (4,))
        for network, optimizer, average in zip(both, optimizers, averages, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = 0.05
            optimizer.zero_grad()
            F.cross_entropy(network(batch), labels).backward()
            optimizer.step()
            average.update(step)
        check(gradients(aligned), gradients(plain))
        assert check(tensors(aligned), tensors(plain)) > 0
        momenta = [
            dict(zip(names, (optimizer.state[p]["momentum_buffer"] for p in network.parameters()), strict=True))
            for network, optimizer in zip(both, optimizers, strict=True)
        ]
        check(momenta[1], momenta[0])
        check(tensors(averages[1].model), tensors(averages[0].model))
    assert all(not torch.equal(p, start[name]) for name, p in plain.named_parameters())
    assert all(gradient.any() for gradient in gradients(plain).values()) and gradients(plain).keys() == start.keys()


def test_tresnet_xl_equals_timm():
    torch.manual_seed(0)
    plain = randomize(timm.create_model("tresnet_xl", num_classes=CLASSES))
    aligned = align(copy.deepcopy(plain))
    assert widths(plain) == {48, 64, 83, 166, 332, 664, 1328, 2656}
    assert widths(aligned) == {48, 64, 88, 168, 336, 664, 1328, 2656}
    assert check(tensors(aligned), tensors(plain), exactly=True) == 1_027_874  # parameters and statistics
    for training in (False, True):
        with torch.no_grad():
            expected, actual = (model.train(training)(images(2)) for model in (plain, aligned))
        assert relative_error(actual, expected) < 1e-10
    check(tensors(aligned), tensors(plain))
    state = aligned.state_dict()
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert {name: tensor.shape for name, tensor in state.items()} == shapes


def same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(actual) == list(expected) and all(
        actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "inside another module"])
def test_state_dicts_are_lossless_in_both_directions(nested):
    plain, aligned = pair()
    torch.manual_seed(1)
    other = randomize(small_tresnet())
    if nested:
        plain, aligned, other = (nn.ModuleDict({"backbone": network}) for network in (plain, aligned, other))
    assert same_bits(aligned.state_dict(), plain.state_dict())
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    originals = dict(state)
    assert str(aligned.load_state_dict(state)) == "<All keys matched successfully>"
    assert all(state[name] is tensor for name, tensor in originals.items())  # the caller's tensors are not replaced
    assert same_bits(aligned.state_dict(), state)
    check(tensors(aligned), tensors(other), exactly=True)
    plain.load_state_dict(aligned.state_dict())
    assert same_bits(plain.state_dict(), state)


def test_cut_and_pad_are_lossless():
    """As used for the optimizer's momentum. For a network that is not aligned, they change nothing."""
    plain, aligned = pair()
    unpadded = dict(plain.state_dict())
    padded = {name: tensors(aligned)[name] for name in unpadded}
    assert same_bits(cut(padded, aligned), unpadded)
    assert same_bits(pad(unpadded, aligned), padded)
    assert same_bits(pad(cut(padded, aligned), aligned), padded)
    assert all(cut(unpadded, plain)[name] is tensor for name, tensor in unpadded.items())
    assert all(pad(unpadded, plain)[name] is tensor for name, tensor in unpadded.items())
    unrelated = {"cosine.weight": torch.ones(3, 5)}
    assert cut(unrelated, aligned) == unrelated == pad(unrelated, aligned)


def test_padding_keeps_the_memory_format():
    _, aligned = pair()
    name = "body.layer1.0.conv1.conv.weight"
    weight = aligned.state_dict()[name].clone().contiguous(memory_format=torch.channels_last)
    padded = pad({name: weight}, aligned)[name]
    assert padded.is_contiguous(memory_format=torch.channels_last) and padded.shape == (40, 40, 3, 3)


def test_wrong_shapes_are_refused():
    _, aligned = pair()
    name = "body.layer1.0.conv1.conv.weight"
    assert aligned.state_dict()[name].shape == (35, 35, 3, 3)
    for shape in [(34, 35, 3, 3), (40, 40, 3, 3), (35, 35)]:  # narrower, padded, and with other dimensions
        with pytest.raises(UserError, match=r"conv1\.conv\.weight is .*, but \[35, 35, 3, 3\] in this network"):
            pad({name: torch.ones(shape)}, aligned)
        state = {**aligned.state_dict(), name: torch.ones(shape)}
        with pytest.raises(RuntimeError, match=r"conv1\.conv\.weight: it is .* but must be \[35, 35, 3, 3\]"):
            aligned.load_state_dict(state)
    state = aligned.state_dict()
    del state[name]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        aligned.load_state_dict(state)


def test_a_deep_copy_does_not_need_its_original():
    """Its hooks belong to the copy, which the averaged network needs."""
    aligned = pair()[1]
    clone = copy.deepcopy(aligned)
    del aligned
    gc.collect()
    state = {name: tensor.clone() for name, tensor in randomize(small_tresnet()).state_dict().items()}
    clone.load_state_dict(state)
    assert same_bits(clone.state_dict(), state)


def test_align_draws_no_random_numbers_and_keeps_parameters():
    torch.manual_seed(0)
    network = small_tresnet()
    state, weight = torch.get_rng_state(), network.head.fc.weight
    align(network)
    assert torch.equal(torch.get_rng_state(), state) and network.head.fc.weight is weight


def test_frozen_parameters_stay_frozen():
    network = small_tresnet()
    network.body.layer1.requires_grad_(False)
    align(network)
    assert {p.requires_grad for p in network.body.layer1.parameters()} == {False}
    assert {p.requires_grad for p in network.body.layer2.parameters()} == {True}


def test_norms_can_be_set_to_one_before_align():
    """The other order would set the weights of padded channels to 1."""
    torch.manual_seed(0)
    plain = small_tresnet()
    _init_norms_to_one(plain)
    check(tensors(align(copy.deepcopy(plain))), tensors(plain), exactly=True)


def test_other_networks_are_refused():
    with pytest.raises(UserError, match="only a TResNet can be aligned, not a ResNet"):
        align(timm.create_model("resnet18"))
    with pytest.raises(UserError, match="already aligned"):
        align(align(small_tresnet()))
    with pytest.raises(UserError, match="not of 0"):
        align(small_tresnet(), 0)


def test_it_compiles_into_one_graph_in_channels_last():
    plain, aligned = pair()
    aligned = aligned.to(memory_format=torch.channels_last)
    batch = images().contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(aligned, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert relative_error(compiled(batch), plain(images())) < 1e-10
        features = aligned.forward_features(batch)
    assert features.is_contiguous(memory_format=torch.channels_last)


def multiply_adds(network: TResNet, size: int) -> list[tuple[int, int, int]]:
    """(channels in, channels out, multiply-adds per image) of each convolution and of the classifier."""
    counts = []

    def count(module: nn.Conv2d | nn.Linear, _: object, output: Tensor) -> None:
        outputs, inputs = module.weight.shape[:2]
        positions = output.numel() // outputs
        counts.append((inputs, outputs, positions * module.weight.numel()))

    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    network.eval()(torch.empty(1, 3, size, size, device="meta"))
    return counts


def test_cost_of_tresnet_xl():
    with torch.device("meta"):
        plain, aligned = (timm.create_model("tresnet_xl", num_classes=1000) for _ in range(2))
    align(aligned)
    totals, unaligned = [], []
    for network in (plain, aligned):
        counts = multiply_adds(network, 224)
        totals.append(sum(count for *_, count in counts))
        unaligned.append(sum(count for inputs, outputs, count in counts if inputs % 8 or outputs % 8))
    assert totals == [15_165_013_664, 15_614_274_432]
    assert unaligned[0] / totals[0] == pytest.approx(0.8716, abs=1e-4) and unaligned[1] == 0
    parameters = [sum(p.numel() for p in network.parameters()) for network in (plain, aligned)]
    assert parameters == [78_436_244, 79_463_600]


@pytest.mark.parametrize(
    ("device", "compiled"),
    [("cpu", False), *(pytest.param("cuda", compiled, marks=pytest.mark.gpu) for compiled in (False, True))],
)
def test_padded_channels_stay_zero_in_half_precision(device, compiled):
    torch.manual_seed(0)
    plain = small_tresnet()
    shapes = {name: tensor.shape for name, tensor in tensors(plain).items()}
    network = align(plain).train().to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    forward = torch.compile(network) if compiled else network
    for step in range(3):
        batch = images(seed=step).float().to(device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(forward(batch), torch.arange(4, device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        padded = gradients(network)  # spaces keep the names below apart
        padded |= {f"{name} ": optimizer.state[p]["momentum_buffer"] for name, p in network.named_parameters()}
        padded |= {f"{name}  ": tensor for name, tensor in tensors(network).items() if not name.endswith(".filt")}
        strays = {name: count for name, tensor in padded.items() if (count := split(tensor, shapes[name.strip()])[1])}
        assert loss.isfinite() and not strays


# ---- training runs


@pytest.mark.slow
def test_a_run_can_resume_with_the_other_setting(demo_set, tmp_path):
    """Losses are equal to rounding, checkpoints have timm's shapes, and either form resumes the other."""
    index = part_of(demo_set, 2)
    machine = tiny().machine
    recipe = tiny(
        arch="tresnet_l", image_size=64, batch_size=10, epochs=2, ema=schema.EmaConfig(0.9), mix=MixConfig(cutmix=0)
    )
    forms = {"plain": recipe, "aligned": replace(recipe, machine=replace(machine, align="on"))}
    for name, form in forms.items():
        run(form, tmp_path / name, index)
    plain, aligned = (checkpoint.load(tmp_path / name / "checkpoints" / "step-00000002") for name in forms)
    assert {n: t.shape for n, t in plain.train.items()} == {n: t.shape for n, t in aligned.train.items()}
    assert {n: t.shape for n, t in plain.model.items()} == {n: t.shape for n, t in aligned.model.items()}
    losses = [[event["loss"] for event in events(tmp_path / name) if event["event"] == "train"] for name in forms]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for name, other in (("plain", "aligned"), ("aligned", "plain")):
        (tmp_path / name / "last").unlink()
        (tmp_path / name / "last").symlink_to("checkpoints/step-00000002")
        run(forms[other], tmp_path / name, index)
        resumed = [event["loss"] for event in events(tmp_path / name) if event["event"] == "train"]
        assert resumed[-1] == pytest.approx(losses[0][-1], rel=1e-3)
        model, _, _ = checkpoint.network(tmp_path / name)
        assert model.backbone.body.layer1[0].conv1.conv.out_channels == (80 if other == "aligned" else 76)
