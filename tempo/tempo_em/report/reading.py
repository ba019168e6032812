"""Responses to the same questions before and after, with what the critic thought of them token by token."""

from collections import defaultdict
from dataclasses import dataclass

from markupsafe import Markup

from tempo_em.report.charts import spark
from tempo_em.report.runs import Row, Run, number

LEVELS = 10
LONGEST = 4000  # characters of a response


@dataclass(frozen=True)
class Token:
    """`level`: the critic's value after it, in tenths; None where it was not written."""

    text: str
    level: int | None


@dataclass(frozen=True)
class Response:
    """One side of a pair. `verdict`: right, wrong, or empty where the run did not write it."""

    when: str
    verdict: str
    terminal: str
    tokens: list[Token]
    left_out: int
    spark: Markup | None


@dataclass(frozen=True)
class Pair:
    """A question, and its response at each of two evaluations (one, where there is only one)."""

    set_name: str
    prompt: str
    sides: list[Response]


def pairs(run: Run, key: str, most: int = 6) -> dict[str, list[Pair]]:
    """For each evaluation set the first questions, with the response before the EM loop (`start`, else `base`) and the newest."""
    by_label: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in run.samples:
        by_label[str(row.get("evaluation"))][str(row.get("set"))].append(row)
    before = next((label for label in ("start", "base") if label in by_label), None)
    last = [label for label in by_label if label not in ("start", "base")]
    labels = [label for label in (before, last[-1] if last else None) if label]
    names = run.sets or sorted({name for label in labels for name in by_label[label]})
    found = {
        name: _of_set(name, [(label, by_label[label][name]) for label in labels], f"{key}-{i}", most)
        for i, name in enumerate(names)
    }
    return {name: rows for name, rows in found.items() if rows}


def _of_set(set_name: str, sides: list[tuple[str, list[Row]]], key: str, most: int) -> list[Pair]:
    prompts = list(dict.fromkeys(str(row.get("prompt")) for _, rows in sides for row in rows))
    found = []
    for i, prompt in enumerate(prompts[:most]):
        responses = [
            _response(label, row, f"{key}-{i}-{side}")
            for side, (label, rows) in enumerate(sides)
            for row in [row for row in rows if str(row.get("prompt")) == prompt][:1]
        ]
        found.append(Pair(set_name, prompt[-LONGEST:], responses))
    return found


def _response(label: str, row: Row, key: str) -> Response:
    right, terminal = row.get("right"), number(row.get("terminal"))
    texts, raw = row.get("tokens"), row.get("values")
    values = [number(v) for v in raw] if isinstance(raw, list) else []
    if not isinstance(texts, list) or not texts:
        texts, values = [str(row.get("response", ""))[:LONGEST]], []
    after = values[1:]
    tokens = [Token(str(text), _level(after[i]) if i < len(after) else None) for i, text in enumerate(texts)]
    known = [v for v in values if v is not None]
    return Response(
        when=label,
        verdict={True: "right", False: "wrong"}.get(right, "") if isinstance(right, bool) else "",
        terminal="" if terminal is None else f"{terminal:.2f}",
        tokens=tokens,
        left_out=round(number(row.get("left_out")) or 0),
        spark=spark(key, "the critic's value, token by token", known) if len(known) > 1 else None,
    )


def _level(value: float | None) -> int | None:
    return None if value is None else round(LEVELS * min(max(value, 0.0), 1.0))
