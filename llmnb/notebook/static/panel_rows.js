// The rows of the training panel and the rows of data under them. Nothing here knows the kernel: a line tells its view
// what was typed. This text stands in front of panel.js (see panel.py).

function percent(share) {
  return share > 0 && share < 0.01 ? `${(100 * share).toFixed(1)} %` : `${Math.round(100 * share)} %`;
}

// What an empty field means.
const EMPTY = {
  model_name_or_path: "hub id or folder",
  key: "chosen from the rows",
  filter: "all documents",
  limit: "all",
  train_on: "answers; all of a text",
  prompt_template: "the model's own",
  identifier: "the base's name",
  adapter_id: "none",
  bits: "full precision",
  optim: "transformers' own",
  deepspeed: "none",
  num_gpus: "all",
  ray_address: "this machine",
  max_steps: "by epochs",
  eval_steps: "each log",
  save_total_limit: "all",
  early_stopping_patience: "never",
};

function wordOf(row, choice) {
  if (row.name === "bits" && choice) return `${choice} bits`;
  if (choice === "") return EMPTY[row.name] || "automatic";
  if (choice === "true") return "on";
  return choice === "false" ? "off" : choice;
}

// One row of the form: label, control, unit, help, fault.
class Line {
  constructor(row, view) {
    Object.assign(this, { row, view });
    const id = `llmnb-${ids.next++}`;
    this.input = this.control(row);
    this.input.id = id;
    this.input.setAttribute("aria-describedby", `${id}-help ${id}-fault`);
    this.label = element("label", "llmnb-label", { for: id, title: row.name }, row.label);
    this.unit = element("span", "llmnb-unit");
    const box = element("div", "llmnb-control", {}, this.input, this.unit);
    this.help = element("div", "llmnb-help", { id: `${id}-help` });
    this.fault = element("div", "llmnb-fault", { id: `${id}-fault` });
    this.node = element("div", `llmnb-row llmnb-kind-${row.kind}`, { "data-row": row.name }, this.label, box, this.help, this.fault);
    this.offered = "";
  }

  control(row) {
    if (row.kind === "yes") {
      const box = element("input", "", { type: "checkbox" });
      box.addEventListener("change", () => this.view.edit(row.name, box.checked, true));
      return box;
    }
    if (row.kind === "choice" || row.kind === "collection") {
      const select = element("select", "llmnb-field");
      for (const choice of row.choices) select.append(new Option(wordOf(row, choice), choice));
      select.addEventListener("change", () => this.view.edit(row.name, select.value, true));
      if (row.kind === "collection") select.addEventListener("focus", () => this.view.send({ kind: "look" }));
      return select;
    }
    const field = element("input", `llmnb-field llmnb-field-${row.kind}`, { type: "text", autocomplete: "off", spellcheck: "false" });
    if (row.kind === "number") field.inputMode = "decimal";
    field.placeholder = row.default || EMPTY[row.name] || "";
    field.addEventListener("input", () => this.view.edit(row.name, field.value, false));
    field.addEventListener("change", () => this.view.edit(row.name, field.value, true));
    return field;
  }

  // What can be chosen: [value, words].
  offer(pairs) {
    const key = JSON.stringify(pairs);
    if (key === this.offered) return;
    this.offered = key;
    if (this.row.kind === "collection") {
      const chosen = this.input.value;
      this.input.replaceChildren(new Option(pairs.length ? "choose" : "no collection yet", ""));
      for (const [value, words] of pairs) this.input.append(new Option(words, value));
      this.input.value = chosen;
      return;
    }
    const list = element("datalist", "", { id: `${this.input.id}-list` });
    for (const [value, words] of pairs) {
      const option = new Option(words, value);
      if (words !== value) option.label = words;
      list.append(option);
    }
    this.input.parentNode.querySelector("datalist")?.remove();
    this.input.parentNode.append(list);
    if (pairs.length) this.input.setAttribute("list", list.id);
  }

  show(values, faults) {
    const { row, input } = this;
    const value = values[row.name] ?? row.default;
    const changed = value !== row.default && row.default !== "" && value !== "";
    if (row.kind === "yes") input.checked = Boolean(value);
    else if (input !== document.activeElement && input.value !== value) {
      if (input.tagName === "SELECT" && ![...input.options].some((o) => o.value === value)) input.append(new Option(value, value));
      input.value = value;
    }
    const was = row.kind === "yes" ? (row.default ? "on" : "off") : wordOf(row, row.default);
    say(this.unit, [row.unit, changed ? `default ${was}` : ""].filter(Boolean).join(" · "));
    this.label.classList.toggle("llmnb-changed", changed);
    let off = "";
    if (row.needs) {
      const [name, wanted, reason] = row.needs;
      if ((values[name] ?? this.view.rowOf(name).default) !== wanted) off = reason;
    }
    input.disabled = Boolean(off);
    this.node.classList.toggle("llmnb-off", Boolean(off));
    say(this.help, off ? `No effect: ${off}.` : row.help);
    const fault = faults[row.name] || "";
    const needed = fault.startsWith("is needed");
    say(this.fault, needed ? "" : fault);
    input.setAttribute("aria-invalid", String(Boolean(fault) && !needed));
    input.setAttribute("aria-required", String(["model_name_or_path", "collection"].includes(row.name)));
  }
}

// Three rows as the model sees them.
class Preview {
  constructor() {
    this.at = 0;
    this.node = element("section", "llmnb-preview", { "aria-label": "Rows as the model sees them" });
    this.place = element("span", "llmnb-dim");
    this.back = element("button", "llmnb-icon", { "aria-label": "Previous row" }, "◂");
    this.next = element("button", "llmnb-icon", { "aria-label": "Next row" }, "▸");
    this.back.addEventListener("click", () => this.go(-1));
    this.next.addEventListener("click", () => this.go(1));
    this.walk = element("span", "llmnb-walk", {}, this.place, this.back, this.next);
    this.key = element("span", "llmnb-swatch-key llmnb-dim");
    const title = element("span", "llmnb-subtitle", {}, "As the model sees it");
    this.tokens = element("div", "llmnb-tokens", { tabindex: "0", role: "group", "aria-label": "Tokens of the row" });
    this.note = element("div", "llmnb-note", { role: "status" });
    this.notes = element("ul", "llmnb-notes");
    this.node.append(element("div", "llmnb-line", {}, title, this.key, this.walk), this.tokens, this.note, this.notes);
  }

  go(way) {
    this.at = Math.max(0, Math.min(this.told.rows.length - 1, this.at + way));
    this.draw();
  }

  show(told = {}) {
    if (told === this.told) return;
    this.told = told;
    this.at = 0;
    this.draw();
  }

  draw() {
    const told = this.told;
    const rows = told.rows || [];
    const row = rows[this.at];
    this.walk.hidden = this.key.hidden = this.tokens.hidden = !row;
    this.note.classList.toggle("llmnb-fault", Boolean(told.trouble));
    this.notes.replaceChildren(...(told.notes || []).slice(0, 4).map((text) => element("li", "", {}, text)));
    if (!row) return say(this.note, told.trouble || told.waits || "");
    const side = row.side ? ` (${row.side})` : "";
    say(this.place, `row ${this.at + 1} of ${rows.length} shown${side}, about ${number(told.all)} in all`);
    this.back.disabled = this.at === 0;
    this.next.disabled = this.at === rows.length - 1;
    this.key.replaceChildren(element("i", "llmnb-swatch"), `trained ${percent(row.trained / row.length)} of ${number(row.length)} tokens`);
    const parts = row.tokens.map(([text, trained, special]) => {
      const name = ["llmnb-token", trained ? "llmnb-trained" : "", special ? "llmnb-special" : ""].filter(Boolean).join(" ");
      return element("span", name, {}, text.replace(/\n/g, "↵\n"));
    });
    if (row.before) parts.unshift(element("span", "llmnb-dim", {}, `… ${number(row.before)} tokens before … `));
    if (row.after) parts.push(element("span", "llmnb-dim", {}, ` … ${number(row.after)} more tokens`));
    this.tokens.replaceChildren(...parts);
    const share = told.cut / Math.max(told.found, 1);
    const cut = told.cut ? `${percent(share)} of ${number(told.found)} rows looked at are longer than ${number(told.limit)} tokens and are cut.` : `None of ${number(told.found)} rows looked at is longer than ${number(told.limit)} tokens.`;
    const lost = told.dropped ? ` ${number(told.dropped)} give no row.` : "";
    say(this.note, cut + lost);
  }
}
