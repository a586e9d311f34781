"""Recipes: the report's numbers, round trips through TOML, and errors that name the nearest key."""

import dataclasses
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttrain import recipes
from fasttrain.config import toml
from fasttrain.config.schema import AugmentConfig, DataConfig, MixConfig, OptimConfig, Recipe
from fasttrain.losses.arcface import ArcFace
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.triplet import Triplet
from fasttrain.utils.errors import UserError


@pytest.mark.parametrize(
    ("arch", "batch", "peak"), [("tresnet_xl", 256, 0.1), ("resnest101e", 128, 0.05), ("seresnext101_32x4d", 128, 0.05)]
)
def test_the_reports_recipes_have_its_numbers(arch, batch, peak):
    recipe = recipes.for_arch(arch)
    assert (recipe.batch_size, recipe.epochs, recipe.image_size) == (batch, 250, 224)
    assert recipe.peak_lr == pytest.approx(peak)
    assert recipe.optim == OptimConfig(
        lr=0.1, lr_batch=256, momentum=0.9, nesterov=False, weight_decay=1e-4, warmup_epochs=1
    )
    assert recipe.augment == AugmentConfig((0.08, 1.0), (3 / 4, 4 / 3), 0.5, "imagenet-24")
    assert recipe.mix == MixConfig(cutmix=0.5, cutmix_alpha=1.0) and recipe.losses == (CrossEntropy(0.1),)


# The report's table of models: network, losses, batch size and epochs.
SEVEN = {
    "deepblueai/resnest101e-ce": ("resnest101e", ["cross_entropy"], 128, 250),
    "deepblueai/resnest101e-ce+triplet": ("resnest101e", ["cross_entropy", "triplet"], 128, 200),
    "deepblueai/resnest101e-ce+arcface": ("resnest101e", ["cross_entropy", "arcface"], 128, 200),
    "deepblueai/tresnet_xl-ce": ("tresnet_xl", ["cross_entropy"], 256, 250),
    "deepblueai/tresnet_xl-ce+triplet": ("tresnet_xl", ["cross_entropy", "triplet"], 256, 200),
    "deepblueai/seresnext101_32x4d-ce": ("seresnext101_32x4d", ["cross_entropy"], 128, 250),
    "deepblueai/seresnext101_32x4d-ce+arcface": ("seresnext101_32x4d", ["cross_entropy", "arcface"], 128, 200),
}


def test_the_ensemble_is_the_reports_seven_models():
    assert set(recipes.ENSEMBLE) == set(SEVEN) and len(recipes.ENSEMBLE) == 7
    for name, (arch, losses, batch, epochs) in SEVEN.items():
        recipe = recipes.by_name(name)
        assert (recipe.arch, recipe.batch_size, recipe.epochs) == (arch, batch, epochs)
        assert [loss.name for loss in recipe.losses] == losses
        assert recipe.images_per_class == (4 if "triplet" in losses else 0)
        assert recipe.augment.autoaugment == "imagenet-24" and recipe.mix == MixConfig(cutmix=0.5)
        combination = name.removeprefix(f"deepblueai/{arch}-")
        assert recipes.for_arch(arch, combination) == recipe
        for loss in recipe.losses:
            if isinstance(loss, Triplet):
                assert (loss.margin, loss.soft_margin, loss.weight) == (0.3, False, 1.0)
            if isinstance(loss, ArcFace):
                assert (loss.scale, loss.margin_rad, loss.weight) == (30.0, 0.5, 1.0)


def test_the_448_recipe_differs_only_in_image_size():
    base, larger = (recipes.by_name(f"deepblueai/resnest101e-ce{suffix}") for suffix in ("", "-448"))
    assert replace(larger, name=base.name, image_size=224) == base and larger.image_size == 448


def test_stage_2_differs_from_stage_1_only_in_losses_epochs_and_batches():
    for name in SEVEN:
        recipe = recipes.by_name(name)
        first = recipes.for_arch(recipe.arch)
        same = replace(recipe, name=first.name, losses=first.losses, epochs=250, images_per_class=0)
        assert same == first and recipe.peak_lr == first.peak_lr


@pytest.mark.parametrize("combination", ["ce+triplet", "ce+arcface"])
def test_any_network_can_have_a_second_stage(combination):
    recipe = recipes.for_arch("resnet18", combination)
    assert recipe.name == f"resnet18-{combination}" and recipe.epochs == 72
    assert [loss.name for loss in recipe.losses] == ["cross_entropy", combination.removeprefix("ce+")]


def test_other_networks_get_the_reports_settings():
    other, ours = recipes.for_arch("resnet18"), recipes.for_arch("resnest101e")
    assert (other.batch_size, other.epochs) == (128, 90) and other.augment.autoaugment == "imagenet"
    assert replace(other, name=ours.name, arch=ours.arch, epochs=250, augment=ours.augment) == ours


def test_demo_runs_of_different_recipes_have_different_names(tmp_path):
    names = [recipes.demo(recipe, tmp_path, 1).name for recipe in recipes.RECIPES.values()]
    assert len(set(names)) == len(names) and "demo-tresnet_xl" in names


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_every_recipe_round_trips_through_toml(name):
    recipe = recipes.by_name(name)
    assert toml.from_toml(toml.to_toml(recipe)) == recipe


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
names = st.from_regex(r"\w[\w.+-]*(/\w[\w.+-]*)*", fullmatch=True).filter(str.isprintable)


@given(
    st.builds(
        Recipe,
        name=names,
        arch=texts,
        image_size=st.integers(8, 4096),
        epochs=st.integers(1, 10**6),
        losses=st.builds(lambda s, w: (CrossEntropy(s, w),), st.floats(0, 0.99), st.floats(0, 9)),
        optim=st.builds(OptimConfig, lr=st.floats(1e-9, 1e9), nesterov=st.booleans()),
        data=st.builds(DataConfig, train=st.lists(texts).map(tuple), val=texts),
    )
)
def test_random_recipes_round_trip_through_toml(recipe):
    assert toml.from_toml(toml.to_toml(recipe)) == recipe


@pytest.mark.parametrize(
    ("setting", "check"),
    [
        ("epochs=3", lambda r: r.epochs == 3),
        ("optim.weight_decay=5e-5", lambda r: r.optim.weight_decay == 5e-5),
        ("optim.lr=1", lambda r: r.optim.lr == 1.0 and type(r.optim.lr) is float),
        ("optim.decay_norm_bias=false", lambda r: r.optim.decay_norm_bias is False),
        ("augment.crop_area=[0.2, 1]", lambda r: r.augment.crop_area == (0.2, 1.0)),
        ("augment.autoaugment=none", lambda r: r.augment.autoaugment == "none"),
        ("losses.cross_entropy.smoothing=0", lambda r: r.losses == (CrossEntropy(0.0),)),
        ("data.train=['a', 'b']", lambda r: r.data.train == ("a", "b")),
        ("ema.decay=0.99", lambda r: r.ema.decay == 0.99),
        ("init.force_scratch=true", lambda r: r.init.force_scratch),
        ("optim.lr_scale=0.5", lambda r: r.peak_lr == 0.5 * recipes.for_arch("tresnet_xl").peak_lr),
    ],
)
def test_settings_change_one_value(setting, check):
    before = recipes.for_arch("tresnet_xl")
    after = toml.override(before, setting)
    assert check(after)
    new, old = toml.to_dict(after), toml.to_dict(before)
    different = [key for key in new if new[key] != old[key]]
    assert different == [setting.split("=")[0].split(".")[0]]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epoch=3", "no key 'epoch'; did you mean 'epochs'?"),
        ("optim.momentun=.5", "no key 'optim.momentun'; did you mean 'optim.momentum'?"),
        ("optm.lr=.5", "no part 'optm'; did you mean 'optim'?"),
        ("epochs=soon", "epochs must be an integer, not 'soon'"),
        ("epochs=1.5", "epochs must be an integer, not 1.5"),
        ("epochs=true", "epochs must be an integer, not True"),
        ("epochs=0", "epochs must be 1 or more, not 0"),
        ("optim.momentum=1.0", "optim.momentum must be in"),
        ("optim.lr=nan", "optim.lr must be a finite number, not nan"),
        ("optim.lr_scale=inf", "optim.lr_scale must be a finite number, not inf"),
        ("losses.cross_entropy.weight=-1", "losses.cross_entropy.weight must be 0 or more, not -1"),
        ("augment.crop_area=[0.5]", "augment.crop_area must be a list of 2 of float"),
        ("augment.autoaugment=imagnet", "augment.autoaugment must be one of none, imagenet, imagenet-24"),
        ("augment.randaugment=2", "augment.autoaugment must be none where randaugment is used instead"),
        ("augment.randaugment_magnitude=31", "augment.randaugment_magnitude must be 0 to 30"),
        ("augment.erase_area=[0.5, 0.2]", "augment.erase_area must be two increasing fractions"),
        ("augment.warps=cubic", "augment.warps must be nearest or linear"),
        ("machine.align=1", "machine.align must be a string, not 1"),
        ("machine.decoder=nvjpeg", "machine.decoder must be one of auto, cpu, gpu, gpu-region, gpu-hardware"),
        ("machine.hardware_load=1.5", "machine.hardware_load must be a share in [0, 1]"),
        ("machine.compile=graph", "machine.compile must be one of auto, on, off, graphs"),
        ("losses.cross_entropy.smoothing=2", "losses.cross_entropy.smoothing must be in"),
        ("mix.mixup=0.6", "mix.mixup must be at most 0.5 where cutmix is 0.5, not 0.6"),
        ("optim.schedule=linear", "optim.schedule must be one of cosine, step"),
        ("ema.decay=1", "ema.decay must be in [0, 1)"),
        ("evaluation.every_epochs=0", "evaluation.every_epochs must be 1 or more, not 0"),
        ("losses.arcfaze.margin=2", "no part 'losses.arcfaze'"),
        ("optim=3", "'optim' is a part; set one of its keys: optim.lr"),
        ("epochs", "expected key=value"),
        ("=3", "expected key=value"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(setting, message):
    with pytest.raises(UserError) as caught:
        toml.override(recipes.for_arch("tresnet_xl"), setting)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arch = 'x'\nepoch = 3", "no key 'epoch'; did you mean 'epochs'?"),
        ("arch = 'x'\n[optimizer]\nlr = 1", "no key 'optimizer'; did you mean 'optim'?"),
        ("arch = 'x'\n[losses.crossentropy]", "no loss 'crossentropy'; did you mean 'cross_entropy'?"),
        ("arch = 'x'\nlosses = 3", "losses must be tables"),
        ("arch = 'x'\noptim = 3", "optim must be a table"),
        ("arch = ", "not valid TOML"),
        ("arch = 'x'\n[losses.triplet]", "losses must be cross_entropy or another that trains the classifier"),
        (
            "arch = 'x'\n[losses.cross_entropy]\n[losses.triplet]",
            "images_per_class must be 2 or more with the loss trip",
        ),
        ("epochs = 3", "no `arch`"),
    ],
)
def test_wrong_recipe_files_are_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        recipes.by_name(str(tmp_path / "mine.toml"))
    assert message in str(caught.value) and "mine.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_short_recipe_file_takes_the_defaults(tmp_path):
    (tmp_path / "mine.toml").write_text('arch = "resnet18"\n[optim]\nlr = 0.5\n')
    recipe = recipes.by_name(str(tmp_path / "mine.toml"))
    expected = recipes.for_arch("resnet18")
    assert recipe == replace(expected, name="mine", optim=replace(expected.optim, lr=0.5))


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(UserError, match="did you mean 'deepblueai/tresnet_xl-ce'"):
        recipes.by_name("deepblueai/tresnet-ce")


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipes.for_arch("resnet18").epochs = 3  # type: ignore[misc]


def test_settings_are_checked_after_all_are_applied():
    """In either order, although randaugment alone is refused."""
    pair = ("augment.randaugment=2", "augment.autoaugment=none")
    for settings in (pair, pair[::-1]):
        assert toml.override(recipes.for_arch("resnet18"), *settings).augment.randaugment == 2


@pytest.mark.parametrize(
    ("losses", "rest", "message"),
    [
        ("[losses.mean_teacher]", "", "ema.decay must be above 0 with the loss mean_teacher"),
        ("[losses.contrastive]", "mix.cutmix = 1.0", "the loss contrastive takes images that are not mixed"),
        (
            "[losses.triplet]",
            "images_per_class = 4\nmix.cutmix = 0.5\nmix.mixup = 0.5",
            "the loss triplet takes images",
        ),
    ],
)
def test_losses_that_would_never_apply_are_refused(losses, rest, message):
    with pytest.raises(UserError, match=message):
        toml.from_toml(f"arch = 'x'\n{rest}\n[losses.cross_entropy]\n{losses}")


def test_attract_repulse_recipes_have_the_readmes_numbers():
    for arch, batch in (("resnest101e", 128), ("tresnet_xl", 256), ("seresnext101_32x4d", 128)):
        first, second = (recipes.RECIPES[f"attract_repulse/stage{stage}-{arch}"] for stage in (1, 2))
        assert (first.arch, first.batch_size, first.epochs, second.epochs) == (arch, batch, 250, 200)
        assert [loss.name for loss in first.losses] == ["symmetric_cross_entropy", "contrastive"]
        assert [loss.name for loss in second.losses] == ["symmetric_cross_entropy", "contrastive", "mean_teacher"]
        assert (first.views, first.ema_views, second.views, second.ema_views) == (
            2,
            0,
            2,
            1,
        ) and second.ema.decay == 0.999
        augment = second.augment
        assert (augment.autoaugment, augment.randaugment, augment.randaugment_magnitude) == ("none", 2, 9)
        assert augment.erase == 0.25 and second.mix.cutmix == 0.5


def test_a_recipe_may_start_with_a_byte_order_mark(tmp_path):
    (tmp_path / "mine.toml").write_text('name = "mine"\narch = "resnet18"\n', encoding="utf-8-sig")
    assert recipes.by_name(str(tmp_path / "mine.toml")).arch == "resnet18"
