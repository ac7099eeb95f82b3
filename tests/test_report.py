"""The one page in a real browser: it renders, sorts, searches, and shows text from data sets as text."""

import json
import os
import shutil
import time

import numpy as np
import pytest

from analysis import findings, labels, report
from analysis.measure import COLUMNS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = ["<script>document.title = 'owned'</script>", "</script><b id=owned>", "<!--", "&lt;", "<img src=x onerror=alert(1)>"]


def made_up_table(n: int, changed: int = 9) -> dict:
    """A table as analyze.py makes it, with numbers whose order is known: relative norm falls with the latent's number.

    So does the rank: even latents are more in the fine-tuned model, odd ones in the base model.
    """
    draw = np.random.default_rng(0)
    table = {name: draw.random(n) for name in COLUMNS if not name.startswith("planted")}
    table["latent"], table["dead"] = np.arange(n), np.arange(n) == n - 1
    table["relative_norm"] = 1 - np.arange(n) / n
    tags = np.where(table["relative_norm"] > 0.8, "ft_only", np.where(table["relative_norm"] < 0.2, "base_only", "shared"))
    table |= {"tag": tags, "tag_scaling": tags.copy(), "tag_delta_norm": tags.copy()}
    table["beta_ratio_error"][3:4] = table["base_beta_ratio_error"][3:4] = np.nan
    table["direction"] = np.where(np.arange(n) % 2, "base", "ft")
    table |= {"rank": 1 + np.arange(n) // 2, "changed": np.arange(n) < changed}
    return table | {"freq_text_0": draw.random(n), "mean_text_0": draw.random(n)}


def made_up_sections(latents, n_examples: int) -> list[dict]:
    def example(latent, i):
        tokens = ["Zebra" if latent == 7 else " word", *HOSTILE, *[f" token{i}"] * 40]
        values = [None, *[0.0] * (len(tokens) - 2), 1.5]
        kind = "top" if i < n_examples // 2 else "25 to 50 %"
        place = {"sequence": i, "position": 5, "peak": len(tokens) - 1}
        return {"range": kind, "text": "</script>.txt", "tokens": tokens, "values": values} | place

    return [{"latent": int(j), "examples": [example(j, i) for i in range(n_examples)]} for j in latents]


def made_up_metrics(table: dict) -> dict:
    counts = {name: int((table["tag"] == name).sum()) for name in report.CLASSES}
    return {
        "explained_variance": 0.9, "explained_variance_A": 0.91, "explained_variance_B": 0.89, "l0_loss": 12.0, "k": None,
        "variant": "vanilla", "d_hidden": len(table["latent"]), "dead_fraction": 0.01, "latents": counts | {"dead": 1},
        "latents_by_scaling": counts, "latents_by_norm": counts, "rows_validation": 10, "rows_train": 10, "notes": HOSTILE[:1],
        "latents_by_published_cuts": {"a cut": counts | {"other": 0}}, "run": "/home/me/<b>run<", "data": "/home/me/</script>",
        "threshold_curve": [],
    }  # fmt: skip


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
    """Render a page of n latents, with examples for some, into a file."""

    folder, table = tmp_path_factory.mktemp("figures"), made_up_table(200)
    with_random = table | {"random_cosine": np.zeros(200)}
    drawn = report.draw_figures(folder, with_random, made_up_metrics(table), curves=[], pair=HOSTILE[0], truth=None)
    assert {p.suffix for p in folder.iterdir()} == {".png", ".svg"}

    def make(n: int, with_examples, n_examples: int = 4, changed: int = 9, words: str | None = None):
        folder, table = tmp_path_factory.mktemp("page"), made_up_table(n, changed)
        if words:  # the label of latent 7
            table |= labels.columns(
                [{"latent": 7, "label": {"description": words, "score": 0.75}}, {"latent": 1, "label": None}], n
            )
        metrics = made_up_metrics(table)
        definitions = COLUMNS | labels.COLUMNS | {"freq_text_0": "how often", "mean_text_0": "how much"}
        sections = made_up_sections(with_examples, n_examples)
        null = {"center": 0.05, "spread": 0.01, "cut": 0.19, "false_discovery_rate": 0.05, "blocks": 16, "tested": n - 1}
        found = findings.find(table, null, metrics, sections, ["</script>.txt"], HOSTILE[0], "python analyze.py /home/me/run")
        html = report.render(
            metrics, table, definitions, found, ["</script>.txt"], figures=drawn, sections=sections, steered=[], truth=None,
            pair=HOSTILE[0],
        )  # fmt: skip
        (folder / "report.html").write_text(html, encoding="utf-8")
        return folder / "report.html"

    return make


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, driven by playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements-dev.txt)")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open a file; at the end of the test there must have been no console error and no request beyond the file."""
    complaints, pages = [], []

    def go(path):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append("a dialog opened"), dialog.dismiss()))
        page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
        page.goto(path.as_uri())
        return page

    yield go
    for page in pages:
        page.close()
    assert complaints == []


def first_column(page) -> list[int]:
    """The latents shown, which is the table's second column, after their rank."""
    return [int(text) for text in page.locator("#latents tbody td:nth-child(2)").all_inner_texts()]


def test_the_table_sorts_searches_and_turns_pages(page_of, open_page):
    page = open_page(page_of(200, [7, 150]))
    assert first_column(page) == list(range(50))
    assert page.get_by_role("button", name="previous").is_disabled() and page.get_by_role("button", name="next").is_enabled()
    page.get_by_role("button", name="relative norm").click()
    assert first_column(page)[:2] == [0, 1]
    page.get_by_role("button", name="relative norm").click()
    assert first_column(page)[:2] == [199, 198]
    page.get_by_role("button", name="next").click()
    assert first_column(page)[0] == 149
    page.get_by_role("button", name="ν error").click()  # what was not measured comes last, in both directions
    page.locator("#class").select_option("ft_only")
    assert len(first_column(page)) == 40 and first_column(page)[-1] == 3
    page.get_by_role("button", name="ν error").click()
    assert first_column(page)[-1] == 3
    page.locator("#class").select_option("")
    page.locator("#direction").select_option("base")
    assert page.locator("#latents tbody tr").count() == 50 and all(latent % 2 for latent in first_column(page))
    page.locator("#direction").select_option("")
    page.locator("#class").select_option("changed")
    assert sorted(first_column(page)) == list(range(9)) and page.get_by_role("button", name="next").is_disabled()
    page.locator("#class").select_option("")
    page.get_by_label("search latents").fill("zebra")
    assert first_column(page) == [7]
    page.get_by_label("search latents").fill("42")
    assert first_column(page) == [42]
    page.get_by_label("search latents").fill("base-only")
    assert set(first_column(page)) <= set(range(160, 200))


def test_each_direction_has_its_own_ranks(page_of, open_page):
    page = open_page(page_of(200, [7, 150]))
    assert page.locator("#latents tbody td:first-child").all_inner_texts()[:4] == ["ft 1", "base 1", "ft 2", "base 2"]
    assert page.locator("#latents th", has_text="more in").count() == 0  # which the rank says


def test_examples_show_values_and_link_from_the_table(page_of, open_page):
    page = open_page(page_of(200, [7, 150]))
    section = page.locator("#latent-7")
    section.scroll_into_view_if_needed()  # it is filled when it comes near
    section.locator(".example").first.wait_for()
    assert section.locator(".example").count() == 2  # the weaker ones open on demand
    assert section.locator(".peak").first.get_attribute("title") == "activation 1.50"
    assert section.locator(".missing").first.get_attribute("title") == "left out of the dataset"
    section.locator("summary").click()
    section.locator(".example").nth(3).wait_for()  # the browser says a moment later that it was opened
    assert section.locator(".example").count() == 4
    page.get_by_label("search latents").fill("150")
    page.locator("#latents tbody a").click()
    assert page.locator("#latent-150").evaluate("e => Math.abs(e.getBoundingClientRect().top) < innerHeight")


def test_text_of_the_data_stays_text(page_of, open_page):
    page = open_page(page_of(20, [7]))
    page.locator("#latent-7").scroll_into_view_if_needed()
    shown = page.locator("#latent-7 .text").first.evaluate("e => e.textContent")
    assert all(part in shown for part in HOSTILE)
    assert page.locator("#owned, main script:not([type='application/json'])").count() == 0
    assert "<script>" in page.title() and "owned" not in page.title().replace(HOSTILE[0], "")
    assert page.locator("img:not(figure img)").count() == 0
    assert "<b>run<" in page.locator("header").inner_text()
    assert page.locator("table .snippet b").first.inner_text() == HOSTILE[-1] or page.locator(".snippet").count()
    assert "/home/me" not in page.content()


def test_a_label_stands_beside_its_latent_and_is_found(page_of, open_page):
    page = open_page(page_of(200, [7, 150], words=f"zygotes {HOSTILE[1]}"))
    page.get_by_label("search latents").fill("zygotes </script>")
    assert first_column(page) == [7] and page.locator("#owned").count() == 0
    assert "0.750" in page.locator("#latents tbody tr").inner_text()
    page.locator("#latents tbody a").click()
    page.locator("#latent-7 h3").wait_for()
    assert page.locator("#latent-7 h3").inner_text() == f"Latent 7: zygotes {HOSTILE[1]}"
    page.get_by_label("search latents").fill("")
    page.get_by_role("button", name="label score").click()
    assert first_column(page)[0] == 7  # those without a label come last


def test_the_page_begins_with_what_changed(page_of, open_page):
    page = open_page(page_of(200, range(12)))
    assert (
        "9 of 199 live latents changed beyond chance: 5 stand more in the fine-tuned model"
        in page.locator("header").inner_text()
    )
    lead = page.locator(".lead article")
    assert lead.count() == 5 and lead.nth(4).locator(".shown").count() == 2
    assert lead.nth(4).bounding_box()["y"] + lead.nth(4).bounding_box()["height"] < 900  # all of them without scrolling
    assert page.locator("#latents tbody tr").first.locator(".snippet").inner_text().strip()


def test_without_a_change_the_page_says_so_and_shows_the_nearest(page_of, open_page):
    page = open_page(page_of(200, range(12), changed=0))
    assert "No change found above chance among 199 live latents" in page.locator("header").inner_text()
    assert page.locator("h2").first.inner_text() == "No change found above chance"
    assert page.locator(".lead article").count() == 5


def test_a_page_of_no_live_latent(page_of, open_page):
    page = open_page(page_of(1, [], changed=0))
    assert "0 live latents" in page.locator("main").inner_text() and first_column(page) == [0]


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 390), ("light", 1400)])
def test_the_page_does_not_scroll_sideways_and_its_table_does_in_its_box(page_of, browser, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.goto(page_of(200, range(12)).as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator("#latents").evaluate("t => [t.scrollWidth, t.parentElement.clientWidth, t.parentElement.scrollWidth]")
    assert box[2] >= box[0] and box[1] <= width - 24
    assert ("more columns to the right" in page.locator("#count").inner_text()) == (box[0] > box[1])
    page.locator("#latents").evaluate("t => t.parentElement.scrollLeft = 9999")
    assert page.locator("#latents tbody td:nth-child(2)").first.bounding_box()["x"] < 60  # which latent a row is of stays
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 249)"
    assert light == (scheme == "light")
    page.close()


def test_a_page_with_2000_latents_of_examples_opens_at_once(page_of, open_page):
    path = page_of(16_384, range(2000), n_examples=20)
    began = time.perf_counter()
    page = open_page(path)
    page.wait_for_selector("#latent-0")
    seconds = time.perf_counter() - began
    assert page.locator("section.latent").count() < 50  # the rest comes when it is scrolled to
    assert seconds < 5, seconds  # about 1 s
    page.evaluate("document.getElementById('sections').scrollIntoView(false)")
    page.wait_for_function("document.querySelectorAll('section.latent').length > 5")


def test_what_has_no_number_is_null(page_of):
    html = page_of(20, [7]).read_text(encoding="utf-8")
    start = html.index('id="columns">') + len('id="columns">')
    columns = {c["name"]: c for c in json.loads(html[start : html.index("</script>", start)])}
    assert columns["nu_error"]["values"][3] is None and columns["relative_norm"]["values"][0] == 1.0


def test_latents_that_widen_the_kl_are_not_said_to_close_it():
    table = made_up_table(20)
    null = {"center": 0.05, "spread": 0.01, "cut": 0.19, "false_discovery_rate": 0.05, "blocks": 16, "tested": 19}
    sets = {"first_ranked": {"latents": 5, "kl": {"all": 1.5}}, "as_many_random": {"latents": 5, "kl": {"all": 2.01}}}
    metrics = made_up_metrics(table) | {"patching": {"diffing": {"base model": {"before": {"all": 2.0}} | sets}}}
    found = findings.find(table, null, metrics, made_up_sections(range(20), 4), ["text"], "a pair", "python analyze.py run")
    said = "KL divergence from base to fine-tuned model, 5 latents ranked first close 25 %, 5 random ones widen it by 0.5"
    assert f"Of the {said} %." in found["summary"] and said in findings.as_markdown(found)
