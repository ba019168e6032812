from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tempo_engine import parallel
from tempo_engine.packing import PackedBatch, micro_batches, pack
from tempo_engine.rollout import Prompt, Rollout

MakeRollouts = Callable[..., list[Rollout]]


def rollout(prompt: tuple[int, ...], response: list[int]) -> Rollout:
    return Rollout(Prompt("p", "", prompt), response, [-0.5] * len(response), (), False, "")


def test_positions_of_log_probs_and_values_by_hand() -> None:
    batch = pack([rollout((5, 9), [7, 2]), rollout((4,), [3])])
    assert batch.input_ids_N.tolist() == [5, 9, 7, 2, 4, 3]
    assert batch.target_T.tolist() == [7, 2, 3]
    assert batch.logprob_index_T.tolist() == [1, 2, 4]
    assert batch.value_index_TS.tolist() == [1, 2, 3, 4, 5]
    assert batch.cu_values_S1.tolist() == [0, 3, 5]


def test_padding_is_on_the_right_and_reversible() -> None:
    batch = pack([rollout((5, 9), [7, 2]), rollout((4,), [3])])
    ids_BL, index_N = batch.padded()
    assert ids_BL.tolist() == [[5, 9, 7, 2], [4, 3, 0, 0]]
    assert torch.equal(ids_BL.flatten()[index_N], batch.input_ids_N)


def test_select_takes_sequences_in_the_given_order() -> None:
    rollouts = [rollout((5, 9), [7, 2]), rollout((4,), [3]), rollout((8, 8, 8), [1, 1, 1])]
    chosen = pack(rollouts).select(torch.tensor([2, 0]))
    wanted = pack([rollouts[2], rollouts[0]])
    for name in ("input_ids_N", "cu_seqlens_S1", "cu_responses_S1", "sampler_logprob_T"):
        assert torch.equal(getattr(chosen, name), getattr(wanted, name))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        pack([rollout((), [1])])


@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20),
    max_tokens=st.integers(1, 60),
)
def test_micro_batches_cover_every_sequence_once_within_the_budget(
    lengths: list[tuple[int, int]], max_tokens: int
) -> None:
    batch = pack([rollout(tuple(range(p)), list(range(r))) for p, r in lengths])
    micros = micro_batches(batch, None, max_tokens, is_packed=False)
    assert [micro.is_last for micro in micros] == [False] * (len(micros) - 1) + [True]
    parts = [micro.rows for micro in micros]
    assert sorted(torch.cat(parts).tolist()) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * int(batch.length_S[part].max()) <= max_tokens
    longest = [int(batch.length_S[part].max()) for part in parts]
    assert longest == sorted(longest, reverse=True)


def parts_of_two_ranks(
    lengths: list[int], max_tokens: int, monkeypatch: pytest.MonkeyPatch, *, is_packed: bool
) -> list[list[list[int]]]:
    """Rows of each rank's parts that count."""
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    batch, parts = pack([rollout((1,), list(range(length - 1))) for length in lengths]), []
    rounds = set()
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        micros = micro_batches(batch, None, max_tokens, is_packed=is_packed)
        rounds.add(len(micros))
        parts.append([micro.rows.tolist() for micro in micros if micro.counts])
    assert len(rounds) == 1, "a rank that has one part less waits for the other for ever"
    return parts


def test_ranks_that_pad_share_rows_of_similar_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    # Alone: [8, 8], [4, 4, 2, 2] and [2, 2], three parts of up to 16. Two ranks have four in two rounds, all of them 8 tokens.
    parts = parts_of_two_ranks([8, 2, 4, 2, 8, 2, 4, 2], 16, monkeypatch, is_packed=False)
    assert parts == [[[0], [2, 6]], [[4], [1, 3, 5, 7]]]


def test_ranks_that_do_not_pad_share_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of_two_ranks([8, 2, 4, 2, 8, 2, 4, 2], 16, monkeypatch, is_packed=True)
    assert parts == [[[0, 2, 1, 5]], [[4, 6, 3, 7]]]


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30), max_tokens=st.integers(1, 100))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_two_ranks_cover_every_sequence_once_within_the_budget(
    lengths: list[int], max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for is_packed in (True, False):
        parts = [
            part for mine in parts_of_two_ranks(lengths, max_tokens, monkeypatch, is_packed=is_packed) for part in mine
        ]
        assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
        for part in parts:
            tokens = sum(lengths[row] for row in part) if is_packed else len(part) * max(lengths[row] for row in part)
            assert len(part) == 1 or tokens <= max_tokens


def test_packing_never_splits_a_rollout(make_rollouts: MakeRollouts) -> None:
    rollouts = make_rollouts([(3, 4), (1, 1), (2, 7)])
    batch: PackedBatch = pack(rollouts)
    for row, r in enumerate(rollouts):
        start, end = batch.cu_seqlens_S1[row], batch.cu_seqlens_S1[row + 1]
        assert batch.input_ids_N[start:end].tolist() == [*r.prompt.token_ids, *r.response_ids]
