import {choose, define, shape} from "./dom.mjs";
import {rangeOf, ticks, tickWords, words} from "./scales.mjs";

const W = 400, H = 190, L = 54, R = 8, T = 8, B = 34;
const there = v => v !== null && v !== undefined && !Number.isNaN(v);

// A line over depth, with its interval and its nulls; a click goes to a layer.
class BasinCurve extends HTMLElement {
  // `lines`: {values, kind} each, drawn in order; `low`, `high`: of the band.
  show({layers, lines, low, high, layer, unit, label}) {
    const svg = shape("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label});
    const known = [...lines.flatMap(l => Array.from(l.values)), ...low, ...high].filter(there);
    this.replaceChildren(svg);
    if (!known.length) { svg.append(shape("text", {x: W / 2, y: H / 2, "text-anchor": "middle"}, "no values")); return; }
    const [least, most] = rangeOf(known), marked = ticks(least, most), marks = tickWords(marked);
    const x = i => L + (layers.length === 1 ? .5 : i / (layers.length - 1)) * (W - L - R);
    const y = v => T + (most - v) / (most - least) * (H - T - B);
    marked.forEach((v, i) => svg.append(
      shape("line", {x1: L, x2: W - R, y1: y(v), y2: y(v), class: v === 0 ? "zero" : "grid"}),
      shape("text", {x: L - 5, y: y(v) + 3, "text-anchor": "end"}, marks[i])));
    const band = layers.map((_, i) => i).filter(i => there(low[i]) && there(high[i]));
    if (band.length > 1) svg.append(shape("path", {class: "band", d:
      `M${band.map(i => `${x(i)},${y(high[i])}`).join("L")}` +
      `L${band.slice().reverse().map(i => `${x(i)},${y(low[i])}`).join("L")}Z`}));
    for (const {values, kind} of lines) {
      let path = "", open = false;
      Array.from(values).forEach((v, i) => { if (there(v)) path += `${open ? "L" : "M"}${x(i)},${y(v)}`; open = there(v); });
      svg.append(shape("path", {d: path, class: `line ${kind}`}));
    }
    Array.from(lines.at(-1).values).forEach((v, i) => { if (there(v))
      svg.append(shape("circle", {cx: x(i), cy: y(v), r: i === layer ? 4.5 : 2.2, class: i === layer ? "now" : "dot"})); });
    const step = Math.max(1, Math.ceil(layers.length / 8)), wide = (W - L - R) / layers.length;
    layers.forEach((l, i) => {
      if (i % step === 0) svg.append(shape("text", {x: x(i), y: H - B + 14, "text-anchor": "middle"}, l));
      const hit = shape("rect", {x: x(i) - wide / 2, y: T, width: wide, height: H - T - B, class: "hit"});
      hit.append(shape("title", {}, `layer ${l}: ${words(lines.at(-1).values[i])}`));
      hit.addEventListener("click", () => choose(this, {layer: i}));
      svg.append(hit);
    });
    svg.append(shape("text", {x: (L + W - R) / 2, y: H - 4, "text-anchor": "middle"}, `layer (${unit} on the vertical axis)`));
  }

  // The drawing as a file of its own: what the page's styles say of it stands in it.
  file() {
    const svg = this.querySelector("svg"), copy = svg.cloneNode(true), made = copy.querySelectorAll("*");
    svg.querySelectorAll("*").forEach((element, i) => {
      const style = getComputedStyle(element);
      for (const name of ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-family"])
        made[i].setAttribute(name, style.getPropertyValue(name));
    });
    for (const hit of copy.querySelectorAll(".hit")) hit.remove();  // for the mouse alone
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    copy.setAttribute("width", 2 * W);
    copy.setAttribute("height", 2 * H);
    copy.insertBefore(shape("rect", {width: W, height: H,
      fill: getComputedStyle(this.closest("basin-explorer")).backgroundColor}), copy.firstChild);
    return new Blob([new XMLSerializer().serializeToString(copy)], {type: "image/svg+xml"});
  }
}
define("basin-curve", BasinCurve);
