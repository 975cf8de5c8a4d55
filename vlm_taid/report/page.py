"""The page itself: its style, its script and its frame. It needs no network and no other file."""

from __future__ import annotations

from html import escape

CSS = """
:root { color-scheme: light dark; --page: #fff; --card: #f6f8fa; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0;
  --right: #1a7f37; --partly: #9a6700; --wrong: #cf222e; --bar: #3b82f6; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --ink: #e6edf3; --soft: #9198a1;
  --line: #30363d; --right: #3fb950; --partly: #d29922; --wrong: #f85149; --bar: #4c8df6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0 .75rem; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); } th:first-child, td:first-child, .word { text-align: left; }
td.word:first-child { white-space: normal; min-width: 7rem; }
details { margin-top: .75rem; } summary { cursor: pointer; color: var(--soft); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow-x: auto;
  font-size: .8rem; line-height: 1.4; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1rem; }
figure { margin: 0 0 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem; }
.figures figure { margin: 0; } .alone { max-width: 640px; margin-top: 1rem; }
figure svg { display: block; width: 100%; height: auto; } figcaption { font-size: .85rem; color: var(--soft); }
figcaption b { color: var(--ink); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(168px, 46%), 1fr)); gap: .8rem; }
button { font: inherit; color: inherit; cursor: pointer; }
:focus-visible { outline: 3px solid var(--bar); outline-offset: 2px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; padding: 0;
  font-size: .82rem; text-align: left; display: flex; flex-direction: column; }
.card img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--page); }
.pictures { display: block; width: 100%; }
.pictures.several { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }
img.small { image-rendering: pixelated; }
.card > .text { padding: .5rem .6rem .6rem; overflow-wrap: anywhere; display: block; width: 100%; }
.card strong { display: block; line-height: 1.3; } .text span { display: block; color: var(--soft); }
.card .right, dialog .right { color: var(--right); } .card .partly, dialog .partly { color: var(--partly); }
.card .wrong, dialog .wrong { color: var(--wrong); }
dialog { width: min(960px, 94vw); max-height: 92vh; border: 1px solid var(--line); border-radius: 10px; padding: 1.2rem;
  background: var(--page); color: var(--ink); }
dialog::backdrop { background: #0009; }
dialog nav { display: flex; gap: .5rem; justify-content: flex-end; margin-bottom: .6rem; }
dialog nav button { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .2rem .7rem; }
dialog .about { display: flex; gap: 1rem; flex-wrap: wrap; } dialog .about > div { flex: 1 1 260px; }
dialog .about img { width: 240px; max-width: 100%; object-fit: contain; align-self: flex-start; }
dialog ul { list-style: none; margin: 0 0 .75rem; padding: 0; }
dialog h2 { margin: 0 0 .3rem; overflow-wrap: anywhere; } dialog h3 { font-size: .95rem; margin: 1rem 0 .3rem; }
dialog td { vertical-align: top; text-align: left; white-space: normal; } dialog th { text-align: left; }
fieldset { border: 1px solid var(--line); border-radius: 6px; margin: .8rem 0 0; display: flex; flex-wrap: wrap;
  gap: .3rem 1.2rem; } legend { color: var(--soft); }
.p { display: inline-block; height: .6rem; min-width: 1px; background: var(--bar); border-radius: 2px;
  margin-right: .35rem; }
.top { color: var(--soft); font-size: .78rem; display: flex; flex-wrap: wrap; gap: 0 .8rem; } td { min-width: 6rem; }
code { font: .85rem ui-monospace, monospace; white-space: pre-wrap; }
"""
# Enter opens a card; arrow keys go from card to card, in the grid and in the dialog; radio buttons choose the answer.
SCRIPT = """
const cards = JSON.parse(document.getElementById('cards').textContent);
const buttons = [...document.querySelectorAll('.card')];
const view = document.getElementById('view');
let open = 0;
const make = (tag, text, kind) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
};
const shown = text => text.replaceAll('\\n', '⏎').replaceAll(' ', '·');
const cell = token => {
  const td = make('td'), bar = make('span', undefined, 'p'), top = make('span', undefined, 'top');
  bar.style.width = `${token[1] * 3.5}rem`;
  for (const [text, p] of token[2]) if (p >= 0.001) top.append(make('span', `${shown(text)} ${p.toFixed(3)}`));
  td.append(bar, token[1].toFixed(3), top);
  return td;
};
const table = (head, rows) => {
  const all = make('table'), body = make('tbody'), row = make('tr'), scroll = make('div', undefined, 'scroll');
  for (const name of head) { const th = make('th', name); th.scope = 'col'; row.append(th); }
  all.append(make('thead')); all.tHead.append(row);
  for (const [token, ...cells] of rows) {
    const tr = make('tr'), first = make('td');
    first.append(make('code', shown(token)));
    tr.append(first, ...cells);
    body.append(tr);
  }
  all.append(body); scroll.append(all);
  return scroll;
};
const tokens = (choice, at) => {
  const models = Object.entries(choice.tokens), texts = models.map(([, list]) => list.map(t => t[0]).join('\\0'));
  const found = make('div');
  found.setAttribute('aria-live', 'polite');
  const head = 'Probability of each token, and the likeliest tokens in its place (of five, those over 0.001)';
  if (new Set(texts).size === 1) {
    found.append(make('h3', head));
    found.append(table(['token', ...models.map(([label]) => label)],
      models[0][1].map((token, i) => [token[0], ...models.map(([, list]) => cell(list[i]))])));
  } else for (const [label, list] of models) {
    found.append(make('h3', `${head}: ${label}`), table(['token', 'probability'], list.map(t => [t[0], cell(t)])));
  }
  at.replaceChildren(found);
};
const show = index => {
  open = (index + cards.length) % cards.length;
  const card = cards[open], about = make('div', undefined, 'about'), text = make('div'), rest = make('div');
  for (const picture of buttons[open].querySelectorAll('img')) about.append(picture.cloneNode());
  const question = make('h2', card.question);
  question.id = 'question';
  text.append(question);
  if (card.options.length) {
    const list = make('ul');
    list.append(...card.options.map(option => make('li', option)));
    text.append(list);
  }
  text.append(make('p', `References: ${card.references.join(' | ')}`));
  for (const {label, text: said, verdict, symbol} of card.answers) {
    text.append(make('div', `${symbol} ${label}: ${said}`, verdict));
  }
  about.append(text);
  view.querySelector('div').replaceChildren(about);
  if (card.choices.length) {
    const set = make('fieldset'), at = make('div');
    set.append(make('legend', 'Token by token: the answer'));
    card.choices.forEach((choice, number) => {
      const label = make('label'), input = make('input');
      Object.assign(input, {type: 'radio', name: 'choice', checked: number === 0});
      input.addEventListener('change', () => tokens(choice, at));
      label.append(input, ` ${choice.text} (${choice.of})`);
      set.append(label);
    });
    rest.append(set, at);
    tokens(card.choices[0], at);
    view.querySelector('div').append(rest);
  }
  view.scrollTop = 0;
};
buttons.forEach((button, index) => {
  button.addEventListener('click', () => { show(index); view.showModal(); });
  button.addEventListener('keydown', key => {
    const columns = buttons.filter(b => b.offsetTop === button.offsetTop).length;
    const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns}[key.key];
    if (step && buttons[index + step]) { buttons[index + step].focus(); key.preventDefault(); }
  });
});
view.addEventListener('close', () => buttons[open].focus());
view.addEventListener('keydown', key => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[key.key];
  if (step && key.target.type !== 'radio') { show(open + step); key.preventDefault(); }
});
document.getElementById('previous').addEventListener('click', () => show(open - 1));
document.getElementById('next').addEventListener('click', () => show(open + 1));
"""
DIALOG = (
    '<dialog id="view" aria-labelledby="question"><nav><button type="button" id="previous">‹ Previous</button>'
    '<button type="button" id="next">Next ›</button><form method="dialog"><button>Close</button></form></nav>'
    "<div></div></dialog>"
)


def page(title: str, subtitle: str, body: str, cards: str) -> str:
    """The page.

    Args:
        title: its heading, as text.
        subtitle: the line below, as text.
        body: HTML.
        cards: JSON of the cards in the body, in their order; empty for a page without cards.
    """
    # in a script element nothing but "<" can end it
    data = cards.replace("<", "\\u003c")
    view = f'{DIALOG}<script type="application/json" id="cards">{data}</script><script>{SCRIPT}</script>'
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{CSS}</style></head><body><main><h1>{escape(title)}</h1><p>{escape(subtitle)}</p>"
        f"{body}</main>{view if cards else ''}</body></html>\n"
    )
