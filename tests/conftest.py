"""Shared by all tests: one thread, small models, quiet libraries, Triton as an interpreter."""

import os
import random
import sys
import types

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton kernels run in its interpreter where a test asks for them with TEMPO_KERNELS=triton; read when they are imported.
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from tempo_engine.blocks import BlockOptions
from tempo_engine.model import Policy
from tempo_engine.parallel import Sharding
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.weights import DTYPES, create_causal_lm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, so that in the end no process waits for another's long file."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two busy OpenMP threads per process on two cores are far slower than one."""
    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a skipped test is a broken promise: it fails."""
    report = yield
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped"
    return report


class FakeGymDataset:
    """What is used of a dataset of reasoning-gym: item i of seed s is drawn from s + i. Its scorer must not be called."""

    def __init__(self, size: int, seed: int, largest: int = 99) -> None:
        if largest < 0:
            raise AssertionError("largest must be >= 0")
        self.size, self.seed, self.largest = size, seed, largest

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(self.seed + index)
        a, b = rng.randint(0, self.largest), rng.randint(0, self.largest)
        return {"question": f"Add {a} and {b}.\n", "answer": str(a + b), "metadata": {"source_dataset": "chain_sum"}}

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        raise AssertionError("scorers of reasoning-gym evaluate answers")


@pytest.fixture
def fake_gym(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `reasoning_gym` with the one task chain_sum, and the interface of the real one (0.1.25)."""

    def create_dataset(name: str, **config: Any) -> FakeGymDataset:
        if name != "chain_sum":
            raise ValueError(f"Dataset '{name}' not registered")
        return FakeGymDataset(**config)

    module = types.ModuleType("reasoning_gym")
    module.create_dataset = create_dataset  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)


SMALL: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 48},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48},
    "olmo3": {"num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 8},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48, "final_logit_softcapping": 5.0},
}


@pytest.fixture
def make_policy() -> Callable[..., Policy]:
    """A small random policy: make_policy("qwen3", seed=1)."""

    def make(
        model_type: str = "llama",
        *,
        seed: int = 0,
        dtype: str = "float32",
        blocks: BlockOptions | None = None,
        **overrides: Any,
    ) -> Policy:
        config = {
            "model_type": model_type,
            "vocab_size": 40,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
            "initializer_range": 0.2,
            **SMALL[model_type],
            **overrides,
        }
        sharding = Sharding(compute=DTYPES[dtype])
        attention = "eager" if model_type == "gemma2" else "sdpa"
        model = create_causal_lm(config, dtype=sharding.storage, attention=attention, seed=seed)
        return Policy(model, sharding=sharding, blocks=blocks)

    return make


@pytest.fixture
def make_rollouts() -> Callable[..., list[Rollout]]:
    """Rollouts of random tokens with the given (prompt, response) lengths."""

    def make(lengths: list[tuple[int, int]], *, vocab: int = 40, seed: int = 0) -> list[Rollout]:
        generator = torch.Generator().manual_seed(seed)

        def tokens(count: int) -> list[int]:
            return torch.randint(2, vocab, (count,), generator=generator).tolist()

        rollouts = []
        for index, (prompt_length, response_length) in enumerate(lengths):
            prompt = Prompt(str(index), "", tuple(tokens(prompt_length)))
            ids = tokens(response_length)
            rollouts.append(Rollout(prompt, ids, [-1.0] * len(ids), versions=(), is_truncated=False, text=""))
        return rollouts

    return make
