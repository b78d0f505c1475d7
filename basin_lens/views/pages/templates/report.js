"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const make = (tag, text, cls) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text;
  if (cls) e.className = cls; return e; };
const fmt = v => Number.isNaN(v) || v === null ? "no score" : (v !== 0 && (Math.abs(v) < .001 || Math.abs(v) >= 1e5)) ?
  v.toExponential(2) : Number(v.toPrecision(4)).toString();
const visible = t => t === "" ? "\u2205" : t.replace(/\r/g, "\u240d").replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5");

// Arrays are 16-bit steps between a low and a high per layer, 65535 for NaN; decoded when first looked at.
const decoded = new Map();
function bytes(text) { const raw = atob(text), out = new Uint8Array(raw.length); for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out.buffer; }
function floats(key, packed) {
  if (!decoded.has(key)) {
    const steps = new Uint16Array(bytes(packed.data)), out = new Float32Array(steps.length), width = (packed.high - packed.low) / 65534;
    for (let i = 0; i < steps.length; i++) out[i] = steps[i] === 65535 ? NaN : packed.low + steps[i] * width;
    decoded.set(key, out);
  }
  return decoded.get(key);
}
const values = (score, layer) => floats(`${score}/${layer}`, D.values[score][layer]);

let score = 0, layer = 0, chosen = -1;
const spans = [];

$("title").textContent = D.title;
$("about").textContent = D.about;
$("provenance").textContent = D.provenance;
for (const note of D.notes) $("notes").append(make("p", note));
D.scores.forEach((s, i) => { const o = make("option", s.name); o.value = i; $("score").append(o); });
D.layers.forEach((l, i) => { const o = make("option", String(l)); o.value = i; $("layer").append(o); });
$("slider").max = D.layers.length - 1;
let row = 0, doc = null;
for (const s of D.sequences) {
  const box = make("div");
  if (s.doc !== doc) { box.append(make("h3", s.doc)); doc = s.doc; }
  const text = make("div", undefined, "text");
  for (const token of s.tokens) { const span = make("span", visible(D.strings[token])); span.dataset.row = row++; spans.push(span); text.append(span); }
  box.append(text); $("texts").append(box);
}

function middleAndBound(array) {
  const known = Array.from(array).filter(v => !Number.isNaN(v)).sort((a, b) => a - b);
  if (!known.length) return [0, 1];
  const middle = known[0] < 0 && known[known.length - 1] > 0 ? 0 : known[known.length >> 1];
  const away = known.map(v => Math.abs(v - middle)).sort((a, b) => a - b);
  return [middle, away[Math.floor(.98 * (away.length - 1))] || away[away.length - 1] || 1];
}
function color(v, middle, bound) {
  const x = Math.max(-1, Math.min(1, (v - middle) / bound)), to = x > 0 ? [67, 147, 195] : [214, 96, 77], a = Math.abs(x);
  return `rgb(${to.map(c => Math.round(255 + (c - 255) * a)).join(",")})`;
}
function paint() {
  const array = values(score, layer), [middle, bound] = middleAndBound(array), s = D.scores[score];
  let none = 0;
  spans.forEach((span, i) => {
    const missing = Number.isNaN(array[i]); none += missing;
    span.style.background = missing ? "" : color(array[i], middle, bound);
    span.classList.toggle("none", missing);
  });
  $("low").textContent = fmt(middle - bound); $("high").textContent = fmt(middle + bound); $("unit").textContent = s.unit;
  $("viewtitle").textContent = `${s.name} at layer ${D.layers[layer]}`;
  $("viewnote").textContent = `White is ${fmt(middle)}${middle === 0 ? "" : ", the median here"}. ${none} of ${array.length} tokens have no score (gray).` +
    (s.sampled ? ` It was measured on a seeded sample of ${s.sampled} tokens per layer, the colored ones.` : "");
  $("score").value = score; $("layer").value = layer; $("slider").value = layer;
  curve(); pane();
}

const NS = "http://www.w3.org/2000/svg";
function shape(tag, attributes, text) { const e = document.createElementNS(NS, tag); for (const k in attributes) e.setAttribute(k, attributes[k]);
  if (text !== undefined) e.textContent = text; return e; }
function plot(layers, mean, low, high, current, unit, pick, nulls = []) {
  const W = 400, H = 190, L = 52, R = 8, T = 8, B = 34;
  const finite = [...mean, ...low, ...high, ...nulls.flatMap(n => n.mean)].filter(v => v !== null && !Number.isNaN(v));
  const svg = shape("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "score by layer"});
  if (!finite.length) { svg.append(shape("text", {x: W / 2, y: H / 2, "text-anchor": "middle"}, "no values")); return svg; }
  let lo = Math.min(...finite), hi = Math.max(...finite); if (lo === hi) { lo -= 1; hi += 1; }
  const x = i => L + (layers.length === 1 ? .5 : i / (layers.length - 1)) * (W - L - R), y = v => T + (hi - v) / (hi - lo) * (H - T - B);
  const rough = (hi - lo) / 4, ten = 10 ** Math.floor(Math.log10(rough)), tick = ten * [1, 2, 5, 10].find(f => f * ten >= rough);
  for (let n = Math.ceil(lo / tick); n * tick <= hi + 1e-9; n++) { const v = n * tick;
    svg.append(shape("line", {x1: L, x2: W - R, y1: y(v), y2: y(v), stroke: "#eceff1"}),
      shape("text", {x: L - 5, y: y(v) + 3, "text-anchor": "end"}, fmt(v))); }
  if (lo < 0 && hi > 0) svg.append(shape("line", {x1: L, x2: W - R, y1: y(0), y2: y(0), stroke: "#8a8f94"}));
  const there = v => v !== null && !Number.isNaN(v);
  const band = layers.map((_, i) => i).filter(i => there(low[i]) && there(high[i]));
  if (band.length > 1) svg.append(shape("path", {fill: "#0072b2", opacity: .18,
    d: "M" + band.map(i => `${x(i)},${y(high[i])}`).join("L") + "L" + band.reverse().map(i => `${x(i)},${y(low[i])}`).join("L") + "Z"}));
  function line(of, style) {
    let path = "", open = false;
    of.forEach((v, i) => { if (there(v)) { path += `${open ? "L" : "M"}${x(i)},${y(v)}`; open = true; } else open = false; });
    svg.append(shape("path", {d: path, fill: "none", ...style}));
  }
  for (const n of nulls) line(n.mean, {stroke: n.color, "stroke-width": 1.2, "stroke-dasharray": n.dash});
  line(mean, {stroke: "#0072b2", "stroke-width": 1.6});
  mean.forEach((v, i) => { if (!there(v)) return; svg.append(shape("circle", {cx: x(i), cy: y(v), r: i === current ? 4.5 : 2.2,
    fill: i === current ? "#d55e00" : "#0072b2"})); });
  const step = Math.max(1, Math.ceil(layers.length / 8));
  layers.forEach((l, i) => { if (i % step === 0) svg.append(shape("text", {x: x(i), y: H - B + 14, "text-anchor": "middle"}, l)); });
  svg.append(shape("text", {x: (L + W - R) / 2, y: H - 4, "text-anchor": "middle"}, `layer (${unit} on the vertical axis)`));
  layers.forEach((l, i) => { const hit = shape("rect", {x: x(i) - (W - L - R) / layers.length / 2, y: T, width: (W - L - R) / layers.length,
    height: H - T - B, fill: "transparent", class: "hit"}); hit.append(shape("title", {}, `layer ${l}: ${fmt(mean[i])}`));
    hit.addEventListener("click", () => pick(i)); svg.append(hit); });
  return svg;
}
function curve() {
  const s = D.scores[score], c = D.curves[score];
  $("curvetitle").textContent = `${s.name} over depth`;
  const nulls = c.nulls.map((n, i) => ({...n, color: ["#d55e00", "#6b7280"][i % 2], dash: ["5 3", "1.5 2.5"][i % 2]}));
  $("curve").replaceChildren(plot(D.layers, c.mean, c.low, c.high, layer, s.unit, go, nulls));
  const r = c.reliability ? c.reliability[layer] : undefined;
  $("curvenote").textContent = `Mean over documents, 95 % interval over ${D.n_documents} documents. ` +
    (c.reliability ? `Split-half reliability at layer ${D.layers[layer]}: ${fmt(r)} (Spearman over disjoint neighbor halves). ` : "") +
    (c.local ? `The neighborhoods' median variance is ${fmt(c.local[layer])} of that of random sets here. ` : "");
  if (nulls.length) $("curvenote").append(`Its nulls: ${nulls.map((n, i) => `${["dashed", "dotted"][i % 2]}, ${n.name}`).join("; ")}.`);
}
function go(i) { layer = i; paint(); }

function pane() {
  spans.forEach(s => s.classList.remove("chosen", "near"));
  const box = $("pane"); box.replaceChildren();
  if (chosen < 0) { box.append("Click a token to see its neighbors at this layer, and its score at every layer."); return; }
  spans[chosen].classList.add("chosen");
  const s = D.scores[score];
  $("panetitle").textContent = `\u201c${visible(D.strings[D.rows[chosen]])}\u201d, position ${D.positions[chosen]}`;
  const own = D.layers.map((_, i) => values(score, i)[chosen]), empty = own.map(() => NaN);
  box.append(make("p", `${s.name} at layer ${D.layers[layer]}: ${fmt(own[layer])} ${s.unit}`), plot(D.layers, own, empty, empty, layer, s.unit, go));
  if (!D.neighbors) { box.append(make("p", "Neighbors were not kept in this report.")); return; }
  const N = D.neighbors, ids = new (N.none === 65535 ? Uint16Array : Uint32Array)(bytes(N.rows[layer])), first = chosen * N.k;
  const before = floats(`before/${layer}`, N.before[layer]), after = floats(`after/${layer}`, N.after[layer]);
  if (ids[first] === N.none) { box.append(make("p", "No neighbors at this layer (position 0, not asked for, or too few).")); return; }
  const table = make("table"), head = make("tr");
  for (const [t, c] of [["neighbor in its text"], ["document"], ["before", "n"], ["after", "n"]]) head.append(make("th", t, c));
  table.append(head);
  for (let i = first; i < first + N.k; i++) {
    const id = ids[i], line = make("tr"), ctx = make("td", undefined, "ctx");
    const start = N.bank.first[N.bank.seq[id]], end = start + N.bank.length[N.bank.seq[id]], text = j => visible(D.strings[N.bank.tokens[j]]);
    for (let j = Math.max(start + 1, id - 5); j < Math.min(end, id + 4); j++) ctx.append(j === id ? make("b", text(j)) : text(j));
    line.append(ctx, make("td", N.bank.docs[N.bank.seq[id]]), make("td", fmt(before[i]), "n"), make("td", fmt(after[i]), "n"));
    table.append(line);
    if (N.own) spans[id].classList.add("near");
  }
  box.append(table, make("p", `The ${N.k} neighbors behind ${N.score}, nearest first, with their distance to the token before the block and to ` +
    "its output after it (state units)." + (N.own ? " They are underlined in the text." : ""), "soft"));
}

$("score").addEventListener("change", e => { score = +e.target.value; paint(); });
$("layer").addEventListener("change", e => go(+e.target.value));
$("slider").addEventListener("input", e => go(+e.target.value));
$("texts").addEventListener("click", e => { if (e.target.dataset.row !== undefined) { chosen = +e.target.dataset.row; pane(); } });
$("texts").addEventListener("mousemove", e => {
  const tip = $("tip"), id = e.target.dataset.row;
  if (id === undefined) { tip.style.display = "none"; return; }
  tip.textContent = D.scores.map((s, i) => `${i === score ? "\u25b8 " : "  "}${s.name}: ${fmt(values(i, layer)[id])}`).join("\n");
  tip.style.display = "block";
  tip.style.left = Math.min(e.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(e.clientY + 18, innerHeight - tip.offsetHeight - 8) + "px";
});
$("texts").addEventListener("mouseleave", () => { $("tip").style.display = "none"; });
document.addEventListener("keydown", e => { if (["SELECT", "INPUT"].includes(e.target.tagName)) return;
  if (e.key === "ArrowRight" && layer < D.layers.length - 1) go(layer + 1); if (e.key === "ArrowLeft" && layer > 0) go(layer - 1); });

{ // Tables that do not change.
  const table = $("summary"), head = make("tr"); head.append(make("th", "layer", "n"));
  D.scores.forEach((s, i) => { if (D.curves[i].shown) { head.append(make("th", `${s.name} [${s.unit}]`, "n"));
    if (D.curves[i].reliability) head.append(make("th", "reliability", "n"));
    if (D.curves[i].local) head.append(make("th", "V in / V of random sets", "n")); } });
  table.append(head);
  D.layers.forEach((l, j) => { const line = make("tr"); line.append(make("td", l, "n"));
    D.scores.forEach((s, i) => { const c = D.curves[i]; if (!c.shown) return;
      line.append(make("td", c.low[j] === null ? fmt(c.mean[j]) : `${fmt(c.mean[j])} (${fmt(c.low[j])} to ${fmt(c.high[j])})`, "n"));
      if (c.reliability) line.append(make("td", fmt(c.reliability[j]), "n"));
      if (c.local) line.append(make("td", fmt(c.local[j]), "n")); });
    table.append(line); });
  const left = $("left");
  const names = [...new Set(D.left_out.flatMap(l => Object.keys(l.counts)))], top = make("tr"); top.append(make("th", "score"));
  names.forEach(n => top.append(make("th", n, "n"))); left.append(top);
  for (const l of D.left_out) { const line = make("tr"); line.append(make("td", l.score)); names.forEach(n => line.append(make("td", l.counts[n] ?? 0, "n")));
    left.append(line); }
}
paint();
