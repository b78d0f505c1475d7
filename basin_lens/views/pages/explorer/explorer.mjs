import "./tokens.mjs";
import "./map.mjs";
import "./curve.mjs";
import "./neighbors.mjs";
import {button, chooser, define, folded, headed, make, save, tableOf} from "./dom.mjs";
import {csvOf, hashOf, scoresOf, search, stateOf, visible} from "./layout.mjs";
import {bestLayer, colorAt, css, scaleOf, words} from "./scales.mjs";

const DARK = "(prefers-color-scheme: dark)";
const KEYS = "Keys: arrows left and right go to the next token, up and down to the next layer, s to the next score, " +
  "/ looks for a token, Escape lets go.";
const HINT = "Choose a token to see its neighbors at this layer, and its score at every layer.";

// One run to look at, whatever its provider. What is chosen is in `state`: score, layer and token by place, -1: no token.
class BasinExplorer extends HTMLElement {
  async open(provider) {
    this.provider = provider;
    this.about = await provider.describe();
    const {scores, layers, rows, curves} = this.about, first = {scores, layers, count: rows.length};
    this.dark = matchMedia(DARK);
    const start = Math.max(0, curves.findIndex(c => c.reliability));
    this.state = {score: start, layer: bestLayer(curves[start].reliability, layers.length), token: -1, fixed: false,
      ...(this.linked ? stateOf(location.hash, first) : {})};
    this.scales = new Map();
    this.starts = [0];
    for (const {length} of this.about.sequences) this.starts.push(this.starts.at(-1) + length);
    this.build();
    this.tokens.load(this.about);
    this.listen();
    await this.paint();
    if (this.state.token >= 0) this.tokens.reveal(this.state.token, false);
  }

  get linked() { return this.hasAttribute("linked"); }

  build() {
    const {title, about, notes} = this.about, header = make("header"), main = make("main");
    const columns = make("div", undefined, "columns");
    header.append(make("h1", title), make("p", about, "soft"));
    columns.append(this.text(), this.beside());
    main.append(columns, make("h2", "How to read this"), ...notes.map(note => make("p", note)), make("p", KEYS, "soft"),
      ...this.below(), make("p", "Made by basin_lens. This page asks no outside site for anything.", "soft last"));
    this.tip = make("div", undefined, "tip");
    this.replaceChildren(header, this.controls(), main, this.tip);
  }

  controls() {
    const {scores, layers} = this.about;
    const bar = make("div", undefined, "bar"), line = make("div"), key = make("div", undefined, "key");
    const labeled = (text, element) => { const label = make("label", `${text} `); label.append(element); return label; };
    this.scoreBox = chooser("score", scores.map(s => s.name));
    this.layerBox = chooser("layer", layers);
    this.slider = Object.assign(make("input", undefined, "slider"), {type: "range", min: 0, max: layers.length - 1, step: 1});
    this.slider.setAttribute("aria-label", "layer");
    this.fixedBox = Object.assign(make("input", undefined, "fixed"), {type: "checkbox"});
    this.searchBox = Object.assign(make("input", undefined, "search"), {type: "search", placeholder: "find a token  /"});
    this.searchBox.setAttribute("aria-label", "find a token");
    const fixed = make("label");
    fixed.append(this.fixedBox, " fix scale over layers");
    line.append(labeled("Score", this.scoreBox), labeled("Layer", this.layerBox), this.slider, fixed, this.searchBox);
    this.legend = make("span", undefined, "legend");
    key.append(this.low = make("span"), this.ramp = make("i"), this.high = make("span"), this.legend);
    bar.append(line, key);
    return bar;
  }

  text() {
    const section = make("section");
    const what = `scores of all tokens at this layer${this.about.rounded ? ", rounded as in this page" : ""}`;
    const toFile = async () => save(new Blob([await this.csv()], {type: "text/csv"}), `${this.name()}.csv`);
    this.tokens = make("basin-tokens", undefined, "texts");
    section.append(
      headed(this.viewTitle = make("h2"),
        button("Copy CSV", `${what}, to the clipboard`, () => this.copy()), button("Save CSV", `${what}, as a file`, toFile)),
      this.viewNote = make("p", undefined, "soft"), this.tokens);
    return section;
  }

  beside() {
    const aside = make("aside");
    this.curve = make("basin-curve", undefined, "curve");
    this.map = make("basin-map");
    aside.append(
      headed(this.curveTitle = make("h2"), button("Save SVG", "this curve", () => save(this.curve.file(), `${this.name()}.svg`))),
      this.curve, this.curveNote = make("p", undefined, "soft"),
      headed(this.mapTitle = make("h2"),
        button("Save PNG", "this map", async () => save(await this.map.picture(), `${this.name()}.png`))),
      this.map, this.mapNote = make("p", undefined, "soft"), this.pane = make("div", undefined, "pane"));
    return aside;
  }

  below() {
    const {left_out: left, provenance} = this.about, names = [...new Set(left.flatMap(l => Object.keys(l.counts)))];
    const pre = make("pre", provenance);
    pre.tabIndex = 0;
    return [make("h2", "What was left out"),
      tableOf(["score", ...names], left.map(l => [l.score, ...names.map(n => String(l.counts[n] ?? 0))]), 1),
      folded("Layer by layer", this.summary()), folded("Provenance of this run", pre)];
  }

  summary() {
    const {scores, layers, curves} = this.about, head = ["layer"];
    const shown = scores.map((s, i) => ({...s, ...curves[i]})).filter(s => s.shown);
    for (const s of shown) {
      head.push(`${s.name} [${s.unit}]`);
      if (s.reliability) head.push("reliability");
      if (s.local) head.push("V in / V of random sets");
    }
    return tableOf(head, layers.map((l, i) => [String(l), ...shown.flatMap(s => [
      s.low[i] === null ? words(s.mean[i]) : `${words(s.mean[i])} (${words(s.low[i])} to ${words(s.high[i])})`,
      ...(s.reliability ? [words(s.reliability[i])] : []), ...(s.local ? [words(s.local[i])] : [])])]), 0);
  }

  listen() {
    const {scores, layers, rows} = this.about;
    this.scoreBox.addEventListener("change", () => this.go({score: Number(this.scoreBox.value)}));
    this.layerBox.addEventListener("change", () => this.go({layer: Number(this.layerBox.value)}));
    this.slider.addEventListener("input", () => this.go({layer: Number(this.slider.value)}));
    this.fixedBox.addEventListener("change", () => this.go({fixed: this.fixedBox.checked}));
    this.addEventListener("choose", e => this.go(e.detail, e.target !== this.tokens));
    this.addEventListener("keydown", e => this.key(e));
    this.dark.addEventListener("change", () => this.paint());
    const linked = () => ({token: -1, fixed: false, ...stateOf(location.hash, {scores, layers, count: rows.length})});
    if (this.linked) addEventListener("hashchange", () => this.go(linked(), true));
    const tell = (row, layer, event, of) => row === undefined ? this.hush() : this.say(Number(row), layer, event, of);
    this.tokens.addEventListener("mousemove", e => tell(e.target.dataset.row, this.state.layer, e));
    this.tokens.addEventListener("mouseleave", () => this.hush());
    this.map.addEventListener("point", ({detail: {at, event}}) => tell(at?.token, at?.layer, event, at?.of));
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target === this.searchBox, {token, layer, score} = this.state, {layers, scores, rows} = this.about;
    if (typing && event.key === "Enter") this.find();
    else if (event.key === "Escape") { this.searchBox.value = ""; this.go({token: -1});
      if (typing) this.tokens.span(this.tokens.cursor)?.focus(); }
    else if (["SELECT", "INPUT"].includes(event.target.tagName)) return;
    else if (event.key === "/") this.searchBox.focus();
    else if (event.key === "s") this.go({score: (score + 1) % scores.length});
    else if (!this.tokens.contains(event.target) && event.target !== this.map.canvas) return;
    else if (event.key === "Enter" && event.target.dataset.row) this.go({token: Number(event.target.dataset.row)}, true, true);
    else {
      const at = token >= 0 ? token : this.tokens.cursor - 1, focus = event.target !== this.map.canvas;
      const to = {ArrowRight: {token: Math.min(rows.length - 1, at + 1)}, ArrowLeft: {token: Math.max(0, at - 1)},
        ArrowUp: {layer: Math.min(layers.length - 1, layer + 1)}, ArrowDown: {layer: Math.max(0, layer - 1)}}[event.key];
      if (!to) return;
      this.go(to, "token" in to, focus);
    }
    event.preventDefault();
  }

  find() {
    const row = search(this.tokens.texts, this.searchBox.value, this.state.token + 1);
    this.searchBox.setAttribute("aria-invalid", String(row < 0));
    if (row >= 0) this.go({token: row}, true);
  }

  go(change, reveal = false, focus = false) {
    Object.assign(this.state, change);
    if (reveal && this.state.token >= 0) this.tokens.reveal(this.state.token, focus);
    return this.paint();
  }

  name() { return `${this.about.scores[this.state.score].name}-layer-${this.about.layers[this.state.layer]}`; }

  // All tokens of a score or, where the scale is fixed, of all its layers; not those at position 0, which are far from all others.
  async scale(score, layer, fixed) {
    const key = `${score} ${fixed ? "all" : layer}`;
    if (!this.scales.has(key)) {
      const places = fixed ? this.about.layers.map((_, i) => i) : [layer];
      const arrays = await Promise.all(places.map(i => this.provider.values(score, i)));
      this.scales.set(key, scaleOf(arrays, this.about.scores[score].zero, i => this.about.positions[i] === 0));
    }
    return this.scales.get(key);
  }

  async paint() {
    const {score, layer, token, fixed} = this.state, dark = this.dark.matches, turn = this.turn = {};
    const [values, scale, found] = await Promise.all(
      [this.provider.values(score, layer), this.scale(score, layer, fixed), this.provider.neighbors(layer)]);
    if (turn !== this.turn) return;  // something else was chosen meanwhile
    const {scores, layers, neighbors, rows} = this.about, {name, unit, sampled} = scores[score];
    const kept = neighbors && token >= 0 ? found.rows.subarray(token * neighbors.shown, (token + 1) * neighbors.shown) : [];
    this.tokens.show({values, scale, dark, chosen: token, near: new Set(neighbors?.own ? kept : [])});
    const none = values.reduce((sum, v) => sum + Number.isNaN(v), 0), middle = words(scale.middle, 3);
    this.scoreBox.value = score; this.layerBox.value = this.slider.value = layer; this.fixedBox.checked = fixed;
    this.low.textContent = words(scale.middle - scale.bound, 3);
    this.high.textContent = `${words(scale.middle + scale.bound, 3)} ${unit}`;
    const ramp = [-1, -.66, -.33, 0, .33, .66, 1].map(x => css(colorAt(x, dark)));
    this.ramp.style.background = `linear-gradient(90deg, ${ramp.join(", ")})`;
    this.legend.textContent = `Red: below ${middle}, blue: above; no color: ${middle}${scale.zero ? "" : ", the median"}.`;
    this.viewTitle.textContent = `${name} at layer ${layers[layer]}`;
    this.viewNote.textContent = `${none} of ${rows.length} tokens have no score (gray). Position 0 is not in the color scale.` +
      (sampled ? ` It was measured on a seeded sample of ${sampled} tokens per layer, the colored ones.` : "");
    if (this.linked) history.replaceState(null, "", hashOf(this.state, this.about));
    this.overDepth();
    await this.every(turn, found, dark);
  }

  overDepth() {
    const {score, layer} = this.state, {scores, layers, curves, n_documents: documents} = this.about;
    const {name, unit} = scores[score], c = curves[score];
    this.curveTitle.textContent = `${name} over depth`;
    this.curve.show({layers, layer, unit, low: c.low, high: c.high, label: `${name} over depth`,
      lines: [...c.nulls.map((n, i) => ({values: n.mean, kind: `null${i % 2}`})), {values: c.mean, kind: "mean"}]});
    const interval = c.low[layer] === null ? "" : ` (${words(c.low[layer])} to ${words(c.high[layer])})`;
    this.curveNote.textContent = `At layer ${layers[layer]}: ${words(c.mean[layer])}${interval} ${unit}. ` +
      `Mean over documents, 95 % interval over ${documents} documents. ` +
      (c.reliability ? `Split-half reliability: ${words(c.reliability[layer])} (Spearman over disjoint neighbor halves). ` : "") +
      (c.local ? `The neighborhoods' median variance is ${words(c.local[layer])} of that of random sets here. ` : "") +
      (c.nulls.length ? `Its nulls: ${c.nulls.map((n, i) => `${["dashed", "dotted"][i % 2]}, ${n.name}`).join("; ")}.` : "");
  }

  // What needs every layer comes after the first view.
  async every(turn, found, dark) {
    const {score, layer, token, fixed} = this.state, {layers, scores, sequences} = this.about, all = layers.map((_, i) => i);
    await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
    if (turn !== this.turn) return;
    const [values, scales] = await Promise.all([Promise.all(all.map(i => this.provider.values(score, i))),
      Promise.all(all.map(i => this.scale(score, i, fixed)))]);
    if (turn !== this.turn) return;
    const sequence = this.starts.findLastIndex(start => start <= Math.max(token, 0)), start = this.starts[sequence],
      end = this.starts[sequence + 1];
    this.mapTitle.textContent = `${sequences[sequence].doc} at every layer`;
    this.map.show({values, scales, layers, start, end, layer, chosen: token, dark,
      label: `${scores[score].name} of ${end - start} tokens at ${layers.length} layers; arrows choose token and layer`});
    this.mapNote.textContent = `${fixed ? "One color scale for all layers." : "Each layer has its own color scale."} ` +
      "It is the text of the token chosen, else the first. " +
      (this.map.columns.length < end - start ? "A column is several tokens; its color, words and click are those of the one " +
        "furthest from the middle at the layer." : "");
    this.showToken(values, found);
  }

  showToken(values, found) {
    const {score, layer, token} = this.state, {layers, scores, positions} = this.about, {name, unit} = scores[score];
    this.pane.classList.toggle("open", token >= 0);
    this.pane.replaceChildren();
    if (token < 0) { this.pane.append(make("p", HINT, "soft")); return; }
    const own = values.map(layer => layer[token]), empty = own.map(() => NaN);
    const line = make("basin-curve"), list = make("basin-neighbors");
    this.pane.append(headed(make("h2", `“${visible(this.tokens.texts[token])}”, position ${positions[token]}`),
      button("Close", "let the token go (Escape)", () => this.go({token: -1}))),
      make("p", `${name} at layer ${layers[layer]}: ${words(own[layer], 3)} ${unit}`, "own"),
      list, make("h3", `${name} of this token over depth`), line);
    line.show({layers, layer, unit, low: empty, high: empty, lines: [{values: own, kind: "mean"}],
      label: `${name} of this token over depth`});
    list.show({about: this.about, found, token});
  }

  async say(row, layer, event, of = 1) {
    this.told = `${row} ${layer}`;
    const told = this.told, {scores} = this.about, {clientX, clientY} = event;
    const values = await Promise.all(scores.map((_, i) => this.provider.values(i, layer)));
    if (told !== this.told) return;
    this.tip.textContent = [`${visible(this.tokens.texts[row])}   layer ${this.about.layers[layer]}`,
      ...(of > 1 ? [`of ${of} tokens in this column, the one furthest from the middle`] : []),
      ...scores.map((s, i) => `${i === this.state.score ? "▸ " : "  "}${s.name}: ${words(values[i][row], 3)}`)].join("\n");
    this.tip.style.display = "block";
    this.tip.style.left = `${Math.max(4, Math.min(clientX + 14, innerWidth - this.tip.offsetWidth - 8))}px`;
    this.tip.style.top = `${Math.max(4, Math.min(clientY + 18, innerHeight - this.tip.offsetHeight - 8))}px`;
  }

  hush() { this.told = ""; this.tip.style.display = "none"; }

  async csv() {
    const {layer} = this.state;
    const values = await Promise.all(this.about.scores.map((_, i) => this.provider.values(i, layer)));
    return csvOf(scoresOf(this.about, layer, this.tokens.texts, values));
  }

  async copy() { await navigator.clipboard.writeText(await this.csv()); }
}
define("basin-explorer", BasinExplorer);
