"""The report in a real browser: the slider counts what the plan says, without script all is there, nothing is wide."""

from __future__ import annotations

import shutil

import pytest

from safemerge_recipes.report.overview import read_plan
from safemerge_recipes.report.page import render_report
from safemerge_recipes.report.thresholds import thresholds
from tests.fixtures.plans import PROVENANCE, SCORES, make_plan, paired

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    scores = {**SCORES, "comparisons": [paired(0.387), paired(0.0, "safemerge_arithmetic", detected=False)]}
    path.write_text(render_report(make_plan(), scores=scores, provenance=PROVENANCE), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def browse(page):
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    opened = []

    def open_page(width=1180, height=900, *, dark=False, script=True):
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for argument in ("--headless=new", "--no-sandbox", f"--window-size={width},{height}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = webdriver.Chrome(options=options, service=Service(DRIVER))
        opened.append(browser)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": theme})
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
        browser.get(page)
        return browser

    yield open_page
    for browser in opened:
        browser.quit()


def read(browser, selector):
    return browser.find_element("css selector", selector).text


def slide(browser, position):
    browser.execute_script(
        "const s = document.querySelector('#chooser input'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input'))",
        position,
    )


def test_the_slider_starts_at_the_recipes_tau_and_counts_as_the_plan_does(browse):
    browser, choice = browse(), thresholds(read_plan(make_plan()))
    assert read(browser, "#chooser output") == f"0.35: {choice.total(0.35)} of 224 gated tensors merge"
    assert read(browser, "#chooser code") == "--set gate.tau=0.35"
    steps = round((choice.high - choice.low) / choice.step)
    for position in (0, steps // 3, steps // 2 + 1, steps):
        slide(browser, position)
        tau = float(f"{choice.low + position * choice.step:.6g}")
        assert read(browser, "#chooser output") == f"{tau:g}: {choice.total(tau)} of 224 gated tensors merge"
        assert read(browser, "#chooser code") == f"--set gate.tau={tau:g}"
        sums = [one.text for one in browser.find_elements("css selector", "#chooser .sum")]
        assert sums == [f"{choice.count(lines, tau)} of {len(lines)}" for _, lines in choice.rows]
    assert browser.get_log("browser") == []


def test_the_squares_show_what_merges(browse):
    browser = browse()
    slide(browser, 0)
    heights = "return [...document.querySelectorAll('#chooser .share')].map(r => Number(r.getAttribute('height')))"
    assert set(browser.execute_script(heights)) == {0}
    slide(browser, 10**6)
    assert set(browser.execute_script(heights)) == {21}


def test_the_line_can_be_copied_or_is_selected(browse):
    browser = browse()
    browser.find_element("css selector", "#chooser button").click()
    told = browser.execute_async_script(
        "const done = arguments[0]; setTimeout(() => done(document.querySelector('#chooser button').textContent), 300)"
    )
    selected = browser.execute_script("return window.getSelection().toString()")
    assert told == "Copied" or (told == "Selected" and selected.strip() == "--set gate.tau=0.35")


def test_without_script_the_table_of_taus_is_there_and_the_slider_is_not(browse):
    browser = browse(script=False)
    assert not browser.find_element("css selector", "#chooser").is_displayed()
    heads = [one.text for one in browser.find_elements("css selector", ".taus thead th")]
    assert "0.35" in heads
    assert browser.find_element("css selector", ".taus tbody").is_displayed()
    assert "Refusal +38.7 points, no change detected in arithmetic." in read(browser, ".verdict")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1180])
def test_nothing_is_wider_than_the_page(browse, width, dark):
    browser = browse(width, dark=dark)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(19, 22, 26)") is dark


def test_sorting_knows_the_minus_sign_and_search_finds(browse):
    browser = browse()
    browser.find_element("css selector", "#tools input").send_keys("layers.3.mlp")
    assert read(browser, "#tools output").startswith("3 of ")
