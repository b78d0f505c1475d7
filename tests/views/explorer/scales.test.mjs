import assert from "node:assert/strict";
import test from "node:test";
import * as scales from "../../../basin_lens/views/pages/explorer/scales.mjs";

const PAPER = {light: [255, 255, 255], dark: [22, 24, 27]};

// Red and blue as one sees them who lacks the cones for long or for middle waves (Viénot, Brettel and Mollon 1999), in linear RGB.
const SEEN = {
  protan: [[.11238, .88762, 0], [.11238, .88762, 0], [.00401, -.00401, 1]],
  deutan: [[.29275, .70725, 0], [.29275, .70725, 0], [-.02234, .02234, 1]],
};
const linear = color => color.map(c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
const seen = (color, how) => SEEN[how].map(row => row.reduce((sum, part, i) => sum + part * linear(color)[i], 0));
const distance = (a, b) => Math.hypot(...a.map((v, i) => v - b[i]));

for (const mode of ["light", "dark"]) {
  test(`every token can be read on its color, ${mode}`, () => {
    for (let i = -100; i <= 100; i++) {
      const color = scales.colorAt(i / 100, mode === "dark");
      assert.ok(scales.contrast(color, scales.inkOn(color)) >= 4.5, `${i}: ${color}`);
    }
  });

  test(`the middle is nearly the page's ground, the ends are not, ${mode}`, () => {
    const [low, middle, high] = [-1, 0, 1].map(x => scales.colorAt(x, mode === "dark"));
    assert.ok(scales.contrast(middle, PAPER[mode]) < 1.15);
    assert.ok(scales.contrast(low, PAPER[mode]) > 4.5 && scales.contrast(high, PAPER[mode]) > 4.5);
  });

  test(`below and above stay apart for color-blind eyes, ${mode}`, () => {
    for (const how of ["protan", "deutan"]) for (const x of [.3, .6, 1]) {
      const below = seen(scales.colorAt(-x, mode === "dark"), how), above = seen(scales.colorAt(x, mode === "dark"), how);
      assert.ok(distance(below, above) > .05, `${how} ${x}: ${distance(below, above)}`);
    }
  });
}

test("the scale has 0 at its middle where the provider says so, whatever signs rounding made, else the median", () => {
  assert.deepEqual(scales.scaleOf([[-1, NaN, 3]], true), {middle: 0, bound: 1, known: 2, zero: true});
  assert.equal(scales.scaleOf([[1, 2, 9]], true).middle, 0);
  assert.equal(scales.scaleOf([[-1e-15, 2, 9]], false).middle, 2);
  assert.equal(scales.scaleOf([[NaN]], false).bound, 1);
});

test("what is left out moves neither middle nor ends", () => {
  const values = Array.from({length: 101}, (_, i) => i / 100 - .5);
  assert.deepEqual(scales.scaleOf([[1000, ...values]], true, i => i === 0), scales.scaleOf([values], true));
  assert.equal(scales.scaleOf([values, values.map(v => 2 * v)], true).known, 202);
});

test("the key ends where a score does", () => {
  assert.deepEqual(scales.endsOf({middle: 3.1, bound: 9}, 0, null), [0, 12.1]);
  assert.deepEqual(scales.endsOf({middle: .5, bound: 2}, 0, 1), [0, 1]);
  assert.deepEqual(scales.endsOf({middle: 0, bound: 2}, undefined, null), [-2, 2]);
  assert.deepEqual(scales.endsOf({middle: 50, bound: 2}, 0, 100), [48, 52]);
});

test("values beyond the ends have the ends' color", () => {
  const scale = {middle: 2, bound: 4};
  assert.deepEqual([-100, 0, 2, 4, 100].map(v => scales.placeOn(v, scale)), [-1, -.5, 0, .5, 1]);
});

test("it opens at the most reliable layer, or in the middle", () => {
  assert.equal(scales.bestLayer([null, .2, .8, .8, null], 5), 2);
  assert.equal(scales.bestLayer(null, 5), 2);
  assert.equal(scales.bestLayer([null, null], 2), 0);
});

test("ticks are round and within", () => {
  assert.deepEqual(scales.ticks(-.31, .52), [-.2, 0, .2, .4]);
  assert.deepEqual(scales.ticks(0, 1e-7), [0, 2e-8, 4e-8, 6e-8, 8e-8, 1e-7]);
  assert.deepEqual(scales.ticks(3, 3), [3]);
});

test("ticks of nearly flat, huge and tiny ranges are few, and come at once", () => {
  const up = v => v + Math.abs(v) * 2 ** -52;
  const ends = [[1, up(1)], [1, 1 + 1e-15], [1e300, up(1e300)], [-3e-310, 3e-310], [0, 5e-324], [-1.7e308, 1.7e308], [0, 1e308], [-1, 1e-17],
    [1e-17, 2e-17], [0, Infinity], [NaN, 1], [2, 1], [1e15, 1e15 + 1], [.1, .1 + 1e-11], [5, 5 + 1e-10]];
  for (const [low, high] of ends) {
    const found = scales.ticks(low, high);
    assert.ok(found.length >= 1 && found.length <= 11, `${low} ${high}: ${found}`);
  }
});

test("a curve that is flat but for rounding is drawn in the middle", () => {
  assert.deepEqual(scales.rangeOf([1, 1 + 1e-16, 1 + 4e-16]).map(v => Number(v.toFixed(9))), [.5, 1.5]);
  assert.deepEqual(scales.rangeOf([0, 0]), [-1, 1]);
  assert.deepEqual(scales.rangeOf([-4]), [-6, -2]);
  assert.deepEqual(scales.rangeOf([1, 1.001]), [1, 1.001]);
});

test("words of ticks differ", () => {
  for (const [low, high] of [[1000.1, 1000.4], [-.31, .52], [0, 1e-7], [12345.6, 12345.9], [1, 1.0000001], [3, 3]]) {
    const said = scales.tickWords(scales.ticks(low, high));
    assert.equal(new Set(said).size, said.length, said.join(" "));
  }
});

test("numbers in words", () => {
  assert.deepEqual([NaN, null, 0, -1.23456, 123456789, .00001234, 42].map(v => scales.words(v)),
    ["–", "–", "0", "−1.235", "1.23e+8", "1.23e−5", "42"]);
});
