"""Pages in headless Chromium: what it makes of them, and what a reader of the screen or of the keyboard meets."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = Path("/usr/bin/chromium")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --dump-dom"
)
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
_DARK = "@media (prefers-color-scheme: dark)"
# WCAG 2.2, 1.4.3: the contrast of each text with what is behind it; and what the Tab key reaches, in order.
_PROBE = """
<script>
const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
const behind = element => {
  for (; element; element = element.parentElement) {
    const colour = numbers(getComputedStyle(element).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), contrasts = [];
while (texts.nextNode()) {
  const element = texts.currentNode.parentElement, text = texts.currentNode.data.trim();
  if (!text || element.closest("svg, script")) continue;
  const [a, b] = [numbers(getComputedStyle(element).color), behind(element)].map(luminance);
  contrasts.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), text.slice(0, 60)]);
}
const focusable = [...document.querySelectorAll("a[href], [tabindex]")].map(element => {
  element.focus();
  const own = document.activeElement === element, style = getComputedStyle(element);
  return [element.tagName, element.getAttribute("aria-label") || element.innerText, own && style.visibility !== "hidden"];
});
const found = {contrasts, focusable, width: document.documentElement.scrollWidth, window: innerWidth, title: document.title};
document.documentElement.innerHTML = "<pre id=found></pre>";
document.getElementById("found").textContent = JSON.stringify(found);
</script>
"""


def dump_dom(page: Path, profile: Path, *flags: str) -> str:
    """The page as the browser has read it."""
    command = [str(CHROMIUM), *_FLAGS.split(), *flags, f"--user-data-dir={profile}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout


def probe(page: Path, folder: Path, *, dark: bool) -> dict[str, Any]:
    """Contrasts, focusable elements and widths of a copy of ``page`` that may run a script, on a narrow screen."""
    text = _POLICY.sub("", page.read_text(encoding="utf-8"))
    if dark:
        assert _DARK in text
        text = text.replace(_DARK, "@media all")
    copy = folder / f"probe-{dark}.html"
    copy.write_text(text.replace("</body>", f"{_PROBE}</body>"), encoding="utf-8")
    dom = dump_dom(copy, folder / "profile", "--window-size=500,900")
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', dom, flags=re.DOTALL)
    return dict(json.loads(html.unescape(found)))
