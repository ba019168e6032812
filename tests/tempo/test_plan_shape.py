"""What a plan reads out of configs: parameters, windows, vocabularies."""

from typing import Any

import pytest
import torch
from tempo_em.datasets import load_datasets, tokenizer_for
from tempo_em.loading import load_recipe
from tempo_em.plan.configs import fresh_vocab_size, packaged_models
from tempo_em.plan.shape import FAMILIES, shape_of
from tempo_engine.errors import UserError
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 128, "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def small(model_type: str, **changes: Any) -> dict[str, Any]:
    experts = {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"}
    kept = {k: v for k, v in SMALL.items() if FAMILIES[model_type].experts or k not in experts}
    return {"model_type": model_type, **kept, **changes}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # as the models' safetensors files on the hub add up
        ("Qwen3-8B", 8_190_735_360),
        ("Qwen3-8B-Base", 8_190_735_360),
        ("Qwen3-14B", 14_768_307_200),
        ("Qwen3-14B-Base", 14_768_307_200),
        ("Olmo-3-1025-7B", 7_298_011_136),
        ("Mistral-Large-Instruct-2411", 122_610_069_504),
        ("SmolLM2-135M-Instruct", 134_515_008),
    ],
)
def test_packaged_configs_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert shape_of(packaged_models()[name], name).total == parameters


def test_every_packaged_config_is_one_that_transformers_reads() -> None:
    for name, config in packaged_models().items():
        fields = dict(config)
        assert AutoConfig.for_model(fields.pop("model_type"), **fields).num_hidden_layers, name


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_parameters_are_counted_as_transformers_makes_them(model_type: str, is_tied: bool) -> None:
    config = small(model_type, tie_word_embeddings=is_tied)
    fields = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    shape = shape_of(config, "it")
    assert shape.total == sum(p.numel() for p in model.parameters())
    assert shape.block == sum(p.numel() for p in model.base_model.layers[0].parameters())


def test_biases_are_counted() -> None:
    # queries 64, keys and values 32 each, output 64; gate and up 96 each, down 64
    plain, biased = shape_of(small("llama"), ""), shape_of(small("llama", attention_bias=True, mlp_bias=True), "")
    assert biased.block - plain.block == (64 + 32 + 32 + 64) + (96 + 96 + 64)


def test_a_token_meets_only_its_experts() -> None:
    shape = shape_of(small("mixtral"), "")
    assert shape.total - shape.active == 3 * (4 - 2) * (3 * 64 * 96)  # layers, experts it does not meet, their matrices


def test_adapters_are_counted_by_rank_and_target() -> None:
    shape = shape_of(small("llama"), "")
    assert shape.adapters(4, ("q_proj", "v_proj")) == 4 * ((64 + 64) + (64 + 32))
    assert shape.adapters(1, "all-linear") == (64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 96)
    with pytest.raises(
        UserError, match=r"model\.lora\.targets has query; the linear layers of a llama block are q_proj"
    ):
        shape.adapters(4, ("query",))


def test_windows_are_those_of_the_transformers_config() -> None:
    for model_type in ("olmo3", "qwen3", "mistral", "llama"):
        for changes in ({}, {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}):
            config = small(model_type, num_hidden_layers=5, **changes)
            fields = dict(config)
            theirs: Any = AutoConfig.for_model(fields.pop("model_type"), **fields)
            kinds = getattr(theirs, "layer_types", None) or ["full_attention"] * 5
            window = getattr(theirs, "sliding_window", None)
            if model_type == "mistral":
                kinds = ["sliding_attention"] * 5
            expected = tuple(window if kind == "sliding_attention" else None for kind in kinds)
            assert shape_of(config, "it").windows == expected, (model_type, changes)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gpt2"}, "it is a gpt2; plan knows the architectures llama, "),
        (small("llama", hidden_size=None), "it has hidden_size None; plan needs it as a positive number"),
        (small("llama", vocab_size="many"), "it has vocab_size 'many'; plan needs it as a positive number"),
        (small("qwen3_moe", mlp_only_layers=[0]), "it mixes blocks with and without experts"),
    ],
)
def test_a_config_that_cannot_be_planned_is_refused_in_one_sentence(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        shape_of(config, "it")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["data.unlabelled.terms=[6]", "data.unlabelled.largest=9"],
        ["data.labelled={generator: sums, count: 8}"],
        ["data.evaluation.cups={generator: swaps, count: 8, terms: [3, 4], unique: true}"],
    ],
)
def test_a_fresh_model_has_as_many_tokens_as_its_tokenizer(settings: list[str]) -> None:
    recipe = load_recipe("tiny", settings).recipe
    assert fresh_vocab_size(recipe) == len(tokenizer_for(load_datasets(recipe)))


def test_a_fresh_model_on_files_has_a_token_for_each_byte(tmp_path: Any) -> None:
    (tmp_path / "some.jsonl").write_text('{"prompt": "1 + 1", "answer": 2}')
    recipe = load_recipe(
        "tiny", [f"data.evaluation.more={{jsonl: {tmp_path}/some.jsonl}}", "cold_start.steps=0"]
    ).recipe
    assert fresh_vocab_size(recipe) == len(tokenizer_for(load_datasets(recipe))) == 259
