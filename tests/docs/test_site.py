"""The documentation site: whole, without dead ends, and, where there is a Chromium, as a reader sees it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from test_public_names import METHODS, NAMES

from browser import CHROMIUM, found
from pages import PAGES, ROOT, name

# What pages and the theme are made of; <v, T> or <path> of a text that forgot its backticks is none of it.
_TAGS = """
a abbr article aside b blockquote body br button circle code defs del details dialog div dl dt dd em figcaption figure
footer form g h1 h2 h3 h4 h5 h6 head header hr html i img input kbd label li line link main mark meta nav noscript ol p
path pre rect script section small span strong style sub summary sup svg symbol table tbody td template th thead time
title tr u ul use var
"""
# No part of the Python interface.
NOT_IN_THE_REFERENCE = {
    f"ilvae_fast.{module}" for module in ("_C", "cli", "training.toy_report", "training.study_report")
}


class _Reader(HTMLParser):
    """Collects tags, anchors, and what a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []  # without a click

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = {key: value or "" for key, value in attributes}
        self.anchors.update(given[key] for key in ("id", "name") if key in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("img", "script") and "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as ``make docs`` builds it: warnings are errors."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def read(site):
    """Each page of the site, read."""
    readers = {}
    for file in sorted(site.rglob("*.html")):
        if file.name != "404.html":  # whose links are absolute
            readers[file] = _Reader()
            readers[file].feed(file.read_text())
    return readers


def _in_nav(page: Path) -> bool:
    return re.search(rf"\s{re.escape(name(page))}$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE) is not None


def test_every_page_is_in_the_navigation():
    assert [name(page) for page in PAGES if not _in_nav(page)] == []


def test_markup_is_not_taken_for_tags(read):
    """``<v, T>`` outside of code would vanish from a page."""
    assert {(file.name, tag) for file, page in read.items() for tag in page.tags - set(_TAGS.split())} == set()


def test_no_backslash_is_left_before_a_bar(site):
    """GitHub wants one in the code of a table."""
    assert [file.name for file in site.rglob("*.html") if r"\|" in file.read_text()] == []


def test_links_of_the_site_lead_somewhere(site, read):
    for file, page in read.items():
        for link in page.links:
            if not link.startswith(("http:", "https:", "mailto:")):
                target, _, anchor = unquote(link).partition("#")
                destination = (file.parent / target).resolve() if target else file
                destination = destination / "index.html" if destination.is_dir() else destination
                assert destination.is_file(), f"{file.name}: {link}"
                if anchor and destination in read and not anchor.startswith("__"):
                    assert anchor in read[destination].anchors, f"{file.name}: {link}"


def test_nothing_comes_from_other_servers(site, read):
    for file, page in read.items():
        assert [source for source in page.loaded if re.match(r"(https?:)?//", source)] == [], file.name
        assert [s for s in page.loaded if not (file.parent / unquote(s).partition("?")[0]).is_file()] == [], file.name


def test_public_names_are_in_the_reference(site, read):
    anchors = set().union(*(page.anchors for file, page in read.items() if file.parent.name == "api"))
    modules = {module for module in NAMES if module not in NOT_IN_THE_REFERENCE}
    top = set(NAMES["ilvae_fast"].split())  # what is there too has its entry by that name
    entries = {
        f"ilvae_fast.{one}" if one in top else f"{module}.{one}" for module in modules for one in NAMES[module].split()
    } - {"ilvae_fast.__version__", "ilvae_fast.layers", "ilvae_fast.training.sweep"}
    entries.add("ilvae_fast.training.sweep.sweep")  # the module has the name of its function
    plain = {"extra_repr"}  # as any module of PyTorch has it
    entries |= {f"ilvae_fast.{c}.{m}" for c, methods in METHODS.items() for m in methods.split() if m not in plain}
    assert sorted(entries - anchors) == []


def test_docstrings_are_markdown(site):
    """No roles of Sphinx are left, no links inside of code, and no prose that was indented is taken for code."""
    for file in (site / "docs" / "api").glob("*.html"):
        text = file.read_text()
        assert [code for code in re.findall(r"<pre.*?</pre>", text, re.DOTALL) if "`" in code] == [], file.name
        assert [shape for shape in re.findall(r"<em>(.*?)</em>", text) if "," in shape] == [], file.name
        assert re.findall(r":(?:class|func|meth|mod|attr|data|exc):|\]\[ilvae_fast", text) == [], file.name


browser = pytest.mark.skipif(CHROMIUM is None, reason="NO CHROMIUM HERE: the site is not tried in a browser")

_STATES = """
const page = await open("docs/latents.html", 1200), errors = [];
page.addEventListener("error", (event) => errors.push(event.message));
const colours = new Set([...page.document.querySelectorAll(".latents-legend b")].map((digit) => digit.style.color));
const extent = (id) => {  // the width of what is drawn in the colours of the digits, as a part of the canvas
  const canvas = page.document.getElementById(id), {width, height} = canvas;
  const {data} = canvas.getContext("2d").getImageData(0, 0, width, height);
  let [left, right, sum] = [width, 0, 0];
  for (let p = 0; p < width * height; p++) {
    sum = (sum * 31 + data[4 * p] + 7 * data[4 * p + 3]) % 1000003;
    const colour = `rgb(${data[4 * p]}, ${data[4 * p + 1]}, ${data[4 * p + 2]})`;
    if (colours.has(colour)) [left, right] = [Math.min(left, p % width), Math.max(right, p % width)];
  }
  return {width: (right - left) / width, sum};
};
const slider = page.document.getElementById("latents-slider"), states = [];
for (let k = 0; k <= Number(slider.max); k++) {
  slider.value = k;
  slider.dispatchEvent(new page.Event("input"));
  states.push({
    L: page.document.getElementById("latents-L").textContent,
    cells: [...page.document.querySelectorAll("#latents td")].map((cell) => cell.textContent),
    address: page.location.hash,
    dots: extent("latents-plane").width,
    drawn: ["plane", "grid", "samples", "pairs"].map((id) => extent(`latents-${id}`).sum),
  });
}
const linked = await open("docs/latents.html#L=2", 390);
return {states, errors, linked: linked.document.getElementById("latents-L").textContent};
"""


@browser
def test_the_slider_shows_what_was_recorded(site):
    rows = json.loads((ROOT / "results" / "latents" / "digits.json").read_text())["rows"]
    result = found(site, _STATES)
    assert result["errors"] == []
    assert result["linked"] == "2"
    states = result["states"]
    assert [state["L"] for state in states] == [f"{row['L']:g}" for row in rows]
    assert [state["address"] for state in states] == [f"#L={row['L']:g}" for row in rows]
    for state, row in zip(states, rows, strict=True):
        names = ("gain", "nll", "elbo_kl", "mutual_information", "active_directions", "certified", "measured")
        assert [float(cell) for cell in state["cells"]] == pytest.approx([row[n] for n in names], abs=0.0051)
    for k in range(4):
        assert len({state["drawn"][k] for state in states}) == len(rows)
    # collapsed at 0, spread at 0.1, drawn together again by the largest
    dots = [state["dots"] for state in states]
    assert dots[0] < 0.1
    assert dots[1] > 0.5
    assert dots[-1] < dots[1] / 2


@browser
@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_the_screen(site, read, width):
    urls = [file.relative_to(site).as_posix() for file in read]
    script = f"""
const wide = [];
for (const url of {json.dumps(urls)}) {{
  const page = await open(url, {width});
  if (page.document.documentElement.scrollWidth > {width}) wide.push([url, page.document.documentElement.scrollWidth]);
  page.frameElement.remove();
}}
return wide;"""
    assert found(site, script) == []
