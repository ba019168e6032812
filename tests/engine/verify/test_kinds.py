"""Kinds of answers: which spellings are one answer, and that what is not of the kind is none."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_engine.tasks.answers import EXTRACTORS, answer_line, boxed, whole
from tempo_engine.verify.kinds import GRID_CHARS, KINDS, choice, grid, integer, last_object, text


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("42", "42"),
        ("+042", "42"),
        ("-0", "0"),
        ("-7.0", "-7"),
        ("1,000", "1000"),
        (r"1{,}000", "1000"),
        (r"1\,000", "1000"),
        (r"\!42", "42"),
        ("$42$", "42"),
        ("x = 42", None),
        ("42 km", None),
        ("4.5", None),
        ("41 42", None),
        ("٤٢", None),
        ("\uff14\uff12", None),
        ("4²", None),
        ("1e3", None),
        ("", None),
        ("7" * 301, None),
    ],
)
def test_integers(written: str, meant: str | None):
    assert integer(written) == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("A", "A"),
        ("b", "B"),
        ("(C)", "C"),
        ("[c]", "C"),
        ("D.", "D"),
        ("D)", "D"),
        ("(D).", "D"),
        ("**A**", "A"),
        ("**(A)**", "A"),
        (r"\text{(A)}", "A"),
        (r"$\mathrm{B}$", "B"),
        ("(B) the Nile", "B"),
        ("B. Vitamin C", "B"),
        ("A: yes", "A"),
        ("a dog", None),
        ("AB", None),
        ("A or B", None),
        ("A, B", None),
        ("(A) or (B)", None),
        ("(A)/(B)", None),
        ("(A) and C", None),
        ("A. B.", None),
        ("(A) B", None),
        ("5", None),
        ("\u0410", None),  # Cyrillic
        ("\uff21", None),  # fullwidth
        ("A\u202e", None),
        ("", None),
    ],
)
def test_choices(written: str, meant: str | None):
    assert choice(written) == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("The  Nile!", "nile"),
        ("nile", "nile"),
        ("an apple, a pear", "apple pear"),
        ("-3.5", "-3.5"),
        ("3.5 m", "3.5 m"),
        ("well-known", "well known"),
        ("Straße", "strasse"),
        ("a", "a"),
        ("...", None),
        ("ye\u200bs", None),
        ("", None),
    ],
)
def test_texts(written: str, meant: str | None):
    assert text(written) == meant


# --- Grids -------------------------------------------------------------------------------------------------------------------

SOLUTION = {"House 1": {"Name": "Eric", "Pet": "Cat"}, "House 2": {"Name": "Ann", "Pet": "Dog"}}
TABLE = {"header": ["House", "Name", "Pet"], "rows": [["1", "Eric", "Cat"], ["2", "Ann", "Dog"]]}
GOLD = grid(json.dumps(SOLUTION))


def changed(house: str, attribute: str, value: object) -> dict[str, dict[str, object]]:
    return {
        h: {a: value if (h, a) == (house, attribute) else v for a, v in cells.items()} for h, cells in SOLUTION.items()
    }


@pytest.mark.parametrize(
    "same",
    [
        SOLUTION,
        TABLE,
        {"solution": SOLUTION, "reasoning": "clue 3"},
        changed("House 1", "Name", "  ERIC "),
        dict(reversed(SOLUTION.items())),
    ],
)
def test_a_grid_has_one_spelling(same: object):
    assert grid(json.dumps(same)) == GOLD is not None


@pytest.mark.parametrize(
    "other",
    [changed("House 2", "Pet", "cat"), {"House 1": SOLUTION["House 1"]}, SOLUTION | {"House 3": {"Name": "Bo"}}],
)
def test_every_cell_of_a_grid_must_match(other: object):
    assert grid(json.dumps(other)) not in (GOLD, None)


@pytest.mark.parametrize(
    "no_grid",
    [
        [],
        {},
        "House 1",
        {"House 1": {}},
        {"House 1": "Eric"},
        changed("House 1", "Name", ["Eric", "Ann"]),
        changed("House 1", "Name", None),
        changed("House 1", "Name", True),
        changed("House 1", "Name", "Er\u202eic"),
        {"header": ["House", "Name"], "rows": [["1"]]},
        {"header": 3, "rows": []},
    ],
)
def test_what_is_no_grid(no_grid: object):
    assert grid(json.dumps(no_grid)) is None


def test_the_last_complete_grid_of_a_response_counts():
    first, last = json.dumps(changed("House 1", "Name", "Bo")), json.dumps({"reasoning": "so", "solution": SOLUTION})
    read = KINDS["grid"].extract(boxed)
    assert read(f"I think {first}, no: ```json\n{last}\n``` is it.") == GOLD
    assert read(f"{last} and then {last[:-9]}") == GOLD, "what breaks off is no answer"
    assert read(f'{last} {{"note": "done"}}') == GOLD
    assert read(f"{first} {{ unbalanced {last}") == GOLD
    assert read("no JSON at all") is None


@pytest.mark.parametrize(
    "bomb", ["{" * 50_000, "}" * 50_000, "{}" * 50_000, '{"a":' * 20_000 + "1" + "}" * 20_000, "[" * 9_000 + "}"]
)
def test_hostile_json_is_no_grid(bomb: str):
    assert last_object(bomb) is None
    assert grid(bomb[:GRID_CHARS]) is None


# --- All kinds ---------------------------------------------------------------------------------------------------------------


def test_a_kind_says_what_it_reads_and_where_it_looks():
    assert KINDS["int"].extract(answer_line)("Answer: 1,024") == "1024"
    assert KINDS["choice"].extract(answer_line)("Answer: (b)") == "B"
    assert KINDS["text"].extract(whole)("The Nile.") == "nile"
    assert KINDS["exact"].extract(boxed)(r"\boxed{x}") == "x"
    assert KINDS["int"].extract(boxed)("nothing") is None


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@given(response=st.text() | st.text(alphabet="{}\\boxed\"':,[]() AB12.\u202e\ud800"))
@settings(deadline=None)
def test_any_text_gives_one_spelling_or_none(kind, response: str):
    """And reading that spelling again changes nothing, or a right answer could not be compared with it."""
    for find in EXTRACTORS.values():
        answer = kind.extract(find)(response)
        assert answer is None or kind is KINDS["grid"] or kind.read(answer) == answer


@given(st.integers(), st.sampled_from(["{}", "{:,}", "{}.0", "$ {} $", "{:+d}"]))
@settings(deadline=None)
def test_every_spelling_of_an_integer_is_the_integer(number: int, spelling: str):
    assert integer(spelling.format(number)) == str(number)
