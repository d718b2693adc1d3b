// What came of an action of the checkpoint picker: a sentence, figures by name, and of an evaluation a table with the
// rows that each model did worst and best. Every word is text, never HTML.

function resultTable({ columns, rows }) {
  const head = element("tr");
  columns.forEach((text, i) => head.append(element("th", i ? "llmnb-number" : "", { scope: "col" }, text)));
  const body = element("tbody");
  for (const [name, ...figures] of rows) {
    const row = element("tr", "", {}, element("th", "", { scope: "row" }, name));
    for (const figure of figures) {
      const [value, gap] = figure.split(" ("); // the difference below its figure: many columns, and no line to spare
      row.append(element("td", "llmnb-number", {}, value, ...(gap ? [element("div", "llmnb-dim", {}, `(${gap}`)] : [])));
    }
    body.append(row);
  }
  const table = element("table", "", { "aria-label": "Figures of each model, with the difference to the base" }, element("thead", "", {}, head), body);
  return element("div", "llmnb-picker-figures", { tabindex: "0", role: "group", "aria-label": "Figures" }, table);
}

function resultRows({ name, shown }) {
  const box = element("details", "", {}, element("summary", "", {}, `${name}: worst and best rows`));
  for (const [heading, parts] of shown) {
    box.append(element("div", "llmnb-picker-head-line", {}, heading));
    const list = element("dl");
    for (const [what, words] of parts) list.append(element("dt", "", {}, what), element("dd", "llmnb-picker-text", {}, words));
    box.append(list);
  }
  return box;
}

function resultOf({ head, lines, table, examples }) {
  const parts = [element("div", "llmnb-picker-head-line", { role: "status" }, head)];
  if (table) parts.push(resultTable(table));
  const list = element("dl");
  for (const [what, figure] of lines) list.append(element("dt", "", {}, what), element("dd", "", {}, figure));
  return [...parts, list, ...(examples || []).map(resultRows)];
}
