import "./tokens.mjs";
import "./map.mjs";
import "./curve.mjs";
import "./neighbors.mjs";
import {button, chooser, copied, define, focused, folded, headed, make, save, tableOf} from "./dom.mjs";
import {asked, placeOf} from "./keys.mjs";
import {csvOf, hashOf, scoresOf, search, stateOf, visible} from "./layout.mjs";
import {bestLayer, colorAt, css, endsOf, placeOn, scaleOf, words} from "./scales.mjs";

const DARK = "(prefers-color-scheme: dark)";
const KEYS = "Keys: arrows left and right go to the next token, up and down to the next layer (once a token is chosen, or " +
  "from the map), s to the next score, / looks for a token, Escape lets go.";
const HINT = "Choose a token to see its neighbors at this layer, and its score at every layer.";

// One run to look at, whatever its provider. What is chosen is in `state`: score, layer and token by place, -1: no token.
class BasinExplorer extends HTMLElement {
  async open(provider) {
    try { await this.begin(provider); } catch (error) {
      this.prepend(make("p", `It could not be shown (${error.message}). ${this.dataset.needs ?? ""}`, "failed"));
      throw error;
    }
  }

  async begin(provider) {
    this.provider = provider;
    this.about = await provider.describe();
    const {scores, layers, rows, curves} = this.about, first = {scores, layers, count: rows.length};
    this.dark = provider.dark ?? matchMedia(DARK);
    const start = Math.max(0, curves.findIndex(c => c.reliability));
    this.state = {score: start, layer: bestLayer(curves[start].reliability, layers.length), token: -1, fixed: false,
      ...(this.linked ? stateOf(location.hash, first) : {}), ...provider.start?.(this.about)};
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

  // Within another page, a notebook: it hears only its own keys, and neither scrolls nor covers what is around it.
  get enclosed() { return this.hasAttribute("enclosed"); }

  build() {
    const {title, about, notes} = this.about, header = make("header"), main = make("main");
    const columns = make("div", undefined, "columns");
    header.append(make("h1", title), make("p", about, "soft"));
    columns.append(this.text(), this.beside());
    const reading = [...notes.map(note => make("p", note)), make("p", KEYS, "soft"), ...this.below()];
    main.append(columns, ...(this.enclosed ? [folded("How to read this, what was left out, provenance", ...reading)] :
      [make("h2", "How to read this"), ...reading,
        make("p", "Made by basin_lens. This page asks no outside site for anything.", "soft last")]));
    this.tip = make("div", undefined, "tip");
    this.voice = make("div", undefined, "voice");
    this.voice.setAttribute("role", "status");
    this.replaceChildren(header, this.controls(), main, this.tip, this.voice);
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
      this.byHand = make("div", undefined, "byhand soft"), this.viewNote = make("p", undefined, "soft"), this.tokens);
    this.byHand.setAttribute("role", "status");
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
      folded("Layer by layer", make("p", this.about.of_means, "soft"), this.summary()), folded("Provenance of this run", pre)];
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

  connectedCallback() { if (this.about) this.listen(); }

  disconnectedCallback() {
    this.ending?.abort();
    if (BasinExplorer.used === this) BasinExplorer.used = null;
  }

  // Again after it was opened anew or moved within the page; what it heard of before is given up.
  listen() {
    this.ending?.abort();
    const {signal} = this.ending = new AbortController(), {scores, layers, rows} = this.about;
    const on = (target, kind, act) => target.addEventListener(kind, act, {signal});
    on(this.scoreBox, "change", () => this.go({score: Number(this.scoreBox.value)}));
    on(this.layerBox, "change", () => this.go({layer: Number(this.layerBox.value)}));
    on(this.slider, "input", () => this.go({layer: Number(this.slider.value)}));
    on(this.fixedBox, "change", () => this.go({fixed: this.fixedBox.checked}));
    on(this, "choose", e => this.go(e.detail, e.target !== this.tokens));
    if (!this.enclosed) {
      for (const kind of ["pointerdown", "focusin"]) on(this, kind, () => { BasinExplorer.used = this; });
      BasinExplorer.used ??= this;
    }
    on(this.enclosed ? this : document, "keydown", e => this.key(e));
    on(this.dark, "change", () => this.paint());
    const linked = () => ({token: -1, fixed: false, ...stateOf(location.hash, {scores, layers, count: rows.length})});
    if (this.linked) on(globalThis, "hashchange", () => { clearTimeout(this.remembering); this.go(linked(), true); });
    const tell = (row, layer, event, of) => row === undefined ? this.hush() : this.say(Number(row), layer, event, of);
    on(this.tokens, "mousemove", e => tell(e.target.dataset.row, this.state.layer, e));
    on(this.tokens, "mouseleave", () => this.hush());
    on(this.map, "point", ({detail: {at, event}}) => tell(at?.token, at?.layer, event, at?.of));
  }

  // Keys are heard wherever they are pressed; of several explorers in a page, that one answers which has the focus or, where
  // nothing has it, which was used last.
  key(event) {
    const {target, key} = event, {scores, layers, rows} = this.about, row = target.dataset?.row;
    const inside = this.contains(target), place = placeOf({tag: target.tagName, type: target.type, inside,
      search: target === this.searchBox, token: inside && row !== undefined, map: target === this.map.canvas,
      editable: target.isContentEditable});
    if (event.defaultPrevented || event.isComposing || place === "page" && BasinExplorer.used !== this) return;
    const modified = event.ctrlKey || event.metaKey || event.altKey;
    if (this.enclosed && !modified) event.stopPropagation();  // an s or an arrow is not the notebook's, too
    const cursor = Number(row ?? this.tokens.cursor);
    const change = asked({key, modified, shift: event.shiftKey}, place, this.state,
      {scores: scores.length, layers: layers.length, tokens: rows.length}, cursor);
    if (!change) return;
    event.preventDefault();
    if (change.act === "find") this.find();
    else if (change.act === "search") this.searchBox.focus();
    else if (change.act === "leave") this.leave(place === "search");
    else this.go(change, "token" in change, "token" in change && place !== "map");
  }

  leave(focus = false) {
    this.searchBox.value = "";
    this.searchBox.removeAttribute("aria-invalid");
    this.go({token: -1});
    if (focus) this.tokens.span(this.tokens.cursor)?.focus({preventScroll: true});
  }

  find() {
    const row = search(this.tokens.texts, this.searchBox.value, this.state.token + 1);
    this.searchBox.setAttribute("aria-invalid", String(row < 0));
    if (row >= 0) this.go({token: row}, true);
  }

  go(change, reveal = false, focus = false) {
    Object.assign(this.state, change);
    this.dispatchEvent(new CustomEvent("state", {detail: {...this.state}}));
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
    if (this.enclosed) this.setAttribute("theme", dark ? "dark" : "light");
    const [values, scale, found] = await Promise.all(
      [this.provider.values(score, layer), this.scale(score, layer, fixed), this.provider.neighbors(layer)]);
    if (turn !== this.turn) return;  // something else was chosen meanwhile
    const {scores, layers, neighbors, rows} = this.about, {name, unit, low, high, sampled} = scores[score];
    const kept = neighbors && token >= 0 ? found.rows.subarray(token * neighbors.shown, (token + 1) * neighbors.shown) : [];
    this.tokens.show({values, scale, dark, chosen: token, near: new Set(neighbors?.own ? kept : [])});
    const none = values.reduce((sum, v) => sum + Number.isNaN(v), 0), middle = words(scale.middle, 3);
    this.scoreBox.value = score; this.layerBox.value = this.slider.value = layer; this.fixedBox.checked = fixed;
    const ends = endsOf(scale, low, high), [from, to] = ends.map(v => placeOn(v, scale));
    this.low.textContent = words(ends[0], 3);
    this.high.textContent = `${words(ends[1], 3)} ${unit}`;
    const ramp = Array.from({length: 13}, (_, i) => css(colorAt(from + i / 12 * (to - from), dark)));
    this.ramp.style.background = `linear-gradient(90deg, ${ramp.join(", ")})`;
    this.legend.textContent = `Red: below ${middle}, blue: above; no color: ${middle}${scale.zero ? "" : ", the median"}.`;
    this.viewTitle.textContent = `${name} at layer ${layers[layer]}`;
    this.viewNote.textContent = `${none} of ${rows.length} tokens have no score (gray). Position 0 is not in the color scale.` +
      (sampled ? ` It was measured on a seeded sample, of at most ${sampled} tokens of a layer.` : "");
    this.overDepth();
    this.tell(values);
    await this.every(turn, found, dark);
    if (turn === this.turn && this.linked) this.remember();
  }

  // The address comes last and not at every step: a browser may refuse it (Safari after 100 in half a minute, a frame with a
  // sandbox), and the page goes on without.
  remember() {
    clearTimeout(this.remembering);
    this.remembering = setTimeout(() => {
      try { history.replaceState(history.state, "", hashOf(this.state, this.about)); } catch { /* the link stays as it was */ }
    }, 250);
  }

  // What was chosen, in words for those who hear the page: at the slider what it stands at, else in a region that is read out.
  tell(values) {
    const {score, layer, token} = this.state, {scores, layers, curves, positions} = this.about, {name, unit} = scores[score];
    const at = `layer ${layers[layer]}`, was = this.spoken;
    this.slider.setAttribute("aria-valuetext", `${at}: ${name}, mean ${words(curves[score].mean[layer])} ${unit}`);
    const value = Number.isNaN(values[token]) ? "no score" : `${words(values[token], 3)} ${unit}`;
    this.spoken = token < 0 ? `No token chosen. ${at}, ${name}` :
      `“${visible(this.tokens.texts[token])}”, position ${positions[token]}, ${at}: ${name} ${value}`;
    const heard = token < 0 && [this.slider, this.layerBox, this.scoreBox].includes(focused(this));
    if ((was || token >= 0) && !heard) this.voice.textContent = this.spoken;
  }

  overDepth() {
    const {score, layer} = this.state, {scores, layers, curves, of_means: about} = this.about;
    const {name, unit} = scores[score], c = curves[score];
    this.curveTitle.textContent = `${name} over depth`;
    this.curve.show({layers, layer, unit, low: c.low, high: c.high, label: `${name} over depth`,
      lines: [...c.nulls.map((n, i) => ({values: n.mean, kind: `null${i % 2}`})), {values: c.mean, kind: "mean"}]});
    const interval = c.low[layer] === null ? "" : ` (${words(c.low[layer])} to ${words(c.high[layer])})`;
    const alone = c.low[layer] !== null || c.low.every(v => v === null) ? "" : "No interval here: fewer than two documents. ";
    this.curveNote.textContent = `At layer ${layers[layer]}: ${words(c.mean[layer])}${interval} ${unit}. ` +
      `${about} ${alone}` +
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
    const sequence = this.starts.filter(start => start <= Math.max(token, 0)).length - 1, start = this.starts[sequence],
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
    const held = this.pane.contains(focused(this));
    this.pane.classList.toggle("open", token >= 0);
    this.pane.replaceChildren();
    if (held && token < 0) this.tokens.span(this.tokens.cursor)?.focus({preventScroll: true});
    if (token < 0) { this.pane.append(make("p", HINT, "soft")); return; }
    const own = values.map(layer => layer[token]), empty = own.map(() => NaN);
    const line = make("basin-curve"), list = make("basin-neighbors");
    const close = button("Close", "let the token go (Escape)", () => this.leave());
    this.pane.append(headed(make("h2", `“${visible(this.tokens.texts[token])}”, position ${positions[token]}`), close),
      make("p", `${name} at layer ${layers[layer]}: ` +
        (Number.isNaN(own[layer]) ? "no score of this token" : `${words(own[layer], 3)} ${unit}`), "own"), list);
    if (own.every(Number.isNaN)) this.pane.append(make("p", `No layer has ${name} of this token.`, "soft"));
    else this.pane.append(make("h3", `${name} of this token over depth`), line);
    line.show({layers, layer, unit, low: empty, high: empty, lines: [{values: own, kind: "mean"}],
      label: `${name} of this token over depth`});
    list.show({about: this.about, found, token});
    if (held) close.focus({preventScroll: true});
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
    const {left, top} = this.enclosed ? this.getBoundingClientRect() : {left: 0, top: 0};
    const wide = this.enclosed ? this.clientWidth : innerWidth, high = this.enclosed ? this.clientHeight : innerHeight;
    this.tip.style.left = `${Math.max(4, Math.min(clientX - left + 14, wide - this.tip.offsetWidth - 8))}px`;
    this.tip.style.top = `${Math.max(4, Math.min(clientY - top + 18, high - this.tip.offsetHeight - 8))}px`;
  }

  hush() { this.told = ""; this.tip.style.display = "none"; }

  async csv() {
    const {layer} = this.state;
    const values = await Promise.all(this.about.scores.map((_, i) => this.provider.values(i, layer)));
    return csvOf(scoresOf(this.about, layer, this.tokens.texts, values));
  }

  async copy() {
    const text = await this.csv(), done = await copied(text, this), {layers, rows} = this.about;
    this.byHand.replaceChildren();
    if (done) { this.byHand.textContent = `Copied ${rows.length} tokens at layer ${layers[this.state.layer]}.`; return; }
    const field = Object.assign(make("textarea"), {value: text, readOnly: true, rows: 4});
    field.setAttribute("aria-label", "the CSV");
    this.byHand.append(
      make("span", "This page may not write to the clipboard here. The CSV is selected: press Ctrl+C (⌘C)."), field,
      button("Close", "put the field away", () => this.byHand.replaceChildren()));
    field.select();
    field.focus();
  }
}
define("basin-explorer", BasinExplorer);
