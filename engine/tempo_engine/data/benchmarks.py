"""Published benchmarks by name: where their rows lie, at which commit, under which licence, and what is asked how.

The items themselves are never part of this package: they are fetched from the Hugging Face Hub when a run needs them. Commits were
taken from public evaluation code and from the data sets' pages; without one, the newest is taken, and recorded with the run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tempo_engine.data import shapes
from tempo_engine.data.hub import Where
from tempo_engine.tasks.question import Question

Verifier = Literal["exact", "int", "expression", "choice", "grid", "judge"]


@dataclass(frozen=True)
class Benchmark:
    """A data set that is known by name. `parts`: what `subset` of a recipe may choose; by default all of them are read.

    `extract` says where a response states its answer, `verifier` what kind of answer it is (`tempo_engine.verify.kinds`) or that it
    takes a judge.
    """

    about: str
    licence: str
    extract: Literal["boxed", "answer_line", "whole"]
    verifier: Verifier
    question: Callable[[Mapping[str, Any]], Question]
    parts: Mapping[str, Where]

    def places(self, subset: str | None) -> list[Where]:
        """Where the rows of a subset, or of all of them, lie."""
        return list(self.parts.values()) if subset is None else [self.parts[subset]]


def _one(hub: str, revision: str, split: str = "test", config: str | None = None) -> dict[str, Where]:
    return {"all": Where(hub=hub, revision=revision, split=split, config=config)}


_BBH = (
    "boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages", "formal_fallacies",
    "geometric_shapes", "hyperbaton", "logical_deduction_five_objects", "logical_deduction_seven_objects",
    "logical_deduction_three_objects", "movie_recommendation", "multistep_arithmetic_two", "navigate", "object_counting",
    "penguins_in_a_table", "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies", "word_sorting",
)  # fmt: skip
_AGIEVAL = {
    "aqua-rat": None,  # 6a0ee29 was the newest one seen; the Hub wants all 40 digits
    "logiqa-en": "e01aa0f040456cd8d58ee9986a58b64e26c1b782",
    "lsat-ar": "052cc636b612f5563329dd182fb6c2cad56681c8",
    "lsat-lr": "d876c675a8d47aa4d8a6d682ca8400b7d2ffe1c4",
    "lsat-rc": "432868ea4fa7b50db66d14524d42472dd052b53c",
    "sat-en": "848ee12cf003124f5a1e33446fa3cc6d2ec028e4",
    "sat-en-without-passage": "e65a391e64e60a00223fde8e827e2df76a9895ed",
    "sat-math": "51ab661f5a2e48370671c87c29d037b5b2b4853e",
}
_BBH_COMMIT, _OLYMMATH = "76eaa8c29ad448752cd44201a1246618e2454cac", "5f83d12e63ee3267f35044461a6cebad58ec3be1"

BENCHMARKS: dict[str, Benchmark] = {
    "dapo_math_17k": Benchmark(
        "17k competition problems with integer answers for training; each is repeated about 100 times, which is removed",
        "Apache-2.0", "answer_line", "int", shapes.dapo,
        _one("BytedTsinghua-SIA/DAPO-Math-17k", "65877096c24ffa7abc4e4fa5edb95cf3413a5674", "train", "default"),
    ),
    "dolci_rl_zero_general": Benchmark(
        "general questions with reference answers for training; needs a judge",
        "ODC-BY by its sisters' cards (its own not seen)", "whole", "judge", shapes.dolci,
        _one("allenai/Dolci-RL-Zero-General-7B", "7e415e2b556bb74b3ce3924708772d43145ed6a3", "train"),
    ),
    "aime_2024": Benchmark(
        "30 problems, answers 0 to 999",
        "MIT by its card; the statements are the MAA's", "boxed", "int", shapes.boxed("Problem", "Answer"),
        _one("Maxwell-Jia/AIME_2024", "8d88b2876a82a080e2f172cc9b25d0d9d2cb4792", "train"),
    ),
    "aime_2025": Benchmark(
        "30 problems, answers 0 to 999",
        "Apache-2.0 by its card; the statements are the MAA's", "boxed", "int", shapes.boxed("problem", "answer"),
        _one("math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b"),
    ),
    "aime_2026": Benchmark(
        "30 problems, answers 0 to 999",
        "Apache-2.0 by its card; the statements are the MAA's", "boxed", "int", shapes.boxed("problem", "answer"),
        _one("math-ai/aime26", "79037aebdb6580008fb960d17cb21fd3099083e3"),
    ),
    "beyond_aime": Benchmark(
        "100 problems harder than AIME's, integer answers",
        "CC0-1.0 (not confirmed)", "boxed", "int", shapes.boxed("problem", "answer"),
        _one("ByteDance-Seed/BeyondAIME", "c705198ae1043810b1e1693bd879250b51a7a523"),
    ),
    "olymmath": Benchmark(
        "olympiad problems in English, 100 easy and 100 hard, answers are expressions",
        "MIT", "boxed", "expression", shapes.boxed("problem", "answer"),
        {s: Where(hub="RUC-AIBOX/OlymMATH", revision=_OLYMMATH, config=s, split="test") for s in ("en-easy", "en-hard")},
    ),
    "bbh": Benchmark(
        "BIG-Bench Hard, 27 tasks: choices, yes or no, short answers (two rows of ruin_names are broken upstream)",
        "MIT", "answer_line", "exact", shapes.bbh,
        {s: Where(hub="Joschka/big_bench_hard", revision=_BBH_COMMIT, config=s, split=s) for s in _BBH},
    ),
    "agieval": Benchmark(
        "AGIEval v1.1, English multiple choice: law, logic, SAT, GRE",
        "none on the cards; MIT where it comes from", "answer_line", "choice", shapes.agieval,
        {s: Where(hub=f"hails/agieval-{s}", revision=revision, split="test") for s, revision in _AGIEVAL.items()},
    ),
    "agieval_math": Benchmark(
        "AGIEval v1.1, competition mathematics, answers are expressions",
        "none on the card; MIT where it comes from", "boxed", "expression", shapes.agieval_math,
        _one("hails/agieval-math", "c29655ec5d31268835333d5df45aae65773fea78"),
    ),
    "zebralogic": Benchmark(
        "1,000 logic grid puzzles, 2 x 2 to 6 x 6; the answer is the whole grid as JSON",
        "none stated", "whole", "grid", shapes.zebralogic,
        _one("WildEval/ZebraLogic", "0a473f5a0054835754ed156d5a79c6ce27178bb1", "test", "grid_mode"),
    ),
    "gpqa_diamond": Benchmark(
        "198 graduate questions in the sciences, four choices; gated: accept its terms and set HF_TOKEN",
        "CC-BY-4.0; its authors ask not to publish items", "answer_line", "choice", shapes.gpqa,
        _one("Idavidrein/gpqa", "633f5ee89ab8ad4522a9f850766b73f62147ffdd", "train", "gpqa_diamond"),
    ),
}  # fmt: skip
