"""Recipes as TOML: comments for each setting, and settings that add a loss."""

import dataclasses
import tomllib
from dataclasses import replace

import pytest

from fasttrain import recipes
from fasttrain.config import toml
from fasttrain.config.schema import DataConfig, Recipe
from fasttrain.losses import LOSSES
from fasttrain.utils.errors import UserError


def settings_classes() -> list[type]:
    parts = [type(value) for value in vars(recipes.for_arch("resnet18")).values() if dataclasses.is_dataclass(value)]
    return [Recipe, *parts, *LOSSES.values()]


@pytest.mark.parametrize("cls", settings_classes(), ids=lambda cls: cls.__name__)
def test_every_setting_has_one_line_of_documentation(cls):
    docs = toml.field_docs(cls)
    settings = {field.name for field in dataclasses.fields(cls) if not dataclasses.is_dataclass(field.default_factory)}
    undocumented = settings - docs.keys() - {"losses"}
    assert not undocumented
    assert all(line and "\n" not in line and len(line) <= 120 for line in docs.values())


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_comments_change_nothing_and_stand_above_each_setting(name):
    recipe = recipes.by_name(name)
    text = toml.to_toml(recipe, comments=True)
    assert toml.from_toml(text) == recipe
    assert tomllib.loads(text) == toml.to_dict(recipe)
    lines = text.splitlines()
    assert lines[lines.index("batch_size = " + str(recipe.batch_size)) - 1].startswith("# Images per step")
    assert lines[lines.index("[optim]") + 1].startswith("# Peak learning rate")


def test_a_setting_adds_its_loss():
    recipe = recipes.for_arch("resnet18")
    changed = toml.override(recipe, "losses.triplet.margin=0.5", "images_per_class=4")
    assert changed.losses == (*recipe.losses, LOSSES["triplet"](margin=0.5))
    assert toml.override(recipe, "losses.arcface.weight=1").losses[1] == LOSSES["arcface"]()
    with pytest.raises(UserError, match=r"no part 'losses.tripelt'; did you mean 'triplet'\?"):
        toml.override(recipe, "losses.tripelt.margin=0.5")
    with pytest.raises(UserError, match=r"no key 'losses.triplet.margn'; did you mean 'losses.triplet.margin'\?"):
        toml.override(recipe, "losses.triplet.margn=0.5")
    with pytest.raises(UserError, match="images_per_class must be 2 or more with the loss triplet"):
        toml.override(recipe, "losses.triplet.margin=0.5")


@pytest.mark.parametrize("text", ["/d/a\u2028b", "/d/a\u0085[optim]", "a\nlr = 3", 'x"""\n[mix]\ncutmix = 1'])
def test_comments_and_strange_texts(text):
    recipe = replace(recipes.for_arch("resnet18"), data=DataConfig(train=(text,), val=text))
    assert toml.from_toml(toml.to_toml(recipe, comments=True)) == recipe
