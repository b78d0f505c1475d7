import assert from "node:assert/strict";
import test from "node:test";
import {deflateSync} from "node:zlib";
import {ModelProvider, chosenBy, isDark, rowOf, tokenOf, traitsOf} from "../../../basin_lens/views/pages/explorer/model.mjs";

// Positions with gaps, and a sequence whose number is not its place.
const about = {sequences: [{seq: 2, length: 3}, {seq: 7, length: 2}], positions: [0, 1, 4, 0, 4], layers: [3, 9],
  scores: [{name: "a"}, {name: "b"}], values: [[0, 1], [2, 2]], neighbors: {shown: 1}};

class FakeModel {
  constructor(state) { Object.assign(this, {state, sent: [], heard: new Set()}); }
  get(name) { return this.state[name]; }
  on(_, hear) { this.heard.add(hear); }
  off(_, hear) { this.heard.delete(hear); }
  send(message) { this.sent.push(message); }
  answer(content, buffers) { for (const hear of this.heard) hear(content, buffers); }
}

test("rows go by sequence and position as the table has them, and back", () => {
  for (const [row, token] of [[0, [2, 0]], [2, [2, 4]], [3, [7, 0]], [4, [7, 4]], [-1, null]]) {
    assert.equal(rowOf(about, token), row);
    assert.deepEqual(tokenOf(about, row), token);
  }
  for (const unknown of [[7, 1], [3, 0], [2, 9]]) assert.equal(rowOf(about, unknown), -1);
});

test("what is chosen goes by names and numbers of the table; what it does not have is left as it was", () => {
  assert.deepEqual(traitsOf(about, {score: 1, layer: 0, token: 4}), {score: "b", layer: 3, token: [7, 4]});
  assert.deepEqual(chosenBy(about, {score: "b", layer: 3, token: [7, 4]}), {score: 1, layer: 0, token: 4});
  assert.deepEqual(chosenBy(about, {score: "c", layer: 0, token: null}), {token: -1});
});

test("the notebook's theme comes before the reader's setting", () => {
  const page = {classes: []};
  assert.equal(isDark({...page, jpThemeLight: "false"}, false), true);
  assert.equal(isDark({...page, jpThemeLight: "true"}, true), false);
  for (const [kind, dark] of [["vscode-dark", true], ["vscode-high-contrast", true], ["vscode-light", false],
    ["vscode-high-contrast-light", false]]) assert.equal(isDark({...page, kind}, !dark), dark);
  assert.equal(isDark({...page, theme: "dark"}, false), true);
  assert.equal(isDark({...page, theme: "light"}, true), false);
  assert.equal(isDark({classes: ["dark"]}, false), true);
  assert.equal(isDark({classes: ["light"]}, true), false);
  assert.equal(isDark(page, true), true);
});

test("a layer is asked for once, and its bytes are read as the page's are", async () => {
  const model = new FakeModel({score: "b", layer: 9, token: [2, 1]}), provider = new ModelProvider(model);
  const described = provider.describe();
  assert.equal(model.sent[0].ask, "describe");
  model.answer({id: model.sent[0].id, facts: about}, []);
  assert.equal(await described, about);
  assert.deepEqual(provider.start(about), {score: 1, layer: 1, token: 1});
  const first = provider.values(1, 0);
  assert.equal(provider.values(1, 1), first);  // both layers are the one array
  assert.equal(model.sent.length, 2);
  assert.deepEqual({...model.sent[1], id: ""}, {ask: "values", place: 2, id: ""});
  const packed = {middle: 0, spread: 1, low: 0, high: 0, least: 5, most: 5, zero: null, run: 1, width: 1, steps: 9};
  model.answer({id: "another view's", facts: [packed]}, [new DataView(new ArrayBuffer(1))]);
  const bytes = Uint8Array.from(deflateSync(Uint8Array.from([0, 1])));
  model.answer({id: model.sent[1].id, facts: [packed]}, [new DataView(bytes.buffer)]);
  assert.deepEqual([...await first], [NaN, 5]);
});

test("a refusal is an error, and who is closed hears nothing more", async () => {
  const model = new FakeModel({}), provider = new ModelProvider(model);
  provider.about = about;
  const refused = provider.neighbors(0);
  model.answer({id: model.sent[0].id, refused: "expected a place below 2"}, []);
  await assert.rejects(refused, /expected a place/);
  provider.close();
  assert.equal(model.heard.size, 0);
});
