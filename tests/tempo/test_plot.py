from pathlib import Path

from tempo_em.plot import evaluation_points, plot_run

ROWS = [
    {"step": 3, "evaluation": "base", "val-core/unlabelled/acc/mean@4": 0.1},
    {"step": 5, "evaluation": "start", "val-core/unlabelled/acc/mean@4": 0.2},
    {"step": 6, "stage": "em", "iteration": 1},
    {"step": 7, "stage": "em", "iteration": 2},
    {"step": 7, "evaluation": "em/2", "val-core/unlabelled/acc/mean@4": 0.3, "val-aux/unlabelled/critic/auroc": None},
    {"step": 8, "stage": "em", "iteration": 3},
    {"step": 8, "evaluation": "final", "val-core/unlabelled/acc/mean@4": 0.4},
]


def test_evaluations_are_placed_at_their_em_iteration() -> None:
    points = [(x, row["val-core/unlabelled/acc/mean@4"]) for x, row in evaluation_points(ROWS)]
    assert points == [(0, 0.2), (2, 0.3), (3, 0.4)]


def test_rows_of_no_known_iteration_are_left_out_and_the_later_of_two_counts() -> None:
    rows = [{"evaluation": "final"}, {"evaluation": "em/x"}, {"evaluation": "start"}, {"evaluation": "start", "a": 1}]
    damaged = [{"stage": "em", "iteration": None}, {"stage": "em", "iteration": 3}, {"stage": "em"}]
    assert evaluation_points([*rows, *damaged]) == [(0, rows[3]), (3, rows[0])]


def test_a_plot_is_drawn_even_where_metrics_are_missing(tmp_path: Path) -> None:
    plot_run(ROWS, tmp_path / "curves.png", title="test")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_evaluations_there_is_no_plot(tmp_path: Path) -> None:
    plot_run(ROWS[:1], tmp_path / "curves.png", title="test")
    assert not (tmp_path / "curves.png").exists()
