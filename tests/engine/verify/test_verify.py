"""What all verifiers have in common: shares of ranks, failures that every rank hears of, counts that add up."""

import json
from collections.abc import Sequence

import pytest
from tempo_engine import parallel
from tempo_engine.errors import Halted, UserError
from tempo_engine.rollout import Labelled, Prompt, Rollout
from tempo_engine.tasks.answers import boxed, whole
from tempo_engine.verify import ExactMatch, metrics_of, verify


def question(*answers: str, name: str = "q") -> Labelled:
    return Labelled(Prompt(name, "", (5,)), frozenset(answers))


def said(text: str, item: Labelled, tokens: int = 3) -> Rollout:
    return Rollout(item.prompt, [2] * tokens, [-1.0] * tokens, ((0, tokens),), False, text)


class Scripted:
    """A verifier that gives every response the same, or fails."""

    def __init__(self, gives: float | Exception) -> None:
        self.gives = gives
        self.asked: list[str] = []

    def extract(self, response: str) -> str | None:
        return response

    def rewards(self, responses: Sequence[Rollout], items: Sequence[Labelled]) -> list[float]:
        self.asked += [r.text for r in responses]
        if isinstance(self.gives, Exception):
            raise self.gives
        return [self.gives] * len(responses)

    def metrics(self) -> dict[str, float]:
        return {"verify/checks": len(self.asked)}

    def close(self) -> None:
        pass


def test_an_exact_match_is_the_extraction_and_a_look_into_the_set():
    item = question("7", "8")
    verifier = ExactMatch(boxed)
    responses = [said(text, item) for text in (r"\boxed{+7}", r"\boxed{8.0}", r"\boxed{9}", "7")]
    assert verifier.rewards(responses, [item] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert [verifier.extract(r.text) for r in responses] == ["7", "8", "9", None]
    assert verifier.metrics() == {}


def test_a_response_needs_a_question_beside_it():
    item = question("7")
    with pytest.raises(ValueError):
        ExactMatch(whole).rewards([said("7", item)], [])


def test_one_process_verifies_everything_at_once():
    item, verifier = question("7"), Scripted(0.5)
    assert verify(verifier, [said("a", item), said("b", item, tokens=9)], [item, item]) == [0.5, 0.5]
    assert verifier.asked == ["a", "b"]


def two_ranks(monkeypatch: pytest.MonkeyPatch, other: list[object]) -> None:
    """This process is rank 0 of two; `other` is what rank 1 sends."""
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "_all_gather_json", lambda mine: [json.loads(json.dumps(mine)), other])


def test_a_rank_verifies_its_share_only(monkeypatch: pytest.MonkeyPatch):
    """Costs 9, 1, 1 for two ranks: the long response is rank 0's, both short ones are rank 1's."""
    two_ranks(monkeypatch, [1.0, 0.0])
    item, verifier = question("7"), Scripted(0.25)
    responses = [said("long", item, tokens=9), said("b", item, tokens=1), said("c", item, tokens=1)]
    assert verify(verifier, responses, [item] * 3) == [0.25, 1.0, 0.0]
    assert verifier.asked == ["long"]


@pytest.mark.parametrize("kind", [Halted, UserError])
def test_every_rank_hears_of_another_ones_failure(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]):
    two_ranks(monkeypatch, [[kind.__name__, "the judge is gone"]])
    item = question("7")
    with pytest.raises(kind, match="the judge is gone"):
        verify(Scripted(1.0), [said("a", item), said("b", item)], [item, item])


def test_a_failing_rank_sends_its_failure_before_it_fails(monkeypatch: pytest.MonkeyPatch):
    two_ranks(monkeypatch, [1.0])
    item = question("7")
    with pytest.raises(Halted, match="mine"):
        verify(Scripted(Halted("mine")), [said("a", item), said("b", item)], [item, item])


def test_counts_of_several_verifiers_add_up():
    first, second = Scripted(1.0), Scripted(1.0)
    item = question("7")
    verify(first, [said("a", item)], [item])
    verify(second, [said("a", item), said("b", item)], [item, item])
    assert metrics_of([first, ExactMatch(whole), second]) == {"verify/checks": 3.0}
    assert metrics_of([ExactMatch(whole)]) == {}
