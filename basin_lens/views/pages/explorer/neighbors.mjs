import {define, make} from "./dom.mjs";
import {around, visible} from "./layout.mjs";
import {words} from "./scales.mjs";

// The neighbors of a token at a layer: each in its text, its distance before the block and that of their outputs after it.
class BasinNeighbors extends HTMLElement {
  show({about, found, token}) {
    this.replaceChildren();
    const {neighbors: kept, strings} = about;
    if (!kept) return this.append(make("p", "Neighbors were not kept in this report."));
    const first = token * kept.shown;
    if (found.rows[first] < 0) return this.append(make("p", "No neighbors at this layer (position 0, not asked for, or too few)."));
    const table = make("table"), head = make("tr");
    for (const [text, name] of [["neighbor in its text", ""], ["before", "n"], ["after", "n"]]) head.append(make("th", text, name));
    table.append(head);
    for (let i = first; i < first + kept.shown && found.rows[i] >= 0; i++) {
      const line = make("tr"), context = make("td", undefined, "context");
      for (const [code, itself] of around(kept.bank, found.rows[i]))
        context.append(itself ? make("mark", visible(strings[code])) : visible(strings[code]));
      context.append(make("small", kept.bank.docs[kept.bank.seq[found.rows[i]]]));
      line.append(context, make("td", words(found.before[i], 3), "n"), make("td", words(found.after[i], 3), "n"));
      table.append(line);
    }
    const which = kept.shown < kept.k ? `The ${kept.shown} nearest of the ${kept.k} neighbors` : `The ${kept.k} neighbors`;
    this.append(table, make("p", `${which} behind ${kept.score}, nearest first, with their distance to the token before the ` +
      `block and to its output after it (state units).${kept.own ? " They are underlined in the text." : ""}`, "soft"));
  }
}
define("basin-neighbors", BasinNeighbors);
