import assert from "node:assert/strict";
import test from "node:test";
import {asked, placeOf} from "../../../basin_lens/views/pages/explorer/keys.mjs";

const counts = {scores: 3, layers: 4, tokens: 10}, chosen = {token: 5, layer: 2, score: 2}, none = {...chosen, token: -1};
const ask = (key, place, state = chosen, more = {}) => asked({key, modified: false, shift: false, ...more}, place, state, counts, 7);

test("arrows go to tokens and layers from tokens, the map, a button and where nothing has the focus", () => {
  for (const place of ["token", "map", "button", "page"]) {
    assert.deepEqual(ask("ArrowRight", place), {token: 6});
    assert.deepEqual(ask("ArrowLeft", place), {token: 4});
    assert.deepEqual(ask("ArrowUp", place), {layer: 3});
    assert.deepEqual(ask("ArrowDown", place), {layer: 1});
  }
  assert.deepEqual(ask("ArrowRight", "token", {...chosen, token: 9}), {token: 9});
  assert.deepEqual(ask("ArrowUp", "token", {...chosen, layer: 3}), {layer: 3});
  assert.deepEqual(ask("ArrowRight", "page", none), {token: 7});
});

test("where nothing is chosen or has the focus, up and down scroll the page and Escape is not taken", () => {
  for (const key of ["ArrowUp", "ArrowDown", "Escape", "Enter", "PageDown", " "]) assert.equal(ask(key, "page", none), null);
  assert.deepEqual(ask("ArrowUp", "map", none), {layer: 3});
});

test("keys of fields, of boxes that scroll, of other parts of the page and of the browser are left to them", () => {
  for (const key of ["s", "/", "ArrowLeft", "ArrowUp", "Enter"]) {
    assert.equal(ask(key, "typing"), null);
    assert.equal(ask(key, "elsewhere"), null);
    assert.equal(ask(key, "token", chosen, {modified: true}), null);
  }
  assert.equal(ask("Escape", "elsewhere"), null);
  for (const key of ["ArrowDown", "ArrowRight", "Enter"]) assert.equal(ask(key, "other"), null);
  assert.equal(ask("Enter", "button"), null);
  assert.equal(ask("ArrowRight", "token", chosen, {shift: true}), null);
  for (const key of ["s", "ArrowLeft"]) assert.equal(ask(key, "search"), null);
});

test("searching, letting go, the next score, the token in focus", () => {
  assert.deepEqual(ask("Enter", "search"), {act: "find"});
  for (const place of ["search", "typing", "token", "other", "page"]) assert.deepEqual(ask("Escape", place), {act: "leave"});
  assert.deepEqual(ask("/", "page", chosen, {shift: true}), {act: "search"});
  assert.deepEqual(ask("s", "other"), {score: 0});
  assert.deepEqual(ask("Enter", "token"), {token: 7});
});

test("places of a key", () => {
  const places = [[{tag: "BODY"}, "page"], [{tag: "HTML"}, "page"], [{tag: "DIV"}, "elsewhere"], [{tag: "INPUT"}, "elsewhere"],
    [{tag: "DIV", editable: true}, "elsewhere"], [{tag: "BODY", editable: true}, "elsewhere"], [{tag: "SELECT", inside: true}, "typing"],
    [{tag: "INPUT", inside: true, search: true}, "search"],
    [{tag: "INPUT", type: "checkbox", inside: true}, "button"], [{tag: "INPUT", type: "range", inside: true}, "other"],
    [{tag: "INPUT", type: "checkbox"}, "elsewhere"], [{tag: "SPAN", inside: true, token: true}, "token"],
    [{tag: "CANVAS", inside: true, map: true}, "map"], [{tag: "BUTTON", inside: true}, "button"], [{tag: "PRE", inside: true}, "other"]];
  for (const [element, place] of places) assert.equal(placeOf(element), place, JSON.stringify(element));
});
