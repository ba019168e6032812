"""The page in Chromium: `pip install .[browser]`, a Chromium of the system (CHROMIUM names it), `pytest -m browser`."""

import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tempo_em.report.command import report

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-headless-shell", "google-chrome")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Fails where there is no browser: who asks for these tests has one."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with importlib.import_module("playwright.sync_api").sync_playwright() as playwright:
        # Containers rarely let Chromium build its own sandbox; the page is ours.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=["one", "many", "hostile"])
def page_file(request: pytest.FixtureRequest, write_run: Callable[..., Path], tmp_path: Path) -> Path:
    if request.param == "hostile":
        folders = [request.getfixturevalue("hostile_run")]
    else:
        settings = {"one": [[]], "many": [["seed=1"], ["seed=2"], ["method=ttrl"]]}[request.param]
        folders = [write_run(f"run{i}", *each) for i, each in enumerate(settings)]
    return report(folders, tmp_path / "page.html", watch=False, say=print)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_fits_and_nothing_is_reported(chromium: Any, page_file: Path, width: int, theme: str) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert said == []
    page.close()


def test_the_button_changes_the_theme_and_the_choice_is_kept(chromium: Any, page_file: Path) -> None:
    context = chromium.new_context(color_scheme="light")
    page = context.new_page()
    page.goto(page_file.as_uri())
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.keyboard.press("Tab")  # past the link to the verdict
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    dark = page.evaluate(paper)
    assert dark != light
    page.reload()
    assert page.evaluate(paper) == dark
    page.get_by_role("button", name="Light theme").click()
    assert page.evaluate(paper) == light
    context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_what_it_is_written_on(chromium: Any, page_file: Path, theme: str) -> None:
    """WCAG's 4.5 : 1 for the colours that text has, on paper and on the darkest shade."""
    page = chromium.new_page(color_scheme=theme)
    page.goto(page_file.as_uri())
    ratios = page.evaluate(
        """() => {
          const probe = document.body.appendChild(document.createElement("p"));
          function rgb(value) {
            const canvas = document.createElement("canvas").getContext("2d");
            canvas.fillStyle = value; canvas.fillRect(0, 0, 1, 1);
            return Array.from(canvas.getImageData(0, 0, 1, 1).data).slice(0, 3);
          }
          function light(value) {
            const [r, g, b] = rgb(value).map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          }
          function seen(property) {
            probe.setAttribute("style", "");
            probe.style.color = property; return getComputedStyle(probe).color;
          }
          const paper = light(seen("var(--paper)"));
          const against = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          const names = ["ink", "quiet", "accent", "alarm", "c1", "c2", "c3", "c4", "c5", "c6", "c7"];
          const found = names.map(name => [name, against(light(seen(`var(--${name})`)), paper)]);
          const shade = light(seen("color-mix(in srgb, var(--accent) 48%, var(--paper))"));
          return [...found, ["shade", against(light(seen("var(--ink)")), shade)]];
        }"""
    )
    assert [(name, ratio) for name, ratio in ratios if ratio < 4.5] == []
    page.close()
