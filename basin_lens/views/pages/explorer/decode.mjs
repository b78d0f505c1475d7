// Numbers as Python's `packing.py` writes them: zlib, then planes of bytes, then steps between a lowest and a highest.

export function bytesOf(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

// Base64 where the page holds the numbers, bytes where a kernel sent them.
export async function inflated(data) {
  const bytes = typeof data === "string" ? bytesOf(data) : data;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The first plane has every number's lowest byte, the next its second, and so on: alike bytes stand together and compress.
export function joined(bytes, width) {
  const count = bytes.length / width;
  if (!Number.isInteger(count)) throw new Error(`expected a multiple of ${width} bytes, got ${bytes.length}`);
  const numbers = new Uint32Array(count);
  for (let plane = 0; plane < width; plane++)
    for (let i = 0; i < count; i++) numbers[i] += bytes[plane * count + i] * 256 ** plane;
  return numbers;
}

// Step 0 is no value. Steps are even in asinh((value - middle) / spread): fine near the middle, coarser where values are far out.
// The ends and exact zeros are as they were measured; rounding puts no value beyond the ends.
export function unstepped(steps, {middle, spread, low, high, least, most, zero, steps: last}) {
  const values = new Float32Array(steps.length), width = last > 1 ? (high - low) / (last - 1) : 0;
  const at = step => step === 0 ? NaN : step === zero ? 0 : step === 1 ? least : step === last ? most
    : Math.min(most, Math.max(least, middle + spread * Math.sinh(low + (step - 1) * width)));
  for (let i = 0; i < steps.length; i++) values[i] = at(steps[i]);
  return values;
}

// Within a run, each number but the first is the difference to the one before, in a byte.
export function summed(steps, run) {
  for (let i = 0; i < steps.length; i++) if (i % run) steps[i] = (steps[i] + steps[i - 1]) % 256;
  return steps;
}

export async function floatsOf(packed) {
  return unstepped(summed(joined(await inflated(packed.data), packed.width), packed.run), packed);
}

// Rows of the bank, each plus one; 0 is none.
export async function rowsOf(packed) {
  return Int32Array.from(joined(await inflated(packed.data), packed.width), row => row - 1);
}
