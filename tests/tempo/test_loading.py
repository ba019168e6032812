from pathlib import Path
from typing import Any

import pytest
import yaml
from tempo_em.loading import load_recipe, packaged, parse_setting, resolve
from tempo_em.presets import PRESETS
from tempo_engine.errors import UserError

MINIMAL: dict[str, Any] = {
    "model": {"create": {"model_type": "llama"}},
    "data": {
        "labelled": {"generator": "signs", "count": 8},
        "unlabelled": {"generator": "signs", "count": 4},
    },
}


def refusal(recipe: dict[str, Any], *settings: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve("test", recipe, [parse_setting(s) for s in settings])
    message = str(caught.value)
    assert "\n" not in message
    return message


def merged(**changes: Any) -> dict[str, Any]:
    return {**MINIMAL, **changes}


def test_an_unknown_key_is_answered_with_its_path_the_nearest_name_and_the_choices() -> None:
    message = refusal(merged(rollout={"temprature": 1.0}))
    assert message.startswith(
        "rollout.temprature is not an option (did you mean temperature?); rollout takes backend, temperature, top_p"
    )


def test_an_unknown_key_of_a_source_names_that_sources_options() -> None:
    data = {**MINIMAL["data"], "unlabelled": {"generator": "signs", "count": 4, "uniqe": True}}
    message = refusal(merged(data=data))
    assert message.startswith("data.unlabelled.uniqe is not an option (did you mean unique?)")
    assert "largest" in message


def test_an_unknown_generator_is_answered_with_those_there_are() -> None:
    data = {**MINIMAL["data"], "unlabelled": {"generator": "swap", "count": 4}}
    assert "data.unlabelled: the generator is not known; generators: signs, swaps, sums" in refusal(merged(data=data))


def test_an_unknown_key_of_swaps_names_the_options_of_swaps() -> None:
    data = {**MINIMAL["data"], "unlabelled": {"generator": "swaps", "count": 4, "largest": 6}}
    message = refusal(merged(data=data))
    assert message.startswith("data.unlabelled.largest is not an option")
    assert message.endswith("data.unlabelled takes count, shots, generator, terms, unique")


def test_an_unknown_key_at_the_top_lists_the_sections() -> None:
    assert "(did you mean estep?); a recipe takes method, seed" in refusal(merged(estpe={}))


def test_an_unknown_evaluation_set_option_is_found_inside_the_dictionary() -> None:
    data = {**MINIMAL["data"], "evaluation": {"heldout": {"generator": "sums", "count": 3, "larges": 4}}}
    assert "data.evaluation.heldout.larges is not an option (did you mean largest?)" in refusal(merged(data=data))


def test_scientific_notation_is_a_number_in_files_and_settings() -> None:
    text = yaml.safe_load("mstep: {optim: {lr: 1e-6}}")
    resolved = resolve("test", merged(**text), [parse_setting("estep.optim.lr=2e-5")])
    assert resolved.recipe.mstep.optim.lr == 1e-6
    assert resolved.recipe.estep.optim.lr == 2e-5


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        ("rollout.temperature=0", "rollout.temperature"),
        ("em.labelled_share=1.5", "em.labelled_share"),
        ("em.rollouts=many", "em.rollouts"),
        ("mstep.loss=gpso", "mstep.loss"),
        ("seed=-1", "seed"),
        ("data.labelled.terms=[]", "data.labelled.terms"),
    ],
)
def test_values_out_of_range_are_refused_by_their_path(setting: str, place: str) -> None:
    assert refusal(MINIMAL, setting).startswith(f"{place}: ")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["method=ttrl", "estep.every=2"], "nothing reads a critic"),
        (["method=frozen_critic"], "never fitted"),
        (["method=tempo", "em.labelled_share=0"], "no labelled prompts"),
        (["em.posterior=label"], "no labels for unlabelled prompts"),
        (["mstep.normalise=group_std"], "belongs to mstep.baseline group_mean"),
        (["method=ttrl", "em.group_size=1"], "one response"),
        (["method=grpo", "em.labelled_group_size=1"], "one response"),
        (["em.posterior=oracle", "data.unlabelled={jsonl: x, answer: null}"], "its answer is null"),
        (["method=oracle", "em.labelled_share=1"], "samples none of its prompts"),
        (["method=ttrl", "em.votes=4"], "less than the em.group_size 8"),
        (["em.votes=16"], "for a posterior that counts answers"),
        (["method=rlvr", "em.entropy_band=[0, 1]"], "leaves none"),
        (["em.entropy_band=[0.5, 0.5]"], "from low to high"),
        (["mstep.normalise=self_normalise"], "use mstep.baseline group_mean or none"),
        (["method=exact_em", "critic.target=plus_minus_one"], "no outcome may be negative"),
        (["method=exact_em", "em.clamp=false"], "no outcome may be negative"),
        (["method=exact_em", "em.noise_rate=0.1"], "values below 0"),
        (["em.noise_rate=0.1", "critic.head=sigmoid", "critic.loss=bce"], "has no minimum"),
        (["data.label_noise=0.5"], "less than 0.5"),
        (["critic.pessimism=1"], "set heads to 2 or more"),
        (["critic.heads=2", "critic.head=sigmoid"], "exported as their mean"),
        (["critic.heads=2", "critic.path=x"], "has one head"),
        (["critic.heads=2", "estep.clip=token"], "several heads share"),
        (["critic.heads=2", "critic.pessimism=1", "method=ttrl"], "the posterior is majority_vote"),
        (["estep.adaptive.auroc_band=0.05"], "the longest time between two E-steps"),
        (["mstep.gate.auroc_below=0.7", "em.posterior=frozen_critic"], "the posterior is frozen_critic"),
        (["mstep.gate.brier_above=0.2", "estep.every=0", "initialisation.critic_warmup=1"], "never becomes one"),
        (["method=ttrl", "em.terminal=last_prefix"], "the posterior is majority_vote"),
        (["em.posterior=frozen_critic", "critic.backbone=shared"], "cannot be frozen"),
        (["mstep.old_logprob=sampler", "rollout.top_p=0.9"], "truncated distribution"),
        (["mstep.old_logprob=sampler", "mstep.importance=token"], "set old_logprob to trainer"),
        (["critic.loss=bce"], "sigmoid"),
        (["critic.path=x", "cold_start.steps=3"], "set cold_start.steps to 0"),
        (["critic.path=x", "critic.backbone=shared"], "trunk of its own"),
        (["em.rollouts=1", "em.labelled_share=0", "method=ttrl"], "no whole group of 8"),
        (["em.rollouts=10"], "no whole group of 8 for unlabelled"),
        (["estep.filter=zero_variance", "em.labelled_group_size=1"], "drop every group of one"),
        (["em.labelled_group_size=600", "initialisation.rlvr=1", "estep.every=0"], "less than one labelled group"),
        (["critic.backbone=shared", "estep.every=0", "initialisation.critic_warmup=1"], "cannot be frozen"),
        (["model.attention=flash_attention_2"], "works in bfloat16"),
        (["mstep.optim.betas=[0.9, 1.0]"], "less than 1"),
        (["mstep.entropy_coef=.nan"], "finite"),
        (["data.evaluation={a/b: {generator: sums, count: 3}}"], "pattern"),
        (["method=[a]"], "not known"),
        (["cold_start.mix={right: 0.5}"], "add up to 1"),
        (["cold_start.task={generator: signs, count: 5}"], "cold_start.task takes generator, terms, largest, unique"),
    ],
)
def test_contradictions_are_refused_with_the_reason(settings: list[str], reason: str) -> None:
    assert reason in refusal(MINIMAL, *settings)


def test_a_model_is_loaded_or_created_but_not_both_or_neither() -> None:
    assert "either path" in refusal(merged(model={}))
    assert "either path" in refusal(merged(model={"path": "x", "create": {"model_type": "llama"}}))
    assert "model_type" in refusal(merged(model={"create": {"hidden_size": 3}}))


def test_a_missing_section_is_named() -> None:
    assert refusal({"model": MINIMAL["model"]}).startswith("data is missing")


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    assert "did you mean tempo?" in refusal(merged(method="temppo"))


def test_the_last_setting_wins_and_every_value_knows_its_origin() -> None:
    recipe = merged(method="ttrl", em={"rollouts": 128})
    settings = [parse_setting(s) for s in ("em.group_size=4", "em.group_size=16")]
    resolved = resolve("test", recipe, settings)
    assert resolved.recipe.em.group_size == 16
    assert resolved.origin["em.group_size"] == "--set"
    assert resolved.origin["em.rollouts"] == "file"
    assert resolved.origin["em.posterior"] == "preset ttrl"
    assert "mstep.clip_low" not in resolved.origin


def test_the_resolved_recipe_is_a_recipe_again() -> None:
    resolved = resolve("test", merged(method="ttrl"), [parse_setting("seed=3")])
    text = resolved.to_yaml()
    assert "seed: 3  # --set" in text
    assert "posterior: majority_vote  # preset ttrl" in text
    again = resolve("test", yaml.safe_load(text), [])
    assert again.recipe == resolved.recipe


def test_a_file_overrides_the_preset_and_a_setting_overrides_both() -> None:
    recipe = merged(method="tempo_pure", em={"train_policy_on_labelled": True})
    assert resolve("test", recipe, []).recipe.em.train_policy_on_labelled
    assert not resolve("test", recipe, [("em.train_policy_on_labelled", False)]).recipe.em.train_policy_on_labelled


def test_paths_in_a_recipe_are_relative_to_its_file(tmp_path: Path) -> None:
    data = {**MINIMAL["data"], "unlabelled": {"jsonl": "questions.jsonl"}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(merged(data=data)))
    source = load_recipe(str(file), []).recipe.data.unlabelled
    assert getattr(source, "jsonl", None) == tmp_path / "questions.jsonl"


def test_a_generated_source_can_be_replaced_by_a_file_with_one_setting() -> None:
    source = resolve("t", MINIMAL, [parse_setting("data.unlabelled={jsonl: q.jsonl}")]).recipe.data.unlabelled
    assert getattr(source, "jsonl", None) == Path.cwd() / "q.jsonl"


def test_a_source_can_be_replaced_by_one_of_another_kind_with_one_setting() -> None:
    data = {**MINIMAL["data"], "unlabelled": {"generator": "signs", "count": 4, "largest": 9}}
    resolved = resolve("t", merged(data=data), [parse_setting("data.unlabelled={generator: swaps, count: 5}")])
    assert resolved.recipe.data.unlabelled.model_dump() == {
        "generator": "swaps", "count": 5, "shots": 0, "terms": (4,), "unique": False,
    }  # fmt: skip
    same = resolve("t", merged(data=data), [parse_setting("data.unlabelled={generator: signs, count: 5}")])
    assert getattr(same.recipe.data.unlabelled, "largest", None) == 9


def test_paths_of_settings_are_relative_to_the_working_directory_and_know_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    file = tmp_path / "recipes" / "recipe.yaml"
    file.write_text(yaml.safe_dump(merged(model={"path": "~/models/x"})))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("recipes/recipe.yaml", ["critic.path=runs/critic"]).recipe
    assert recipe.critic.path == tmp_path / "runs" / "critic"
    assert recipe.model.path == Path.home() / "models" / "x"


def test_scientific_notation_is_a_number_even_where_any_value_goes() -> None:
    assert parse_setting("model.create.initializer_range=2e-2") == ("model.create.initializer_range", 0.02)
    assert parse_setting("a=-1E+3") == ("a", -1000.0)
    assert parse_setting("a=12") == ("a", 12)


def test_a_recipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(str(tmp_path / "binary.yaml"), [])


def test_missing_recipes_and_broken_yaml_are_refused(tmp_path: Path) -> None:
    for where, reason in [("quickstrat", "did you mean quickstart?"), ("no/such.yaml", "does not exist")]:
        with pytest.raises(UserError, match=reason.replace("?", r"\?")):
            load_recipe(where, [])
    broken = tmp_path / "broken.yaml"
    broken.write_text("em: [1, 2")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(str(broken), [])
    broken.write_text("- a list")
    with pytest.raises(UserError, match="must hold keys"):
        load_recipe(str(broken), [])


@pytest.mark.parametrize("setting", ["novalue", "=3", "a..b=1", "a.b=[1"])
def test_a_malformed_setting_is_refused(setting: str) -> None:
    with pytest.raises(UserError, match="--set"):
        parse_setting(setting)


@pytest.mark.parametrize("name", packaged("recipes"))
@pytest.mark.parametrize("method", PRESETS)
def test_every_packaged_recipe_runs_every_method_by_changing_one_line(name: str, method: str) -> None:
    # Only a critic on the policy's trunk cannot be frozen.
    more = ["critic.backbone=separate"] if (name, method) == ("smollm2-135m", "frozen_critic") else []
    recipe = load_recipe(name, [f"method={method}", *more]).recipe
    assert recipe.method == method
    labelled, unlabelled = recipe.groups(recipe.em.labelled_share)
    sampled = labelled * recipe.em.labelled_group_size + unlabelled * recipe.em.group_size
    assert sampled == recipe.em.rollouts, "methods are compared at equal numbers of sampled responses"
