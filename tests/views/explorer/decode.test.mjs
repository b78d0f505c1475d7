import assert from "node:assert/strict";
import {deflateSync} from "node:zlib";
import test from "node:test";
import {bytesOf, floatsOf, joined, rowsOf, summed} from "../../../basin_lens/views/pages/explorer/decode.mjs";
import {PageProvider} from "../../../basin_lens/views/pages/explorer/provider.mjs";

const packed = (bytes, facts) => ({...facts, data: deflateSync(Uint8Array.from(bytes)).toString("base64")});

test("planes of bytes become whole numbers", () => {
  assert.deepEqual([...joined([1, 2, 0, 1], 2)], [1, 258]);
  assert.deepEqual([...joined([1, 0, 0, 255], 4)], [0xff000001]);
  assert.throws(() => joined([1, 2, 3], 2), /multiple of 2/);
  assert.deepEqual([...bytesOf("AP8=")], [0, 255]);
});

const line = {width: 1, steps: 5, run: 1, middle: 5, spread: 2, low: -1, high: 1, least: 5 - 2 * Math.sinh(1), most: 8, zero: 6};

test("steps become values, 0 none", async () => {
  const values = await floatsOf(packed([0, 1, 2, 3, 4, 5], line));
  assert.ok(Number.isNaN(values[0]));
  [line.least, 5 - 2 * Math.sinh(.5), 5, 5 + 2 * Math.sinh(.5), 8].forEach((v, i) => assert.ok(Math.abs(values[i + 1] - v) < 1e-6));
});

test("exact zeros and ends are exact, and rounding goes beyond no end", async () => {
  const least = .3, most = .7;
  assert.deepEqual([...await floatsOf(packed([6, 1, 5], line))], [0, Math.fround(line.least), 8]);
  assert.deepEqual([...await floatsOf(packed([2, 4], {...line, least, most}))], [Math.fround(most), Math.fround(most)]);
  assert.equal((await floatsOf(packed([1], {...line, middle: 1.1 - 1.1 + 1e-15, low: 0, high: 0, least: 0, most: 0})))[0], 0);
});

test("differences within a run become numbers again, also where they fall", () => {
  assert.deepEqual([...summed(Uint32Array.from([5, 2, 255, 9, 0, 1]), 3)], [5, 7, 6, 9, 9, 10]);
  assert.deepEqual([...summed(Uint32Array.from([300, 2]), 1)], [300, 2]);
});

test("rows of the bank, and none", async () => {
  assert.deepEqual([...await rowsOf(packed([0, 1, 8, 0, 0, 1], {width: 2}))], [-1, 0, 263]);
});

test("the page's provider decodes a layer when it is first asked for, and once", async () => {
  const facts = {width: 1, steps: 3, run: 1, middle: 0, spread: 1, low: 0, high: 1};
  const provider = new PageProvider({
    values: [[0, 1], [1, 1]], arrays: [packed([1], facts), {...facts, data: "damaged"}], neighbors: null});
  assert.equal(await provider.values(0, 0), await provider.values(0, 0));
  await assert.rejects(provider.values(0, 1));
  assert.equal(await provider.neighbors(0), null);
});
