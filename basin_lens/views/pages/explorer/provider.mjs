import {floatsOf, rowsOf} from "./decode.mjs";

// Where an explorer's data come from. A provider has `describe()`, `values(score, layer)` and `neighbors(layer)`, numbers by
// place in
// what `describe` lists; a live one may have more. This one has them in the page, and decodes a layer when it is first asked for.
export class PageProvider {
  constructor(data) { this.data = data; this.decoded = new Map(); }

  async describe() { return this.data; }

  once(key, decode) {
    if (!this.decoded.has(key)) this.decoded.set(key, decode());
    return this.decoded.get(key);
  }

  values(score, layer) {
    const place = this.data.values[score][layer];
    return this.once(`values ${place}`, () => floatsOf(this.data.arrays[place]));
  }

  neighbors(layer) {
    const kept = this.data.neighbors;
    if (!kept) return Promise.resolve(null);
    return this.once(`neighbors ${layer}`, async () => {
      const [rows, before, after] = await Promise.all(
        [rowsOf(kept.rows[layer]), floatsOf(kept.before[layer]), floatsOf(kept.after[layer])]);
      return {rows, before, after};
    });
  }
}
