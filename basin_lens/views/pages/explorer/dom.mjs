// Elements made of text: what a run's texts say never becomes markup.
export function make(tag, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
}

export function shape(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

export function button(text, title, act) {
  const element = make("button", text, "small");
  element.type = "button";
  element.title = title;
  element.addEventListener("click", act);
  return element;
}

export function chooser(name, texts) {
  const select = make("select", undefined, name);
  texts.forEach((text, i) => { const option = make("option", text); option.value = i; select.append(option); });
  return select;
}

export function headed(heading, ...buttons) {
  const line = make("div", undefined, "headed");
  line.append(heading, ...buttons);
  return line;
}

export function folded(title, ...inside) {
  const box = make("details");
  box.append(make("summary", title), ...inside);
  return box;
}

export function tableOf(head, rows, numbersFrom) {
  const table = make("table"), lines = [head, ...rows];
  lines.forEach((cells, i) => {
    const line = make("tr");
    cells.forEach((cell, j) => line.append(make(i ? "td" : "th", cell, j >= numbersFrom ? "n" : "")));
    table.append(line);
  });
  const box = make("div", undefined, "scrolls");
  box.tabIndex = 0;  // a table wider than the page scrolls by keyboard, too
  box.append(table);
  return box;
}

export function save(blob, name) {
  const link = make("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// Whether a text got to the clipboard. A page of http has none, one of file or in a frame may be refused it: then an older way.
export async function copied(text, within) {
  try { await navigator.clipboard.writeText(text); return true; } catch { /* by a field that is selected */ }
  const field = Object.assign(make("textarea", undefined, "unseen"), {value: text}), before = focused(within);
  within.append(field);
  field.select();
  let done = false;
  try { done = document.execCommand("copy"); } catch { /* neither way */ }
  field.remove();
  before?.focus({preventScroll: true});
  return done;
}

// What has the focus, seen from an element: within a shadow root, the document knows only of the root's host.
export const focused = element => element.getRootNode().activeElement;

export const choose = (element, detail) => element.dispatchEvent(new CustomEvent("choose", {bubbles: true, detail}));

// An element may be defined once a page, however many explorers it holds.
export function define(name, type) { if (!customElements.get(name)) customElements.define(name, type); }
