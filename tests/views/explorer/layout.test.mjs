import assert from "node:assert/strict";
import test from "node:test";
import * as layout from "../../../basin_lens/views/pages/explorer/layout.mjs";

test("parts hold every token once, in order, within their sequence", () => {
  const lengths = [1, 500, 240, 3, 49_000], parts = layout.partsOf(lengths, row => row % 100 === 99);
  let next = 0;
  for (const part of parts) {
    assert.equal(part.start, next);
    assert.ok(part.end - part.start <= 240 && part.end > part.start);
    next = part.end;
  }
  assert.equal(next, lengths.reduce((a, b) => a + b));
  assert.deepEqual(parts.filter(p => p.first).map(p => p.sequence), [0, 1, 2, 3, 4]);
  assert.equal(parts[1].end, 200);  // the last line's end in reach, not the 240th token
});

test("no character of a token is unseen", () => {
  assert.equal(layout.visible(""), "∅");
  assert.equal(layout.visible("a\n\tb\r"), "a⏎⇥b␍");
  assert.equal(layout.visible("x\u202ey\u0000\u200b"), "x\\u202ey␀\\u200b");
  assert.equal(layout.visible(" <b>é漢"), " <b>é漢");
});

test("columns of a map share all tokens out", () => {
  for (const [count, width] of [[10, 500], [500, 10], [7, 3], [50_000, 400], [1, .5]]) {
    const columns = layout.columnsOf(count, width);
    assert.ok(columns.length <= Math.max(1, width) && columns.length <= count);
    assert.deepEqual([columns[0][0], columns.at(-1)[1]], [0, count]);
    columns.slice(1).forEach(([first], i) => assert.equal(first, columns[i][1]));
  }
});

test("the token furthest from the middle stands for a column", () => {
  assert.equal(layout.furthest([NaN, 1, -3, 2, 99], 0, 4, 0), 2);
  assert.equal(layout.furthest([5, 1, 2], 0, 3, 5), 1);
  assert.equal(layout.furthest([2, -2, 2], 0, 3, 0), 0);
  assert.equal(layout.furthest([NaN, NaN], 0, 2, 0), -1);
});

test("a neighbor stands in its own text, which ends where it ends", () => {
  const bank = {seq: [0, 0, 0, 1, 1, 1], first: [0, 3], length: [3, 3], tokens: [10, 11, 12, 20, 21, 22]};
  assert.deepEqual(layout.around(bank, 2), [[11, false], [12, true]]);
  assert.deepEqual(layout.around(bank, 4), [[21, true], [22, false]]);
  assert.deepEqual(layout.around(bank, 3)[0], [20, true]);
});

test("the state goes into the address and comes back; what the run lacks does not", () => {
  const about = {scores: [{name: "a & b"}, {name: "c=d"}], layers: [0, 5, 29], count: 10};
  for (const state of [{score: 1, layer: 2, token: 7, fixed: true}, {score: 0, layer: 0, token: 0}])
    assert.deepEqual(layout.stateOf(layout.hashOf(state, about), about), state);
  assert.deepEqual(layout.stateOf("#score=nope&layer=4&token=10&fixed=2", about), {});
  assert.deepEqual(layout.stateOf("#token=-1", about), {});
  assert.deepEqual(layout.stateOf("", about), {});
});

test("search finds words of one token and of several, from where one is", () => {
  const texts = ["The", " fer", "ry", " had", " fer", "n"];
  assert.equal(layout.search(texts, "ferry", 0), 1);
  assert.equal(layout.search(texts, "FER", 2), 4);
  assert.equal(layout.search(texts, "the", 3), 0);
  assert.equal(layout.search(texts, "ferry h", 0), 1);
  assert.equal(layout.search(texts, "boat", 0), -1);
  assert.equal(layout.search(texts, "  ", 0), -1);
});

test("a spreadsheet reads a file's texts as texts", () => {
  assert.equal(layout.csvOf([["token", "score"], ["=1+1", .5], ['a"b,\n', NaN], ["-", -1]]),
    '"token","score"\n"\'=1+1",0.5\n"a""b,\n",\n"\'-",-1\n');
  for (const start of ["=", "+", "-", "@", "\t", "\r", "\n", "＝", "'"])
    assert.equal(layout.csvOf([[`${start}1`]]), `"'${start}1"\n`);
  for (const text of [" =1", "a=1", "\"=1", "", ";=1"]) assert.equal(layout.csvOf([[text]]), `"${text.replace('"', '""')}"\n`);
});

test("a file's rows have the table's own keys, and say that their numbers are rounded", () => {
  const about = {scores: [{name: "a"}, {name: "b"}], layers: [3, 9], positions: [0, 1, 5], rounded: true,
    sequences: [{doc: "d", seq: 4, length: 2}, {doc: "e", seq: 17, length: 1}]};
  const values = [Float64Array.of(NaN, .123456, 2), Float64Array.of(1, 2, 3)], texts = ["x", "y", "z"];
  assert.deepEqual(layout.scoresOf(about, 1, texts, values), [["doc", "seq", "pos", "token", "layer", "a (rounded)", "b (rounded)"],
    ["d", 4, 0, "x", 9, NaN, 1], ["d", 4, 1, "y", 9, .1235, 2], ["e", 17, 5, "z", 9, 2, 3]]);
  const [head, , second] = layout.scoresOf({...about, rounded: false}, 0, texts, values);
  assert.deepEqual([head[5], second[5]], ["a", .123456]);
});
