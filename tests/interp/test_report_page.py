"""The report page in a headless Chromium. Skipped where there is none (Debian: apt-get install chromium)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from snmf_interp import LanguageModel, Report, Sample, write_report
from snmf_interp.features import write_features
from snmf_interp.labels import Label, write_labels
from snmf_interp.runs import Run

from .browser import Page, browse, find_chromium
from .conftest import make_network, make_tokenizer
from .test_report import HOSTILE, TREE, steered

chromium = find_chromium()
pytestmark = pytest.mark.skipif(chromium is None, reason="no chromium on the PATH")
WIDE, NARROW = (1366, 768), (360, 740)
ROWS = "#rows .row"
# Contrast of each text with what is behind it, as WCAG 2 has it; those below 4.5.
FAINT = """(() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const pixel = (colours) => {
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((c) => {
      const s = c / 255;
      return s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4;
    });
  };
  const luminance = ([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b;
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let checked = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest("script, select")) continue;
    const grounds = [];
    for (let e = element; e; e = e.parentElement) grounds.unshift(getComputedStyle(e).backgroundColor);
    const [a, b] = [luminance(pixel(grounds)), luminance(pixel([...grounds, getComputedStyle(element).color]))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    checked += 1;
    if (contrast < 4.5) faint.push(`${element.className || element.tagName}: ${contrast.toFixed(2)}`);
  }
  return [checked, [...new Set(faint)]];
})()"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Two layers of five features; of layer 0, feature 0 has hostile texts everywhere, and feature 4 is dead."""
    folder = tmp_path_factory.mktemp("report")
    model = LanguageModel(make_network("llama"), make_tokenizer(), name="tiny")
    words = ["Monday", "cat", "dog", "rain", "sun", "red", "blue", "Tuesday", "mat", "fast"]
    samples = [
        Sample(
            f"{label}/{i}", f"the {words[(3 * i + j) % 10]} and {words[(i + 2 * j) % 10]} on a rug .", label
        )
        for j, label in enumerate(["days", "colours"])
        for i in range(14)
    ]
    run = Run.collect(folder / "run", model, samples, "0-1")
    list(run.fit([0, 1], 5, keep=0.2, max_iter=10))
    features = [
        dataclasses.replace(feature, clarity=0.5 - feature.index / 10) for feature in run.features(0, model)
    ]
    token = dataclasses.replace(
        features[0].tokens[0], before=HOSTILE, token=HOSTILE, after=HOSTILE, label=HOSTILE, sample="days/0"
    )
    words_of = ((HOSTILE, 1.0), (" \u202eevil", 0.5))
    features[0] = dataclasses.replace(
        features[0],
        tokens=(token, *features[0].tokens[1:]),
        promoted=words_of,
        suppressed=words_of,
        distinctive=words_of,
        concept=HOSTILE,
        clarity=0.9,
        name=HOSTILE,
    )
    features[1] = dataclasses.replace(features[1], concept="colours")
    features[4] = dataclasses.replace(features[4], tokens=(), concept=None)
    write_features(run.features_path(0), features)
    labels = [
        Label(0, 0, "input", HOSTILE, True, HOSTILE),
        Label(0, 1, "input", "unmistakable zebras", True, "some/model"),
        Label(0, 2, "input", None, False, "some/model", reason="no answer"),
    ]
    write_labels(run.labels_folder(0), labels[:1], {"source": HOSTILE})
    write_labels(run.labels_folder(0), labels[1:], {"source": "some/model"})
    return write_report(
        run,
        folder / "report.html",
        model=model,
        hierarchy={0: TREE},
        steering=[steered(feature=0, text=HOSTILE), steered(feature=1)],
    )


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert chromium is not None
    with browse(chromium, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(tab: Page, report: Report) -> Iterator[Page]:
    """The report, wide and light, as opened for the first time."""
    tab.problems.clear()
    tab.requests.clear()
    tab.resize(*WIDE)
    tab.media(prefers_color_scheme="light")
    tab.open("about:blank")
    tab.open(report.path.as_uri())
    tab.evaluate("localStorage.clear()")
    tab.open("about:blank")
    tab.open(report.path.as_uri())
    tab.wait("document.documentElement.classList.contains('ready')")
    yield tab
    # Whatever a test has done: no error, no dialog, and nothing asked for but the file itself.
    assert tab.problems == []
    assert {url.split("#")[0] for url in tab.requests} <= {report.path.as_uri(), "about:blank"}


def go(page: Page, fragment: str) -> None:
    page.evaluate(f"location.hash = {fragment!r}")
    page.press("F2")  # A key of no meaning: its two frames let the page settle.


def current(page: Page) -> str:
    address: str = page.evaluate("location.hash")
    return address


def places(page: Page) -> list[str]:
    found: list[str] = page.evaluate(
        f"[...document.querySelectorAll('{ROWS}')].map((row) => row.dataset.place)"
    )
    return found


def test_loads_with_every_feature_and_the_facts(page: Page) -> None:
    assert len(places(page)) == 10
    assert page.text("#count") == "10 features"
    assert "relative error" in page.text("#about")


def test_search_narrows_the_list(page: Page) -> None:
    page.press("/")
    page.type("ZEBRAS unmis")
    assert places(page) == ["0/1"]
    assert page.text("#count") == "1 of 10 features"
    page.press("Enter")
    assert current(page) == "#/layer/0/feature/1"
    assert page.text("#view h2") == "unmistakable zebras"
    page.press("/")
    page.press("Escape")
    assert len(places(page)) == 10
    page.type("nothing has this")
    assert "Nothing matches" in page.text("#rows")
    page.press("Escape")
    page.press("Escape")
    assert page.evaluate("document.activeElement.id") != "search"


def choose(page: Page, select: str, value: str) -> None:
    page.evaluate(
        f"(() => {{ const s = document.getElementById('{select}'); s.value = {value!r};"
        "s.dispatchEvent(new Event('change')); })()"
    )


def test_sort_and_filter(page: Page) -> None:
    assert places(page)[0] == "0/0"
    choose(page, "sort", "index")
    assert places(page) == [f"{layer}/{index}" for layer in (0, 1) for index in range(5)]
    choose(page, "sort", "energy")
    shown = page.evaluate(
        "[...document.querySelectorAll('#rows .value')].map((v) => parseFloat(v.textContent))"
    )
    assert len(shown) == 10
    assert shown == sorted(shown, reverse=True)
    choose(page, "layer", "1")
    assert {place.split("/")[0] for place in places(page)} == {"1"}
    choose(page, "layer", "all")
    choose(page, "kind", "dead")
    assert places(page) == ["0/4"]
    choose(page, "kind", "clear")
    assert sorted(places(page)) == ["0/0", "0/1"]
    choose(page, "kind", "all")
    choose(page, "concept", "colours")
    assert 0 < len(places(page)) < 10


def test_keys_walk_the_list_and_one_walk_is_one_step_back(page: Page) -> None:
    order = places(page)
    go(page, "#/layer/1/feature/3")
    page.press("/")
    page.press("ArrowDown")
    assert current(page) == f"#/layer/{order[0].replace('/', '/feature/')}"
    page.press("j")
    page.press("ArrowDown")
    assert page.evaluate("document.activeElement.dataset.place") == order[2]
    page.press("k")
    assert current(page) == f"#/layer/{order[1].replace('/', '/feature/')}"
    assert page.evaluate("document.querySelector('[aria-current=true]').dataset.place") == order[1]
    page.press("End")
    assert page.evaluate("document.activeElement.dataset.place") == order[-1]
    page.press("Home")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.evaluate("history.back()")
    page.wait("location.hash === '#/layer/1/feature/3'")
    page.wait("document.querySelector('.crumb').textContent === 'layer 1 · feature 3'")
    page.press("?")
    assert current(page) == "#/about"
    page.press("Escape")
    assert current(page) == "#/features"
    assert page.evaluate("document.getElementById('list').contains(document.activeElement)")


def test_feature_view(page: Page) -> None:
    go(page, "#/layer/0/feature/1")
    assert page.evaluate("document.title").startswith("0/1 unmistakable zebras · tiny")
    assert page.count(".contexts li") == 10
    assert page.count(".contexts mark") == 10
    assert page.evaluate(
        "[...document.querySelectorAll('.contexts .text')].every((t) => / and /.test(t.innerText))"
    )
    assert page.count(".contexts span.shaded") > 0
    assert not page.evaluate(
        "getComputedStyle(document.querySelector('.contexts mark')).backgroundColor"
    ).endswith("/ 0)")
    page.click(".contexts + button")
    assert page.count(".contexts li") > 10
    page.click("[aria-pressed]")
    assert page.count(".contexts.aligned") == 1
    text = page.text("#view")
    for part in (
        "stands out",
        "promotes",
        "suppresses",
        "Strengths",
        "Shares neurons with",
        "some/model · clear",
    ):
        assert part in text
    assert "add +8, KL 0.25" in page.text(".steering")
    assert page.count(".bars li") == 5
    assert page.count(".chart canvas") == 1
    # The choice is remembered.
    go(page, "#/layer/0/feature/2")
    assert page.count(".contexts.aligned") == 1
    assert "no answer" in page.text(".labels")


def test_back_forward_and_deep_links(page: Page, report: Report) -> None:
    steps = [
        "#/layer/0/feature/1",
        "#/layer/0/neurons",
        "#/layer/1/overlap",
        "#/layer/0/tree",
        "#/layer/1/feature/2",
    ]
    for step in steps:
        go(page, step)
    headings = [
        "unmistakable zebras",
        "Neurons of layer 0",
        "Shared neurons of layer 1",
        "Hierarchy of layer 0",
    ]
    for step, heading in reversed(list(zip(steps, headings, strict=False))):
        page.evaluate("history.back()")
        page.wait(f"location.hash === '{step}'")
        page.wait(f"document.querySelector('#view h2').textContent === '{heading}'")
    page.evaluate("history.forward()")
    page.wait("document.querySelector('#view h2').textContent === 'Neurons of layer 0'")
    page.open("about:blank")
    page.open(f"{report.path.as_uri()}#/layer/1/feature/2")
    page.wait("document.querySelector('.crumb').textContent === 'layer 1 · feature 2'")
    for nowhere in (
        "#/layer/9/feature/0",
        "#/layer/0/feature/5",
        "#/layer/0/constructor/1",
        "#/layer/1/tree",
        "#/x",
    ):
        go(page, nowhere)
        assert page.text("#view h2") == "Not in this report"


def test_neurons(page: Page) -> None:
    go(page, "#/layer/0/feature/1")
    neuron = page.text(".bars a")
    page.click(".bars a")
    assert current(page) == f"#/layer/0/neuron/{neuron}"
    assert "0/1" in page.text(".bars").split("\n")
    go(page, "#/layer/0/neurons")
    page.evaluate("document.getElementById('neuron').focus()")
    page.type("24")
    page.press("Enter")
    assert "from 0 to 23" in page.text(".problem[role=alert]")
    page.press("Backspace")
    page.press("Enter")
    assert current(page) == "#/layer/0/neuron/2"


def test_overlap(page: Page) -> None:
    go(page, "#/layer/0/overlap")
    box = page.evaluate(
        "(() => { const r = document.querySelector('.u-over').getBoundingClientRect();"
        "return [r.x, r.y, r.width, r.height]; })()"
    )
    # The second cell of the first row.
    page.point(box[0] + 0.3 * box[2], box[1] + 0.1 * box[3])
    page.wait("/share \\d+ of \\d+ and \\d+ neurons/.test(document.querySelector('.readout').textContent)")
    page.point(box[0] + 0.1 * box[2], box[1] + 0.1 * box[3])
    page.wait("/: \\d+ neurons$/.test(document.querySelector('.readout').textContent)")
    # Something is drawn in the plot: not all of its pixels are alike.
    colours = page.evaluate(
        "(() => { const c = document.querySelector('.heat canvas');"
        "const p = new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer);"
        "return new Set(p).size; })()"
    )
    assert colours > 2
    assert page.count(".table tbody tr") > 0
    page.click("#layers a:last-child")
    assert page.text("#view h2") == "Shared neurons of layer 1"


def test_tree(page: Page) -> None:
    go(page, "#/layer/0/tree")
    assert page.count(".tree details") == 1
    page.click(".tree summary")
    page.wait("document.querySelectorAll('.tree details').length === 3")
    assert "67 %" in page.text(".tree")
    page.click(".tools button:last-child")
    assert page.count(".tree details[open]") == 0
    page.click(".tools button")
    assert page.count(".tree details[open]") == 3


def test_dark_mode(page: Page, report: Report) -> None:
    def ground() -> str:
        colour: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return colour

    light = ground()
    page.media(prefers_color_scheme="dark")
    dark = ground()
    assert dark != light
    page.click("#theme")
    assert ground() == light
    assert page.text("#theme") == "○ Light"
    page.open("about:blank")
    page.open(report.path.as_uri())
    assert page.text("#theme") == "○ Light"
    assert ground() == light
    page.media(prefers_color_scheme="light")
    page.click("#theme")
    assert ground() == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page: Page, scheme: str) -> None:
    page.media(prefers_color_scheme=scheme)
    for view in (
        "#/about",
        "#/layer/0/feature/0",
        "#/layer/0/feature/2",
        "#/layer/0/overlap",
        "#/layer/0/tree",
    ):
        go(page, view)
        # Colours fade from one to the next.
        page.wait("document.getAnimations().length === 0")
        checked, faint = page.evaluate(FAINT)
        assert checked > 20
        assert faint == [], view


def test_narrow(page: Page) -> None:
    page.resize(*NARROW)
    views = (
        "#/features",
        "#/layer/0/feature/0",
        "#/layer/0/overlap",
        "#/layer/0/neurons",
        "#/layer/0/tree",
        "#/about",
    )
    for view in views:
        go(page, view)
        assert page.evaluate("document.documentElement.scrollWidth") == NARROW[0], view
        # One at a time.
        shown = page.evaluate(
            "['list', 'main'].map((id) => document.getElementById(id).offsetParent !== null)"
        )
        assert shown == [view == "#/features", view != "#/features"]
    go(page, "#/features")
    page.press("j")
    assert current(page) == "#/features"
    page.press("Enter")
    assert current(page) == "#/layer/0/feature/0"
    page.press("Escape")
    assert current(page) == "#/features"
    assert page.evaluate("document.activeElement.dataset.place") == "0/0"


def test_hostile_text_shows_as_text(page: Page) -> None:
    spelled = HOSTILE.replace("\u2028", "\\u2028").replace("\u202e", "\\u202e")
    for view in ("#/layer/0/feature/0", "#/layer/0/tree", "#/layer/0/overlap", "#/layer/0/neurons"):
        go(page, view)
        assert page.count("img") == 0
        assert page.count("script") == 2
        assert "\u202e" not in page.evaluate("document.body.innerText")
        if view.endswith("tree"):
            page.click(".tools button")
        assert spelled in page.text("#view"), view
    go(page, "#/layer/0/feature/0")
    assert page.evaluate("document.querySelector('.contexts .text').textContent") == spelled * 3
    assert "\\u202eevil" in page.text(".lenses")
    page.press("/")
    page.type("<!--<script>")
    assert places(page) == ["0/0"]


def test_policy_is_a_second_line(page: Page) -> None:
    # Were markup to get in after all: neither its handlers nor its requests would run.
    page.evaluate(
        "document.getElementById('view').innerHTML ="
        '\'<img src="http://127.0.0.1:9/x" onerror="window.hit = 1"><p style="color: red">x</p>\''
    )
    page.press("F2")
    assert page.evaluate("window.hit") is None
    refused = "\n".join(page.problems)
    assert "img-src" in refused
    assert "style-src" in refused
    # It is noted before it is refused.
    assert page.requests.pop() == "http://127.0.0.1:9/x"
    page.problems.clear()


def test_roles_and_names(page: Page) -> None:
    go(page, "#/layer/0/feature/1")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {}
    for node in nodes:
        if not node["ignored"]:
            roles.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("main", "navigation", "complementary", "search", "banner", "status"):
        assert role in roles, role
    for role in ("button", "link", "combobox", "searchbox"):
        assert all(roles[role]), f"a {role} without a name"
    assert any(name.startswith("Histogram of strengths") for name in roles["image"])
    assert roles["heading"][:2] == ["tiny · run", "unmistakable zebras"]


def test_print_shows_the_feature_alone(page: Page) -> None:
    go(page, "#/layer/0/feature/1")
    page.call("Emulation.setEmulatedMedia", media="print")
    try:
        shown = page.evaluate(
            "['list', 'tabs', 'view'].map((id) => document.getElementById(id).checkVisibility())"
        )
        assert shown == [False, False, True]
        assert page.evaluate("getComputedStyle(document.getElementById('main')).overflowY") == "visible"
    finally:
        page.call("Emulation.setEmulatedMedia", media="")
