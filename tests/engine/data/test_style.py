"""How questions are asked: what stands around them, as text or as messages."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tempo_engine.data.style import PLAIN, Style, ask
from tempo_engine.errors import UserError
from tempo_engine.tasks.question import Question
from tempo_engine.tokenizer import byte_tokenizer, to_prompts

TEXT = Question("1 + 1?")
CHAT = Question((("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2"), ("user", "2 + 2?")))


def test_without_a_style_a_question_is_asked_as_it_is() -> None:
    assert ask(TEXT, PLAIN, has_chat=True) == "1 + 1?"
    assert ask(CHAT, PLAIN, has_chat=True) == CHAT.content
    assert ask(Question("c", shown="worked\nc\n"), PLAIN, has_chat=True) == "worked\nc\n"


@given(text=st.text(alphabet=st.characters(exclude_categories=("Cs",)), min_size=1))
def test_a_template_stands_around_any_text_and_reads_nothing_in_it(text: str) -> None:
    style = Style(template="Q: {prompt}\nPut it in \\boxed{}. {answer}")
    assert ask(Question(text), style, has_chat=False) == "Q: " + text + "\nPut it in \\boxed{}. {answer}"


def test_a_template_stands_around_the_last_question_of_a_chat() -> None:
    asked = ask(CHAT, Style(template="{prompt} Box it."), has_chat=True)
    assert asked == (*CHAT.content[:3], ("user", "2 + 2? Box it."))


def test_a_template_replaces_what_a_benchmark_shows() -> None:
    question = Question("1 + 1?", shown="Solve: 1 + 1?")
    assert ask(question, Style(template="{prompt} Box it."), has_chat=False) == "1 + 1? Box it."


def test_a_system_prompt_goes_first_where_a_row_has_none() -> None:
    style = Style(system="Think.", chat="yes")
    assert ask(TEXT, style, has_chat=True) == (("system", "Think."), ("user", "1 + 1?"))
    assert ask(CHAT, style, has_chat=True) == CHAT.content


@pytest.mark.parametrize(("chat", "has_chat", "is_chat"), [("yes", False, True), ("no", True, False), ("if_possible", True, True),
                                                           ("if_possible", False, False)])  # fmt: skip
def test_a_text_becomes_a_message_where_it_should(chat: Any, has_chat: bool, is_chat: bool) -> None:
    assert isinstance(ask(TEXT, Style(chat=chat), has_chat=has_chat), tuple) == is_chat


def tokenizer(template: str) -> Any:
    made = byte_tokenizer()
    made.chat_template = template
    return made


THINKING = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
THINKING += "{% if not enable_thinking %}<think></think>{% endif %}"


@pytest.mark.parametrize(
    ("thinking", "ends"), [(True, "1 + 1?\n"), (False, "<think></think>"), (None, "<think></think>")]
)
def test_the_thinking_switch_reaches_the_chat_template(thinking: bool | None, ends: str) -> None:
    style = Style(chat="yes", enable_thinking=thinking)
    prompt = to_prompts([TEXT], tokenizer(THINKING), max_tokens=99, where="data.x", style=style)[0]
    assert prompt.text.endswith(ends)
    assert bytes(tokenizer("").decode(list(prompt.token_ids)), "utf-8").decode() == prompt.text


def test_a_thinking_switch_that_the_template_lacks_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"data\.x sets enable_thinking, but the tokenizer's chat template has no such switch"
    ):
        to_prompts(
            [TEXT], tokenizer("{{ messages }}"), max_tokens=99, where="data.x", style=Style(enable_thinking=True)
        )


def test_messages_that_the_template_refuses_are_one_sentence() -> None:
    refusing = tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"data\.x: the tokenizer's chat template refuses its messages: roles must"):
        to_prompts([CHAT], refusing, max_tokens=99, where="data.x")


def test_a_prompt_that_is_too_long_is_told_and_left_out() -> None:
    told: list[tuple[Question, str]] = []
    questions = [TEXT, Question("long " * 9), Question("2")]
    prompts = to_prompts(
        questions, byte_tokenizer(), max_tokens=9, where="data.x", refuse=lambda q, why: told.append((q, why))
    )
    assert [prompt.text for prompt in prompts] == ["1 + 1?", "2"]
    why = "the prompt has 45 tokens, the limit rollout.max_prompt_tokens is 9; raise it or shorten the prompt"
    assert told == [(questions[1], why)]


def test_columns_of_a_row_never_reach_a_prompt() -> None:
    question = Question("1 + 1?", frozenset({"2"}), columns={"answer": "the secret"})
    prompt = to_prompts([question], byte_tokenizer(), max_tokens=9, where="data.x")[0]
    assert "secret" not in repr(prompt)
    assert prompt == to_prompts([TEXT], byte_tokenizer(), max_tokens=9, where="data.x")[0]
