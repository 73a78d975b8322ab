"""The report's page in a real browser, on a desktop and on a phone, with and without its script."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from medalign import phantom
from medalign.evaluation.metrics import read_predictions, write_predictions
from medalign.evaluation.report.page import write_report
from medalign.observability.rows import JsonlSink
from tests.unit.evaluation.runs_on_disk import make_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DESKTOP, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}
HOSTILE = "<script>hit = 1</script><img src=//leak.test/x onerror='hit = 1'>\"'><svg onload=hit=1>{{ 7 * 7 }}"
NAME = "</main><script>hit()</script>\"'>{{ 7 * 7 }}"  # of an arm, which has no equals sign

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of three arms, one of them with two seeds, whose names, texts, settings and losses are hostile."""
    folder = tmp_path_factory.mktemp("page")
    phantom.write_phantoms(folder / "shards", 1, 10, 0)
    for name, skill, seed in (("base", 0.3, 0), ("mine0", 0.9, 1), ("mine1", 0.8, 2), ("evil", 0.7, 3)):
        taught = name.startswith("mine")
        config = {"losses": {"alpha": float(taught), "beta": 0.0}, "run": {"seed": seed}, "log": {"name": HOSTILE}}
        config["log"]["name"] *= name == "evil"
        make_run(
            folder / name, folder / "shards/val", skill=skill, aim=0.6, steps=40 * taught, config=config, seed=seed
        )
    rows = read_predictions(folder / "evil/evaluation/val/predictions.jsonl")
    for row in rows:
        row.prediction += f" {HOSTILE}"
    write_predictions(folder / "evil/evaluation/val/predictions.jsonl", rows)
    sink = JsonlSink(folder / "evil/metrics.jsonl")
    sink.log(1, {f"loss/{HOSTILE}": 1.0})
    sink.close()
    arms = [f"base={folder / 'base'}", f"ours={folder / 'mine0'},{folder / 'mine1'}", f"{NAME}={folder / 'evil'}"]
    write_report(
        arms, folder / "page.html", teacher_maps=lambda run, samples, grid: [np.arange(grid.size)] * len(samples)
    )
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser, page_file: Path):
    """Open the page. At the end no error, and no request other than for the page itself, may have occurred."""
    contexts, faults = [], []

    def open_page(size, **settings) -> Page:
        contexts.append(browser.new_context(viewport=size, **settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.append(request.url) if asks_for_more(request.url) else None)
        page.goto(page_file.as_uri())
        return page

    def asks_for_more(address: str) -> bool:
        return not address.startswith("data:") and address.partition("#")[0] != page_file.as_uri()

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_contrast_names_and_structure_are_accessible(opened, size, scheme):
    page = opened(size, color_scheme=scheme, reduced_motion="reduce", bypass_csp=True)  # axe is not the page's script
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert {"color-contrast", "image-alt", "link-name"} <= {rule["id"] for rule in found.response["passes"]}
    assert "scrollable-region-focusable" in {rule["id"] for rule in found.response["passes"]} or size is DESKTOP


def test_hostile_text_stays_text(opened):
    page = opened(DESKTOP)
    page.wait_for_load_state("networkidle")
    assert page.evaluate("typeof hit") == "undefined"
    assert page.locator("script").count() == 1 and page.locator("img[src^='//'], svg[onload]").count() == 0
    seen = page.locator("main").inner_text()
    assert seen.count(HOSTILE) > 5 and seen.count(NAME) > 5 and page.locator(".answer", has_text=HOSTILE).count() > 0


def test_markup_that_got_into_the_page_could_not_run_or_load_anything(browser, page_file):
    page = browser.new_page()
    blocked = []
    page.on("console", lambda message: blocked.append(message.text))
    page.goto(page_file.as_uri())
    page.evaluate("""document.body.insertAdjacentHTML('beforeend', '<img src="//leak.test/x" onerror="hit = 1">')""")
    page.wait_for_function("[...document.images].at(-1).complete")
    page.evaluate("fetch('https://leak.test/x').catch(() => 0)")
    assert page.evaluate("typeof hit") == "undefined"
    assert {text.partition("'")[0] for text in blocked} >= {"Loading the image ", "Connecting to "}
    page.close()


def test_the_title_and_the_alternative_texts_say_what_is_there(opened):
    page = opened(DESKTOP)
    assert page.title() == page.locator("h1").inner_text() + " · medalign"
    arms = page.locator(".example img").evaluate_all("images => images.map(image => image.alt)")
    assert any("the reference is: " in text for text in arms)
    aim = "of the attention inside the boxes, its peak"
    assert any("The teacher’s attention: " in text and aim in text for text in arms)
    assert any(" base answers: " in text and ("(wrong)" in text or "(correct)" in text) for text in arms)


def scroll_to_the_end(page: Page, table) -> tuple[float, float]:
    """Return the left edge of the first column before and after scrolling a table."""
    cell = table.locator("tbody th").first
    before = cell.bounding_box()["x"]
    table.locator(".scroll").evaluate("scroller => scroller.scrollTo(1e6, 0)")
    page.wait_for_function("card => card.classList.contains('end')", arg=table.element_handle())
    return before, cell.bounding_box()["x"]


def test_on_a_phone_the_first_column_stays_and_a_table_shows_that_it_scrolls(opened):
    page = opened(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]  # the page itself does not scroll
    table = page.locator("section[id^=scores] .table").first
    assert "scrolls" in table.get_attribute("class") and table.locator(".hint").is_visible()
    shade = "frame => getComputedStyle(frame, '::after').opacity"
    page.wait_for_function(f"frame => ({shade})(frame) === '1'", arg=table.locator(".frame").element_handle())
    before, after = scroll_to_the_end(page, table)
    assert before == pytest.approx(after, abs=0.5)
    page.wait_for_function(f"frame => ({shade})(frame) === '0'", arg=table.locator(".frame").element_handle())
    last = table.locator("thead th").last.bounding_box()
    assert last["x"] + last["width"] <= PHONE["width"]


def rows_of_pictures(page: Page) -> list[int]:
    """Return how many pictures of the first example are in each row."""
    tops = page.locator(".example").first.locator("figure").evaluate_all("all => all.map(one => one.offsetTop)")
    return [tops.count(top) for top in dict.fromkeys(tops)]


def test_pictures_are_in_one_row_on_a_desktop_and_two_by_two_on_a_phone(opened):
    assert rows_of_pictures(opened(DESKTOP)) == [5]  # truth, teacher, three arms
    assert rows_of_pictures(opened(PHONE)) == [2, 2, 1]
    assert rows_of_pictures(opened({"width": 820, "height": 1100})) == [3, 2]


def test_on_a_desktop_no_table_of_scores_scrolls(opened):
    page = opened(DESKTOP)
    assert page.locator("section[id^=scores] .scrolls").count() == 0
    assert page.locator("section[id^=scores] .hint").first.is_hidden()


def shown(page: Page) -> list[str]:
    return page.locator(".example:visible").evaluate_all("all => all.map(one => one.dataset.kind)")


def test_the_keyboard_filters_the_examples(opened):
    page = opened(DESKTOP)
    everything = shown(page)
    assert {everything.count(kind) for kind in set(everything)} <= {1, 2} and "false-yes" in everything
    assert page.get_by_role("status").inner_text() == f"{len(everything)} questions shown"
    page.get_by_role("radio", name="all").focus()
    page.keyboard.press("ArrowRight")
    assert set(shown(page)) == {everything[0]} and len(shown(page)) == everything.count(everything[0])
    page.get_by_role("radio", name="all").check()
    page.get_by_role("radio", name="ours").check()
    erring = page.locator(".example:visible").evaluate_all("all => all.map(one => one.dataset.errs)")
    assert 0 < len(erring) < len(everything) and all("1" in errs.split() for errs in erring)


def test_the_keyboard_reaches_what_it_must(opened):
    page = opened(PHONE)
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        kind, outline = page.evaluate(
            "[document.activeElement.className || document.activeElement.tagName, "
            "getComputedStyle(document.activeElement.nextElementSibling?.parentElement.className == 'chip' ? "
            "document.activeElement.nextElementSibling : document.activeElement).outlineStyle]"
        )
        assert kind == "BODY" or outline == "solid", kind
        reached.append(kind)
    assert reached.count("A") > 8 and "scroll" in reached and "INPUT" in reached


def test_tables_and_figures_are_saved_as_csv_and_png(opened, tmp_path):
    page = opened(DESKTOP)
    heads = page.locator(".head").count()
    assert page.locator("a[download$='.csv']").count() == page.locator("a[download$='.png']").count() >= heads - 1
    for kind, start in (("csv", b"\xef\xbb\xbfarm,score,n"), ("png", b"\x89PNG")):
        with page.expect_download() as download:
            page.locator(f"a[download='scores-answers.{kind}']").click()
        download.value.save_as(tmp_path / kind)
        assert (tmp_path / kind).read_bytes().startswith(start)


def test_without_its_script_nothing_is_missing(opened):
    page = opened(PHONE, java_script_enabled=False)
    assert page.locator(".example:visible").count() == page.locator(".example").count() > 4
    assert page.locator("form").first.is_hidden() and page.locator(".hint").first.is_visible()
    assert page.locator(".scroll").first.get_attribute("tabindex") == "0"


def test_bold_is_only_a_difference_that_holds(opened):
    page = opened(DESKTOP)
    bold = page.locator("section[id^=scores] td .under b").all_inner_texts()
    plain = page.locator("section[id^=scores] td .under:not(:has(b))", has_text="[").all_inner_texts()
    assert bold or plain
    assert page.locator("section[id^=scores] .note").first.inner_text().count("bold only where it holds") == 1
