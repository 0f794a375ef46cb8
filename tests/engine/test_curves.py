"""`report`: the figures are those of the runs, on a page that works offline, for everyone, whatever names it holds."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import read_jsonl, run_here, write_jsonl

from tisdpo_cli.engine.curves import report as door
from tisdpo_cli.engine.curves.results import thinned
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load, to_yaml


def step(number: int, **more: Any) -> dict[str, Any]:
    rate = {"learning_rate": 1e-6, "grad_norm": 2.0, "pairs_per_second": 30.5, "tokens_per_second": 900.0}
    metrics = {"loss": 0.7 - number / 100, "rewards/margins": number / 50, "rewards/accuracies": 0.5}
    return {"step": number, "epoch": number / 10, **metrics, **(rate if number else {}), **more}


def make_run(path: Path, steps: int = 5, finished: bool = True, **settings: Any) -> Path:
    """An output as train-dpo writes it, without a model."""
    flags = {"model": "m", "dataset": "d", "output_dir": str(path), **settings}
    made = load(COMMANDS["train-dpo"].settings, flags, environ={}).settings
    rows = [
        step(i, **({"eval/loss": 0.6, "eval/rewards/margins": 0.2} if i in (0, steps) else {}))
        for i in range(steps + 1)
    ]
    write_jsonl(path / "metrics.jsonl", rows)
    (path / "config.yaml").write_text(to_yaml(made))
    marker = {"command": "train-dpo", "made_from": {}}
    if finished:
        (path / "run.json").write_text(json.dumps({**marker, "versions": {"tisdpo": "1"}, "files": []}))
    else:
        (path / ".started.json").write_text(json.dumps(marker))
    return path


def report(*runs: Path, page: Path) -> dict[str, Any]:
    done = run_here("report", *runs, "-o", page, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return make_run(tmp_path / "a"), make_run(tmp_path / "b", 7, finished=False, beta="0.5", lr="1e-5")


# ---------------------------------------------------------------- what it reads


def test_the_figures_are_those_of_the_metrics(two: tuple[Path, Path], tmp_path: Path) -> None:
    found = report(*two, page=tmp_path / "r.html")
    assert found["path"] == str(tmp_path / "r.html")
    assert [(run["name"], run["command"], run["finished"], run["step"]) for run in found["runs"]] == [
        (str(two[0]), "train-dpo", True, 5), (str(two[1]), "train-dpo", False, 7),
    ]  # fmt: skip
    for run, path in zip(found["runs"], two, strict=True):
        rows = read_jsonl(path / "metrics.jsonl")
        for name, points in run["curves"].items():
            assert points == [[row["step"], row[name]] for row in rows if name in row]
        assert run["final"] == {name: value for name, value in rows[-1].items() if name not in ("step", "epoch")}
    assert set(found["runs"][0]["curves"]) == set(step(1)) - {"step", "epoch"} | {"eval/loss", "eval/rewards/margins"}


def test_only_the_settings_that_differ_are_compared(two: tuple[Path, Path], tmp_path: Path) -> None:
    found = report(*two, page=tmp_path / "r.html")
    assert found["settings"] == {"method.beta": [0.1, 0.5], "optim.learning_rate": [5e-7, 1e-5]}
    shown = (tmp_path / "r.html").read_text().partition("Settings that differ")[2]
    assert set(re.findall(r'scope="row" class="text">([^<]*)', shown)) == set(found["settings"])
    alone = report(two[0], page=tmp_path / "r.html")
    assert alone["settings"]["method.beta"] == [0.1]
    assert "output_dir" not in alone["settings"]


def test_a_run_that_was_killed_while_it_wrote_a_line(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", 5, finished=False)
    whole = (path / "metrics.jsonl").read_bytes()
    (path / "metrics.jsonl").write_bytes(whole[:-9])
    (run,) = report(path, page=tmp_path / "r.html")["runs"]
    assert (run["step"], len(run["curves"]["loss"])) == (4, 5)
    # After it resumed from a checkpoint, before the file was cut back: the newer line counts.
    (path / "metrics.jsonl").write_bytes(whole + json.dumps(step(3, loss=9.0)).encode() + b"\n")
    (run,) = report(path, page=tmp_path / "r.html")["runs"]
    assert run["curves"]["loss"][3] == [3, 9.0]
    assert len(run["curves"]["loss"]) == 6


@pytest.mark.parametrize("content", ["", '{"step": 0}\n', '{"step": 0, "loss": NaN, "rewards/margins": "x"}\n'])
def test_a_run_without_a_figure_yet(tmp_path: Path, content: str) -> None:
    path = make_run(tmp_path / "a", finished=False)
    (path / "metrics.jsonl").write_text(content)
    (path / "config.yaml").write_text("{")
    found = report(path, page=tmp_path / "r.html")
    assert (found["runs"][0]["curves"], found["settings"]) == ({}, {})
    assert "No steps yet." in (tmp_path / "r.html").read_text()


def test_of_a_pipeline_every_stage_is_drawn_in_order(tmp_path: Path) -> None:
    for stage in ("tisdpo", "dpo", "reverse"):
        make_run(tmp_path / "out" / stage)
    (tmp_path / "out" / "scored").mkdir()
    found = report(tmp_path / "out", tmp_path / "out" / "dpo", page=tmp_path / "r.html")
    assert [Path(run["name"]).name for run in found["runs"]] == ["dpo", "reverse", "tisdpo"]


def test_a_real_training(world: Path, tmp_path: Path) -> None:
    (run,) = report(world / "sft", page=tmp_path / "r.html")["runs"]
    assert (run["command"], run["finished"]) == ("train-sft", True)
    assert {"loss", "eval/loss", "examples_per_second", "learning_rate", "grad_norm"} <= set(run["curves"])


def test_what_is_no_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run")
    for given, message in (("rum", "did you mean"), (".", "no metrics.jsonl here")):
        done = run_here("report", tmp_path / given, "-o", tmp_path / "r.html")
        assert (done.code, message in done.error) == (2, True), done.err
    assert run_here("report", tmp_path / "run").code == 2
    done = run_here("report", tmp_path / "run", "-o", tmp_path / "no" / "r.html")
    assert (done.code, done.out) == (1, "")
    monkeypatch.setattr(door, "find_spec", lambda _: None)
    done = run_here("report", tmp_path / "run", "-o", tmp_path / "r.html")
    assert (done.code, done.error) == (2, "error: report needs matplotlib; pip install 'tisdpo[report]'")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(("count", "most"), [(0, 3), (1, 3), (3, 3), (4, 3), (100, 7), (600, 300), (601, 300)])
def test_thinned_curves_keep_their_mean(count: int, most: int) -> None:
    points = [(i, float(i * i)) for i in range(count)]
    thin = thinned(points, most)
    assert len(thin) <= most
    assert thin == sorted(thin)
    if count <= most:
        assert thin == points
    # Every point counts in one mean, in order.
    width = -(-count // most) if count else 1
    for (_, value), start in zip(thin, range(0, count, width), strict=True):
        own = [v for _, v in points[start : start + width]]
        assert value == pytest.approx(sum(own) / len(own))


# ---------------------------------------------------------------- the page


class Elements(HTMLParser):
    """The elements of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, Mapping[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


HOSTILE = "a<img src=x>&\"'$x^2$ _y_ \u202e{{7*7}}\x1b[31m 你好"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A page whose runs have hostile names and settings; enough of them for colors to repeat."""
    runs = [make_run(tmp_path / HOSTILE / f"_{i}", i + 1, beta=f"0.{i + 1}") for i in range(9)]
    page = tmp_path / "r.html"
    report(*runs, page=page)
    return page


def test_the_page_asks_for_nothing_and_runs_nothing(hostile: Path) -> None:
    text = hostile.read_text()
    found = Elements(text).found
    assert not {"script", "img", "link", "iframe", "object", "style "} & {tag for tag, _ in found}
    attributes = [(tag, name, value or "") for tag, own in found for name, value in own.items()]
    assert not [name for _, name, _ in attributes if name.startswith("on") or name == "style"]
    links = [value for _, name, value in attributes if name in ("href", "src", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    ids = [value for _, name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src &#39;sha256-{digest}&#39;" in text
    assert "url(http" not in text
    assert "<img" not in text
    assert "\u202e" not in text
    assert "{{7*7}}" in text


def test_every_chart_has_words_and_figures(two: tuple[Path, Path], tmp_path: Path) -> None:
    report(*two, page=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    labels = [own["aria-label"] for tag, own in Elements(text).found if tag == "svg" and own.get("role") == "img"]
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert titles == [
        "Loss", "Reward margin", "Reward accuracy", "Learning rate", "Gradient norm", "Pairs per second",
        "Tokens per second",
    ]  # fmt: skip
    assert [(label or "").partition(" by step")[0] for label in labels] == titles
    assert labels[0] == (
        "Loss by step: run 1 from 0.7 at step 0 to 0.65 at step 5; run 2 from 0.7 at step 0 to 0.63 at step 7"
    )
    table = text.partition("Loss in figures</summary>")[2].partition("</table>")[0]
    assert re.findall(r'<th scope="row">(\d+)', table) == [str(i) for i in range(8)]
    assert re.findall(r"<td>(.*?)</td>", table)[:4] == ["0.7", "0.6", "0.7", "0.6"]


def test_the_same_runs_make_the_same_page(two: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("1.html", "2.html"):
        report(*two, page=tmp_path / name)
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()
    assert len((tmp_path / "1.html").read_bytes()) < 200_000


def test_a_browser_shows_it_light_and_dark_without_a_violation(
    two: tuple[Path, Path], hostile: Path, tmp_path: Path, opened: Callable[..., Any]
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    report(*two, page=tmp_path / "two.html")
    inks = []
    for path, options in (
        (tmp_path / "two.html", {}), (tmp_path / "two.html", {"color_scheme": "dark"}), (hostile, {"width": 420}),
    ):  # fmt: skip
        tab = opened(path, **options)
        inks.append(tab.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill"))
        lines = tab.evaluate(
            "[...document.querySelectorAll('figure:first-of-type svg path')].map(e => getComputedStyle(e).stroke)"
        )
        assert len({line for line in lines if line != "none"}) >= 4  # axes, grid and two runs
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        checked = opened(path, bypass_csp=True, **options)
        found = axe.run(checked).response["violations"]
        assert [(v["id"], v["nodes"][0]["html"][:120]) for v in found] == []
    assert inks[0] != inks[1]
