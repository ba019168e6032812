"""Reading answers: spelled examples, and arbitrary text, because responses are whatever a model writes."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tempo_engine.tasks.answers import EXTRACTORS, MAX_ANSWER_CHARS, answer_line, boxed, canonical, score, whole

# Text that is likely to hit the special characters, beside any text at all.
answer_text = st.text(alphabet="0123456789+-,.$ \t\n{}\\x") | st.text()
response_text = st.lists(
    st.sampled_from(["\\boxed{", "}", "{", "Answer:", "answer :", "\n", " ", "42", "$", "."]) | st.text(max_size=5)
).map("".join)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("42", "42"),
        ("025", "25"),
        ("1,000", "1000"),
        ("-1,234,567", "-1234567"),
        ("+7", "7"),
        ("-7", "-7"),
        ("-0", "0"),
        ("+0", "0"),
        ("000", "0"),
        ("-0.0", "0"),
        ("3.0", "3"),
        ("3.", "3"),
        ("1,000.00", "1000"),
        ("$42$", "42"),
        (" $ 42 $ ", "42"),
        ("$$42$$", "42"),
        ("  42\n", "42"),
        ("42.", "42"),
    ],
)
def test_an_integer_has_one_spelling(written: str, meant: str):
    assert canonical(written) == meant


@pytest.mark.parametrize(
    "written", ["3.5", "1,00", "1,0000", ",000", "1 000", "+-5", "--5", "1e3", "٣", "+٣", "x", "\\frac{1}{2}", "-"]
)
def test_what_is_no_integer_stays_as_it_is(written: str):
    assert canonical(written) == written


def test_inner_space_is_made_single():
    assert canonical(" x  =\t\n 3 ") == "x = 3"


def test_an_integer_too_long_to_be_an_answer_is_not_rewritten():
    assert canonical("0" * 300 + "7") == "0" * 300 + "7"
    assert canonical("0" * 299 + "7") == "7"


@pytest.mark.parametrize("written", ["$42$.", "5 .", "$ $5$", "$5.$."])
def test_dollars_spaces_and_full_stop_go_in_any_order(written: str):
    assert canonical(written) in ("42", "5")


@given(answer_text)
@example("$42$.")
@settings(deadline=None)
def test_canonical_is_idempotent(text: str):
    assert canonical(canonical(text)) == canonical(text)


@given(st.integers(), st.sampled_from(["{}", "{:,}", "+{}", "{}.0", "$ {} $", " {}.\n", "{:012d}", "{:+d}"]))
@settings(deadline=None)
def test_every_spelling_of_an_integer_is_the_integer(number: int, spelling: str):
    if spelling == "+{}":
        number = abs(number)
    assert canonical(spelling.format(number)) == str(number)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{{{7}}} and }", "{{7}}"),
        (r"\boxed{1 + \boxed{2}}", "2"),
        (r"\boxed{ 1,024. }", "1024"),
        ("\\boxed{1\n2}", "1 2"),
        (r"\boxed{3} then \boxed{4", "3"),  # the last box is unclosed
        (r"\boxed{3} then \boxed{4 \boxed{5 {6}", "3"),
        (r"\boxed{4 \boxed{5}", "5"),
        (r"\boxed{\boxed{\boxed{", None),
        (r"\boxed{}", None),
        (r"\boxed{ . }", None),
        (r"\boxed 5", None),
        (r"boxed{5}", None),
        ("42", None),
        ("", None),
    ],
)
def test_boxed_reads_the_last_balanced_box(response: str, answer: str | None):
    assert boxed(response) == answer


@given(
    st.recursive(
        st.just("x"), lambda inner: st.lists(inner).map(lambda parts: "{" + "".join(parts) + "}"), max_leaves=20
    )
)
@settings(deadline=None)
def test_boxed_returns_balanced_content_whole(content: str):
    assert boxed(f"first \\boxed{{no}} then \\boxed{{{content}}} {{}} }}") == content


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Answer: 42", "42"),
        ("7 + 1 = 8 ; Answer: 8", "8"),
        ("answer : 1,000.", "1000"),
        ("ANSWER:x", "x"),
        ("Answer: 1\nAnswer: 2\nthanks", "2"),
        ("Answer: 1\nAnswer:", None),
        ("Answer 42", None),
        ("", None),
    ],
)
def test_answer_line_reads_what_follows_the_last_answer(response: str, answer: str | None):
    assert answer_line(response) == answer


def test_answer_line_reads_the_last_of_two_answers_on_one_line():
    assert answer_line("Answer: 5 no, Answer: 6") == "6"


def test_whole_reads_everything():
    assert whole(" +3 (2)\n") == "+3 (2)"


def test_an_empty_response_has_no_answer():
    assert [extract("  \n") for extract in EXTRACTORS.values()] == [None, None, None]


@pytest.mark.parametrize("extract", EXTRACTORS.values(), ids=EXTRACTORS)
@given(response=response_text)
@settings(deadline=None)
def test_extraction_of_any_text_gives_a_short_answer_or_none(extract, response: str):
    answer = extract(response)
    assert answer is None or 0 < len(answer) <= MAX_ANSWER_CHARS


def test_the_longest_answer_has_300_characters():
    assert boxed("\\boxed{" + "x" * 300 + "}") == "x" * 300
    assert boxed("\\boxed{" + "x" * 301 + "}") is None


HOSTILE = {
    "digits": "7" * 100_000,
    "digits with commas": "7" + ",777" * 25_000,
    "boxed digits": "\\boxed{" + "7" * 100_000 + "}",
    "answer digits": "Answer: " + "7" * 100_000,
    "nested braces": "\\boxed{" + "{" * 50_000 + "}" * 50_000 + "}",
    "nested boxes": "\\boxed{" * 5_000 + "7" + "}" * 5_000,
    "unclosed boxes": "\\boxed{" * 5_000,
    "closing braces": "\\boxed" + "}" * 100_000,
    "spaces after answer": "answer" + " " * 100_000,
    "answers": "answer " * 15_000,
    "dollars": "$" * 100_000,
}


@pytest.mark.parametrize("extract", EXTRACTORS.values(), ids=EXTRACTORS)
@pytest.mark.parametrize("response", HOSTILE.values(), ids=HOSTILE)
def test_hostile_responses_are_read_without_error(extract, response: str):
    assert extract(response) in (None, "7", "answer")


def test_a_response_scores_1_for_any_of_the_right_answers():
    right = frozenset({"7", "8"})
    assert [score(boxed, f"\\boxed{{{n}}}", right) for n in ("+7", "8.0", "9")] == [1.0, 1.0, 0.0]


def test_no_answer_scores_0():
    assert score(boxed, "seven", frozenset({"7"})) == 0.0


def test_without_right_answers_nothing_scores():
    assert score(boxed, "\\boxed{7}", frozenset()) == 0.0
