"""Expressions told apart by their values at one point: quicker than simplifying their difference, and never another verdict."""

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Expr, Integer, cos, exp, log, oo, pi, sin, sqrt, symbols, zoo
from tempo_engine.verify.worker import differ

x, y = symbols("x y")
n = sympy.Symbol("n", integer=True)
leaves = st.sampled_from([x, y, Integer(2), Integer(-3), pi, sqrt(2)])
trees = st.recursive(
    leaves,
    lambda parts: st.one_of(
        st.builds(lambda a, b: a + b, parts, parts), st.builds(lambda a, b: a * b, parts, parts),
        st.builds(lambda a, k: a**k, parts, st.integers(-2, 3)), st.builds(sin, parts), st.builds(exp, leaves),
    ),
    max_leaves=5,
)  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (x + 1, x + 2), (sqrt(12), sqrt(13)), (sympy.I * pi, 3 * sympy.I), (sin(x), cos(x)), (x * y, x + y), (1 / x, x),
        (Integer(1) / 3, Integer(333) / 1000),
    ],
)  # fmt: skip
def test_other_values_tell_expressions_apart(a: Expr, b: Expr):
    assert differ(a, b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((x + 1) ** 2, x**2 + 2 * x + 1), (sqrt(12), 2 * sqrt(3)), (sin(x) ** 2 + cos(x) ** 2, Integer(1)),
        (cos(pi * n), Integer(-1) ** n),  # the same for integers, and only for them
        (oo, Integer(3)), (zoo, x), (Integer(10) ** 20, Integer(10) ** 20 + 1),  # for math-verify to decide
    ],
)  # fmt: skip
def test_equal_ones_and_those_that_numbers_cannot_tell_are_left_to_the_library(a: Expr, b: Expr):
    assert not differ(a, b)


@pytest.mark.parametrize(
    ("a", "b"), [(sympy.Matrix([1]), sympy.Matrix([2])), (sympy.Function("f")(x), x), (sum(symbols("a b c d e")), x)]
)
def test_what_has_no_number_raises_and_so_is_left_to_the_library(a: Expr, b: Expr):
    with pytest.raises(Exception, match=r"."):
        differ(a, b)


@settings(deadline=None, max_examples=60)
@given(
    tree=trees, form=st.sampled_from([sympy.expand, sympy.factor, sympy.together, sympy.trigsimp, sympy.powsimp, log])
)
def test_what_simplifies_to_the_same_is_never_told_apart(tree: Expr, form: object):
    assert callable(form)
    other = exp(form(tree)) if form is log and tree != 0 else form(tree)
    try:
        told_apart = differ(tree, other)
    except Exception:  # no number
        return
    assert not (told_apart and sympy.simplify(tree - other) == 0)
