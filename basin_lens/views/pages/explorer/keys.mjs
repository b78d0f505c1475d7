// What keys ask for. Nothing here touches the page.

// Where a key was pressed: in the field for searching, another field, on a token, the map, a button, on nothing of the page
// ("page"), on what scrolls or opens by keys of its own ("other"). `inside`: the explorer has the element.
export function placeOf({tag, type, inside, search, token, map, editable}) {
  if (search) return "search";
  if (inside && type === "checkbox") return "button";
  if (inside && type === "range") return "other";
  if (editable || ["INPUT", "SELECT", "TEXTAREA"].includes(tag)) return inside ? "typing" : "elsewhere";
  if (["BODY", "HTML"].includes(tag)) return "page";
  if (!inside) return "elsewhere";
  return token ? "token" : map ? "map" : tag === "BUTTON" ? "button" : "other";
}

// A change of the state, {act} for what is none, or null: the key is not the explorer's. `cursor`: the token that the tab key
// reaches. Up and down scroll the page while nothing is chosen or has the focus.
export function asked({key, modified, shift}, place, {token, layer, score}, {scores, layers, tokens}, cursor) {
  if (modified || place === "elsewhere") return null;
  if (place === "search" && key === "Enter") return {act: "find"};
  if (key === "Escape") return place === "page" && token < 0 ? null : {act: "leave"};
  if (place === "search" || place === "typing") return null;
  if (key === "/") return {act: "search"};
  if (key === "s") return {score: (score + 1) % scores};
  if (place === "other" || shift) return null;
  if (key === "Enter") return place === "token" ? {token: cursor} : null;
  const at = token >= 0 ? token : cursor - 1;
  if (key === "ArrowRight") return {token: Math.min(tokens - 1, at + 1)};
  if (key === "ArrowLeft") return {token: Math.max(0, at - 1)};
  if (place === "page" && token < 0) return null;
  if (key === "ArrowUp") return {layer: Math.min(layers - 1, layer + 1)};
  return key === "ArrowDown" ? {layer: Math.max(0, layer - 1)} : null;
}
