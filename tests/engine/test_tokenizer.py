from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tempo_engine.errors import UserError
from tempo_engine.tasks.question import Question
from tempo_engine.tokenizer import (
    byte_tokenizer,
    decoder,
    load_tokenizer,
    pieces,
    single_token,
    to_prompts,
    word_tokenizer,
)

BYTES = byte_tokenizer()


def test_words_become_one_token_each_and_come_back() -> None:
    tokenizer = word_tokenizer(["+3", "(2)", "="])
    ids = tokenizer("+3 (2) = +3")["input_ids"]
    assert len(ids) == 4
    assert tokenizer.unk_token_id not in ids
    assert decoder(tokenizer)(ids) == "+3 (2) = +3"


def test_an_unknown_word_is_marked_as_such() -> None:
    tokenizer = word_tokenizer(["a"])
    assert tokenizer("b")["input_ids"] == [tokenizer.unk_token_id]


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text_survives_the_byte_tokenizer(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert decoder(BYTES)(ids) == text


@pytest.mark.parametrize("text", ["\n", "7", " ", "<end>"])
def test_a_text_that_is_one_token_is_found(text: str) -> None:
    assert BYTES.decode([single_token(BYTES, text)]) == text


@pytest.mark.parametrize("text", ["", "\n\n", "é", "ab"])
def test_a_text_of_no_token_or_several_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"rollout\.stop takes texts that are one token each"):
        single_token(BYTES, text)


@pytest.mark.parametrize("text", ["\n", "b"])
def test_a_text_that_words_do_not_spell_is_no_token_of_theirs(text: str) -> None:
    with pytest.raises(UserError, match="is not for this model's tokenizer"):
        single_token(word_tokenizer(["a"]), text)


def test_a_saved_tokenizer_loads_again(tmp_path: Path) -> None:
    word_tokenizer(["a", "b"]).save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded("b a")["input_ids"] == word_tokenizer(["a", "b"])("b a")["input_ids"]
    assert loaded.eos_token == "<end>"


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_chat_messages_go_through_the_template() -> None:
    tokenizer = word_tokenizer(["user:", "hi", "assistant:"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"
    prompt = to_prompts([Question((("user", "hi"),))], tokenizer, max_tokens=8, where="data")[0]
    assert prompt.text == "user: hi assistant:"
    assert len(prompt.token_ids) == 3


def test_prompts_keep_the_id_of_their_content() -> None:
    question = Question("a b", frozenset({"c"}))
    prompt = to_prompts([question], word_tokenizer(["a", "b"]), max_tokens=2, where="data")[0]
    assert prompt.id == question.id == Question("a b").id != Question("b a").id


@pytest.mark.parametrize("text", ["a a a", ""])
def test_prompts_that_are_too_long_or_empty_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="max_prompt_tokens is 2"):
        to_prompts([Question(text)], word_tokenizer(["a"]), max_tokens=2, where="data.labelled")


def test_pieces_say_what_each_token_adds() -> None:
    tokenizer = word_tokenizer(["+3", "(2)"])
    ids = [*tokenizer("+3 (2)")["input_ids"], tokenizer.eos_token_id]
    assert pieces(tokenizer, ids) == ["+3", " (2)", " <end>"]
    assert pieces(tokenizer, []) == []


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=20))
def test_pieces_of_any_text_are_that_text(text: str) -> None:
    assert "".join(pieces(BYTES, BYTES(text)["input_ids"])) == text


def test_a_character_of_several_tokens_belongs_to_the_last() -> None:
    assert pieces(BYTES, BYTES("a\u20ac!")["input_ids"]) == ["a", "", "", "\u20ac", "!"]
