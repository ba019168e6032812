from typing import Any

import numpy as np
from tempo_em.samples import EACH_END, SAMPLES, WITH_VALUES, sample_rows, with_values
from tempo_engine.evaluate import Judged
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.tokenizer import word_tokenizer

TOKENIZER: Any = word_tokenizer(["a", "b"])
A, B = TOKENIZER("a b")["input_ids"]


def rollout(ids: list[int], prompt: str = "q") -> Rollout:
    return Rollout(Prompt(prompt, prompt, (A,)), ids, [0.0] * len(ids), (), False, TOKENIZER.decode(ids))


def test_the_first_sample_of_the_first_prompts_is_kept() -> None:
    rollouts = [rollout([A, B], prompt) for prompt in map(str, range(20)) for _ in range(2)]
    judged = Judged([True, False] * 20, [np.array([0.25, 0.5, 0.12345])] * 40, [0.12345] * 40, [])
    rows = list(sample_rows(rollouts, judged, TOKENIZER, step=2))
    assert [row["prompt"] for row in rows] == [str(i) for i in range(SAMPLES)]
    assert rows[0] == {
        "prompt": "0", "response": "a b", "right": True, "terminal": 0.123, "tokens": ["a", " b"], "values": [0.25, 0.5, 0.123],
    }  # fmt: skip
    assert ["tokens" in row for row in rows] == [True] * WITH_VALUES + [False] * (SAMPLES - WITH_VALUES)


def test_without_a_critic_there_are_no_values() -> None:
    (row,) = sample_rows([rollout([A])], Judged([False], [], [], []), TOKENIZER, step=4)
    assert row == {"prompt": "q", "response": "a", "right": False}


def test_of_a_long_response_the_beginning_and_the_end_are_kept() -> None:
    count = 2 * EACH_END + 3
    found = with_values(rollout([A] * (count - 1) + [B]), np.linspace(0, 1, count + 1), TOKENIZER)
    assert found["left_out"] == 3
    assert len(found["tokens"]) == 2 * EACH_END == len(found["values"]) - 1
    assert (found["tokens"][-1], found["values"][0], found["values"][-1]) == (" b", 0.0, 1.0)
    assert found["values"][EACH_END + 1] == round((EACH_END + 3 + 1) / count, 3)
