import {floatsOf, rowsOf} from "./decode.mjs";

// A notebook's kernel as the provider of an explorer's data. Nothing here touches the page.

// A token's row among the explorer's by its sequence and position as the table has them, and back. -1 and null: no token.
export function rowOf({sequences, positions}, token) {
  if (!token) return -1;
  let start = 0;
  for (const {seq, length} of sequences) {
    if (seq === token[0]) return positions.indexOf(token[1], start) < start + length ? positions.indexOf(token[1], start) : -1;
    start += length;
  }
  return -1;
}

export function tokenOf({sequences, positions}, row) {
  if (row < 0) return null;
  let start = 0;
  for (const {seq, length} of sequences) {
    if (row < start + length) return [seq, positions[row]];
    start += length;
  }
  return null;
}

// The explorer's state as the kernel has it, by names and numbers of the table, and back.
export function traitsOf(about, {score, layer, token}) {
  return {score: about.scores[score].name, layer: about.layers[layer], token: tokenOf(about, token)};
}

export function chosenBy(about, {score, layer, token}) {
  const found = {token: rowOf(about, token)}, places = {score: about.scores.findIndex(s => s.name === score),
    layer: about.layers.indexOf(layer)};
  for (const [name, place] of Object.entries(places)) if (place >= 0) found[name] = place;
  return found;
}

// Whether a notebook is dark, by what it writes on its page: JupyterLab and Notebook 7 (`jpThemeLight`), VS Code (`kind`), Colab
// and marimo (`theme`, or a class). Where nothing is written, by the reader's own setting.
export function isDark({jpThemeLight, kind, theme, classes}, preferred) {
  if (jpThemeLight) return jpThemeLight === "false";
  if (kind) return !kind.endsWith("light");
  if (["dark", "light"].includes(theme)) return theme === "dark";
  if (classes.includes("dark")) return true;
  return classes.includes("light") ? false : preferred;
}

// Asks the kernel for what it has not been sent yet: {ask, id, ...} goes, {id, facts} comes back with a buffer for each array.
// Several views may share a model and so hear the answers of all: an answer is taken by its id.
export class ModelProvider {
  constructor(model, dark) {
    Object.assign(this, {model, dark, asked: new Map(), waiting: new Map(), own: Math.random().toString(36).slice(2), count: 0});
    this.hear = (content, buffers) => {
      const done = this.waiting.get(content?.id);
      if (!done) return;
      this.waiting.delete(content.id);
      if (content.refused) done.fail(new Error(content.refused)); else done.take(content.facts, buffers ?? []);
    };
    model.on("msg:custom", this.hear);
  }

  close() { this.model.off("msg:custom", this.hear); }

  send(message, read) {
    const id = `${this.own} ${this.count++}`;
    return new Promise((done, fail) => {
      this.waiting.set(id, {take: (facts, buffers) => done(read(facts, buffers)), fail});
      this.model.send({...message, id});
    });
  }

  once(key, message, read) {
    if (!this.asked.has(key)) this.asked.set(key, this.send(message, read));
    return this.asked.get(key);
  }

  async describe() {
    this.about = await this.once("describe", {ask: "describe"}, facts => facts);
    return this.about;
  }

  start(about) { return chosenBy(about, this.traits()); }

  traits() { return {score: this.model.get("score"), layer: this.model.get("layer"), token: this.model.get("token")}; }

  values(score, layer) {
    const place = this.about.values[score][layer];
    return this.once(`values ${place}`, {ask: "values", place}, ([packed], [data]) => floatsOf({...packed, data}));
  }

  neighbors(layer) {
    if (!this.about.neighbors) return Promise.resolve(null);
    return this.once(`neighbors ${layer}`, {ask: "neighbors", place: layer}, async (packed, buffers) => {
      const [rows, before, after] = await Promise.all(
        packed.map((facts, i) => (i ? floatsOf : rowsOf)({...facts, data: buffers[i]})));
      return {rows, before, after};
    });
  }
}
