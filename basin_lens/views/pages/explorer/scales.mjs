// From values to places on a scale, colors and words. Nothing here touches the page.

// ColorBrewer's RdBu, safe for color blindness: red below, blue above, the middle as the page's ground. In the dark the ends are
// light.
export const PALETTES = {
  light: [[178, 24, 43], [239, 138, 98], [253, 219, 199], [255, 255, 255], [209, 229, 240], [103, 169, 207], [33, 102, 172]],
  dark: [[255, 138, 112], [196, 84, 68], [104, 50, 46], [28, 31, 35], [34, 62, 88], [52, 116, 168], [122, 192, 240]],
};

export function colorAt(x, dark = false) {
  const stops = PALETTES[dark ? "dark" : "light"], place = (Math.max(-1, Math.min(1, x)) + 1) / 2 * (stops.length - 1);
  const first = Math.min(stops.length - 2, Math.floor(place)), part = place - first;
  return stops[first].map((from, i) => Math.round(from + (stops[first + 1][i] - from) * part));
}

export function luminance(color) {
  const [r, g, b] = color.map(c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
}

export function contrast(a, b) {
  const [high, low] = [luminance(a), luminance(b)].sort((x, y) => y - x);
  return (high + .05) / (low + .05);
}

// Of black and white, one has a contrast of at least 4.58 with any color.
const INKS = [[0, 0, 0], [255, 255, 255]];
export function inkOn(color) {
  return contrast(INKS[0], color) >= contrast(INKS[1], color) ? INKS[0] : INKS[1];
}

export const css = color => `rgb(${color.join(", ")})`;

// The middle is 0 of a score with both signs (`zero`: the provider says so, as rounded numbers cannot), else the median; the ends
// hold all but the furthest 2 %.
// `leaveOut(i)`: values that color nothing by their size, such as those at position 0, which are far from all others.
export function scaleOf(arrays, zero, leaveOut = () => false) {
  const known = [];
  for (const array of arrays) array.forEach((v, i) => { if (!Number.isNaN(v) && !leaveOut(i)) known.push(v); });
  if (!known.length) return {middle: 0, bound: 1, known: 0, zero};
  const sorted = Float64Array.from(known).sort();
  const middle = zero ? 0 : sorted[sorted.length >> 1], away = sorted.map(v => Math.abs(v - middle)).sort();
  return {middle, bound: away[Math.floor(.98 * (away.length - 1))] || away[away.length - 1] || 1, known: known.length, zero};
}

export const placeOn = (value, {middle, bound}) => Math.max(-1, Math.min(1, (value - middle) / bound));

// The values where a scale's colors end, or a score's own bounds where these are nearer.
export const endsOf = ({middle, bound}, low, high) =>
  [Math.max(middle - bound, low ?? -Infinity), Math.min(middle + bound, high ?? Infinity)];

// The layer to open at: of the highest reliability, the first of equals; without reliabilities the one in the middle.
export function bestLayer(reliability, layers) {
  let best = -1;
  (reliability ?? []).forEach((r, i) => { if (r !== null && (best < 0 || r > reliability[best])) best = i; });
  return best < 0 ? Math.floor((layers - 1) / 2) : best;
}

// Lowest and highest of values to draw between; those that differ by nothing but rounding get room on both sides.
export function rangeOf(known) {
  const least = Math.min(...known), most = Math.max(...known), size = Math.max(Math.abs(least), Math.abs(most));
  return most - least > 1e-9 * size ? [least, most] : [least - (size / 2 || 1), most + (size / 2 || 1)];
}

// Round numbers from `low` to `high`, at most 2 * about + 1. Where the steps would be lost in rounding there is one: `low`.
export function ticks(low, high, about = 5) {
  const rough = (high - low) / about, size = Math.max(Math.abs(low), Math.abs(high));
  if (!(rough > 1e-12 * size) || rough === Infinity) return [low];
  const ten = 10 ** Math.floor(Math.log10(rough));
  const step = ten * ([1, 2, 5].find(f => f * ten >= rough * (1 - 1e-9)) ?? 10), first = Math.ceil(low / step - 1e-9), found = [];
  for (let i = 0; i <= 2 * about && (first + i) * step <= high + step * 1e-9; i++)
    found.push(first + i === 0 ? 0 : Number(((first + i) * step).toPrecision(15)));
  return found;
}

// As many digits as tell ticks apart.
export function tickWords(found) {
  const size = Math.max(...found.map(Math.abs)), step = found.length > 1 ? Math.abs(found[1] - found[0]) : size;
  const digits = Math.max(4, Math.min(15, Math.ceil(Math.log10(size / step || 1)) + 1));
  return found.map(v => words(v, digits));
}

// The minus sign, not a hyphen; exponents where the number would be long.
export function words(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const far = value !== 0 && (Math.abs(value) < .001 || Math.abs(value) >= 1e5);
  return (far ? value.toExponential(digits - 2) : String(Number(value.toPrecision(digits)))).replaceAll("-", "−");
}
