"""The page as a browser would parse it: nothing from elsewhere, nothing of a model's as markup, everything named."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tempo_em.report.command import report
from tempo_em.report.page import render
from tempo_em.report.panels import Compared, Panels
from tempo_em.report.runs import read_run
from tempo_em.report.timing import duration, totals
from tempo_em.report.verdict import alarm_stretches, measures, sentence, sentence_of_many
from tempo_engine.errors import UserError

VOID = {"meta", "img", "br", "link", "input", "hr"}
WriteRun = Callable[..., Path]


class Page(HTMLParser):
    """Elements in order, with the text of each; fails where a tag closes another one."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(*folders: Path, **how: Any) -> Page:
    return Page(render([read_run(folder) for folder in folders], **how).decode("utf-8"))


@pytest.fixture(params=["one", "seeds", "many"])
def folders(request: pytest.FixtureRequest, write_run: WriteRun) -> list[Path]:
    settings = {"one": [[]], "seeds": [["seed=1"], ["seed=2"]], "many": [[], ["method=ttrl"]]}[request.param]
    return [write_run(f"run{i}", *each) for i, each in enumerate(settings)]


def test_nothing_is_loaded_from_anywhere_and_only_our_own_script_runs(folders: list[Path]) -> None:
    page = page_of(*folders)
    assert not [a for _, attributes in page.elements for a in attributes if a in ("src", "srcset", "style")]
    assert all((attributes["href"] or "").startswith("#") for _, attributes in page.elements if "href" in attributes)
    assert not {"img", "link", "iframe", "object", "form", "base"} & {tag for tag, _ in page.elements}
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy") or ""
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    html = render([read_run(folder) for folder in folders]).decode()
    assert not re.findall(r"https?:|url\(|@import|//[a-z]", html.replace("http-equiv", ""))


def test_everything_has_a_name_of_its_own(folders: list[Path]) -> None:
    page = page_of(*folders)
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    for attributes in (a for _, a in page.elements if "aria-labelledby" in a):
        assert set((attributes["aria-labelledby"] or "").split()) <= ids.keys()
    assert all(svg.get("role") == "img" and svg.get("aria-labelledby") for svg in page.all("svg"))
    assert all(a.get("aria-label") for _, a in page.elements if a.get("role") == "region")
    assert all(button.get("type") == "button" for button in page.all("button"))
    assert page.all("input") == []
    assert page.all("html") == [{"lang": "en"}]


def test_what_models_and_files_say_stays_text(hostile_run: Path) -> None:
    page = page_of(hostile_run)
    assert len(page.all("script")) == 1
    assert not {"textarea", "img", "b"} & {tag for tag, _ in page.elements}
    assert page.text.count("<script>alert(1)</script></textarea>") >= 8
    assert not set(page.text) & {"\x00", "\u202e"}


def test_what_a_page_shows_first_is_the_verdict(write_run: WriteRun) -> None:
    page = page_of(write_run("a"))
    said = (
        "4 EM iterations of tempo moved accuracy on unlabelled questions from 20.0% to 50.0%, pass@8 from 20.0% to 50.0%, "
        "held-out accuracy from 20.0% to 50.0%; the critic tells right from wrong there with an AUROC of 0.900 "
        "(0.900 at the start) and promises 2.0 points too much; alarms that spoke: auroc (iteration 2)."
    )
    assert said in page.text
    assert page.text.index(said) < page.text.index("EM iteration")


def test_only_a_watched_page_loads_itself_again(write_run: WriteRun) -> None:
    folder = write_run("a", finished=False)
    assert "refresh" in [m.get("http-equiv") for m in page_of(folder, refresh=5).all("meta")]
    assert "refresh" not in [m.get("http-equiv") for m in page_of(folder).all("meta")]


def test_tokens_are_shaded_by_the_value_after_them(write_run: WriteRun) -> None:
    page = page_of(write_run("a"))
    shades = [a["class"] for tag, a in page.elements if tag == "span" and "title" in a]
    assert shades == ["v4", "v5", "v4", "v5"]
    assert [a["class"] for tag, a in page.elements if (a.get("class") or "").startswith("badge")] == [
        "badge wrong", "badge right",
    ]  # fmt: skip


def test_samples_of_an_older_version_are_shown_without_values(write_run: WriteRun) -> None:
    old = [{"evaluation": e, "set": "unlabelled", "prompt": "1 2 =", "response": "+1 -2"} for e in ("base", "final")]
    page = page_of(write_run("a", samples=old))
    assert page.text.count("+1 -2") == 2
    assert "badge" not in str(page.elements)


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_a_run_is_shown_however_far_it_got(write_run: WriteRun, count: int) -> None:
    rows = [
        {"step": 1, "stage": "cold_start", "iteration": 1, "timing_s/step": 1.0}, {"step": 1, "evaluation": "base"},
        {"step": 1, "evaluation": "start"}, {"step": 2, "stage": "em", "iteration": 1}, {"evaluation": "em/1", "x": None},
    ]  # fmt: skip
    page = page_of(write_run("a", rows=rows[:count], samples=[], finished=False))
    assert "nothing is evaluated yet" in page.text
    assert "1 of 1 run not finished" in page.text


def test_alarms_are_told_with_their_stretches(write_run: WriteRun) -> None:
    run = read_run(write_run("a"))
    assert alarm_stretches(run) == {"auroc": [(2, 2)]}
    silent = read_run(write_run("b", rows=[]))
    assert "alarms were not recorded" in sentence([silent], "tempo")


def test_what_e_steps_keep_is_shown_as_a_gap_with_its_alarm(write_run: WriteRun) -> None:
    kept = {"critic/kept_labelled": 0.9, "critic/kept_unlabelled": 0.6, "alarm/transfer": 1.0}
    undefined = kept | {"critic/kept_unlabelled": None}
    run = read_run(
        write_run("a", rows=[{"stage": "em", "iteration": i, **row} for i, row in ((5, kept), (6, undefined))])
    )
    panel = next(panel for panel in Panels([Compared("a", "tempo", [run])]).signs() if panel.title == "Transfer")
    assert panel.curves[0].points == [(5, pytest.approx(0.3))]
    assert alarm_stretches(run) == {"transfer": [(5, 6)]}


def test_seeds_are_averaged_and_recipes_are_ranked(write_run: WriteRun) -> None:
    rows = [{"evaluation": e, "val-core/unlabelled/acc/mean@8": a} for e, a in (("start", 0.2), ("em/4", 0.4))]
    better = [{"evaluation": e, "val-core/unlabelled/acc/mean@8": a} for e, a in (("start", 0.2), ("em/4", 0.8))]
    one, two = read_run(write_run("a", rows=rows)), read_run(write_run("b", rows=better))
    (both,) = measures([one, two])
    assert (both.start, both.last, both.change) == (0.2, pytest.approx(0.6), "+40.0 pts")
    assert "there is no critic" in sentence([one], "tempo")
    assert sentence_of_many(["x", "y"], [measures([one]), measures([two])]) == (
        "Of 2 recipes, y ends highest, with accuracy on unlabelled questions brought from 20.0% to 80.0%; "
        "x ends lowest, from 20.0% to 40.0%."
    )
    assert sentence_of_many(["x", "y"], [[], []]) == "2 recipes; none is evaluated after its start yet."


def test_seconds_add_up_and_what_no_phase_took_is_idle(write_run: WriteRun) -> None:
    found = {name: seconds for name, _, seconds in totals(read_run(write_run("a")))}
    assert found == {"sampling": 4.0, "M-step": 2.0, "idle and unaccounted": 2.0, "evaluation": 2.0}
    assert [duration(s) for s in (4.21, 200, 7500)] == ["4.2 s", "3 min 20 s", "2 h 5 min"]


def test_a_watched_run_is_written_until_it_is_finished(write_run: WriteRun) -> None:
    folder = write_run("a", finished=False)
    seen = []

    def sleep(seconds: float) -> None:
        seen.append(b'http-equiv="refresh"' in (folder / "report.html").read_bytes())
        if len(seen) == 2:
            (folder / "summary.json").write_text("{}")

    assert report([folder], None, watch=True, say=lambda line: None, sleep=sleep) == folder / "report.html"
    assert seen == [True, True]
    assert b'http-equiv="refresh"' not in (folder / "report.html").read_bytes()
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_ctrl_c_leaves_a_page_that_no_longer_loads_itself(write_run: WriteRun) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    page = report([write_run("a", finished=False)], None, watch=True, say=lambda line: None, sleep=interrupted)
    assert b'http-equiv="refresh"' not in page.read_bytes()


def test_several_runs_need_a_place_for_their_page(write_run: WriteRun, tmp_path: Path) -> None:
    both = [write_run("a"), write_run("b", "seed=1")]
    with pytest.raises(UserError, match="--to"):
        report(both, None, watch=False, say=print)
    with pytest.raises(UserError, match="does not exist"):
        report(both, tmp_path / "no" / "page.html", watch=False, say=print)
    assert report(both, tmp_path / "page.html", watch=False, say=print).is_file()


def test_the_command_refuses_a_folder_that_is_none_without_importing_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from tempo_em.commands import report_command; from pathlib import Path\n"
        "code = report_command([Path('.')], None, False); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "tempo-engine: . is not a run folder: it has no recipe.yaml\n")
