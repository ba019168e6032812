"""How a question is asked: a template around it, a system prompt, as chat or as plain text, with or without thinking."""

from dataclasses import dataclass
from typing import Literal

from tempo_engine.tasks.question import Question

Messages = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Style:
    """`template` stands around a text, or around the last message of a user: "{prompt}" in it is replaced, all else is taken
    literally. `chat` says whether a text becomes a user's message; messages stay messages. `enable_thinking`: for chat templates
    with such a switch. A row's own system prompt is part of the question and goes before `system`.
    """

    template: str | None = None
    system: str = ""
    chat: Literal["yes", "no", "if_possible"] = "no"
    enable_thinking: bool | None = None


PLAIN = Style()


def ask(question: Question, style: Style, *, has_chat: bool) -> str | Messages:
    """What a model is shown: text, or (role, text) messages. `has_chat`: whether its tokenizer has a chat template."""
    shown = question.content if style.template else question.shown or question.content
    if isinstance(shown, str):
        text = _within(style.template, shown)
        if style.chat == "no" or (style.chat == "if_possible" and not has_chat):
            return text
        messages: Messages = (("user", text),)
    else:
        last = max((i for i, (role, _) in enumerate(shown) if role == "user"), default=len(shown) - 1)
        messages = tuple((r, _within(style.template, t) if i == last else t) for i, (r, t) in enumerate(shown))
    return (("system", style.system), *messages) if style.system and messages[0][0] != "system" else messages


def _within(template: str | None, text: str) -> str:
    # Not str.format: data is hostile, and \boxed{} is no field.
    return template.replace("{prompt}", text) if template else text
