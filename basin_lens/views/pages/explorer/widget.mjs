import "./explorer.mjs";
import {make} from "./dom.mjs";
import {ModelProvider, chosenBy, isDark, traitsOf} from "./model.mjs";

const NARROW = 820;
const WAITING = "The explorer waits for its kernel. If it stays so, none answers here: run the cell again.";

// Whether the notebook is dark, as `matchMedia` tells of the reader's setting: `matches`, and "change" when it changes.
class NotebookTheme extends EventTarget {
  constructor() {
    super();
    this.preferred = matchMedia("(prefers-color-scheme: dark)");
    this.tell = () => this.dispatchEvent(new Event("change"));
    this.preferred.addEventListener("change", this.tell);
    this.watch = new MutationObserver(this.tell);
    for (const element of [document.documentElement, document.body])
      this.watch.observe(element, {attributes: true,
        attributeFilter: ["class", "theme", "data-theme", "data-jp-theme-light", "data-vscode-theme-kind"]});
  }

  get matches() {
    const {documentElement: root, body} = document;
    return isDark({jpThemeLight: body.dataset.jpThemeLight, kind: body.dataset.vscodeThemeKind,
      theme: root.getAttribute("theme") ?? root.dataset.theme ?? body.dataset.theme,
      classes: [...root.classList, ...body.classList]}, this.preferred.matches);
  }

  close() {
    this.watch.disconnect();
    this.preferred.removeEventListener("change", this.tell);
  }
}

// An explorer in `el`, within a shadow root: its styles do not leave it, the notebook's do not come in. What is chosen goes to the
// model, and what the model says is chosen. Answers with what takes it away again.
export function mount(model, el, style) {
  const host = make("div"), root = host.attachShadow({mode: "open"}), sheet = make("style", style);
  const explorer = make("basin-explorer"), theme = new NotebookTheme(), provider = new ModelProvider(model, theme);
  host.setAttribute("data-lm-suppress-shortcuts", "true");  // JupyterLab hears keys before the page does
  explorer.setAttribute("enclosed", "");
  explorer.setAttribute("theme", theme.matches ? "dark" : "light");
  explorer.append(make("p", WAITING, "failed"));
  root.append(sheet, explorer);
  el.append(host);
  const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
  const follow = () => {
    if (!explorer.state || !explorer.tokens || same(traitsOf(explorer.about, explorer.state), provider.traits())) return;
    explorer.go(chosenBy(explorer.about, provider.traits()), true);
  };
  explorer.addEventListener("state", () => {
    const traits = traitsOf(explorer.about, explorer.state), before = provider.traits();
    const changed = Object.keys(traits).filter(name => !same(traits[name], before[name]));
    for (const name of changed) model.set(name, traits[name]);
    if (changed.length) model.save_changes();
  });
  const changes = ["change:token", "change:layer", "change:score"];
  for (const name of changes) model.on(name, follow);
  const size = new ResizeObserver(() => explorer.classList.toggle("narrow", explorer.clientWidth < NARROW));
  size.observe(explorer);
  explorer.open(provider).then(follow, error => console.error(error));
  return () => {
    for (const name of changes) model.off(name, follow);
    size.disconnect();
    theme.close();
    provider.close();
    host.remove();
  };
}
