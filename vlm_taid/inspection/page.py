"""The inspection as one HTML page that needs no network, a keyboard reaches all of, and follows light and dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from .rows import InspectedRow, Piece, Prediction, StreamView
from .terminal import chip, counts, verdict, visible

HUES = 6  # colours of pairs, in turn
SIDE = 224  # pixels of a picture on the page, at most
CSS = """
:root { color-scheme: light dark; --page: #fff; --card: #f6f8fa; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0;
  --bad: #cf222e; --chip: #e3e8ee; --p0: #cfe4ff; --p1: #ffe3c2; --p2: #c9f0d6; --p3: #ead6fd; --p4: #ffd3e2;
  --p5: #dfe6a8; --bar: #3b82f6; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --ink: #e6edf3; --soft: #9198a1;
  --line: #30363d; --bad: #f85149; --chip: #2b323b; --p0: #153b6b; --p1: #633a0c; --p2: #12492a; --p3: #47246e;
  --p4: #641b3a; --p5: #464c12; --bar: #4c8df6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
h3 { font-size: .85rem; margin: 0 0 .4rem; color: var(--soft); font-weight: 600; }
ul { margin: .5rem 0 1rem; padding-left: 1.1rem; color: var(--soft); } li { overflow-wrap: anywhere; }
.row { border: 1px solid var(--line); border-radius: 8px; margin: 1.2rem 0; overflow: hidden; }
.row > header { padding: .6rem .9rem; background: var(--card); border-bottom: 1px solid var(--line); }
.row > header p { margin: .1rem 0 0; color: var(--soft); font-size: .85rem; }
.row.refused > header p { color: var(--bad); }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.side { padding: .8rem .9rem; min-width: 0; } .side + .side { border-left: 1px solid var(--line); }
.pictures { display: flex; flex-wrap: wrap; gap: .4rem; margin: 0 0 .6rem; }
.pictures img { border: 1px solid var(--line); border-radius: 4px; display: block; image-rendering: pixelated; }
.stream { font: .82rem/1.95 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.t { border-radius: 3px; padding: .1rem 0; color: var(--soft); } .special { font-size: .72rem; opacity: .8; }
.image { background: var(--chip); border-radius: 9px; padding: .12rem .55rem; color: var(--ink); }
.answer { outline: 1px dashed var(--bad); color: var(--ink); padding: .1rem .15rem; }
.paired { color: var(--ink); padding: .12rem .18rem; margin: 0 1px; cursor: pointer; }
.paired:focus-visible, .lit { outline: 2px solid var(--ink); outline-offset: 1px; }
.counts { color: var(--soft); font-size: .8rem; margin: .6rem 0 0; }
details { border-top: 1px solid var(--line); padding: .5rem .9rem; } summary { cursor: pointer; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.kl { text-align: right; white-space: nowrap; }
.top { display: inline-block; margin: 0 .7rem .1rem 0; white-space: nowrap; }
.top i { display: inline-block; height: .55rem; background: var(--bar); border-radius: 2px; margin-right: .25rem; }
code { font: .8rem ui-monospace, monospace; }
""" + "".join(f".h{i} {{ background: var(--p{i}); }}" for i in range(HUES))
# A token and its partner light up together, by pointer and by focus. Tab goes from stream to stream, left and right
# arrows from pair to pair, Home and End to the first and the last, up and down arrows to the partner.
SCRIPT = """
for (const row of document.querySelectorAll('.row')) {
  const all = [...row.querySelectorAll('[data-pair]')];
  const light = (at, on) => all.forEach(e => e.dataset.pair === at && e.classList.toggle('lit', on));
  for (const e of all) {
    const near = [...e.parentNode.querySelectorAll('[data-pair]')];
    const at = near.indexOf(e), partner = all.find(o => o.dataset.pair === e.dataset.pair && !near.includes(o));
    e.tabIndex = at ? -1 : 0;
    for (const [on, off] of [['mouseenter', 'mouseleave'], ['focus', 'blur']]) {
      e.addEventListener(on, () => light(e.dataset.pair, true));
      e.addEventListener(off, () => light(e.dataset.pair, false));
    }
    e.addEventListener('focus', () => near.forEach(o => o.tabIndex = o === e ? 0 : -1));
    e.addEventListener('keydown', key => {
      const next = {ArrowRight: near[at + 1], ArrowLeft: near[at - 1], Home: near[0], End: near[near.length - 1],
                    ArrowUp: partner, ArrowDown: partner}[key.key];
      if (next) { next.focus(); key.preventDefault(); }
    });
  }
}
"""


def page(summary: Sequence[str], rows: Sequence[InspectedRow]) -> str:
    """The page."""
    lines = "".join(f"<li>{escape(line)}</li>" for line in summary)
    legend = (
        '<p class="stream"><span class="t paired h0">paired answer token</span> has the same colour in both streams; '
        '<span class="t answer">unpaired answer token</span>; <span class="image">image × number of its tokens + marks '
        "that frame it or break its lines</span>; the rest is context. Blanks of answers are dots, line ends ⏎. "
        "Keys: Tab to a stream, ← → Home End along its pairs, ↑ ↓ to the partner.</p>"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Streams</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{CSS}</style></head><body><h1>How student and teacher read the data</h1><ul>{lines}</ul>{legend}"
        f"{''.join(map(_row, rows))}<script>{SCRIPT}</script></body></html>\n"
    )


def _row(row: InspectedRow) -> str:
    sides = "".join(
        _side(name, view)
        for name, view in (("student" if row.teacher else "both models", row.student), ("teacher", row.teacher))
        if view is not None
    )
    kind = "row refused" if row.refused else "row"
    return (
        f'<section class="{kind}"><header><h2>{escape(row.name)}</h2><p>{escape(verdict(row))}</p></header>'
        f'<div class="sides">{sides}</div>{_predictions(row.predictions)}</section>'
    )


def _side(name: str, view: StreamView) -> str:
    pictures = "".join(map(_image, view.pictures.images))
    return (
        f'<div class="side"><h3>{name}</h3>'
        + (f'<div class="pictures">{pictures}</div>' if pictures else "")
        + f'<p class="stream">{"".join(map(_piece, view.pieces))}</p><p class="counts">{escape(counts(view))}</p></div>'
    )


def _piece(piece: Piece) -> str:
    if piece.kind == "image":
        return f'<span class="image">{escape(chip(piece, "×"))}</span>'
    if piece.pair is None:
        text = visible(piece.text) if piece.kind == "answer" else piece.text
        return f'<span class="t {piece.kind}">{escape(text)}</span>'
    return (
        f'<span class="t paired h{piece.pair % HUES}" tabindex="0" data-pair="{piece.pair}" '
        f'title="pair {piece.pair + 1}">{escape(visible(piece.text))}</span>'
    )


def _image(image: Image.Image) -> str:
    buffer = io.BytesIO()
    shown = image.copy()
    shown.thumbnail((SIDE, SIDE))
    shown.save(buffer, "PNG", optimize=True)
    scale = max(1, 96 // max(shown.size))  # a very small picture is drawn larger
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    size = f"{image.width} x {image.height}"
    return (
        f'<img src="{source}" width="{shown.width * scale}" height="{shown.height * scale}" '
        f'alt="the picture as the model sees it, {size} pixels" title="{size}">'
    )


def _predictions(predictions: Sequence[Prediction]) -> str:
    if not predictions:
        return ""

    def top(side: list[tuple[str, float]]) -> str:
        return "".join(
            f'<span class="top"><i style="width:{p * 3:.2f}rem"></i><code>{escape(visible(token))}</code> '
            f"{p:.2f}</span>"
            for token, p in side
        )

    body = "".join(
        f'<tr><td><code class="t paired h{i % HUES}">{escape(visible(one.token))}</code></td>'
        f"<td>{top(one.student)}</td>"
        f'<td>{top(one.teacher)}</td><td class="kl">{one.kl:.4f}</td></tr>'
        for i, one in enumerate(predictions)
    )
    return (
        "<details open><summary>What the models predict at each pair, and KL(teacher || student)</summary>"
        '<div class="scroll"><table><thead><tr><th>answer token</th><th>student</th><th>teacher</th><th>KL, nats</th>'
        f"</tr></thead><tbody>{body}</tbody></table></div></details>"
    )
