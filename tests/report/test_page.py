"""The report's page: one file that loads nothing, and whose every number is the report's."""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from sample_report import (
    HOSTILE,
    SCORERS,
    VERBALIZERS,
    full_report,
    make_gallery,
    make_training,
    minimal_report,
)

from nla_ray.report.claim_figures import CLAIM_FIGURES
from nla_ray.report.recovered import PATCH_FIGURES
from nla_ray.report.rendering.markdown import to_markdown
from nla_ray.report.rendering.page import to_html
from nla_ray.report.rendering.vocabulary import DEFINITIONS
from nla_ray.score.metrics import METRICS

SCORER_ORDER = ("judge", "reward", "linear")
JSON_BLOCKS = ("report", "gallery", "training")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def page() -> str:
    return to_html(full_report(), make_gallery(), make_training())


class Scripts(HTMLParser):
    """The contents of script and style elements, and how many scripts a page has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.contents: dict[str, str] = {}
        self.attributes: list[tuple[str, str]] = []
        self.count, self._open = 0, ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag in ("script", "style"):
            self.count += tag == "script"
            self._open = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.contents[self._open] = self.contents.get(self._open, "") + data


# The file -----------------------------------------------------------------------------------------


def test_the_page_asks_for_nothing_from_anywhere(page: str) -> None:
    parsed = Scripts(page)
    assert not [
        value for name, value in parsed.attributes if name in ("src", "srcset", "action", "data")
    ]
    addresses = {value for name, value in parsed.attributes if name == "href"}
    sections = {f"#{value}" for name, value in parsed.attributes if name == "id"}
    assert "data:," in addresses and addresses - {"data:,"} < sections
    code = parsed.contents["style"] + parsed.contents["script"]
    assert not re.findall(
        r"url\(|@import|\bimport\b|fetch\(|XMLHttpRequest|innerHTML|insertAdjacentHTML|document\.write|\beval\(",
        code,
    )
    assert re.findall(r"\bhttps?://[^\"\s]+", code) == ["http://www.w3.org/2000/svg"]


def test_the_policy_names_script_and_style_by_their_digests_and_allows_nothing_else(
    page: str,
) -> None:
    parsed = Scripts(page)
    digests = {
        name: base64.b64encode(hashlib.sha256(parsed.contents[name].encode()).digest()).decode()
        for name in ("style", "script")
    }
    policy = next(
        value for name, value in parsed.attributes if name == "content" and "default-src" in value
    )
    assert (
        policy
        == f"default-src 'none'; img-src data:; style-src 'sha256-{digests['style']}'; script-src"
        f" 'sha256-{digests['script']}'"
    )


def test_no_text_ends_a_script_or_fills_a_place_of_the_template(page: str) -> None:
    parsed = Scripts(page)
    assert parsed.count == 5 and "<" not in parsed.contents["gallery"]
    assert (
        not re.search(r"\{\{\w+\}\}", re.sub(re.escape("{{style}}"), "", page))
        and page.count("{{style}}") > 0
    )


def test_what_went_in_can_be_read_back_out(page: str) -> None:
    contents = Scripts(page).contents
    assert [json.loads(contents[name]) for name in JSON_BLOCKS] == [
        full_report(),
        make_gallery(),
        make_training(),
    ]


def test_values_that_json_does_not_have_are_null() -> None:
    training = {"grpo": [{"step": 1, "reward": math.nan}, {"step": 2, "reward": -math.inf}]}
    assert json.loads(Scripts(to_html(minimal_report(), [], training)).contents["training"]) == {
        "grpo": [{"step": 1, "reward": None}, {"step": 2, "reward": None}]
    }


def test_a_preset_with_markup_in_its_name_is_a_name() -> None:
    assert "<h1>Report of &lt;b&gt;{{style}}</h1>" in to_html(
        {**minimal_report(), "preset": "<b>{{style}}"}, [], {}
    )


@pytest.mark.parametrize("name", [*METRICS, *PATCH_FIGURES, *CLAIM_FIGURES])
def test_every_figure_of_the_report_has_a_definition(page: str, name: str) -> None:
    assert f"<dd>{html.escape(DEFINITIONS[name])}</dd>" in page


@pytest.mark.parametrize(
    "part",
    [
        *("results", "claims", "paired", "domains", "prefix", "retrieval", "quotes", "best_of"),
        *("calibration", "growth", "experiments", "lengths", "refreshed", "seeds", "probe"),
        *("wording", "claim_confidence", "differences"),
    ],
)
def test_every_figure_of_the_report_stands_in_a_table_without_a_script(
    page: str, part: str
) -> None:
    values = figure_values(full_report()[part])
    shown = section_of(page, part)
    if part == "results":
        shown += section_of(page, "patch-back")
    assert values
    assert values == {float(value) for value in re.findall(r'data-value="([^"]+)"', shown)}


def figure_values(part: Any) -> set[float]:
    """The values of all figures in a part of a report."""
    if isinstance(part, dict) and "value" in part:
        return {part["value"]}
    items = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return set().union(*map(figure_values, items))


def section_of(page: str, name: str) -> str:
    section = page[page.index(f'<section id="{name}">') :]
    return section[: section.index("</section>")]


def test_a_section_explains_what_it_shows_and_nothing_else(page: str) -> None:
    warned = "Dashed vertical lines are steps at which the monitor warned"
    assert warned in section_of(page, "curves")
    growth = section_of(page, "growth")
    assert "With the labels" in growth and "with the layer" in growth
    report = {**full_report(), "growth": {"steps": full_report()["growth"]["steps"]}}
    training = {"grpo": [{"step": step, "reward": 0.5} for step in (1, 2)]}
    bare = to_html(report, [], training)
    assert warned not in bare
    growth = section_of(bare, "growth")
    assert "<p>With the steps of GRPO (greedy descriptions of validation documents).</p>" in growth


def test_nothing_is_negative_zero_and_markdown_reads_a_note_as_it_stands() -> None:
    figure = {"value": -0.0004, "low": -0.0011, "high": -0.0, "n": 60, "families": 33}
    report = copy.deepcopy(full_report())
    report["results"]["sft"]["judge"]["delta"] = figure
    report["notes"] = [
        "<b> is *so* & `x` of [a](b), d_model < 1 & 2 [0.1, 0.2]",
        "# &lt; _a_",
        "1. > | \n- x",
    ]
    page, markdown = to_html(report, [], {}), to_markdown(report)
    assert "0.000 [-0.001, 0.000]" in markdown
    assert "-0.000" not in markdown + re.sub(r"<[^>]*>", "", section_of(page, "results"))
    assert "- \\<b> is \\*so\\* & \\`x\\` of [a\\](b), d_model < 1 & 2 [0.1, 0.2]\n" in markdown
    assert "- \\# \\&lt; \\_a\\_\n- 1\\. > |  - x\n" in markdown
    assert "| sft.claims.repeats | – | < 0.1 | FAIL |" in markdown


# In a browser -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip(
        "playwright.sync_api", reason="the page in a browser: the test extra is not installed"
    )
    if CHROMIUM is None:
        pytest.skip("the page in a browser: no Chromium on this machine (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield chromium
        chromium.close()


class Opened:
    """A page in a tab, with everything it complained of and every address it asked for."""

    def __init__(self, browser: Any, path: Path, **context: Any) -> None:
        self.tab = browser.new_page(**{"viewport": {"width": 1400, "height": 900}, **context})
        self.tab.set_default_timeout(60_000)
        self.complaints: list[str] = []
        self.addresses: list[str] = []
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", lambda request: self.addresses.append(request.url))
        self.tab.goto(path.as_uri())
        self.wait_for_charts()

    def wait_for_charts(self) -> None:
        """Charts are drawn in the frame after the one that lays them out."""
        self.tab.wait_for_function(
            "() => [...document.querySelectorAll('.chart')].every((chart) =>"
            " chart.querySelector('svg'))"
        )

    def texts(self, selector: str) -> list[str]:
        return self.tab.locator(selector).all_text_contents()


@pytest.fixture(scope="module")
def page_path(page: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: Any, page_path: Path) -> Iterator[Opened]:
    page = Opened(browser, page_path)
    yield page
    page.tab.close()
    assert page.complaints == []


def shown(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:z.3f}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_the_page_is_drawn_at_every_width_without_complaint_and_never_scrolls_sideways(
    browser: Any, page_path: Path, width: int, scheme: str
) -> None:
    opened = Opened(
        browser, page_path, viewport={"width": width, "height": 800}, color_scheme=scheme
    )
    assert (
        opened.complaints == []
        and opened.addresses == [page_path.as_uri(), "data:,"][: len(opened.addresses)]
    )
    assert opened.tab.evaluate("document.documentElement.scrollWidth") == width
    assert opened.texts("nav a") == [
        "Warnings",
        "Results",
        "Gates",
        "Differences",
        "Seeds",
        "Claims",
        "Probe",
        "Words",
        "Claims kept",
        "Patch-back",
        "Agreement",
        "Refreshed scorer",
        "Of two",
        "Training",
        "Growth",
        "Domains",
        "Confusion",
        "Prefix",
        "Lengths",
        "Retrieval",
        "Quotes",
        "Wording",
        "Best of N",
        "Calibration",
        "Examples",
        "Gallery",
        "Chosen",
        "Experiments",
        "Lineage",
        "Protocols",
        "Notes",
        "Definitions",
    ]
    assert all(
        "NaN" not in part and "undefined" not in part for part in opened.texts("main > section")
    )
    assert opened.tab.evaluate(
        "[...document.querySelectorAll('.chart')].every((chart) =>"
        " chart.querySelector('svg[aria-label]'))"
    )
    assert opened.tab.evaluate(
        "[...document.querySelectorAll('.chart svg')].every((svg) =>"
        " svg.getBoundingClientRect().width <= innerWidth)"
    )
    opened.tab.close()


def test_a_report_without_optional_parts_is_drawn_without_complaint(
    browser: Any, tmp_path: Path
) -> None:
    (tmp_path / "minimal.html").write_text(to_html(minimal_report(), [], {}), encoding="utf-8")
    opened = Opened(browser, tmp_path / "minimal.html")
    assert (
        opened.complaints == []
        and opened.texts("nav a")
        == ["Probe", "Claims kept", "Patch-back", "Wording", "Definitions"]
        and "60 activations of 33" in opened.texts("header")[0]
    )
    opened.tab.close()


def test_figures_that_are_missing_or_null_are_dashes(browser: Any, tmp_path: Path) -> None:
    report = copy.deepcopy(full_report())
    report["results"]["sft"]["judge"]["fve"] = {
        "value": math.nan,
        "low": math.nan,
        "high": math.nan,
        "n": 0,
        "families": 0,
    }
    del (
        report["results"]["sft"]["judge"]["delta"],
        report["results"]["grpo"]["judge"],
        report["prefix"]["sft"]["judge"],
    )
    for by_verbalizer in report["domains"].values():
        del by_verbalizer["gold"]["precision"]
    report["best_of"][0]["judge"]["top1"] = None
    (tmp_path / "holes.html").write_text(
        to_html(report, make_gallery(), {"grpo": []}), encoding="utf-8"
    )
    opened = Opened(browser, tmp_path / "holes.html")
    assert opened.complaints == [] and "Training" not in opened.texts("nav a")
    assert (
        opened.texts("#results tr[data-row=sft] td[data-column=fve], #results tr[data-row=grpo] td")
        == ["–"] * 8
    )
    opened.tab.close()


def test_without_scripts_the_page_says_what_it_needs(browser: Any, page_path: Path) -> None:
    opened = Opened.__new__(Opened)
    opened.tab = browser.new_page(java_script_enabled=False)
    opened.tab.goto(page_path.as_uri())
    assert (
        "Allow JavaScript" in opened.tab.locator("noscript").inner_text()
        and opened.tab.locator("dl").is_visible()
    )
    assert all(table.is_visible() for table in opened.tab.locator("#results table").all())
    assert opened.texts("#results h3") == [f"Under the {name} scorer" for name in SCORER_ORDER]
    assert opened.texts("#drawn pre") == [HOSTILE, "(empty)", HOSTILE]
    assert not any(frame.is_visible() for frame in opened.tab.locator(".charts").all())
    opened.tab.close()


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_main_table_shows_every_figure_of_the_report(opened: Opened, scorer: str) -> None:
    opened.tab.locator(f"#results input[value={scorer}]").check(force=True)
    opened.tab.locator("#results input[value='all metrics']").check(force=True)
    cells = opened.tab.evaluate(
        """Object.fromEntries([...document.querySelectorAll("#results tbody tr")].map((row) => {
            const cells = [...row.querySelectorAll("td")];
            const texts = cells.map((cell) => [cell.dataset.column, cell.textContent]);
            return [row.dataset.row, Object.fromEntries(texts)];
        }))"""
    )
    assert cells == {
        name: {
            metric: f"{shown(figure['value'])} [{shown(figure['low'])}, {shown(figure['high'])}]"
            for metric, figure in by[scorer].items()
            if metric not in PATCH_FIGURES  # they have a table of their own
        }
        for name, by in full_report()["results"].items()
    }
    assert opened.texts("#results tbody tr.quiet > th") == ["nearest train label", "shuffled"]


def test_the_judge_and_the_main_metrics_are_shown_first(opened: Opened) -> None:
    assert opened.tab.locator("#results input:checked").first.get_attribute("value") == "judge"
    assert opened.texts("#results thead button") == [
        "2-way top-1",
        "2-way centred",
        "10-way top-1",
        "10-way hard",
        "centred cosine",
        "delta",
        "FVE",
    ]
    assert opened.tab.locator("#results td[data-column=top1] .chance").count() == len(VERBALIZERS)
    assert opened.tab.locator("#results td[data-column=fve] .chance").count() == 0


def test_a_table_that_goes_on_beyond_its_edge_says_so(opened: Opened) -> None:
    opened.tab.set_viewport_size({"width": 400, "height": 800})
    frame = opened.tab.locator("#results .scroll").first
    widths = frame.evaluate("(frame) => [frame.scrollWidth, frame.clientWidth]")
    attachments = frame.evaluate("(frame) => getComputedStyle(frame).backgroundAttachment")
    assert widths[0] > widths[1] and attachments == "local, local, scroll, scroll"


@pytest.mark.parametrize("width", [400, 1200])
def test_an_interval_is_never_broken(opened: Opened, width: int) -> None:
    opened.tab.set_viewport_size({"width": width, "height": 800})
    beneath = opened.tab.evaluate(
        """[...document.querySelectorAll("#results .range, #claims .range")].map((range) =>
            range.getBoundingClientRect().top
                > range.parentNode.querySelector(".value").getBoundingClientRect().top)"""
    )
    assert len(beneath) > 10 and all(beneath)
    opened.tab.evaluate(
        "document.querySelectorAll('details').forEach((fold) => { fold.open = true; })"
    )
    lines = opened.tab.evaluate(
        """[...document.querySelectorAll("table.plain td[data-value]")].map((cell) => {
            const range = document.createRange();
            range.selectNodeContents(cell);
            return new Set([...range.getClientRects()].map((box) => box.top)).size;
        })"""
    )
    assert len(lines) > 10 and set(lines) == {1}


def test_the_text_and_three_descriptions_stand_side_by_side_at_1200_pixels(opened: Opened) -> None:
    opened.tab.set_viewport_size({"width": 1200, "height": 800})
    columns = opened.tab.locator("#examples .sides").first.evaluate(
        "(sides) => getComputedStyle(sides).gridTemplateColumns.split(' ').length"
    )
    assert columns == 4


def test_the_claims_table_shows_every_figure_and_sorts_by_its_columns(opened: Opened) -> None:
    claims = full_report()["claims"]
    assert opened.texts("#claims td .value") == [
        shown(figure["value"]) for by in claims.values() for figure in by.values()
    ]
    ascending = sorted(claims, key=lambda name: claims[name]["tokens"]["value"])
    orders = []
    for _ in range(3):
        opened.tab.locator("#claims th[data-column=tokens] button").click()
        orders.append(
            opened.tab.evaluate(
                "[...document.querySelectorAll('#claims tbody tr')].map((row) => row.dataset.row)"
            )
        )
    assert orders == [ascending[::-1], ascending, list(VERBALIZERS)]


def test_gates_are_shown_with_bound_and_threshold(opened: Opened) -> None:
    assert opened.texts("#gates tbody :is(th, td)") == [
        *("grpo.judge.top1", "0.9877", "≥ 0.93", "✓ PASS"),
        *("sft.claims.repeats", "–", "< 0.1", "✗ FAIL"),
    ]
    assert "1 of 2 gates passed" in opened.texts("header .verdict")[0]


def test_charts_show_the_figures_of_the_report(opened: Opened) -> None:
    report = full_report()
    opened.tab.locator("#paired input[value=claims]").check(force=True)
    paired = [
        report["paired"][pair]["claims"][metric]
        for metric in ("top1", "delta")
        for pair in report["paired"]
    ]
    opened.wait_for_charts()
    assert opened.texts("#paired .note") == [
        f"{shown(figure['value'])} [{shown(figure['low'])}, {shown(figure['high'])}]"
        for figure in paired
    ]
    precision = report["domains"]["licence"]["grpo"]["precision"]
    assert (
        f"licence, grpo: {shown(precision['value'])} [{shown(precision['low'])},"
        f" {shown(precision['high'])}], n 60" in opened.texts("#domains title")
    )
    opened.tab.locator("#retrieval summary").click()
    cells = opened.texts("#retrieval details tr[data-row=grpo] td")
    assert (
        len(cells) == 3
        and shown(report["retrieval"]["grpo"]["judge"][2]["top1"]["value"]) in cells[2]
    )
    assert opened.texts("#confusion tbody td") == ["11", "·", "2", "3", "·", "·"]
    assert set(opened.texts("#curves title")) == {"grpo no contrast: warning at step 20"}


def test_growth_is_drawn_along_every_axis_with_its_numbers(opened: Opened) -> None:
    opened.wait_for_charts()
    axes = opened.tab.evaluate(
        """[...document.querySelectorAll("#growth svg[role=img]")].map((svg) =>
            svg.getAttribute("aria-label"))"""
    )
    assert axes == [
        "2-way centred by labels that SFT learned from",
        "claim precision by step of GRPO",
        "centred cosine by layer",
    ]
    points = full_report()["growth"]["labels"]["judge"]
    opened.tab.locator("#growth summary").first.click()
    table = opened.tab.locator("#growth details").first
    rows = table.locator("tr[data-row=judge]").all_text_contents()
    assert len(rows) == 3 and all(
        f"{shown(point['top1_2way']['value'])} [{shown(point['top1_2way']['low'])}" in row
        for point, row in zip(points, rows, strict=True)
    )


def test_what_was_tried_is_told_with_its_intervals(opened: Opened) -> None:
    assert opened.texts("#experiments tbody :is(th, td)") == [
        "no KL",
        "-0.012 [-0.020, -0.004]",
        "621",
        "1",
        "–",
        "no",
    ]


def test_differences_stand_on_their_side_of_zero_and_are_hollow_where_the_interval_holds_zero(
    opened: Opened,
) -> None:
    drawn = opened.tab.evaluate(
        """[...document.querySelectorAll("#paired .chart g")].map((group) => {
            const interval = group.querySelector(".interval"), mark = group.querySelector(".mark");
            const zero = group.closest("svg").querySelector(".zero").x1.baseVal.value;
            const value = mark.transform.baseVal[0].matrix.e;
            const ends = [interval.x1.baseVal.value, value, interval.x2.baseVal.value];
            return [...ends.map((end) => end - zero), mark.classList.contains("hollow")];
        })"""
    )
    paired = full_report()["paired"]
    figures = [paired[pair]["judge"][metric] for metric in ("top1", "delta") for pair in paired]
    for (low, value, high, hollow), figure in zip(drawn, figures, strict=True):
        pixels = value / figure["value"]  # one unit of the axis of this plot
        assert (low, high) == (
            pytest.approx(figure["low"] * pixels, abs=0.01),
            pytest.approx(figure["high"] * pixels, abs=0.01),
        ) and pixels > 0
        assert hollow == (figure["low"] <= 0 <= figure["high"])


def test_a_readout_under_the_pointer_gives_the_values_at_the_nearest_point(opened: Opened) -> None:
    box = opened.tab.locator("#best_of .chart svg")
    box.scroll_into_view_if_needed()
    box.hover(position={"x": 60, "y": 60})
    first = full_report()["best_of"][0]["judge"]["top1"]
    assert (
        f"judge {shown(first['value'])} [{shown(first['low'])}, {shown(first['high'])}]"
        in opened.texts("#tip div")
    )


# The gallery --------------------------------------------------------------------------------------


def ids(opened: Opened) -> list[str]:
    return opened.texts("#examples .card header code")


def count(opened: Opened, expected: str) -> None:
    opened.tab.wait_for_function(
        "(expected) => document.querySelector('#examples .count').textContent === expected",
        arg=expected,
    )


def test_the_gallery_draws_a_few_cards_and_more_when_its_end_comes_near(opened: Opened) -> None:
    count(opened, "40 of 40 activations")
    assert len(ids(opened)) == 12
    for expected in (24, 36, 40):
        opened.tab.locator("#examples .card").last.scroll_into_view_if_needed()
        opened.tab.wait_for_function(
            "(least) => document.querySelectorAll('#examples .card').length >= least", arg=expected
        )
    assert ids(opened) == [row["activation_id"] for row in make_gallery()]


def test_the_gallery_fills_a_tall_window_with_short_cards(opened: Opened) -> None:
    opened.tab.set_viewport_size({"width": 1400, "height": 3000})
    for box in opened.tab.locator("#examples .checks input").all():
        box.uncheck()
    opened.tab.locator("#examples .toolbar").scroll_into_view_if_needed()
    opened.tab.wait_for_function("() => document.querySelectorAll('#examples .card').length > 12")


def test_texts_are_texts_and_marks_are_the_segments_that_were_marked(opened: Opened) -> None:
    rows = make_gallery()[:12]
    assert opened.texts("#examples .source") == [row["text"] for row in rows]
    for number, row in enumerate(rows):
        segments = row["descriptions"]["grpo"]["segments"]
        said = (
            opened.tab.locator("#examples .card")
            .nth(number)
            .locator(".said[data-verbalizer=grpo] pre")
        )
        assert said.text_content() == ("".join(content for content, _ in segments) or "(empty)")
        for mark in ("found", "missing"):
            assert said.locator(f"mark.{mark}").all_text_contents() == [
                content for content, marked in segments if marked == mark
            ]
    assert (
        opened.tab.evaluate("window.stolen") is None
        and opened.tab.locator("#examples img, #warnings img, #drawn img").count() == 0
    )
    styles = [
        opened.tab.locator(f"#examples .card mark.{mark}").first.evaluate(
            "(mark) => getComputedStyle(mark).textDecorationStyle"
        )
        for mark in ("found", "missing")
    ]
    assert styles == ["solid", "wavy"]


def test_the_gallery_is_searched_in_texts_and_descriptions_and_filtered_by_domain(
    opened: Opened,
) -> None:
    search, domain = (
        opened.tab.locator("#examples input[type=search]"),
        opened.tab.locator("#examples select[name=domain]"),
    )
    search.fill("SOURCE word12")
    count(opened, "1 of 40 activations")
    assert ids(opened) == ["doc12@4:12"]
    search.fill("lie37")
    count(opened, "2 of 40 activations")
    assert ids(opened) == ["doc38@4:38", "doc39@4:39"]
    domain.select_option("type_stub")
    count(opened, "1 of 40 activations")
    search.fill("")
    count(opened, "13 of 40 activations")
    search.fill("nowhere")
    count(opened, "0 of 40 activations")
    opened.tab.keyboard.press("Escape")


def test_the_gallery_is_sorted_by_scores_words_and_domain_with_missing_scores_last(
    opened: Opened,
) -> None:
    def order(sort: str) -> list[str]:
        opened.tab.locator("#examples select[name=sort]").select_option(sort)
        return [name.split("@")[0] for name in ids(opened)]

    opened.tab.locator("#examples select[name=of]").select_option("grpo")
    opened.tab.locator("#examples select[name=under]").select_option("linear")
    assert order("centred_cosine")[:3] == ["doc39", "doc38", "doc37"]
    assert order("precision")[:3] == ["doc0", "doc1", "doc2"]
    assert order("domain")[:3] == ["doc0", "doc3", "doc6"]
    opened.tab.get_by_role("button", name="reverse").click()
    assert order("centred_cosine")[:8] == [
        "doc0",
        "doc1",
        "doc2",
        "doc3",
        "doc4",
        "doc5",
        "doc6",
        "doc8",
    ]
    assert order("order")[0] == "doc39"


def test_check_boxes_choose_whose_descriptions_are_shown(opened: Opened) -> None:
    def names() -> list[str]:
        return opened.tab.evaluate(
            "[...document.querySelectorAll('#examples .card:first-child .said')].map((said) =>"
            " said.dataset.verbalizer)"
        )

    assert names() == ["gold", "sft", "grpo", "grpo_no_contrast", "read_by_a_human"]
    opened.tab.locator("#examples .checks input[value=shuffled]").check()
    opened.tab.locator("#examples .checks input[value=gold]").uncheck()
    assert names() == ["sft", "grpo", "grpo_no_contrast", "shuffled", "read_by_a_human"]
    scores = opened.texts("#examples .card:first-child .said[data-verbalizer=sft] .scores tbody tr")
    assert scores == ["reward0.0000.500✓1", "judge0.0000.500✓1", "linear0.0000.500✓1"]


def test_the_gallery_is_walked_with_keys(opened: Opened) -> None:
    def focused() -> str:
        return opened.tab.evaluate(
            "document.activeElement.querySelector('header code')?.textContent ??"
            " document.activeElement.type"
        )

    keys = opened.tab.keyboard
    keys.press("j")
    assert focused() == "doc0@4:0"
    assert opened.tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key, expected in (
        ("ArrowDown", "doc1@4:1"),
        ("j", "doc2@4:2"),
        ("k", "doc1@4:1"),
        ("ArrowUp", "doc0@4:0"),
        ("k", "doc0@4:0"),
    ):
        keys.press(key)
        assert focused() == expected
    for _ in range(15):
        keys.press("j")
    assert focused() == "doc15@4:15"
    keys.press("/")
    assert focused() == "search"
    keys.type("jk/")
    assert opened.tab.locator("#examples input[type=search]").input_value() == "jk/"
    count(opened, "0 of 40 activations")
    keys.press("/")
    opened.tab.locator("#examples input[type=search]").fill("word5")
    count(opened, "1 of 40 activations")
    keys.press("Escape")
    assert focused() == "doc5@4:5"
