// What stands where: parts of a text, columns of a map, the state in the address, rows of a file. Nothing here touches the page.

const NAMED = {"\n": "⏎", "\t": "⇥", "\r": "␍"};
const UNSEEN = /[\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Cs}\p{Zl}\p{Zp}]/gu;

// A token's text so that every character of it is seen: what has no width or turns the direction of writing would hide, or reorder
// the text beside it.
export function visible(text) {
  if (text === "") return "∅";
  return text.replace(/[\n\t\r]/g, c => NAMED[c]).replace(UNSEEN, c => {
    const code = c.codePointAt(0);
    return code < 32 ? String.fromCodePoint(0x2400 + code) : `\\u${code.toString(16).padStart(4, "0")}`;
  });
}

// Texts in parts of at most so many tokens, each within one sequence; a part ends at a line's end where one is near its end.
export function partsOf(lengths, endsLine, most = 240) {
  const parts = [];
  let start = 0;
  lengths.forEach((length, sequence) => {
    const end = start + length;
    for (let first = start; first < end;) {
      let last = Math.min(first + most, end);
      if (last < end) for (let at = last; at > first + most / 2; at--) if (endsLine(at - 1)) { last = at; break; }
      parts.push({sequence, start: first, end: last, first: first === start});
      first = last;
    }
    start = end;
  });
  return parts;
}

// Height of a part before it was ever drawn, in pixels. `letters`: of its text; `wide`: of one of them, on average.
export const heightOf = (letters, width, wide = 8, line = 28) => Math.max(1, Math.ceil(letters * wide / Math.max(width,
  80))) * line;

// Which tokens share a column of a map that is so many pixels wide: one each where there is room.
export function columnsOf(count, width) {
  const columns = Math.max(1, Math.min(count, Math.floor(width)));
  return Array.from({length: columns}, (_, i) => [Math.floor(i * count / columns), Math.floor((i + 1) * count / columns)]);
}

// The token whose value is furthest from the middle stands for a column, in color, words and click: a mean would hide what one
// looks for. -1 where none has a value.
export function furthest(values, first, end, middle) {
  let found = -1;
  for (let i = first; i < end; i++)
    if (!Number.isNaN(values[i]) && (found < 0 || Math.abs(values[i] - middle) > Math.abs(values[found] - middle))) found = i;
  return found;
}

// A row of the bank with its text around it: [text, whether it is the row itself] each. Position 0 is the start of the text, not
// of it.
export function around(bank, row, before = 5, after = 4) {
  const sequence = bank.seq[row], start = bank.first[sequence], end = start + bank.length[sequence], found = [];
  for (let i = Math.max(start + 1, row - before); i < Math.min(end, row + after); i++) found.push([bank.tokens[i], i === row]);
  if (row === start) found.unshift([bank.tokens[row], true]);
  return found;
}

// The state of the page in its address, and back. What the run does not have is left out, not guessed.
export function hashOf({score, layer, token, fixed}, {scores, layers}) {
  const parts = new URLSearchParams({score: scores[score].name, layer: String(layers[layer])});
  if (token >= 0) parts.set("token", String(token));
  if (fixed) parts.set("fixed", "1");
  return `#${parts}`;
}

export function stateOf(hash, {scores, layers, count}) {
  const parts = new URLSearchParams(hash.replace(/^#/, "")), state = {};
  const score = scores.findIndex(s => s.name === parts.get("score"));
  const layer = layers.findIndex(l => String(l) === parts.get("layer"));
  const token = /^\d+$/.test(parts.get("token") ?? "") ? Number(parts.get("token")) : -1;
  if (score >= 0) state.score = score;
  if (layer >= 0) state.layer = layer;
  if (token >= 0 && token < count) state.token = token;
  if (parts.get("fixed") === "1") state.fixed = true;
  return state;
}

// Tokens from one on whose text, with what follows, begins with the words looked for; -1: nowhere.
export function search(texts, wanted, from) {
  const low = wanted.toLowerCase().trim();
  if (!low) return -1;
  for (let i = 0; i < texts.length; i++) {
    const at = (from + i) % texts.length;
    let text = texts[at].toLowerCase().trimStart();
    for (let next = at + 1; text.length < low.length && next < texts.length && text && low.startsWith(text); next++)
      text += texts[next].toLowerCase();
    if (text.startsWith(low)) return at;
  }
  return -1;
}

// A spreadsheet would run what begins as a formula: an apostrophe goes before it, and before one that is the text's own, so that
// whoever takes the first of each cell away has the texts again. NaN is an empty cell.
const RUN = /^['=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]/;
const cell = value => typeof value === "number" ? (Number.isNaN(value) ? "" : String(value))
  : `"${(RUN.test(value) ? `'${value}` : value).replaceAll('"', '""')}"`;
export const csvOf = rows => rows.map(row => row.map(cell).join(",")).join("\n") + "\n";

// A row a token with its scores at one layer, keys as the table has them. Rounded numbers say so in the names of their columns.
export function scoresOf({scores, layers, positions, sequences, rounded}, layer, texts, values) {
  const rows = [["doc", "seq", "pos", "token", "layer", ...scores.map(s => rounded ? `${s.name} (rounded)` : s.name)]];
  for (const {doc, seq, length} of sequences)
    for (let row = rows.length - 1, end = row + length; row < end; row++)
      rows.push([doc, seq, positions[row], texts[row], layers[layer],
        ...values.map(v => rounded ? Number(v[row].toPrecision(4)) : v[row])]);
  return rows;
}
