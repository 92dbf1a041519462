"""Configurations in and out of TOML, overridden, resolved, and refused in sentences."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings

from colossus.errors import ConfigError
from colossus.spec.config import from_toml, override, recipes, run_config, to_toml
from colossus.spec.data import DataConfig, Source
from colossus.spec.run import AdamW, Cosine, Muon, RunConfig
from tests.spec.configs import plan_for, run_configs, small_config


def refusal(*changes: str) -> str:
    with pytest.raises(ConfigError) as caught:
        override(small_config(), changes)
    return str(caught.value)


# --- TOML ---


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(run_configs())
def test_toml_gives_back_what_it_was_given(config: RunConfig) -> None:
    assert from_toml(to_toml(config)) == config


def test_absence_is_false_only_where_the_default_is_something() -> None:
    text = to_toml(small_config(gradient_clip=None))
    assert "gradient_clip = false" in text
    assert "plan" not in text
    assert from_toml(text).gradient_clip is None


def test_a_key_left_out_takes_its_default() -> None:
    lines = to_toml(small_config(gradient_clip=None)).splitlines()
    assert from_toml("\n".join(line for line in lines if "gradient_clip" not in line)).gradient_clip == 1.0


def test_false_stays_false_where_it_is_a_value() -> None:
    assert from_toml(to_toml(small_config())).model.tied_embeddings is False


def test_what_is_not_toml_is_said_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"not a TOML file: .*line 2"):
        from_toml("name = 'a'\nseed = =\n")


# --- overrides ---


def test_values_are_toml_or_else_bare_strings() -> None:
    config = override(
        small_config(),
        [
            "optimizer.learning_rate=0.01",
            "budget=10M tokens",
            'data.sources=[{path="a", weight=2}, {path="b"}]',
            "name=7",
            "z_loss=.5",
        ],
    )
    assert config.optimizer.learning_rate == 0.01
    assert (config.budget.amount, config.budget.unit) == (1e7, "tokens")
    assert config.data.sources == (Source(path="a", weight=2.0), Source(path="b"))
    assert config.name == "7"
    assert config.z_loss == 0.5


def test_no_overrides_change_nothing() -> None:
    config = small_config(plan=plan_for(small_config().batch))
    assert override(config, []) == config
    assert override(config, ["seed=0"]) == config


def test_an_item_of_a_list_is_named_by_its_number() -> None:
    changed = override(small_config(), ["data.sources.0.weight=3"])
    assert changed.data.sources[0].weight == 3.0


@pytest.mark.parametrize("word", ["none", "false", "null"])
def test_absence_has_its_words(word: str) -> None:
    assert override(small_config(), [f"gradient_clip={word}"]).gradient_clip is None


def test_a_kind_changes_the_variant_with_its_defaults() -> None:
    config = small_config(optimizer=Muon(learning_rate=0.5))
    assert override(config, ["optimizer.kind=adamw"]).optimizer == AdamW()
    assert override(config, ["schedule.kind=cosine"]).schedule == Cosine()


def test_a_kind_counts_first_whatever_the_order() -> None:
    changes = ["optimizer.learning_rate=0.25", "optimizer.kind=adamw"]
    assert override(small_config(), changes).optimizer == AdamW(learning_rate=0.25)


def test_naming_the_kind_that_it_is_keeps_its_settings() -> None:
    config = small_config(optimizer=Muon(learning_rate=0.5))
    assert override(config, ["optimizer.kind=muon"]) == config


def test_the_last_of_two_settings_wins() -> None:
    assert override(small_config(), ["seed=1", "seed=2"]).seed == 2


def test_a_part_can_be_overridden_by_itself() -> None:
    assert override(DataConfig(), ["heldout_fraction=0.5"]).heldout_fraction == 0.5


def test_a_value_cannot_smuggle_in_another_key() -> None:
    assert override(small_config(), ["name=1\nseed = 9"]).seed == 0


# --- refusals ---


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            "optimizer.learning_rat=1",
            "unknown key 'optimizer.learning_rat'. Did you mean 'optimizer.learning_rate'?",
        ),
        ("modl.num_layers=3", "unknown key 'modl'. Did you mean 'model'?"),
        (
            "optimizer.betas=[0.9, 0.95]",
            "unknown key 'optimizer.betas'. It belongs to optimizer.kind = 'adamw'.",
        ),
        ("learning_rate=3", "'optimizer.learning_rate' or 'optimizer.rest.learning_rate'?"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate is 'fast'; it must be a number"),
        ("seed=1.5", "seed is 1.5; it must be a whole number"),
        ("seed=true", "seed is true; it must be a whole number"),
        ("seed=-1", "seed is -1; it must be at least 0"),
        ("z_loss=nan", "z_loss is nan; it must be a finite number"),
        ("optimizer.kind=adamv", "optimizer.kind is 'adamv'; valid: 'adamw', 'muon'. Did you mean 'adamw'?"),
        ("optimizer={learning_rate=1}", "optimizer.kind is missing; write 'adamw' or 'muon'"),
        ("model.mlp.activation=swigl", "Did you mean 'swiglu'?"),
        ("model=3", "model is 3; it must be a table"),
        ("budget=3", "budget is 3; write for example '2000 steps', '10M tokens' or '3 minutes'"),
        ("budget=3 parsecs", "budget: '3 parsecs' is not a duration; write for example"),
        ("data.sources=[]", "data.sources has 0 items; it needs at least 1"),
        ("data.sources.0.weight=0", "data.sources.0.weight is 0; it must be above 0"),
        ("data.sources.4.weight=1", "data.sources is a list of 1"),
        ("data.tokenizer.kind=file", "data.tokenizer.path is missing"),
        ("batch.sequence_tokens=128", "batch.sequence_tokens is 128, but model.context_tokens is 64"),
        ("plan.compile=true", "plan is not set, so plan.compile cannot be changed in it"),
        ("seed.deep=1", "seed is 0 and has no keys inside"),
        ("seed", "'seed' is not a setting; write key=value"),
        ("=3", "'=3' is not a setting"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(change: str, sentence: str) -> None:
    message = refusal(change)
    assert sentence in message
    assert "\n" not in message


def test_a_contradiction_inside_a_part_names_the_part() -> None:
    message = refusal("model.attention.num_kv_heads=2", "model.attention.num_heads=3")
    assert message.startswith("model.attention: num_heads 3 is not a multiple of num_kv_heads 2")


def test_several_problems_have_a_line_each() -> None:
    assert len(refusal("seed=-1", "z_loss=x", "nam=y").splitlines()) == 3


# --- recipes and files ---


def small_recipe() -> RunConfig:
    return small_config()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("recipes")
    module.RECIPES = {"small": small_recipe, "first-light": small_recipe}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "recipes", module)


@pytest.mark.usefixtures("registry")
def test_a_recipe_is_found_by_name() -> None:
    assert set(recipes()) == {"small", "first-light"}
    assert run_config("small", ["seed=3"]) == small_config(seed=3)


@pytest.mark.usefixtures("registry")
def test_an_unknown_recipe_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'first-ligt'.*Did you mean 'first-light'"):
        run_config("first-ligt")


def test_a_file_is_read_and_overridden(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(to_toml(small_config()))
    assert run_config(str(path), ["seed=3"]) == small_config(seed=3)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("name = 'x'")
    with pytest.raises(ConfigError, match=r"run\.toml: model is missing"):
        run_config(str(path))
    with pytest.raises(ConfigError, match=r"cannot read .*No such file"):
        run_config(str(tmp_path / "none.toml"))


def test_a_run_directory_is_not_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(to_toml(small_config()))
    with pytest.raises(ConfigError, match="is a run, not a recipe; continue it with --resume"):
        run_config(str(tmp_path))
