"""Models that are one GGUF file: small ones written here as llama.cpp would, and what happens when there is none."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tempo_engine.errors import UserError
from tempo_engine.gguf import find_gguf, import_gguf, load_gguf
from tempo_engine.model import Policy
from tempo_engine.tokenizer import byte_tokenizer, load_tokenizer
from tempo_engine.weights import load_causal_lm
from torch import Tensor

MakePolicy = Callable[..., Policy]
IDS = torch.tensor([[3, 40, 5, 200, 7]])
HEADS, KEY_VALUE_HEADS = 2, 1
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def name_in_file(name: str) -> str:
    """llama.cpp's name of a weight of a Llama in transformers."""
    name = name.replace("model.layers.", "blk.").replace("model.embed_tokens", "token_embd")
    name = name.replace("model.norm", "output_norm")
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates neighbouring rows of a head, transformers those half a head apart."""
    halves = weight.view(heads, 2, len(weight) // heads // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


# One token a byte, and one for a space with an equals sign, which is written Ġ=.
MERGED = "Ġ="
TOKENS = [*byte_tokenizer().convert_ids_to_tokens(list(range(len(byte_tokenizer())))), MERGED]


@pytest.fixture
def llama(make_policy: MakePolicy) -> Policy:
    """With rows that blocks of 32 numbers fill."""
    sizes: dict[str, Any] = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_VALUE_HEADS, "hidden_size": 64}
    return make_policy(vocab_size=len(TOKENS), **sizes, intermediate_size=96)


def write(file: Path, policy: Policy, kind: Kind) -> Path:
    """The policy's weights, matrices quantised as `kind`, and the tokenizer."""
    config = policy.model.config
    tokenizer: Any = byte_tokenizer()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges([" ".join(MERGED)])
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    for name, weight in policy.model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight = interleaved(weight, HEADS if "q_proj" in name else KEY_VALUE_HEADS)
        how = kind if weight.ndim == 2 else Kind.F32
        writer.add_tensor(name_in_file(name), gguf.quantize(weight.detach().numpy(), how), raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_an_imported_model_computes_what_the_file_s_weights_do(llama: Policy, tmp_path: Path) -> None:
    import_gguf(write(tmp_path / "small.gguf", llama, Kind.F32), tmp_path / "small")
    model = load_causal_lm(tmp_path / "small", dtype=torch.float32, attention="sdpa")
    torch.testing.assert_close(logits(model), logits(llama.model))


def test_its_tokenizer_comes_along(llama: Policy, tmp_path: Path) -> None:
    import_gguf(write(tmp_path / "small.gguf", llama, Kind.F32), tmp_path / "small")
    tokenizer = load_tokenizer(tmp_path / "small")
    seven, *end = byte_tokenizer()("7\n")["input_ids"]
    assert tokenizer("7 =\n")["input_ids"] == [seven, TOKENS.index(MERGED), *end]
    assert tokenizer.eos_token == "<end>"


def test_quantised_weights_become_what_their_blocks_stand_for(llama: Policy, tmp_path: Path) -> None:
    model, _ = load_gguf(write(tmp_path / "small.gguf", llama, Kind.Q4_1), dtype=torch.float32, attention="sdpa")
    found, before = dict(model.named_parameters()), dict(llama.model.named_parameters())
    assert found.keys() == before.keys()
    for name, weight in before.items():
        if "down_proj" in name:  # as it is in the file: rows neither turned nor shared
            meant = gguf.dequantize(gguf.quantize(weight.detach().numpy(), Kind.Q4_1), Kind.Q4_1)
            assert torch.equal(found[name], torch.from_numpy(meant))
            assert not torch.equal(found[name], weight)


def test_a_file_that_lacks_a_weight_is_refused(llama: Policy, tmp_path: Path) -> None:
    del llama.model.model.layers[1].mlp.up_proj.weight  # pyright: ignore
    with pytest.raises(UserError, match=r"lacks 1 weights of a LlamaForCausalLM, model\.layers\.1\.mlp\.up_proj"):
        load_gguf(write(tmp_path / "small.gguf", llama, Kind.F32), dtype=torch.float32, attention="sdpa")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"not at all")
    with pytest.raises(UserError, match=r"transformers cannot read .*a\.gguf: "):
        import_gguf(tmp_path / "a.gguf", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_import_overwrites_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        import_gguf(tmp_path / "a.gguf", tmp_path)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that cannot be imported."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    folder = tmp_path / "some_model"
    folder.mkdir()
    (folder / "__init__.py").write_text("import llama_cpp_that_nobody_has")
    return folder


def test_the_file_of_a_package_is_found_without_importing_it(package: Path) -> None:
    (package / "model.gguf").touch()
    assert find_gguf("some_model") == package / "model.gguf"


def test_a_package_with_no_file_or_several_is_refused(package: Path) -> None:
    with pytest.raises(UserError, match=r"must bring one \.gguf file, found none"):
        find_gguf("some_model")
    for name in ("a.gguf", "b.gguf"):
        (package / name).touch()
    with pytest.raises(UserError, match=r"found .*a\.gguf, .*b\.gguf; name the file itself"):
        find_gguf("some_model")


@pytest.mark.parametrize("where", ["nowhere", "no-where", "json.decoder", ""])
def test_what_is_neither_a_file_nor_a_package_is_refused(where: str) -> None:
    with pytest.raises(UserError, match=r"neither a \.gguf file nor an installed package|is no file"):
        find_gguf(where)


@pytest.mark.parametrize("where", ["missing.gguf", "."])
def test_a_path_without_a_file_is_refused(where: str) -> None:
    with pytest.raises(UserError, match="is no file"):
        find_gguf(where)


def test_packages_that_read_the_format_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(UserError, match=r"needs gguf; pip install 'tempo-engine\[gguf\]'"):
        load_gguf(tmp_path / "a.gguf", dtype=torch.float32, attention="sdpa")
