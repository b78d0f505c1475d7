import {choose, define, focused, make} from "./dom.mjs";
import {heightOf, partsOf, visible} from "./layout.mjs";
import {colorAt, css, inkOn, placeOn} from "./scales.mjs";

// Tokens in their texts, colored by a score. Only parts near the window hold elements: a text of 50,000 tokens scrolls as a
// short one.
class BasinTokens extends HTMLElement {
  load({strings, rows, sequences}) {
    this.texts = rows.map(code => strings[code]);
    this.view = null;
    this.cursor = 0;
    this.near?.disconnect();
    this.replaceChildren();
    this.near = new IntersectionObserver(
      entries => entries.forEach(e => {
        e.target.near = e.isIntersecting;
        if (e.isIntersecting) this.fill(e.target); else this.empty(e.target);
      }),
      {root: this.scrolls ? this : null, rootMargin: "800px 0px"});
    this.parts = partsOf(sequences.map(s => s.length), row => this.texts[row].includes("\n"));
    let doc = null, length = 0;
    const width = this.clientWidth || 600;
    this.boxes = this.parts.map((part, i) => {
      if (part.first && sequences[part.sequence].doc !== doc) this.append(make("h3", doc = sequences[part.sequence].doc));
      const box = make("div", undefined, part.first ? "text first" : "text");
      for (let row = part.start; row < part.end; row++) length += this.texts[row].length;
      box.style.minHeight = `${heightOf(length, width)}px`;
      box.dataset.part = i;
      length = 0;
      this.append(box);
      this.near.observe(box);
      return box;
    });
    if (this.boxes.length) this.fill(this.boxes[0]);
    this.addEventListener("click", e => { if (e.target.dataset.row) choose(this, {token: Number(e.target.dataset.row)}); });
  }

  // In a notebook the texts scroll in a box of their own: the notebook stays where it is.
  get scrolls() { return this.closest("basin-explorer[enclosed]") !== null; }

  partOf(row) { return this.parts.findIndex(part => row < part.end); }

  fill(box) {
    if (box.childElementCount) return;
    const {start, end} = this.parts[box.dataset.part];
    for (let row = start; row < end; row++) {
      const text = this.texts[row];
      const span = make("span", visible(text) + (text.includes("\n") ? "\n" : ""));
      span.dataset.row = row;
      span.tabIndex = row === this.cursor ? 0 : -1;
      if (this.view) this.paint(span, row);
      box.append(span);
    }
    box.style.minHeight = "";
  }

  empty(box) {
    // The part with the token that the tab key reaches stays: else the key would go past all texts.
    if (!box.childElementCount || box.contains(focused(this)) || box === this.boxes[this.partOf(this.cursor)]) return;
    box.style.minHeight = `${box.offsetHeight}px`;
    box.replaceChildren();
  }

  paint(span, row) {
    const {values, scale, dark, chosen, near, colors} = this.view, value = values[row], missing = Number.isNaN(value);
    const color = missing ? null : colors[Math.round((placeOn(value, scale) + 1) * 100)];
    span.style.background = missing ? "" : color.ground;
    span.style.color = missing ? "" : color.ink;
    span.className = `${missing ? "none" : ""}${row === chosen ? " chosen" : ""}${near.has(row) ? " near" : ""}`.trim();
    span.setAttribute("aria-current", String(row === chosen));
  }

  show(view) {
    const colors = Array.from({length: 201}, (_, i) => colorAt(i / 100 - 1, view.dark)).map(c => ({ground: css(c),
      ink: css(inkOn(c))}));
    this.view = {...view, colors};
    if (view.chosen >= 0) this.move(view.chosen);
    for (const span of this.querySelectorAll(".text span")) this.paint(span, Number(span.dataset.row));
  }

  // One token at a time can be reached with the tab key: the arrows go on from it.
  move(row) {
    const before = this.span(this.cursor), left = this.boxes[this.partOf(this.cursor)], box = this.boxes[this.partOf(row)];
    if (before) before.tabIndex = -1;
    this.cursor = row;
    this.fill(box);
    this.span(row).tabIndex = 0;
    if (left !== box && left.near === false) this.empty(left);
  }

  span(row) { return this.querySelector(`span[data-row="${row}"]`); }

  reveal(row, focus) {
    this.fill(this.boxes[this.partOf(row)]);
    const span = this.span(row), {top, bottom} = span.getBoundingClientRect();
    const own = this.getBoundingClientRect();
    if (this.scrolls) {
      if (top < own.top || bottom > own.bottom) this.scrollTop += top - own.top - this.clientHeight / 3;
    } else if (top < 200 || bottom > innerHeight / 2) span.scrollIntoView({block: "center"});
    if (focus) span.focus({preventScroll: true});
  }
}
define("basin-tokens", BasinTokens);
