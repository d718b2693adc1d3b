// The training panel. It draws what the kernel says and says back what the person types; the kernel keeps both. Each
// render says `ready` and gets everything. A click is answered here, at once, and carried out there.
// panel_rows.js stands in front of this text (see panel.py).

class View {
  constructor(el, model, shared) {
    Object.assign(this, { el, model, shared, lines: new Map(), pages: new Map(), open: "" });
    this.root = element("div", "llmnb-panel", { "data-phase": "opening" });
    this.el.append(this.root);
  }

  rowOf(name) {
    return this.shared.rows.get(name);
  }

  // --- building ----------------------------------------------------------------------------------------------

  build() {
    const { tabs, presets } = this.shared.told.form;
    this.place = element("span", "llmnb-dim llmnb-place");
    this.runs = this.picker("Load settings", (run) => this.send({ kind: "load", run }));
    this.presets = this.picker("Preset", (name) => this.preset(presets.find((p) => p.name === name)));
    for (const { name } of presets) this.presets.select.append(new Option(name, name));
    const head = element("div", "llmnb-line llmnb-panel-head", {}, element("span", "llmnb-title", {}, "Fine-tune"), this.place, this.runs.node, this.presets.node);
    this.said = element("div", "llmnb-said-line llmnb-dim", { role: "status" });
    this.list = element("div", "llmnb-tabs", { role: "tablist", "aria-label": "Settings" });
    this.tabs = tabs.map((name) => this.tab(name));
    this.body = element("div", "llmnb-body");
    this.preview = new Preview();
    this.root.append(head, this.said, this.list, this.body, this.foot());
    this.list.addEventListener("keydown", (event) => this.walkTabs(event));
  }

  picker(label, choose) {
    const id = `llmnb-${ids.next++}`;
    const select = element("select", "llmnb-field llmnb-picker", { id });
    select.append(new Option("choose", ""));
    select.addEventListener("focus", () => this.send({ kind: "look" }));
    select.addEventListener("change", () => {
      if (select.value) choose(select.value);
      select.value = "";
    });
    return { select, node: element("label", "llmnb-pick", { for: id }, label, select) };
  }

  tab(name) {
    const id = `llmnb-${ids.next++}`;
    const count = element("span", "llmnb-count");
    const button = element("button", "llmnb-tab", { role: "tab", id, "aria-controls": `${id}-page` }, name, count);
    button.addEventListener("click", () => this.turn(name));
    this.list.append(button);
    return { name, button, count };
  }

  walkTabs(event) {
    const way = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (way === undefined) return;
    event.preventDefault();
    const last = this.tabs.length - 1;
    const at = this.tabs.findIndex((t) => t.name === this.shared.tab);
    const to = Number.isFinite(way) ? (at + way + last + 1) % (last + 1) : way > 0 ? last : 0;
    this.turn(this.tabs[to].name);
    this.tabs[to].button.focus();
  }

  page(name) {
    if (this.pages.has(name)) return this.pages.get(name);
    const tab = this.tabs.find((t) => t.name === name);
    const page = element("div", "llmnb-page", { role: "tabpanel", id: `${tab.button.id}-page`, "aria-labelledby": tab.button.id });
    if (name === "Advanced") page.append(this.search());
    for (const row of this.shared.rows.values()) {
      if (row.tab !== name) continue;
      const line = new Line(row, this);
      if (row.choices.length && row.kind !== "choice") line.offer(row.choices.map((c) => [c, c]));
      this.lines.set(row.name, line);
      page.append(line.node);
    }
    if (name === this.tabs[0].name) page.append(this.preview.node);
    this.pages.set(name, page);
    this.body.append(page);
    return page;
  }

  search() {
    const id = `llmnb-${ids.next++}`;
    const field = element("input", "llmnb-field", { id, type: "text", autocomplete: "off", spellcheck: "false" });
    const count = element("span", "llmnb-unit", { role: "status" });
    const seek = () => {
      const words = field.value.toLowerCase().replace(/_/g, " ").split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const { row, node } of this.lines.values()) {
        if (row.tab !== "Advanced") continue;
        const text = `${row.name.replace(/_/g, " ")} ${row.help}`.toLowerCase();
        node.hidden = !words.every((word) => text.includes(word));
        shown += node.hidden ? 0 : 1;
      }
      say(count, words.length ? `${shown} found` : "");
    };
    field.addEventListener("input", seek);
    const box = element("div", "llmnb-control", {}, field, count);
    return element("div", "llmnb-row llmnb-search", {}, element("label", "llmnb-label", { for: id }, "Search"), box, element("div", "llmnb-help", {}, "every other option of transformers' Trainer, by name or by what it does"));
  }

  foot() {
    this.outlook = element("div", "llmnb-outlook", { role: "status" });
    const reason = `llmnb-${ids.next++}`;
    this.start = element("button", "llmnb-start", { "aria-describedby": reason }, "Start training");
    this.start.addEventListener("click", () => this.begin());
    this.reason = element("button", "llmnb-link llmnb-jump", {});
    this.reason.addEventListener("click", () => this.jump());
    const words = element("span", "llmnb-reason", { id: reason, role: "status" }, this.reason);
    this.code = element("pre", "llmnb-code", { tabindex: "0" });
    this.copy = element("button", "llmnb-link", {}, "Copy");
    this.copy.addEventListener("click", () => this.copied());
    this.box = element("div", "llmnb-code-box", { hidden: "" }, this.code, this.copy);
    this.openers = ["Python", "Magic"].map((name) => {
      const button = element("button", "llmnb-link", { "aria-expanded": "false" }, name);
      button.addEventListener("click", () => this.unfold(name));
      return button;
    });
    const line = element("div", "llmnb-line llmnb-actions", {}, this.start, ...this.openers, words);
    return element("div", "llmnb-panel-foot", {}, this.outlook, line, this.box);
  }

  // --- acting ------------------------------------------------------------------------------------------------

  turn(name) {
    this.shared.tab = name;
    this.send({ kind: "edit", done: false });
    this.shared.draw();
  }

  edit(name, value, done) {
    const { values, told } = this.shared;
    const model = name === "model_name_or_path" && done && told.names && told.names.models[value];
    if (value === this.rowOf(name).default) delete values[name];
    else values[name] = value;
    if (model) {
      Object.assign(values, model);
      this.lines.get(name).input.value = values[name];
      this.shared.said = `Goes on from ${value}: its base, and the adapter ${values.adapter_id}.`;
    }
    this.shared.trouble = "";
    clearTimeout(this.waiting);
    if (done) this.send({ kind: "edit", done: true });
    else this.waiting = setTimeout(() => this.send({ kind: "edit", done: false }), 250);
    this.shared.draw();
  }

  // False when nobody is there to hear it.
  send(message) {
    try {
      this.model.send({ ...message, values: this.shared.values, tab: this.shared.tab });
      return true;
    } catch (error) {
      console.warn(error);
      this.shared.trouble = "The kernel of this panel has ended: run its cell again.";
      return false;
    }
  }

  preset(chosen) {
    const { values } = this.shared;
    for (const { values: others } of this.shared.told.form.presets) for (const name of Object.keys(others)) delete values[name];
    Object.assign(values, chosen.values);
    this.shared.said = `${chosen.name}: ${chosen.reason}`;
    this.send({ kind: "edit", done: true, said: this.shared.said });
    this.shared.draw();
  }

  begin() {
    if (this.why() || this.shared.phase !== "editing") return;
    clearTimeout(this.waiting);
    if (this.send({ kind: "start" })) this.shared.phase = "starting";
    this.shared.draw();
    setTimeout(() => {
      if (this.shared.phase === "starting" && !this.shared.heard) {
        this.shared.trouble = "The kernel is busy: the training starts when its cell has ended.";
        this.shared.draw();
      }
    }, 3000);
  }

  unfold(name) {
    this.open = this.open === name ? "" : name;
    this.draw();
  }

  async copied() {
    await navigator.clipboard.writeText(this.code.textContent);
    say(this.copy, "Copied");
    setTimeout(() => say(this.copy, "Copy"), 1500);
  }

  // To the first row that keeps training from starting.
  jump() {
    const name = this.first();
    if (!name) return;
    this.turn(this.rowOf(name).tab);
    this.lines.get(name).input.focus();
  }

  first() {
    return Object.keys((this.shared.told.checked && this.shared.told.checked.faults) || {})[0];
  }

  // --- drawing -----------------------------------------------------------------------------------------------

  // Why training cannot start, or "".
  why() {
    const { checked = {} } = this.shared.told;
    if (!checked.faults) return "Looking at the settings …";
    const needed = Object.keys(checked.faults).filter((name) => checked.faults[name].startsWith("is needed"));
    if (needed.length) return `Needed first: ${needed.map((name) => this.rowOf(name).label.toLowerCase()).join(" and ")}`;
    const names = Object.keys(checked.faults);
    const count = names.length + checked.rest.length;
    if (!count) return "";
    const first = names.length ? `${this.rowOf(names[0]).tab} › ${this.rowOf(names[0]).label.toLowerCase()} ${checked.faults[names[0]]}` : checked.rest[0];
    return `${count} ${count === 1 ? "fault" : "faults"}: ${first}`;
  }

  draw() {
    const { told, values, phase, tab } = this.shared;
    if (!told) return;
    if (phase === "running" && told.live) return void this.live(told.live);
    if (!this.list) this.build();
    const faults = (told.checked && told.checked.faults) || {};
    this.root.dataset.phase = phase;
    this.page(tab);
    for (const [name, page] of this.pages) page.hidden = name !== tab;
    for (const { name, button, count } of this.tabs) {
      const bad = Object.keys(faults).filter((row) => this.rowOf(row).tab === name && !faults[row].startsWith("is needed")).length;
      button.setAttribute("aria-selected", String(name === tab));
      button.tabIndex = name === tab ? 0 : -1;
      button.setAttribute("aria-label", bad ? `${name}, ${bad} ${bad === 1 ? "fault" : "faults"}` : name);
      say(count, bad ? ` (${bad})` : "");
    }
    this.offers();
    for (const line of this.lines.values()) line.show(values, faults);
    this.preview.show(told.rows);
    this.words(phase);
  }

  offers() {
    const { names = {}, fields = {} } = this.shared.told;
    say(this.place, names.place || "");
    const collections = names.collections || [];
    this.lines.get("collection")?.offer(collections.map(([name, count]) => [name, `${name} (${number(count)} documents)`]));
    const models = Object.keys(names.models || {}).map((name) => [name, "model of this database"]);
    this.lines.get("model_name_or_path")?.offer([...models, ...(names.bases || [])]);
    this.lines.get("adapter_id")?.offer((names.adapters || []).map((name) => [name, name]));
    this.lines.get("key")?.offer(fields.fields || []);
    const runs = names.runs || [];
    const key = JSON.stringify(runs);
    if (key !== this.listed) {
      this.listed = key;
      this.runs.select.replaceChildren(new Option(runs.length ? "of a run" : "no run yet", ""), ...runs.map(([id, words]) => new Option(words, id)));
      this.runs.select.disabled = !runs.length;
    }
  }

  words(phase) {
    const { told, trouble } = this.shared;
    say(this.said, this.shared.said || "");
    say(this.outlook, (told.outlook && told.outlook.words) || "");
    const busy = phase !== "editing";
    const why = busy ? "" : this.why();
    say(this.start, busy ? "Starting …" : "Start training");
    this.start.setAttribute("aria-disabled", String(Boolean(why) || busy));
    const rows = told.rows && told.rows.trouble && !why ? "The rows cannot be trained on as they are: see Model & data" : "";
    const amiss = trouble || (told.trouble && told.trouble.words) || rows;
    say(this.reason, amiss || why);
    this.reason.hidden = !this.reason.textContent;
    this.reason.disabled = Boolean(amiss) || !this.first();
    this.reason.classList.toggle("llmnb-fault", Boolean(amiss) || /^\d+ fault/.test(why));
    const lines = told.checked || {};
    for (const button of this.openers) {
      button.disabled = !lines.python;
      button.title = lines.python ? "" : "when nothing is missing or wrong";
      button.setAttribute("aria-expanded", String(button.textContent === this.open && Boolean(lines.python)));
    }
    this.box.hidden = !this.open || !lines.python;
    if (!this.box.hidden) say(this.code, this.open === "Python" ? lines.python : lines.magic);
    this.code.setAttribute("aria-label", `${this.open} for these settings`);
  }

  // The same place becomes the run's view.
  async live({ model: id }) {
    if (this.shown === id) return;
    this.shown = id;
    const chart = await this.model.widget_manager.get_model(id);
    const view = await this.model.widget_manager.create_view(chart);
    this.root.replaceWith(view.el);
    this.root = view.el;
  }
}

export default () => {
  const shared = { told: null, values: {}, tab: "", phase: "editing", said: "", trouble: "", heard: false, rows: new Map(), views: new Set() };
  shared.draw = () => shared.views.forEach((view) => view.draw());
  const take = ({ kind, content }) => {
    if (kind === "all") {
      Object.assign(shared, { told: content.told, values: content.values, tab: content.tab, phase: content.phase, said: content.said, trouble: content.told.phase?.trouble || "", heard: content.phase !== "editing" });
      shared.rows = new Map(content.told.form.rows.map((row) => [row.name, row]));
      if (content.told.live) shared.phase = "running";
    } else if (!shared.told) return;
    else if (kind === "phase") {
      Object.assign(shared, { phase: content.phase, trouble: content.trouble || "", heard: content.phase !== "editing" });
    } else if (kind === "values") {
      Object.assign(shared, content);
    } else {
      shared.told[kind] = content;
      if (kind === "live") shared.phase = "running";
    }
    shared.draw();
  };
  return {
    initialize({ model }) {
      model.on("msg:custom", take);
      return () => model.off("msg:custom", take);
    },
    render({ model, el }) {
      const view = new View(el, model, shared);
      shared.views.add(view);
      view.draw();
      model.send({ kind: "ready" });
      return () => shared.views.delete(view);
    },
  };
};
