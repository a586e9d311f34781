"""Aligned TResNets: timm's plain network is the oracle, in float64; added channels are exactly 0 throughout."""

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
from fasttrain.models import _start_norms_at_one
from fasttrain.models.aligned import align, cut, pad
from fasttrain.training.ema import Ema
from fasttrain.training.optim import sgd
from fasttrain.utils.errors import UserError

CLASSES = 7
# Widths 35, 70, 140 and 280, with 70 in squeeze-and-excitation; v2: 32, 64, 128 and 256, in bottlenecks throughout.
SHAPES = [(False, 8), (False, 64), (True, 64)]


def small(v2: bool = False) -> TResNet:
    return TResNet(layers=[2, 2, 2, 1], num_classes=CLASSES, width_factor=0.55, v2=v2)


@torch.no_grad()
def lived_in(network: TResNet) -> TResNet:
    """float64, with norms, biases and statistics that are not those of a fresh network."""
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
    """timm's network and its aligned form, of the same weights."""
    torch.manual_seed(0)
    plain = lived_in(small(v2))
    aligned: TResNet = align(copy.deepcopy(plain), multiple)
    return plain, aligned


def images(count: int = 4, size: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach() for name, each in [*network.named_parameters(), *network.named_buffers()]}


def gradients(network: nn.Module) -> dict[str, Tensor]:
    found = {name: each.grad for name, each in network.named_parameters()}
    return {name: each for name, each in found.items() if each is not None}


def split(tensor: Tensor, shape: torch.Size) -> tuple[Tensor, int]:
    """The first corner of this shape, and how many of the other entries are not 0 (NaN counts)."""
    corner = tensor[tuple(slice(0, each) for each in shape)]
    assert corner.shape == shape
    return corner, int(tensor.count_nonzero() - corner.count_nonzero())


def check(aligned: dict[str, Tensor], plain: dict[str, Tensor], exactly: bool = False) -> int:
    """Equal where both have entries, 0 where only the aligned one does; gives the number of those."""
    assert aligned.keys() == plain.keys()
    added = 0
    for name, expected in plain.items():
        if name.endswith(".filt"):
            continue  # not state: every channel has the same filter
        corner, strays = split(aligned[name], expected.shape)
        assert strays == 0, f"{name} has {strays} added entries that are not 0"
        if exactly:
            assert torch.equal(corner, expected), name
        else:
            # Gradients cancel to near 0 in places, so errors count against a tensor's largest entry.
            error = (corner - expected).abs().amax() / expected.abs().amax().clamp_min(1e-30)
            assert error < 1e-10 or torch.equal(corner, expected), f"{name}: {error}"
        added += aligned[name].numel() - expected.numel()
    return added


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().amax() / expected.abs().amax())


def widths(network: nn.Module) -> set[int]:
    convs = [each for each in network.modules() if isinstance(each, nn.Conv2d)]
    return {each for conv in convs for each in (conv.in_channels, conv.out_channels)}


@pytest.mark.parametrize(("v2", "multiple"), SHAPES)
@pytest.mark.parametrize("training", [False, True])
def test_it_computes_what_timms_network_does(v2, multiple, training):
    plain, aligned = pair(v2, multiple)
    for size in (64, 96):
        with torch.no_grad():
            expected, found = (each.train(training)(images(size=size)) for each in (plain, aligned))
        assert relative(found, expected) < 1e-10
    assert check(tensors(aligned), tensors(plain)) > 0  # the statistics too


@pytest.mark.parametrize(("v2", "multiple"), SHAPES)
def test_widths_are_multiples_but_for_input_and_features(v2, multiple):
    plain, aligned = pair(v2, multiple)
    assert any(each % multiple for each in widths(plain) - {48, plain.num_features})
    assert not any(each % multiple for each in widths(aligned) - {48, plain.num_features})
    assert aligned.num_features == plain.num_features and aligned.head.fc.weight.shape == plain.head.fc.weight.shape
    found = aligned.forward_intermediates(images(), intermediates_only=True)
    assert [each.shape[1] for each in found] == [each["num_chs"] for each in aligned.feature_info]


@pytest.mark.parametrize("arch", ["tresnet_m", "tresnet_v2_l"])
def test_aligned_networks_of_timm_stay_as_they_are(arch):
    with torch.device("meta"):
        network = timm.create_model(arch)
    before = {name: id(each) for name, each in network.named_parameters()}
    assert align(network) is network
    assert {name: id(each) for name, each in network.named_parameters()} == before
    assert not network._state_dict_hooks and not network._load_state_dict_pre_hooks


@pytest.mark.parametrize(
    "settings",
    [
        OptimConfig(momentum=0.9, weight_decay=0.01),
        OptimConfig(momentum=0.9, weight_decay=0.01, decay_norm_bias=False, nesterov=True),
    ],
    ids=["decay on everything", "nesterov, no decay of norms"],
)
def test_training_is_timms_and_added_channels_stay_zero(settings):
    """Gradients, weights, momentum, statistics and averages, after each of five steps from a fresh network."""
    torch.manual_seed(0)
    plain = small().double()  # fresh: the last norm of each block starts at 0
    aligned = align(copy.deepcopy(plain))
    both = (plain.train(), aligned.train())
    optimizers = [sgd(each, settings) for each in both]
    averages = [Ema(each, 0.9) for each in both]
    names = [name for name, _ in plain.named_parameters()]
    start = {name: each.detach().clone() for name, each in plain.named_parameters()}
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
            dict(zip(names, (optimizer.state[each]["momentum_buffer"] for each in network.parameters()), strict=True))
            for network, optimizer in zip(both, optimizers, strict=True)
        ]
        check(momenta[1], momenta[0])
        check(tensors(averages[1].model), tensors(averages[0].model))
    assert all(not torch.equal(each, start[name]) for name, each in plain.named_parameters())
    assert all(each.any() for each in gradients(plain).values()) and gradients(plain).keys() == start.keys()


def test_tresnet_xl_computes_and_converts_as_timms():
    torch.manual_seed(0)
    plain = lived_in(timm.create_model("tresnet_xl", num_classes=CLASSES))
    aligned = align(copy.deepcopy(plain))
    assert widths(plain) == {48, 64, 83, 166, 332, 664, 1328, 2656}
    assert widths(aligned) == {48, 64, 88, 168, 336, 664, 1328, 2656}
    assert check(tensors(aligned), tensors(plain), exactly=True) == 1_027_874  # all with statistics
    for training in (False, True):
        with torch.no_grad():
            expected, found = (each.train(training)(images(2)) for each in (plain, aligned))
        assert relative(found, expected) < 1e-10
    check(tensors(aligned), tensors(plain))
    state = aligned.state_dict()
    shapes = {name: each.shape for name, each in plain.state_dict().items()}
    assert {name: each.shape for name, each in state.items()} == shapes


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(found) == list(expected) and all(
        found[name].dtype == each.dtype and torch.equal(found[name], each) for name, each in expected.items()
    )


@pytest.mark.parametrize("holder", [False, True], ids=["alone", "inside another module"])
def test_states_are_timms_and_go_both_ways_without_loss(holder):
    plain, aligned = pair()
    torch.manual_seed(1)
    other = lived_in(small())
    if holder:
        plain, aligned, other = (nn.ModuleDict({"backbone": each}) for each in (plain, aligned, other))
    assert same_bits(aligned.state_dict(), plain.state_dict())
    state = {name: each.clone() for name, each in other.state_dict().items()}
    kept = dict(state)
    assert str(aligned.load_state_dict(state)) == "<All keys matched successfully>"
    assert all(state[name] is each for name, each in kept.items())  # the caller's tensors are left alone
    assert same_bits(aligned.state_dict(), state)
    check(tensors(aligned), tensors(other), exactly=True)
    plain.load_state_dict(aligned.state_dict())
    assert same_bits(plain.state_dict(), state)


def test_tensors_kept_by_name_go_both_ways_without_loss():
    """As the optimizer's momentum does. Cutting and padding a network that is not aligned changes nothing."""
    plain, aligned = pair()
    whole = tensors(aligned)
    timms = {name: each for name, each in plain.state_dict().items()}
    stored = {name: whole[name] for name in timms}
    assert same_bits(cut(stored, aligned), timms)
    assert same_bits(pad(timms, aligned), stored)
    assert same_bits(pad(cut(stored, aligned), aligned), stored)
    assert all(cut(timms, plain)[name] is each and pad(timms, plain)[name] is each for name, each in timms.items())
    beside = {"cosine.weight": torch.ones(3, 5)}
    assert cut(beside, aligned) == beside == pad(beside, aligned)


def test_padding_keeps_the_memory_format():
    _, aligned = pair()
    name = "body.layer1.0.conv1.conv.weight"
    weight = aligned.state_dict()[name].clone().contiguous(memory_format=torch.channels_last)
    padded = pad({name: weight}, aligned)[name]
    assert padded.is_contiguous(memory_format=torch.channels_last) and padded.shape == (40, 40, 3, 3)


def test_other_shapes_are_refused():
    _, aligned = pair()
    name = "body.layer1.0.conv1.conv.weight"
    assert aligned.state_dict()[name].shape == (35, 35, 3, 3)
    for shape in [(34, 35, 3, 3), (40, 40, 3, 3), (35, 35)]:  # narrower, as in memory, and of other dimensions
        with pytest.raises(UserError, match=r"conv1\.conv\.weight is .*, and \[35, 35, 3, 3\] in this network"):
            pad({name: torch.ones(shape)}, aligned)
        state = {**aligned.state_dict(), name: torch.ones(shape)}
        with pytest.raises(RuntimeError, match=r"conv1\.conv\.weight: it is .* and has to be \[35, 35, 3, 3\]"):
            aligned.load_state_dict(state)
    state = aligned.state_dict()
    del state[name]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        aligned.load_state_dict(state)


def test_a_copy_outlives_its_original():
    """Hooks belong to the copy, as the averaged network needs."""
    aligned = pair()[1]
    twin = copy.deepcopy(aligned)
    del aligned
    gc.collect()
    state = {name: each.clone() for name, each in lived_in(small()).state_dict().items()}
    twin.load_state_dict(state)
    assert same_bits(twin.state_dict(), state)


def test_no_random_number_is_drawn_and_kept_parameters_are_the_same():
    torch.manual_seed(0)
    network = small()
    state, fixed = torch.get_rng_state(), network.head.fc.weight
    align(network)
    assert torch.equal(torch.get_rng_state(), state) and network.head.fc.weight is fixed


def test_frozen_parameters_stay_frozen():
    network = small()
    network.body.layer1.requires_grad_(False)
    align(network)
    assert {each.requires_grad for each in network.body.layer1.parameters()} == {False}
    assert {each.requires_grad for each in network.body.layer2.parameters()} == {True}


def test_norms_that_are_to_start_at_one_do_so_before():
    """The wrong order would give added channels a weight of 1; the right one gives timm's network, and zeros."""
    torch.manual_seed(0)
    plain = small()
    _start_norms_at_one(plain)
    check(tensors(align(copy.deepcopy(plain))), tensors(plain), exactly=True)


def test_only_plain_tresnets_are_aligned():
    with pytest.raises(UserError, match="only a TResNet can be aligned, and this is a ResNet"):
        align(timm.create_model("resnet18"))
    with pytest.raises(UserError, match="aligned already"):
        align(align(small()))
    with pytest.raises(UserError, match="not of 0"):
        align(small(), 0)


def test_it_is_one_graph_and_channels_last():
    plain, aligned = pair()
    aligned = aligned.to(memory_format=torch.channels_last)
    batch = images().contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(aligned, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert relative(compiled(batch), plain(images())) < 1e-10
        features = aligned.forward_features(batch)
    assert features.is_contiguous(memory_format=torch.channels_last)


def multiply_adds(network: TResNet, size: int) -> list[tuple[int, int, int]]:
    """(channels in, channels out, multiply-adds for an image) of each convolution and the classifier."""
    found = []

    def count(module: nn.Conv2d | nn.Linear, _: object, output: Tensor) -> None:
        outputs, inputs = module.weight.shape[:2]
        places = output.numel() // outputs
        found.append((inputs, outputs, places * module.weight.numel()))

    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    network.eval()(torch.empty(1, 3, size, size, device="meta"))
    return found


def test_what_tresnet_xl_gains_and_costs():
    with torch.device("meta"):
        plain, aligned = (timm.create_model("tresnet_xl", num_classes=1000) for _ in range(2))
    align(aligned)
    totals, odd = [], []
    for network in (plain, aligned):
        found = multiply_adds(network, 224)
        totals.append(sum(each for *_, each in found))
        odd.append(sum(each for inputs, outputs, each in found if inputs % 8 or outputs % 8))
    assert totals == [15_165_013_664, 15_614_274_432]
    assert odd[0] / totals[0] == pytest.approx(0.8716, abs=1e-4) and odd[1] == 0
    parameters = [sum(each.numel() for each in network.parameters()) for network in (plain, aligned)]
    assert parameters == [78_436_244, 79_463_600]


@pytest.mark.parametrize(
    ("device", "compiled"),
    [("cpu", False), *(pytest.param("cuda", each, marks=pytest.mark.gpu) for each in (False, True))],
)
def test_added_channels_stay_zero_in_half_precision(device, compiled):
    torch.manual_seed(0)
    plain = small()
    shapes = {name: each.shape for name, each in tensors(plain).items()}
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
        kept = gradients(network)
        kept |= {f"{name} ": optimizer.state[each]["momentum_buffer"] for name, each in network.named_parameters()}
        kept |= {f"{name}  ": each for name, each in tensors(network).items() if not name.endswith(".filt")}
        strays = {name: count for name, each in kept.items() if (count := split(each, shapes[name.strip()])[1])}
        assert loss.isfinite() and not strays


# ---- in runs


@pytest.mark.slow
def test_a_run_may_be_aligned_or_not_and_goes_on_either_way(demo_set, tmp_path):
    """The same losses to rounding, checkpoints in timm's shapes, and one form going on where the other stopped."""
    index = part_of(demo_set, 2)
    machine = tiny().machine
    recipe = tiny(
        arch="tresnet_l", image_size=64, batch_size=10, epochs=2, ema=schema.EmaConfig(0.9), mix=MixConfig(cutmix=0)
    )
    forms = {"plain": recipe, "aligned": replace(recipe, machine=replace(machine, align=True))}
    for name, form in forms.items():
        run(form, tmp_path / name, index)
    plain, aligned = (checkpoint.load(tmp_path / name / "checkpoints" / "step-00000002") for name in forms)
    assert {n: e.shape for n, e in plain.train.items()} == {n: e.shape for n, e in aligned.train.items()}
    assert {n: e.shape for n, e in plain.model.items()} == {n: e.shape for n, e in aligned.model.items()}
    losses = [[each["loss"] for each in events(tmp_path / name) if each["event"] == "train"] for name in forms]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for name, other in (("plain", "aligned"), ("aligned", "plain")):
        (tmp_path / name / "last").unlink()
        (tmp_path / name / "last").symlink_to("checkpoints/step-00000002")
        run(forms[other], tmp_path / name, index)
        again = [each["loss"] for each in events(tmp_path / name) if each["event"] == "train"]
        assert again[-1] == pytest.approx(losses[0][-1], rel=1e-3)
        model, _, _ = checkpoint.network(tmp_path / name)
        assert model.backbone.body.layer1[0].conv1.conv.out_channels == (80 if other == "aligned" else 76)
