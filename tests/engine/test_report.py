"""The HTML report in a real browser: light, dark and narrow, with and without scripts, and under hostile data.

Needs Chromium, and playwright to drive it; skipped without, unless $CHROMIUM names one.
"""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import pair_rows, read_jsonl, run_here, write_jsonl
from rich.text import Text

from tisdpo_cli.cli.inspection_view import picture
from tisdpo_cli.engine.inspection.inspect_weights import inspect_weights
from tisdpo_cli.engine.inspection.report.page import page
from tisdpo_cli.engine.inspection.results import Inspection
from tisdpo_cli.method.transforms import TRANSFORMS
from tisdpo_cli.model.tokenizer import load_tokenizer
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load

HOSTILE = (
    "</script><script>alert(1)</script>", "\"'><img src=x onerror=alert(2)>", "<!--", "]]>", "javascript:alert(3)",
    "\u2028\u2029", "\x1b[31mred\x1b]52;c;aGk=\x07", "{{ 7 * 7 }}{% raw %}", "&lt;b&gt;", "</style><b>", "👩‍👩‍👧 👍🏽",
    "مرحبا كيف حالك", "नमस्ते दुनिया", "你好，世界", "e\u0301\u0302\u0303", "\u202eabc\u2066", "x" * 20_000,
)  # fmt: skip


def inspection_of(scored: Path, html: Path, **more: Any) -> Inspection:
    loaded = load(COMMANDS["inspect-weights"].settings, {"scored": str(scored), "html": str(html), **more}, environ={})
    return inspect_weights(loaded.settings, "tisdpo inspect-weights")


@pytest.fixture(scope="module")
def hostile(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a dataset with hostile texts, in names and tokens too."""
    root = tmp_path_factory.mktemp("hostile")
    tokenizer = load_tokenizer(world / "sft")
    rows = []
    for i, attack in enumerate(HOSTILE):
        row: dict[str, Any] = {"prompt": f"{attack} p", "chosen": f"{attack} {i}", "rejected": f"no {attack[::-1]}\n"}
        for side in ("chosen", "rejected"):
            count = len(tokenizer.texts.encode([row[side]])[0])
            row[f"{side}_weight"] = [(-1) ** t * 0.1 * (t % 17) for t in range(count)]
        rows.append(row)
    scored = root / "<img src=x onerror=alert(9)>"
    write_jsonl(scored / "train.jsonl", rows)
    tokenizer.backend.save_pretrained(scored)
    (scored / "estimate.json").write_text(json.dumps({"models": {HOSTILE[0]: {"path": HOSTILE[1], "sha256": "1"}}}))
    found = inspection_of(scored, root / "r.html", min_count=1, sort="index")
    # Tokens that are attacks as a whole; the tokenizer has none.
    views = [
        replace(view, chosen=[replace(token, text=HOSTILE[i % len(HOSTILE)]) for i, token in enumerate(view.chosen)])
        for view in found.views
    ]
    (root / "r.html").write_text(page(replace(found, views=views)), encoding="utf-8")
    return root / "r.html"


@pytest.fixture(scope="module")
def report(contrast: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of real scores, with a comparison."""
    path = tmp_path_factory.mktemp("report") / "r.html"
    done = run_here(
        "inspect-weights", contrast / "scored", "--html", path, "--spans", "word", "--compare", "rank_based", "--sort",
        "index", "--min-count", "2",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert str(path) in done.err
    return path


@pytest.fixture(scope="module")
def chat(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of conversations: a short one, long ones with hostile texts, and one with a long tool result."""
    root = tmp_path_factory.mktemp("chat")

    def row(*prompt: tuple[str, str]) -> dict[str, Any]:
        messages = [{"role": role, "content": text} for role, text in prompt]
        return {
            "prompt": messages,
            **{side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")},
        }

    rows = [row(("user", "a short question"))]
    for attack in HOSTILE:
        rows.append(row(("system", f"Be kind. {attack}" + "\n" * 9 + "!"), ("user", f"the question {attack}")))
    rows.append(row(("user", "look it up"), ("tool", "found\n" * 9)))
    write_jsonl(root / "data" / "train.jsonl", rows)
    template = root / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    models, options = ("--forward", world / "sft", "--reverse", world / "sft"), ("--chat-template", template)
    for command in (
        ("estimate", *models, "-d", root / "data", "-o", root / "scored"),
        ("inspect-weights", root / "scored", "--html", root / "r.html", "--sort", "index"),
    ):
        done = run_here(*command, *options)
        assert done.code == 0, done.err
    return root / "r.html"


class Outline(HTMLParser):
    """Elements and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def outline(path: Path) -> Outline:
    elements = Outline()
    elements.feed(path.read_text(encoding="utf-8"))
    return elements


@pytest.mark.parametrize("name", ["report", "hostile", "chat"])
def test_the_file_holds_nothing_that_loads_or_runs(name: str, request: pytest.FixtureRequest) -> None:
    elements = outline(request.getfixturevalue(name))
    assert elements.tags.count("script") == 2
    assert not {"img", "iframe", "object", "embed", "link", "form", "base", "b onerror"} & set(elements.tags)
    assert not [key for key, _ in elements.attributes if key.startswith("on") or key == "style"]
    targets = [value or "" for key, value in elements.attributes if key in ("href", "src", "action", "xlink:href")]
    assert targets
    assert all(re.fullmatch(r"#[a-z0-9-]+", target) for target in targets)


def test_the_same_results_give_the_same_page(contrast: Path, tmp_path: Path) -> None:
    one, two = (page(inspection_of(contrast / "scored", tmp_path / "r.html")) for _ in range(2))
    assert one == two


def test_the_picture_asks_the_network_for_nothing(contrast: Path, tmp_path: Path) -> None:
    inspection = inspection_of(contrast / "scored", tmp_path / "r.html")
    attack = "</style>@font-face {src: url(http://x)}<style>"
    image = picture(replace(inspection, transform=attack), Text("stages come first"))
    assert image.startswith("<svg")
    style, _, body = image.partition("</style>")
    assert "@font-face" not in style
    assert "url(" not in style
    targets = re.findall(r"url\(([^)]*)\)", body)
    assert [target for target in targets if not target.startswith("#")] == ["http://x"], "only as text"
    # Data is shown as it is, not searched for fonts.
    assert "&lt;/style&gt;@font-face&#160;{src:&#160;url(http://x)}&lt;style&gt;" in body
    assert body.index("stages&#160;come&#160;first") < body.index("@font-face")
    assert not {"image", "script", "link", "style"} & set(re.findall(r"<(\w+)", body))


# ---------------------------------------------------------------- in a browser


def until(tab: Any, text: str) -> None:
    """Wait until the counter of pairs ends so. (The policy of the page forbids the waiting of playwright.)"""
    deadline = time.monotonic() + 5
    while not tab.locator("#place").inner_text().endswith(text):
        assert time.monotonic() < deadline, tab.locator("#place").inner_text()
        tab.wait_for_timeout(20)


def token_texts(tab: Any, pair: int, side: int) -> str:
    return tab.locator(f"#pair-{pair} .tokens").nth(side).inner_text()


def plain(text: str) -> str:
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_pairs_can_be_read_with_scripts_and_without(contrast: Path, report: Path, opened, scripts: bool) -> None:
    tab = opened(report, java_script_enabled=scripts)
    rows = read_jsonl(contrast / "scored" / "train.jsonl")
    assert tab.locator("article").count() == 10
    for i in range(10):
        for k, side in enumerate(("chosen", "rejected")):
            shown = plain(token_texts(tab, i, k)).replace("·", "").replace("⏎", "")
            assert shown.startswith(plain(rows[i][side]))
        assert plain(rows[i]["prompt"]) in plain(tab.locator(f"#pair-{i} .prompt").inner_text())
    assert tab.locator("#controls").is_visible() == scripts
    assert tab.locator("svg.chart").count() == 6
    coloured = [tab.locator(f".tokens .{sign}{n}").count() for sign in "pn" for n in (1, 2, 3, 4)]
    assert sum(coloured) > 20


def test_both_ways_colour_the_same(report: Path, opened) -> None:
    """The script starts with what the page shows without it."""
    looks = "els => els.map(e => e.className.split(' ').filter(c => /^(p|n)[1-4]$|clipped|eos|none/.test(c)).join(' '))"
    # The script runs in neither evaluation's way: locators work without page scripts too.
    still, alive = opened(report, java_script_enabled=False), opened(report)
    count = still.locator("span.t").count()
    assert count == alive.locator("span.t").count() > 200
    shown = alive.locator("span.t").evaluate_all(looks)
    for at in range(0, count, 23):
        kept = [c for c in still.locator("span.t").nth(at).get_attribute("class").split() if c != "t"]
        assert " ".join(kept) == shown[at]


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_pairs_are_on_the_first_screen(report: Path, opened, scripts: bool) -> None:
    tab = opened(report, java_script_enabled=scripts)
    box = tab.locator("article .tokens").first.bounding_box()
    assert box["y"] + box["height"] < 700
    names = tab.locator("main h2").all_inner_texts()
    assert names == ["Pairs", "Checks", "Summary", "Tokens", "Comparison"]
    assert [text.split(" (")[0] for text in tab.locator("nav li").all_inner_texts()] == [*names, "Provenance"]


def test_both_ways_say_the_same_figures(report: Path, opened) -> None:
    still, alive = opened(report, java_script_enabled=False), opened(report)
    heads = "article section > p"
    assert still.locator(heads).all_inner_texts() == alive.locator(heads).all_inner_texts()
    for at in range(0, still.locator("span.t").count(), 37):
        alive.locator("span.t").nth(at).hover()
        assert card_of(alive)["weight"] == still.locator("span.t").nth(at).get_attribute("title")


def card_of(tab: Any) -> dict[str, str]:
    names, values = (tab.locator(f"#card {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def spelled_out(formula: str) -> tuple[float, float]:
    """What the left side of a formula is, and what its right side says."""
    left, _, right = formula.replace("−", "-").replace("·", "*").rpartition(" = ")

    def clamp(value: float, low: float, high: float) -> float:
        return min(max(value, low), high)

    number = re.fullmatch(r"\[number (\d+) of \d+ by s, the first (\d+) get 1\]", left)
    if number:
        return float(int(number[1]) <= int(number[2])), float(right)
    return eval(left, {"__builtins__": {}, "exp": math.exp, "clamp": clamp}), float(right)


@pytest.mark.parametrize("normalize", ["none", "mean"])
def test_the_card_spells_out_the_formula_with_its_numbers(contrast: Path, tmp_path: Path, opened, normalize) -> None:
    params = {
        "exp": "exp:mu=2,k=1.5", "rank_based": "rank_based", "threshold_and_scale": "threshold_and_scale",
        "threshold": "threshold", "binary": "binary:top_percent=40", "random": "random", "origin": "origin",
    }  # fmt: skip
    assert set(params) == set(TRANSFORMS)
    if normalize == "mean":
        params = {name: params[name] for name in ("exp", "rank_based")}
    path = tmp_path / "r.html"
    found = inspection_of(
        contrast / "scored", path, sort="index", transform="exp", previews=" ".join(params.values()),
        normalize=normalize,
    )  # fmt: skip
    path.write_text(page(found), encoding="utf-8")
    tab = opened(path)
    for mode, option in enumerate(tab.locator("#mode option").all_inner_texts()):
        tab.select_option("#mode", str(mode))
        for side in (0, 1):
            tokens = tab.locator("#pair-1 .tokens").nth(side).locator("span.t")
            for at in (0, 3, tokens.count() - 1):
                tokens.nth(at).hover()
                card = card_of(tab)
                shown = option if option.startswith("weight") else "weight"
                weight = float(card[shown].replace("−", "-"))
                formula = card["formula"]
                assert float(formula.rpartition(" = ")[2].replace("−", "-")) == pytest.approx(weight, abs=0.0051)
                if normalize == "mean":
                    assert (" / mean of the response = " in formula) == (shown == "weight")
                elif "random" in formula:
                    assert "random" in option
                else:
                    left, right = spelled_out(formula)
                    assert left == pytest.approx(right, rel=0.03, abs=0.016), formula


@pytest.mark.parametrize("height", [900, 420, 200])
def test_the_card_never_covers_its_token(report: Path, opened, height: int) -> None:
    tab = opened(report)
    tab.set_viewport_size({"width": 1180, "height": height})
    tokens = tab.locator("article span.t")
    for at in range(0, tokens.count(), 41):
        tokens.nth(at).hover()
        card, token = tab.locator("#card").bounding_box(), tokens.nth(at).bounding_box()
        apart = (
            card["x"] >= token["x"] + token["width"]
            or card["x"] + card["width"] <= token["x"]
            or card["y"] >= token["y"] + token["height"]
            or card["y"] + card["height"] <= token["y"]
        )
        assert apart, (card, token)
        assert card["x"] >= 0


def test_the_value_that_colours_can_be_switched(contrast: Path, report: Path, opened) -> None:
    tab = opened(report)
    names = tab.locator("#mode option").all_inner_texts()
    assert names[:3] == ["weight", "score r", "r after the steps"]
    assert any(name.startswith("weight by rank_based") for name in names)
    assert not any(name.startswith("weight by exp") for name in names[3:]) or "exp" in names[3]
    index = next(i for i, name in enumerate(names) if name.startswith("weight by rank_based"))
    shown = json.loads(
        run_here("inspect-weights", contrast / "scored", "--index", "0", "--json", "--spans", "word", "--transform",
                 "rank_based").out
    )  # fmt: skip
    tab.select_option("#mode", str(index))
    assert "rank_based" in tab.locator("#legend").inner_text()
    box = tab.locator("#pair-0 .tokens").first
    for i, token in enumerate(shown["views"][0]["chosen"]):
        box.locator("span.t").nth(i).hover()
        rows = dict(zip(tab.locator("#card dt").all_inner_texts(), tab.locator("#card dd").all_inner_texts(),
                        strict=True))  # fmt: skip
        assert float(rows[names[index]].replace("−", "-")) == pytest.approx(token["weight"], abs=1e-4)
        assert float(rows["score r"].replace("−", "-")) == pytest.approx(token["score"], abs=1e-4)
        assert rows["position, id"] == f"{i}, {token['id']}"
        assert rows["bytes"] == token["bytes"]


def test_search_filter_order_and_pages(contrast: Path, report: Path, opened) -> None:
    tab = opened(report)
    rows = read_jsonl(contrast / "scored" / "train.jsonl")

    def shown() -> list[int]:
        return [int(name.split("-")[1]) for name in tab.locator("article").evaluate_all("els => els.map(e => e.id)")]

    assert shown() == list(range(10))
    assert tab.locator("#place").inner_text() == "1 to 10 of 24"
    tab.click("#next")
    assert shown() == list(range(10, 20))
    tab.select_option("#size", "25")
    assert shown() == list(range(24))
    word = "bicycle" if "bicycle" in rows[0]["prompt"] else "bike"
    tab.fill("#search", word)
    until(tab, "of 6")
    wanted = [i for i, row in enumerate(rows) if word in row["prompt"] + row["chosen"] + row["rejected"]]
    assert shown() == wanted
    tab.fill("#search", "nothing has this")
    until(tab, "0 of 24")
    tab.fill("#search", "")
    until(tab, "of 24")
    tab.select_option("#sort", "margin")

    def total(row: dict, side: str) -> float:
        return -sum(row[f"{side}_weight"]) - row[f"{side}_eos_weight"]

    margins = {i: total(row, "chosen") - total(row, "rejected") for i, row in enumerate(rows)}
    order = shown()
    assert sorted(order) == list(range(24))
    assert all(margins[a] <= margins[b] + 2e-4 for a, b in pairwise(order))
    tab.select_option("#filter", "wrong")
    assert shown() == [i for i in order if margins[i] < 0]


def test_keys_move_between_tokens_pairs_and_pages(report: Path, opened) -> None:
    tab = opened(report)
    tab.keyboard.press("j")
    tab.keyboard.press("j")
    assert tab.evaluate("document.activeElement.id") == "pair-1"
    tab.keyboard.press("k")
    assert tab.evaluate("document.activeElement.id") == "pair-0"
    tab.locator("#pair-0 .tokens").first.focus()
    assert tab.locator("#card").is_visible()
    first = tab.locator("#card").inner_text()
    assert tab.locator("#announcement").inner_text().startswith("token ")
    tab.keyboard.press("ArrowRight")
    second = tab.locator("#card").inner_text()
    assert second != first
    tab.keyboard.press("ArrowLeft")
    assert tab.locator("#card").inner_text() == first
    tab.keyboard.press("Escape")
    assert not tab.locator("#card").is_visible()
    tab.keyboard.press("n")
    assert tab.locator("article").first.get_attribute("id") == "pair-10"
    tab.keyboard.press("p")
    assert tab.locator("article").first.get_attribute("id") == "pair-0"
    tab.keyboard.press("/")
    assert tab.evaluate("document.activeElement.id") == "search"
    tab.keyboard.type("jkn")
    assert tab.input_value("#search") == "jkn"


def test_a_link_to_a_pair_opens_its_page(report: Path, opened) -> None:
    tab = opened(report, "#pair-17")
    assert tab.locator("#pair-17").is_visible()
    assert tab.locator("article").first.get_attribute("id") == "pair-10"
    tab.evaluate("location.hash = '#pair-3'")
    tab.wait_for_selector("#pair-3")
    assert tab.locator("#pair-3").bounding_box()["y"] < 900


def brightness(tab: Any) -> float:
    colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def test_dark_by_the_system_and_by_the_button(report: Path, opened) -> None:
    light, dark = opened(report, color_scheme="light"), opened(report, color_scheme="dark")
    assert brightness(light) > 200
    assert brightness(dark) < 60
    for tab in (light, dark):
        before = brightness(tab)
        tab.click("#theme")
        assert abs(brightness(tab) - before) > 100
        tab.click("#theme")
        assert brightness(tab) == before


@pytest.mark.parametrize(("width", "side_by_side"), [(1280, True), (420, False)])
def test_narrow_pages_stack_and_never_scroll_sideways(
    report: Path, hostile: Path, chat: Path, opened, width, side_by_side
) -> None:
    for path in (report, hostile, chat):
        tab = opened(path, width=width)
        boxes = [tab.locator("article").first.locator(".tokens").nth(k).bounding_box() for k in (0, 1)]
        assert (boxes[1]["x"] > boxes[0]["x"] + 100) == side_by_side
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_printed_pages_hold_pairs_and_no_controls(report: Path, opened) -> None:
    tab = opened(report)
    tab.emulate_media(media="print")
    assert not tab.locator("#controls").is_visible()
    assert tab.locator("#pair-0").is_visible()
    assert tab.evaluate("getComputedStyle(document.querySelector('.tokens span.t')).printColorAdjust") == "exact"


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_hostile_data_is_shown_as_text(hostile: Path, opened, scripts: bool) -> None:
    """It opens no element, attribute, request or dialog, and nothing reaches the console; see `opened`."""
    tab = opened(hostile, java_script_enabled=scripts)
    page_text = tab.locator("#list").inner_text()
    assert "</script><script>alert(1)</script>" in page_text
    assert "<img src=x onerror=alert(2)>" in page_text
    assert "\\u202e" in page_text
    assert "\\x1b[31m" in page_text
    assert "مرحبا" in page_text
    assert "नमस्ते" in page_text
    assert "你好，世界" in page_text
    assert "<img src=x onerror=alert(9)>" in tab.locator("header").inner_text()
    assert tab.locator("img, iframe, object, embed, #list script, #list style").count() == 0
    if scripts:
        for i in range(tab.locator("#mode option").count()):
            tab.select_option("#mode", str(i))
        tab.fill("#search", "<script>")
        tab.wait_for_timeout(300)
        tab.locator(".tokens").first.focus()
        assert tab.locator("#card b, #card img, #card script").count() == 0


def test_a_very_long_text_is_folded_to_its_end(hostile: Path, opened) -> None:
    at = HOSTILE.index("x" * 20_000)
    tab = opened(hostile, f"#pair-{at}")
    fold = tab.locator(f"#pair-{at} details")
    assert fold.locator("summary").inner_text() == f"prompt of 20002 characters: …{'x' * 238} p"
    assert not fold.locator(".prompt").is_visible()
    fold.locator("summary").click()
    assert fold.locator(".prompt").inner_text() == "x" * 20_000 + " p"


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_a_long_conversation_is_folded_to_its_last_question(chat: Path, opened, scripts: bool) -> None:
    tab = opened(chat, java_script_enabled=scripts)
    assert tab.locator("#pair-0 details").count() == 0
    assert tab.locator("#pair-0 .turn").all_inner_texts() == ["user\na short question"]
    for i in range(1, 10):
        fold = tab.locator(f"#pair-{i} details")
        summary = fold.locator("summary").inner_text()
        assert summary.startswith("prompt of 2 turns: user the question")
        assert not fold.locator(".turn").first.is_visible()
    fold.locator("summary").focus()
    tab.keyboard.press("Enter")
    assert fold.locator(".turn").first.is_visible()
    assert fold.locator(".role").all_inner_texts()[1:] == ["system", "user"]
    assert tab.locator("#list img, #list script, #list style, .turn b:not(.role)").count() == 0
    if scripts:
        tab.select_option("#mode", "1")
        assert fold.locator(".turn").first.is_visible(), "what is unfolded stays so"
        tab.fill("#search", "look it up")
        until(tab, "of 1")
        last = tab.locator(f"#pair-{len(HOSTILE) + 1}")
        assert last.locator("summary").inner_text() == "prompt of 2 turns: user look it up"
        assert last.locator(".turn").last.is_visible(), "unfolded, because the search finds it there"
        assert last.locator(".tokens .eos").count() == 2


def test_right_to_left_text_runs_from_right_to_left(hostile: Path, opened) -> None:
    at = HOSTILE.index("مرحبا كيف حالك")
    tab = opened(hostile, f"#pair-{at}")
    for part, direction in ((".prompt", "rtl"), (".tokens", "rtl")):
        box = tab.locator(f"#pair-{at} {part}").first
        assert tab.evaluate("e => getComputedStyle(e).direction", box.element_handle()) == direction


def test_no_serious_accessibility_violation(report: Path, hostile: Path, chat: Path, opened) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    dark, narrow = {"color_scheme": "dark"}, {"width": 420}
    for path, options in ((report, {}), (report, dark), (report, narrow), (hostile, {}), (chat, {}), (chat, dark)):
        # The policy of the page would block the script of the checker.
        tab = opened(path, bypass_csp=True, **options)
        for step in (None, "4"):
            if step is not None and tab.locator("#mode option").count() > int(step):
                tab.select_option("#mode", step)
            found = axe.run(tab).response["violations"]
            assert [
                (v["id"], v["nodes"][0]["html"][:120]) for v in found if v["impact"] in ("serious", "critical")
            ] == []


@pytest.mark.slow
def test_five_thousand_pairs_open_at_once_and_scroll(world: Path, tmp_path: Path, opened) -> None:
    """Not a speed test of the machine: three seconds are many times what it takes."""
    tokenizer = load_tokenizer(world / "sft")
    rows = pair_rows(5000)
    for i, row in enumerate(rows):
        for side in ("chosen", "rejected"):
            row[side] = row[side] * 2
            count = len(tokenizer.texts.encode([row[side]])[0])
            row[f"{side}_weight"] = [((t * 7 + i) % 19 - 9) / 9 for t in range(count)]
    write_jsonl(tmp_path / "d" / "train.jsonl", rows)
    tokenizer.backend.save_pretrained(tmp_path / "d")
    path = tmp_path / "r.html"
    done = run_here("inspect-weights", tmp_path / "d", "--html", path, "--limit", "5000")
    assert done.code == 0, done.err
    began = time.perf_counter()
    tab = opened(path)
    until(tab, "of 5000")
    assert time.perf_counter() - began < 3
    assert tab.locator("article").count() == 10
    began = time.perf_counter()
    for _ in range(20):
        tab.keyboard.press("n")
    tab.mouse.wheel(0, 20_000)
    tab.select_option("#sort", "max")
    assert time.perf_counter() - began < 10
    assert tab.locator("#place").inner_text() == "1 to 10 of 5000"
