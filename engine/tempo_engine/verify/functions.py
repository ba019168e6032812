"""A user's own reward function, as TRL or verl would call it. It is their code, run in this process; what it returns is checked."""

import asyncio
import importlib
import inspect
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tempo_engine.data.columns import entry
from tempo_engine.errors import Halted, UserError, first_sentence
from tempo_engine.rollout import Labelled, Rollout
from tempo_engine.tasks.answers import Extract

SIGNATURES = (
    "(prompts, completions, **columns) -> list of floats as in TRL, or (data_source, solution_str, ground_truth, extra_info) -> "
    "float as in verl"
)
# Calls at a time of an async function that takes one solution.
CONCURRENCY = 32
_TRL = ("prompts", "completions", "completion_ids", "trainer_state")
_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")


class RewardFunction:
    """`where` is "module:function". Which of the two signatures it has is told by the names of its parameters; `note` says it.

    `prompt_column` and `answer_column` are those of the data file. Each call may take `seconds`.
    """

    def __init__(
        self, where: str, extract: Extract, *, prompt_column: str, answer_column: str | None, seconds: float
    ) -> None:
        self.where, self._extract, self.seconds = where, extract, seconds
        self.prompt_column, self.answer_column = prompt_column, answer_column
        self.columns: frozenset[str] = frozenset()
        self.function = find(where)
        self.parameters = inspect.signature(self.function).parameters
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in self.parameters.values())
        names = self.parameters.keys()
        self.is_verl, is_trl = "solution_str" in names, "completions" in names
        if self.is_verl == is_trl:
            raise UserError(f"the reward function {where} takes ({', '.join(names)}); want {SIGNATURES}")
        self.note = f"reward function {where}: called as in {'verl' if self.is_verl else 'TRL'}"

    def check_columns(self, columns: Sequence[str], data: str) -> None:
        """What rows of the data have. Raises UserError when it wants something else."""
        self.columns = frozenset(columns)
        given = {*_VERL} if self.is_verl else {*_TRL, *columns}
        for name, p in self.parameters.items():
            is_wanted = p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            if is_wanted and (name not in given or p.kind is p.POSITIONAL_ONLY):
                raise UserError(
                    f"the reward function {self.where} wants {name!r}; {data} gives {', '.join(sorted(given))}"
                )

    def extract(self, response: str) -> str | None:
        return self._extract(response)

    def rewards(self, responses: Sequence[Rollout], items: Sequence[Labelled]) -> list[float]:
        if not responses:
            return []
        given = (self._one_by_one if self.is_verl else self._all_at_once)(responses, items)
        return [self._checked(reward, item) for reward, item in zip(given, items, strict=True)]

    def _all_at_once(self, responses: Sequence[Rollout], items: Sequence[Labelled]) -> list[Any]:
        asked = _row(items[0]) if len(items) == 1 else f"a batch that begins with {_row(items[0])}"
        try:
            given = self._run(lambda: self.function(**self._of_all(responses, items)), asked)
        except Halted as error:
            if len(items) > 1 and not isinstance(error.__cause__, TimeoutError):
                for response, item in zip(responses, items, strict=True):  # which row is it?
                    self._all_at_once([response], [item])
            raise
        if not isinstance(given, list | tuple) or len(given) != len(responses):
            what = f"{len(given)} rewards" if isinstance(given, list | tuple) else f"a {type(given).__name__}"
            raise Halted(f"{self._named} returned {what} for {len(responses)} completions; want a list, one float each")
        return list(given)

    def _one_by_one(self, responses: Sequence[Rollout], items: Sequence[Labelled]) -> list[Any]:
        def start(response: Rollout, item: Labelled) -> Any:
            return self._run(lambda: self.function(**self._of_one(response, item)), _row(item))

        workers = CONCURRENCY if inspect.iscoroutinefunction(self.function) else 1
        with ThreadPoolExecutor(workers) as executor:
            given = list(executor.map(start, responses, items))
        return [score["score"] if isinstance(score, dict) and "score" in score else score for score in given]

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass

    def _of_all(self, responses: Sequence[Rollout], items: Sequence[Labelled]) -> dict[str, Any]:
        """TRL: lists, one entry a completion; of a chat, messages. A column that a row lacks is None there."""
        prompts = [entry(item.columns, self.prompt_column, item.prompt.text) for item in items]
        texts = [r.text for r in responses]
        is_chat = [isinstance(prompt, list) for prompt in prompts]
        names = self.columns.union(*(item.columns for item in items)) - {self.prompt_column, *_TRL}
        everything = {
            "prompts": prompts,
            "completions": [
                [{"role": "assistant", "content": text}] if chat else text
                for text, chat in zip(texts, is_chat, strict=True)
            ],
            "completion_ids": [r.response_ids for r in responses],
            "trainer_state": None,
            **{name: [item.columns.get(name) for item in items] for name in sorted(names)},
        }
        return self._taken(everything)

    def _of_one(self, response: Rollout, item: Labelled) -> dict[str, Any]:
        """verl: one solution. Its columns where the row has them, else what takes their place."""
        columns = item.columns
        reward_model = columns.get("reward_model")
        truth = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
        everything = {
            "data_source": columns.get("data_source", ""),
            "solution_str": response.text,
            "ground_truth": entry(columns, self.answer_column) if truth is None else truth,
            "extra_info": columns.get("extra_info", dict(columns)),
        }
        return self._taken(everything)

    def _taken(self, everything: dict[str, Any]) -> dict[str, Any]:
        return everything if self.takes_any else {k: v for k, v in everything.items() if k in self.parameters}

    def _run(self, call: Callable[[], Any], asked: str) -> Any:
        """On a thread of its own, so that it can be given up on, with an event loop for what is async."""
        outcome: dict[str, Any] = {}

        def work() -> None:
            try:
                given = call()
                outcome["given"] = asyncio.run(_awaited(given)) if inspect.isawaitable(given) else given
            except BaseException as error:
                outcome["error"] = error

        thread = threading.Thread(target=work, name=f"reward {self.where}", daemon=True)
        thread.start()
        thread.join(self.seconds)
        if thread.is_alive():
            raise Halted(
                f"{self._named} took more than {self.seconds:g} s on {asked}; make it faster or raise timeout_s"
            ) from TimeoutError()
        if "error" in outcome:
            error = outcome["error"]
            what = f"{type(error).__name__}: {first_sentence(error)}"
            raise Halted(f"{self._named} raised {what} on {asked}; mend it and go on") from error
        return outcome["given"]

    def _checked(self, reward: Any, item: Labelled) -> float:
        row = _row(item)
        if reward is None:
            raise Halted(
                f"{self._named} gave None, no reward, for {row}, and there is no other function; return a float"
            )
        try:
            number = float(reward)
        except (TypeError, ValueError):
            raise Halted(f"{self._named} gave a {type(reward).__name__} for {row}; want a float") from None
        if isinstance(reward, str) or math.isnan(number):
            raise Halted(f"{self._named} gave {reward!r} for {row}; want a float")
        if not 0.0 <= number <= 1.0:
            raise Halted(
                f"{self._named} gave {number:g} for {row}; rewards are what the critic predicts, from 0 to 1: scale them"
            )
        return number

    @property
    def _named(self) -> str:
        return f"the reward function {self.where}"


def _row(item: Labelled) -> str:
    return f"the question {item.prompt.text[-60:]!r} (id {item.prompt.id})"


async def _awaited(given: Any) -> Any:
    return await given


def find(where: str) -> Callable[..., Any]:
    """The function of "module:function"; modules of the working directory too. Raises UserError."""
    module_name, colon, name = where.partition(":")
    if not colon or not name or "/" in module_name or module_name.endswith(".py"):
        raise UserError(f"verifier.function wants module:function, such as rewards:score, got {where!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        raise UserError(
            f"verifier.function {where!r}: there is no module {error.name}; begin in its folder, or install it"
        ) from error
    except AttributeError as error:
        raise UserError(f"verifier.function {where!r}: the module {module_name} has no {name}") from error
    except Exception as error:
        raise UserError(
            f"verifier.function {where!r}: importing {module_name} fails: {type(error).__name__}: {first_sentence(error)}"
        ) from error
    if not callable(found):
        raise UserError(f"verifier.function {where!r} is a {type(found).__name__}, want a function")
    return found
