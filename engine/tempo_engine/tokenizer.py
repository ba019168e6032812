"""Tokenizers: loaded beside a model, or built for a model that is created from a config."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tempo_engine.data.style import PLAIN, Messages, Style, ask
from tempo_engine.errors import UserError, first_sentence
from tempo_engine.rollout import Prompt
from tempo_engine.tasks.question import Question

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a Hugging Face directory. Raises UserError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"transformers finds no usable tokenizer in {path}: {first_sentence(error)}") from error


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a whitespace-separated word: for generators, whose vocabulary is known in full."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([PAD, END, UNKNOWN, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return _wrap(tokenizer)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: for a small model on text of any kind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([PAD, END, UNKNOWN, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )


def to_prompts(
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    max_tokens: int,
    where: str,
    style: Style = PLAIN,
    refuse: Callable[[Question, str], None] | None = None,
) -> list[Prompt]:
    """Ask questions in a style and tokenise them: text as it is, chat messages through the tokenizer's chat template.

    Raises UserError for a chat prompt without a template, for a thinking switch that the template does not have, and for a prompt
    that is empty or longer than `max_tokens`; with `refuse`, that is told instead, with the reason, and gives no prompt.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    options = {} if style.enable_thinking is None else {"enable_thinking": style.enable_thinking}
    if options and has_chat and "enable_thinking" not in str(tokenizer.chat_template):
        raise UserError(
            f"{where} sets enable_thinking, but the tokenizer's chat template has no such switch; remove it"
        )
    prompts = []
    for question in questions:
        asked = ask(question, style, has_chat=has_chat)
        if isinstance(asked, str):
            text, ids = asked, tokenizer(asked)["input_ids"]
        else:
            if not has_chat:
                raise UserError(
                    f"{where} holds chat messages, but the model's tokenizer has no chat template; use text prompts"
                )
            text = _chat_text(tokenizer, asked, options, where)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if 0 < len(ids) <= max_tokens:
            prompts.append(Prompt(question.id, text, tuple(ids)))
            continue
        found = (
            f"{len(ids)} tokens, the limit rollout.max_prompt_tokens is {max_tokens}; raise it or shorten the prompt"
        )
        if refuse is None:
            raise UserError(f"{where}: the prompt {text[:60]!r} has {found}")
        refuse(question, f"the prompt has {found}")
    return prompts


def _chat_text(tokenizer: Any, messages: Messages, options: dict[str, bool], where: str) -> str:
    rows = [{"role": role, "content": content} for role, content in messages]
    try:
        return tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True, **options)
    except TemplateError as error:  # some templates refuse a system prompt, or roles that do not alternate
        raise UserError(
            f"{where}: the tokenizer's chat template refuses its messages: {first_sentence(error)}"
        ) from error


def single_token(tokenizer: Any, text: str) -> int:
    """The token that is exactly this text. Raises UserError when there is none."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # Some tokenizers have one token for all that they do not know, or write spaces of their own.
    if len(ids) != 1 or tokenizer.decode(ids) != text:
        raise UserError(
            f"rollout.stop takes texts that are one token each, {text!r} is not for this model's tokenizer ({len(ids)} tokens)"
        )
    return ids[0]


def decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Token ids -> text, special tokens left out."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it, special tokens shown; together the decoded text.

    A character whose bytes are spread over several tokens belongs to the last of them. Time grows with the square of the length.
    """
    shown, texts = "", []
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)
        is_whole = end == len(ids) or not text.endswith("\ufffd")
        texts.append(text[len(shown) :] if is_whole else "")
        shown = text if is_whole else shown
    return texts
