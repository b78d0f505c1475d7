import {choose, define, make} from "./dom.mjs";
import {columnsOf, furthest} from "./layout.mjs";
import {colorAt, css, placeOn} from "./scales.mjs";

const LEFT = 34, BOTTOM = 16;

// One text at every layer: a row a layer, the last on top, a column a token or, in a long text, a few.
class BasinMap extends HTMLElement {
  connectedCallback() {
    if (this.canvas) return;
    this.canvas = make("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");  // its arrows reach it also where a reader has its own
    this.canvas.setAttribute("aria-roledescription", "map");
    this.append(this.canvas);
    this.canvas.addEventListener("click", e => {
      const at = this.at(e);
      if (at) choose(this, {token: at.token, layer: at.layer});
    });
    this.canvas.addEventListener("mousemove", e => this.dispatchEvent(new CustomEvent("point", {bubbles: true,
      detail: {at: this.at(e), event: e}})));
    this.canvas.addEventListener("mouseleave", e => this.dispatchEvent(new CustomEvent("point", {bubbles: true,
      detail: {at: null, event: e}})));
    new ResizeObserver(() => { if (this.view && this.clientWidth !== this.drawn) this.draw(); }).observe(this);
  }

  at(event) {
    if (!this.view) return null;
    const x = event.offsetX - LEFT, {layers, start} = this.view, row = Math.floor(event.offsetY / this.height);
    const column = this.columns[Math.floor(x / this.width)];
    if (x < 0 || !column || row < 0 || row >= layers.length) return null;
    const layer = layers.length - 1 - row, found = this.shown(column, layer);
    return {token: found < 0 ? start + column[0] : found, layer, of: column[1] - column[0]};
  }

  // The token whose color a column has at a layer; -1: none has a score.
  shown([first, last], layer) {
    const {values, scales, start} = this.view;
    return furthest(values[layer], start + first, start + last, scales[layer].middle);
  }

  // `values`, `scales`: by layer. The text is the rows from `start` to `end`.
  show(view) { this.view = view; this.draw(); }

  draw() {
    const {values, scales, layers, start, end, layer, chosen, dark, label} = this.view, ratio = globalThis.devicePixelRatio || 1;
    const room = Math.max(60, this.clientWidth - LEFT - 2);
    this.drawn = this.clientWidth;
    this.columns = columnsOf(end - start, room);
    this.width = Math.min(room / this.columns.length, 24);
    this.height = Math.max(5, Math.min(16, Math.floor(240 / layers.length)));
    const wide = LEFT + this.width * this.columns.length + 2, high = this.height * layers.length + BOTTOM;
    this.canvas.width = Math.round(wide * ratio);
    this.canvas.height = Math.round(high * ratio);
    this.canvas.style.width = `${wide}px`;
    this.canvas.style.height = `${high}px`;
    this.canvas.setAttribute("aria-label", label);
    const pen = this.canvas.getContext("2d"), style = getComputedStyle(this);
    pen.scale(ratio, ratio);
    pen.fillStyle = style.getPropertyValue("--none");
    pen.fillRect(LEFT, 0, this.width * this.columns.length, this.height * layers.length);
    layers.forEach((_, i) => {
      const top = (layers.length - 1 - i) * this.height;
      this.columns.forEach((column, j) => {
        const found = this.shown(column, i);
        if (found < 0) return;
        pen.fillStyle = css(colorAt(placeOn(values[i][found], scales[i]), dark));
        pen.fillRect(LEFT + j * this.width, top, Math.ceil(this.width * ratio) / ratio, this.height);
      });
    });
    pen.strokeStyle = pen.fillStyle = style.getPropertyValue("--ink");
    pen.lineWidth = 1.5;
    pen.strokeRect(LEFT, (layers.length - 1 - layer) * this.height, this.width * this.columns.length, this.height);
    const column = this.columns.findIndex(([first, last]) => chosen - start >= first && chosen - start < last);
    if (column >= 0) pen.strokeRect(LEFT + column * this.width - .5, 0, Math.max(this.width, 2) + 1, this.height * layers.length);
    pen.fillStyle = style.getPropertyValue("--soft");
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    const step = Math.ceil(14 / this.height);
    layers.forEach((l, i) => { if (i % step === 0) pen.fillText(String(l), LEFT - 5, (layers.length - .5 - i) * this.height); });
    pen.textAlign = "left";
    pen.fillText("layers (last on top) × tokens of this text", LEFT, high - BOTTOM / 2 + 2);
  }

  picture() { return new Promise(done => this.canvas.toBlob(done, "image/png")); }
}
define("basin-map", BasinMap);
