// The checkpoint picker. It draws what the kernel says and says back what the person chooses; the kernel keeps both.
// Each render says `ready` and gets everything. A click is answered here, at once, and carried out there.

const MOST = 4; // answers side by side
const HEARD_WITHIN = 3000; // milliseconds that a choice needs to the kernel and back, at most
const DRAWN_WITHIN = 30000; // milliseconds that a chat needs to its first drawing, at most
const LOST_AFTER = 60000; // milliseconds without an answer to a look until another is sent
const LOOK_EVERY = 10000; // milliseconds; a run that goes on saves checkpoints

function ago(seconds) {
  if (seconds < 45) return "just now";
  if (seconds < 3570) return `${Math.max(1, Math.round(seconds / 60))} min ago`;
  if (seconds < 86400) return `${Math.round(seconds / 3600)} h ago`;
  const days = Math.round(seconds / 86400);
  return days === 1 ? "1 day ago" : `${days} days ago`;
}

function stretch(seconds) {
  return seconds < 100 ? `${Math.floor(seconds)} s` : `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
}

const WORDS = { merge: "Merge", export: "Export" };
const HELP = {
  merge: "A new folder for the whole model in 16 or 32 bits. It is loaded again and compared, on rows of the run: minutes for a large one.",
  export: "A new folder for the files as they are, verified: peft or transformers load it offline.",
};

class View {
  constructor(el, model, shared) {
    Object.assign(this, { el, model, shared, rows: new Map(), form: "", sure: false, asking: null, at: "" });
    this.root = element("div", "llmnb-picker-box", { role: "group", "aria-label": "Checkpoints" });
    this.build();
    this.el.append(this.root);
    this.clock = setInterval(() => this.tick(), 1000);
  }

  close() {
    clearInterval(this.clock);
  }

  // --- building ----------------------------------------------------------------------------------------------

  build() {
    this.title = element("span", "llmnb-title", {}, "Checkpoints");
    this.count = element("span", "llmnb-dim");
    const id = `llmnb-picker-${ids.next++}`;
    this.filter = element("select", "", { id });
    this.filter.addEventListener("change", () => this.choose(this.shared.chosen, this.filter.value));
    this.filterBox = element("label", "", { for: id, hidden: "" }, "Experiment", this.filter);
    this.alert = element("div", "llmnb-alert", { role: "alert" });
    this.body = element("tbody");
    const heads = [["", "selected"], ["experiment"], ["step"], ["eval loss"], ["size"], ["saved"], ["", "best"]];
    const row = element("tr");
    for (const [text, label] of heads) {
      const number = ["step", "eval loss", "size"].includes(text) ? "llmnb-number" : "";
      row.append(element("th", number, { scope: "col", ...(label ? { "aria-label": label } : {}) }, text));
    }
    this.table = element("table", "", { "aria-label": "Checkpoints, newest first" }, element("thead", "", {}, row), this.body);
    this.body.addEventListener("keydown", (event) => this.walk(event));
    this.empty = element("div", "llmnb-picker-empty", {}, "Looking for checkpoints …");
    this.scroll = element("div", "llmnb-picker-scroll", {}, this.table, this.empty);
    this.root.append(element("div", "llmnb-picker-head", {}, this.title, this.count, this.filterBox), this.alert, this.scroll, this.actions(), this.folderForm(), this.foot());
  }

  actions() {
    const words = `llmnb-picker-${ids.next++}`;
    this.buttons = {};
    const line = element("div", "llmnb-picker-actions");
    const names = { chat: "Chat", compare: "Compare with base", evaluate: "Evaluate", merge: "Merge …", export: "Export …", remove: "Remove" };
    for (const [name, text] of Object.entries(names)) {
      const button = element("button", "", { "aria-describedby": words }, text);
      button.addEventListener("click", () => this.press(name));
      if (name === "merge" || name === "export") button.setAttribute("aria-expanded", "false");
      this.buttons[name] = button;
      line.append(button);
    }
    this.words = element("span", "llmnb-picker-words", { id: words, role: "status" });
    line.append(this.words);
    return line;
  }

  folderForm() {
    const id = `llmnb-picker-${ids.next++}`;
    this.folder = element("input", "", { id, type: "text", autocomplete: "off", spellcheck: "false", "aria-describedby": `${id}-help` });
    this.go = element("button", "llmnb-picker-go");
    this.go.addEventListener("click", () => this.submit());
    const back = element("button", "", {}, "Cancel");
    back.addEventListener("click", () => this.fold());
    this.help = element("span", "llmnb-picker-words", { id: `${id}-help` });
    this.formBox = element("div", "llmnb-picker-form", { hidden: "" }, element("label", "", { for: id }, "Folder"), this.folder, this.go, back, this.help);
    this.formBox.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target === this.folder) this.submit();
      else if (event.key === "Escape") this.fold();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    return this.formBox;
  }

  foot() {
    this.busyWords = element("span", "", { role: "status" });
    this.busyTime = element("span", "llmnb-dim");
    this.stop = element("button", "", { hidden: "" });
    this.stop.addEventListener("click", () => {
      if (!this.send({ kind: "stop" })) return;
      say(this.stop, "Stopping …");
      this.stop.setAttribute("aria-disabled", "true");
    });
    this.busy = element("div", "llmnb-picker-busy", { hidden: "" }, this.busyWords, this.busyTime, this.stop);
    this.fault = element("div", "llmnb-alert", { role: "alert" });
    this.result = element("section", "llmnb-picker-result", { "aria-label": "Result", hidden: "" });
    return element("div", "", {}, this.busy, this.fault, this.result);
  }

  rowOf(row) {
    const found = this.rows.get(row.name);
    if (found) return found;
    const box = element("input", "", { type: "checkbox", tabindex: "-1", "aria-label": `${row.experiment} step ${row.step}` });
    const node = element("tr", "", { "data-name": row.name }, element("td", "", {}, box));
    const cells = ["name", "step", "loss", "size", "age", "best"].map((name) => {
      const cell = element("td", { step: "llmnb-number", loss: "llmnb-number", size: "llmnb-number", name: "llmnb-picker-name" }[name] || "");
      node.append(cell);
      return [name, cell];
    });
    box.addEventListener("change", () => this.toggle(row.name, box.checked));
    box.addEventListener("focus", () => { this.at = row.name; this.tabStop(); });
    node.addEventListener("click", (event) => {
      if (event.target === box) return;
      box.focus();
      box.click();
    });
    const made = { node, box, name: element("bdi"), cells: Object.fromEntries(cells) };
    made.cells.name.append(made.name);
    this.rows.set(row.name, made);
    return made;
  }

  // --- acting ------------------------------------------------------------------------------------------------

  // False when nobody is there to hear it.
  send(message) {
    try {
      this.model.send(message);
      return true;
    } catch (error) {
      console.warn(error);
      this.shared.list.trouble = "The kernel of this picker has ended: run its cell again.";
      this.shared.draw();
      return false;
    }
  }

  shown() {
    const { list, filter } = this.shared;
    return (list.rows || []).filter((row) => !filter || row.experiment === filter);
  }

  // In the order in which they were selected.
  chosen() {
    const rows = new Map((this.shared.list.rows || []).map((row) => [row.name, row]));
    return this.shared.chosen.filter((name) => rows.has(name)).map((name) => rows.get(name));
  }

  toggle(name, on) {
    const rest = this.shared.chosen.filter((other) => other !== name);
    this.choose(on ? [...rest, name] : rest, this.shared.filter);
  }

  choose(chosen, filter) {
    // what is out of sight is not acted upon
    const names = new Set((this.shared.list.rows || []).filter((row) => !filter || row.experiment === filter).map((row) => row.name));
    this.shared.chosen = chosen.filter((name) => names.has(name));
    Object.assign(this.shared, { filter, chose: Date.now() });
    Object.assign(this, { sure: false, note: "" });
    this.fold();
    this.send({ kind: "choose", names: this.shared.chosen, filter });
    this.shared.draw();
  }

  // One tab stop for the table: arrows go from row to row.
  walk(event) {
    const way = { ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
    if (way === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const names = this.shown().map((row) => row.name);
    const to = Math.max(0, Math.min(names.length - 1, names.indexOf(this.at) + way));
    const { box } = this.rows.get(names[to]);
    box.focus();
    box.scrollIntoView({ block: "nearest" });
  }

  tabStop() {
    const names = this.shown().map((row) => row.name);
    const at = names.includes(this.at) ? this.at : names[0];
    for (const [name, { box }] of this.rows) box.tabIndex = name === at ? 0 : -1;
  }

  // Why an action cannot be done now, or "".
  why(action) {
    const rows = this.chosen();
    const { busy } = this.shared.doing;
    if (busy) return `${busy.words} first`;
    if (!rows.length) return "Select a checkpoint";
    if (action === "evaluate") return "";
    if (action === "compare") return rows.length > MOST ? `At most ${MOST} are compared at once` : "";
    if (action === "remove") {
      const held = rows.find((row) => row.held);
      return held ? `Step ${held.step} cannot be removed: ${held.held}` : "";
    }
    if (rows.length > 1) return `Select one checkpoint to ${action === "chat" ? "chat with it" : `${action} it`}`;
    return action === "merge" && rows[0].whole ? "A whole model: there is nothing to merge; export it" : "";
  }

  press(action) {
    const why = this.why(action);
    if (why) {
      this.note = why;
      return this.draw();
    }
    this.note = "";
    const names = this.chosen().map((row) => row.name);
    if (action === "merge" || action === "export") return this.unfold(action);
    this.fold();
    if (action === "remove" && !this.sure) {
      this.sure = true;
      return this.draw();
    }
    this.sure = false;
    if (action === "remove") return this.act({ kind: "remove", names }, "Removing …");
    if (action === "evaluate") return this.act({ kind: "evaluate", names }, "Evaluating");
    const asked = action === "compare" && names.length === 1 ? ["base", ...names] : names;
    this.act({ kind: "chat", names: asked }, "Opening the chat …");
    this.asking = document.activeElement;
  }

  // The person goes on in the chat, wherever it stands in the same output: as soon as it can take the focus, unless the
  // person types or chooses somewhere else by then. (Lab itself moves the focus to a cell or the notebook as it likes.)
  goOn(from, until = performance.now() + DRAWN_WITHIN) {
    const at = document.activeElement;
    if (at !== from && at?.matches("input, select, textarea, [contenteditable=true]")) return;
    const prompt = this.root.closest(".jp-OutputArea, .cell-output, body").querySelector(".llmnb-chat textarea");
    prompt?.focus({ preventScroll: true });
    if (prompt && document.activeElement === prompt) prompt.scrollIntoView({ block: "nearest" });
    else if (performance.now() < until) setTimeout(() => this.goOn(from, until), 100);
  }

  act(message, words) {
    if (!this.send(message)) return;
    Object.assign(this.shared, { unheard: true, asks: false });
    Object.assign(this.shared.doing, { busy: { words, now: "", began: this.now(), stops: "" }, result: null });
    this.shared.draw();
  }

  unfold(action) {
    this.sure = false;
    if (this.form === action) return this.fold();
    this.form = action;
    const [row] = this.chosen();
    this.folder.value = `${action === "merge" ? "merged" : "exported"}/${row.name.replace("/", "-")}`;
    this.draw();
    this.folder.focus();
    this.folder.select();
  }

  fold() {
    const action = this.form;
    this.form = "";
    this.draw();
    if (action && this.formBox.contains(document.activeElement)) this.buttons[action].focus();
  }

  submit() {
    const action = this.form;
    const folder = this.folder.value.trim();
    if (!folder) return this.folder.focus();
    const names = this.chosen().map((row) => row.name);
    this.buttons[action].focus();
    this.form = "";
    this.act({ kind: action, names, folder }, `${WORDS[action].replace(/e$/, "")}ing ${names[0]}`);
  }

  // --- drawing -----------------------------------------------------------------------------------------------

  // The kernel's clock, as far as this page knows.
  now() {
    return this.shared.told + (performance.now() - this.shared.heard) / 1000;
  }

  draw() {
    const { list, doing, chosen, filter } = this.shared;
    say(this.alert, list.trouble || "");
    this.root.dataset.rows = String((list.rows || []).length);
    this.root.dataset.busy = String(Boolean(doing.busy));
    this.offer(list, filter);
    const shown = this.shown();
    const more = list.more ? `, the newest of ${list.rows.length + list.more}` : "";
    say(this.count, list.rows && list.rows.length ? `${shown.length}${shown.length < list.rows.length ? ` of ${list.rows.length}` : ""}${more}` : "");
    this.empty.hidden = Boolean(shown.length);
    this.table.hidden = !shown.length;
    if (list.rows && !shown.length) say(this.empty, "No checkpoint yet: the first comes with the first save of a run.");
    const several = new Set((list.rows || []).map((row) => row.experiment)).size > 1;
    this.table.classList.toggle("llmnb-several", several);
    const order = shown.map((row) => {
      const made = this.rowOf(row);
      made.box.checked = chosen.includes(row.name);
      made.node.classList.toggle("llmnb-chosen", made.box.checked);
      say(made.name, row.experiment);
      made.cells.name.title = row.experiment;
      say(made.cells.step, row.step);
      say(made.cells.loss, row.loss);
      say(made.cells.size, row.size);
      say(made.cells.best, row.best ? "best" : row.whole ? "whole" : "");
      return made.node;
    });
    this.place(order);
    for (const cell of this.table.querySelectorAll("th:nth-child(2), td:nth-child(2)")) cell.hidden = !several;
    this.tabStop();
    this.tick();
    this.bar();
    this.below(doing);
  }

  // Rows keep their nodes, so that a list that grows does not take the focus away.
  place(order) {
    const names = new Set(order);
    for (const node of [...this.body.children]) if (!names.has(node)) node.remove();
    order.forEach((node, i) => {
      if (this.body.children[i] !== node) this.body.insertBefore(node, this.body.children[i] || null);
    });
    for (const [name, { node }] of this.rows) if (!node.isConnected && !names.has(node)) this.rows.delete(name);
  }

  offer(list, filter) {
    const names = [...new Set((list.rows || []).map((row) => row.experiment))];
    this.filterBox.hidden = list.experiment !== null || names.length < 2;
    const key = JSON.stringify(names);
    if (key !== this.offered) {
      this.offered = key;
      this.filter.replaceChildren(new Option("all", ""), ...names.map((name) => new Option(name, name)));
    }
    this.filter.value = names.includes(filter) ? filter : "";
  }

  bar() {
    const rows = this.chosen();
    for (const [name, button] of Object.entries(this.buttons)) {
      button.setAttribute("aria-disabled", String(Boolean(this.why(name))));
      button.title = this.why(name);
      if (name === "merge" || name === "export") button.setAttribute("aria-expanded", String(this.form === name));
    }
    say(this.buttons.compare, rows.length > 1 ? `Compare ${rows.length}` : "Compare with base");
    say(this.buttons.evaluate, rows.length > 1 ? `Evaluate ${rows.length}` : "Evaluate");
    say(this.buttons.remove, this.sure ? `Remove ${rows.length > 1 ? rows.length : "it"} for good` : "Remove");
    this.buttons.remove.classList.toggle("llmnb-picker-sure", this.sure);
    const last = this.sure && rows.some((row) => row.resumable) ? " Its run could then not be resumed." : "";
    const count = rows.length ? `${rows.length} selected` : "";
    say(this.words, this.sure ? `Press again to remove ${rows.map((row) => `step ${row.step}`).join(", ")}.${last}` : this.note || count || "Select checkpoints: one to chat, merge or export, more to compare or evaluate.");
    this.formBox.hidden = !this.form;
    if (this.form) {
      say(this.go, WORDS[this.form]);
      say(this.help, HELP[this.form]);
    }
  }

  below({ busy, result }) {
    this.busy.hidden = !busy;
    if (busy) {
      say(this.busyWords, busy.now ? `${busy.words}: ${busy.now}` : busy.words);
      this.stop.hidden = !busy.stops;
      if (this.stop.getAttribute("aria-disabled") !== "true") say(this.stop, busy.stops || "");
    } else this.stop.removeAttribute("aria-disabled");
    if (this.asking && !busy) {
      const from = this.asking;
      this.asking = null;
      if (!result) this.goOn(from);
    }
    say(this.fault, (result && result.fault) || "");
    this.result.hidden = !result || Boolean(result.fault);
    if (!result || result.fault || this.drawn === result) return;
    this.drawn = result;
    this.result.replaceChildren(...resultOf(result));
  }

  tick() {
    const now = this.now();
    for (const row of this.shown()) if (this.rows.has(row.name)) say(this.rows.get(row.name).cells.age, row.created ? ago(Math.max(0, now - row.created)) : "");
    const { busy } = this.shared.doing;
    if (busy) say(this.busyTime, stretch(Math.max(0, now - busy.began)));
  }
}

export default () => {
  const shared = { list: { rows: null, more: 0, trouble: "", experiment: null }, doing: { busy: null, result: null }, chosen: [], filter: "", told: Date.now() / 1000, heard: performance.now(), waits: -Infinity, asks: false, unheard: false, chose: 0, views: new Set() };
  shared.draw = () => shared.views.forEach((view) => view.draw());
  const take = ({ kind, content }) => {
    if (!content) return;
    Object.assign(shared, { told: content.now, heard: performance.now() });
    if (kind === "all") {
      Object.assign(shared, { list: content.list, doing: content.doing, unheard: false });
      // What the kernel said before it heard of the newest choice must not take it back.
      if (Date.now() - shared.chose > HEARD_WITHIN) Object.assign(shared, { chosen: content.chosen, filter: content.filter });
    }
    else if (kind === "list") {
      shared.list = content;
      const there = new Set((content.rows || []).map((row) => row.name));
      shared.chosen = shared.chosen.filter((name) => there.has(name));
    } else if (kind === "doing" || (kind === "now" && shared.asks && !content.busy !== !shared.doing.busy)) {
      // A connection that broke may have lost what was pressed, or what came of it.
      const lost = kind === "now" && shared.unheard && !content.busy;
      if (lost) shared.views.forEach((view) => Object.assign(view, { note: "The kernel did not hear that: press again.", asking: null }));
      Object.assign(shared, { unheard: false, doing: { busy: content.busy, result: content.result } });
    }
    if (kind === "all" || kind === "list" || kind === "same") shared.waits = -Infinity;
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
      // One question at a time: a kernel that is busy must not find a hundred of them.
      const timer = setInterval(() => {
        if (performance.now() - shared.waits < LOST_AFTER || document.hidden || !view.root.isConnected || view.root.offsetParent === null) return;
        if (!view.send({ kind: "look" })) return;
        Object.assign(shared, { waits: performance.now(), asks: true }); // what was pressed before is heard before it
      }, LOOK_EVERY);
      return () => {
        clearInterval(timer);
        shared.views.delete(view);
        view.close();
      };
    },
  };
};
