"""The report in a real browser: its scripts run, hostile text stays text, nothing overflows on a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from megatron_pmd.observe.journal import Journal
from megatron_pmd.observe.report import write_report
from megatron_pmd.rollout_file import write_rollout
from tests.observe.synthetic_run import HOSTILE, make_config, make_samples

# runs before every other script of the page and reports to the page around it
PROBE = """<script>
const errors = [];
addEventListener("error", (e) => errors.push(e.message));
addEventListener("unhandledrejection", (e) => errors.push(String(e.reason)));
addEventListener("securitypolicyviolation", (e) => errors.push("blocked " + e.blockedURI));
const waiting = setInterval(() => {
  const root = document.documentElement;
  if (!root.dataset.ready && !errors.length) return;
  clearInterval(waiting);
  const choose = document.getElementById("browse-iteration");
  choose.selectedIndex = choose.options.length - 1;
  choose.dispatchEvent(new Event("change"));
  parent.postMessage({
    errors, ready: root.dataset.ready, title: document.title,
    innerWidth, scrollWidth: root.scrollWidth,
    wide: [...document.querySelectorAll("main *")].filter((e) => !e.closest(".scroll, .plot, pre, select")
      && e.getBoundingClientRect().right > innerWidth).map((e) => e.tagName + "." + e.className),
    drawn: document.querySelectorAll(".plot .main-svg").length,
    plots: document.querySelectorAll(".plot").length,
    iterations: [...choose.options].map((o) => o.textContent),
    prompts: [...document.querySelectorAll("#browse-prompt option")].map((o) => o.textContent),
    shown: document.getElementById("browse-shown").textContent,
    note: document.getElementById("browse-note").textContent,
    compared: document.getElementById("compare-shown").textContent,
  }, "*");
}, 50);
</script>"""
AROUND = """<!doctype html><body>
<iframe src="probed.html" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="found"></pre><script>
const found = document.getElementById("found");
addEventListener("message", (e) => {{ found.textContent = JSON.stringify(e.data); }});
</script></body>"""


def chromium(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what they wrote to the console."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.fail(
            "no Chromium to look at the report with; on Debian and Ubuntu: apt-get install -y chromium"
        )
    flags = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", "enable-logging=stderr"]
    command = [program, "--headless", *(f"--{flag}" for flag in flags), f"--user-data-dir={profile}"]
    command += ["--virtual-time-budget=20000", "--window-size=1280,1000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def look(folder: Path, width: int) -> dict[str, Any]:
    """Open the report in a frame of the given width: a headless window cannot be narrower than 500."""
    page = write_report(folder).read_text()
    (folder / "probed.html").write_text(page.replace("<head>", "<head>" + PROBE, 1))
    (folder / "around.html").write_text(AROUND.format(width=width))
    document, said = chromium(folder / "around.html", folder.parent / f"profile-{width}")
    assert said == []
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', document, re.DOTALL)
    assert found, "the page never reported"
    values: dict[str, Any] = json.loads(unescape(found))
    return values


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_works_and_does_not_scroll_sideways(make_run, width):
    found = look(make_run(extra=" unbroken" + "n" * 300 + HOSTILE), width)
    assert found["errors"] == []
    assert found["ready"] == "true"
    assert found["title"] == "synthetic · megatron-pmd"
    assert found["innerWidth"] == width
    assert found["scrollWidth"] <= width
    assert found["wide"] == []
    assert found["drawn"] >= found["plots"] >= 10


def test_the_sample_browser_and_the_comparison_are_filled(make_run):
    folder, samples = make_run(extra=HOSTILE), make_samples(6, 12, 2, HOSTILE)
    samples.insert(1, replace(samples[0], branch=1))
    write_rollout(folder / "evaluations/6.parquet", samples, 6)
    found = look(folder, 1280)
    assert found["iterations"] == [
        *(f"rollout of iteration {t}" for t in range(6)),
        "evaluation at the start",
        "evaluation after 3 iterations",
        "evaluation after 6 iterations",
    ]
    assert len(found["prompts"]) == 8
    # the chat template and the words that all prompts share are left out
    assert re.fullmatch(r"100 · mean reward [\d.]+ · 10 \+ 7", found["prompts"][0])
    assert "Reference answer" in found["shown"]
    assert 'document.title="owned"' in found["shown"]
    # an agent's second trajectory is shown, and is no response of its own
    assert [found["shown"].count(f"Response 0{more} ·") for more in ("", ", trajectory 1")] == [1, 1]
    assert "2 of 2 responses" in found["note"]
    assert "At the start" in found["compared"]
    assert "After 6 iterations" in found["compared"]


def test_the_page_of_a_run_that_has_logged_nothing_works(tmp_path):
    Journal.open(tmp_path / "run", make_config(), 0).close()
    found = look(tmp_path / "run", 400)
    assert found["errors"] == []
    assert found["ready"] == "true"
    assert found["scrollWidth"] <= 400
    assert found["iterations"] == []


def test_the_report_itself_runs_without_a_word_on_the_console(make_run):
    folder = make_run()
    document, said = chromium(write_report(folder), folder.parent / "profile")
    assert said == []
    assert 'data-ready="true"' in document
