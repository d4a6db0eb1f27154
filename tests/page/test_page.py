"""The page of a sweep: what is in the file, and what a browser makes of it."""

import base64
import hashlib
import json
import re
import tomllib
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
from browser import Browser, address_of, find_browser

import hap_hf
from hap_hf import ConfigError
from hap_hf.errors import PlanFormatError
from hap_hf.page import page_of, write_page
from hap_hf.tradeoff import Tradeoff, TradeoffGroup, TradeoffPoint

HEADS = [f"bert.encoder.layer.{i}.attention:heads" for i in range(2)]
FFN = [f"bert.encoder.layer.{i}.output:ffn" for i in range(2)]
GROUPS = (
    TradeoffGroup(HEADS[0], "heads", 4, (0.1, 0.001, 0.02, -0.0001), (0.01, 0.001, 0.01, 0.001)),
    TradeoffGroup(HEADS[1], "heads", 4, (1e-5, 0.3, 0.002, 0.02), (0.01, 0.001, 0.01, 0.001)),
    *(TradeoffGroup(name, "ffn", 100) for name in FFN),
)
SWEEP = Tradeoff(
    (
        TradeoffPoint(1.0, 2_000_000, 4e6, 0.5, 0.96, 10.0),
        TradeoffPoint(0.8, 1_600_000, 3e6, 0.51, 0.955, 8.0, 0.1, {HEADS[0]: "4k", HEADS[1]: "p3k", FFN[0]: "90k10p"}),
        TradeoffPoint(
            0.5, 1_100_000, 2e6, 0.9, 0.71, 6.0, 0.5,
            {HEADS[0]: "kpkp", HEADS[1]: "pkip", FFN[0]: "40k10i50p", FFN[1]: "7k93p"},
        ),
    ),
    "accuracy",
    True,
    machine="a machine",
    groups=GROUPS,
    subject="my-bert",
)  # fmt: skip
HOSTILE = "</script></style></title><script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium is installed")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def page(tmp_path):
    write_page(SWEEP, tmp_path / "sweep.html")
    return tmp_path / "sweep.html"


def facts(browser):
    return browser.js("document.getElementById('facts').innerText")


def test_it_shows_the_amount_of_its_address(browser, page):
    browser.open(address_of(page, "#keep=0.5"))
    assert browser.errors == []
    assert "1.1 M" in facts(browser)
    assert "71.0%" in facts(browser)
    assert browser.js("document.getElementById('keep').getAttribute('aria-valuetext')") == (
        "50% of the prunable parameters"
    )
    grid = "[...document.querySelectorAll('.heads td')].map(c => c.className.split(' ')[1][0]).join('')"
    assert browser.js(grid) == "sgsg" + "gsig"  # stays, gone, implant
    widths = browser.js("[...document.querySelectorAll('#widths .number')].map(n => n.textContent)")
    assert widths == ["2 of 4", "1+1 of 4", "40+10 of 100", "7 of 100"]
    assert "--keep 0.5" in browser.js("document.getElementById('take').innerText")
    assert browser.js("document.querySelectorAll('#charts svg').length") == 4
    # By what the loss says of them: the most needed head is the darkest, one below zero the lightest.
    shades = browser.js("[...document.querySelectorAll('.heads td')].map(c => c.className.split(' ')[0])")
    assert (shades[5], shades[3]) == ("s6", "s0")


def test_without_an_address_the_best_choice_is_shown_and_keys_move_on(browser, page):
    browser.open(address_of(page))
    assert "1.6 M" in facts(browser)  # the smallest that loses at most 2%
    browser.js("document.getElementById('keep').focus()")
    browser.press("ArrowLeft")
    assert "1.1 M" in facts(browser)
    assert browser.js("location.hash") == "#keep=0.5"
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.js("document.getElementById('said').textContent") == "all, the dense model"
    assert browser.js("document.querySelectorAll('.heads .gone').length") == 0
    browser.js("location.hash = '#keep=0.51'")
    browser.js("new Promise(done => setTimeout(done, 50))")
    assert browser.js("document.querySelector('.numbers .now th').textContent") == "0.5"
    assert browser.errors == []


def test_heads_are_read_with_keys(browser, page):
    browser.open(address_of(page, "#keep=0.5"))
    browser.js("document.querySelector('.heads td').focus()")
    browser.press("ArrowDown")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    said = "layer.1.attention, head 2: an implant, sensitivity 0.002 ± 0.01"
    assert browser.js("document.getElementById('head').textContent") == said
    assert browser.js("document.querySelectorAll('.heads td[tabindex=\"0\"]').length") == 1


def test_it_asks_for_nothing_and_fits_a_narrow_window(browser, page):
    browser.open(address_of(page), width=600)
    assert browser.requests == [address_of(page)]
    assert browser.js("document.documentElement.scrollWidth") <= 600


def test_what_strangers_wrote_stays_text(browser, tmp_path):
    groups = (replace(GROUPS[0], name=f"a.{HOSTILE}:heads"), *GROUPS[1:])
    write_page(replace(SWEEP, subject=HOSTILE, metric=HOSTILE, machine=HOSTILE, groups=groups), tmp_path / "page.html")
    browser.open(address_of(tmp_path / "page.html"))
    assert browser.errors == []
    assert browser.js("window.pwned === undefined && document.images.length === 0 && document.scripts.length === 2")
    assert browser.js("document.querySelector('h1').textContent") == f"{HOSTILE}: {HOSTILE} against size and time"
    assert HOSTILE in browser.js("document.querySelector('.heads').textContent")
    (tmp_path / "naive.html").write_text(f"<title>{HOSTILE}</title>", encoding="utf-8")
    browser.open(address_of(tmp_path / "naive.html"))
    assert browser.js("window.pwned") >= 1
    # And should something slip through, the policy of the page stops it.
    slipped = page_of(SWEEP).replace("</main>", "</main><script>window.pwned = 1</script>")
    (tmp_path / "slipped.html").write_text(slipped, encoding="utf-8")
    browser.open(address_of(tmp_path / "slipped.html"))
    assert browser.js("window.pwned === undefined")
    assert any("Content Security Policy" in error for error in browser.errors)


def test_a_loss_alone_without_heads_and_times_is_shown_too(browser, tmp_path):
    points = [
        TradeoffPoint(1.0, 500, 700.0, 2.5, 2.5),
        TradeoffPoint(0.5, 300, 400.0, float("nan"), float("nan"), actions={"a:channels": "kkpp"}),
    ]
    sweep = Tradeoff(tuple(points), groups=(TradeoffGroup("a:channels", "channels", 4),), counted_in="macs")
    write_page(sweep, tmp_path / "page.html")
    browser.open(address_of(tmp_path / "page.html", "#keep=0.5"))
    assert browser.errors == []
    assert browser.js("document.getElementById('section-heads').hidden")
    assert browser.js("document.querySelector('#widths .number').textContent") == "2 of 4"
    assert "--target-macs 0.5" in browser.js("document.getElementById('take').innerText")


def test_the_file_holds_its_data_and_names_what_may_run():
    text = page_of(replace(SWEEP, subject=HOSTILE))
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    assert "<" not in data
    assert [p["params"] for p in json.loads(data)["points"]] == [2_000_000, 1_600_000, 1_100_000]
    assert text.count("<script") == 2
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1]
    assert f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}" in text
    assert not re.search(r"\{\{\w+\}\}", text)
    assert re.findall(r"https?://[^\s\"']+", text) == ["http://www.w3.org/2000/svg"]  # a name, which nobody fetches
    assert "<td>1,100,000</td>" in text  # for browsers without JavaScript


def test_the_parts_of_the_page_are_in_what_is_installed():
    root = Path(hap_hf.__file__).parents[1]
    if not (root / "pyproject.toml").is_file():
        pytest.skip("installed, and not in a copy of the repository")
    shipped = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    parts = [f for f in (root / "hap_hf").rglob("*") if f.is_file() and f.suffix not in {".py", ".pyc", ".md"}]
    assert len(parts) >= 4
    for file in parts:
        name = file.relative_to(root / "hap_hf").as_posix()
        assert any(fnmatch(name, pattern) for pattern in shipped["hap_hf"]), f"{name} is in no pattern of package-data"


def test_a_sweep_is_checked_before_it_is_believed():
    values = json.loads(json.dumps(SWEEP.to_dict()))
    assert Tradeoff.from_dict(values) == SWEEP
    for place, wrong in (
        (("points", 1, "params"), "many"),
        (("points", 1, "actions"), {"a": 3}),
        (("points",), []),
        (("groups", 0, "units"), 10**12),
        (("groups", 0, "kind"), "<b>"),
        (("groups", 0, "error"), [1.0]),
        (("subject",), 3),
    ):
        broken = json.loads(json.dumps(values))
        inner = broken
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = wrong
        with pytest.raises(ConfigError, match="expected the values of"):
            Tradeoff.from_dict(broken)
    other = replace(SWEEP.points[1], actions={HEADS[0]: "99999999k"})
    with pytest.raises(PlanFormatError, match="exactly 4 units"):
        page_of(replace(SWEEP, points=(SWEEP.points[0], other)))
