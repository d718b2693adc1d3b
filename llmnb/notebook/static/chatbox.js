// The chat. It draws what the kernel says and says back what the person does; the kernel keeps the conversation. Each
// render says `ready` and gets everything. Whatever a model or a person wrote becomes text, never markup.

const MOST = 4;
const FIELDS = [
  ["max_new_tokens", "max new tokens", "256", "at most so many tokens are answered"],
  ["temperature", "temperature", "greedy", "0 or empty: always the likeliest token; higher: more varied"],
  ["top_p", "top p", "1", "only the likeliest tokens that make up this share are drawn"],
  ["seed", "seed", "any", "the same seed draws the same answer; every column uses the same"],
];

function button(words, act, name = "llmnb-link") {
  const node = element("button", name, {}, words);
  node.addEventListener("click", () => node.getAttribute("aria-disabled") !== "true" && act());
  return node;
}

function off(node, why) {
  node.setAttribute("aria-disabled", String(Boolean(why)));
  node.title = why || "";
}

class View {
  constructor(el, model, shared) {
    Object.assign(this, { model, shared, turns: [], selects: [] });
    this.root = element("div", "llmnb-chat", { "data-phase": "opening", role: "group", "aria-label": "Chat" });
    el.append(this.root);
    this.build();
  }

  // --- building ----------------------------------------------------------------------------------------------

  build() {
    this.who = element("div", "llmnb-line llmnb-who");
    this.add = button("Compare with another", () => this.compare());
    this.nobody = element("span", "llmnb-dim", { hidden: "" }, "a checkpoint can be asked once there is one");
    this.log = element("div", "llmnb-log", { role: "log", "aria-label": "Conversation", tabindex: "0" });
    this.root.append(element("div", "llmnb-line", {}, element("span", "llmnb-title", {}, "Chat"), this.nobody, this.who, this.add), this.log);
    this.rest = [this.asking(), this.settings(), this.actions()];
    this.root.append(...this.rest);
  }

  asking() {
    this.prompt = element("textarea", "llmnb-field llmnb-prompt", { rows: "1", "aria-label": "Question", placeholder: "Ask; Enter sends, Shift+Enter begins a new line" });
    this.prompt.addEventListener("keydown", (event) => {
      event.stopPropagation(); // Lab would run the cell, or leave it
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.ask();
    });
    this.prompt.addEventListener("input", () => {
      this.grow();
      this.shared.draft = this.prompt.value;
      clearTimeout(this.waiting);
      this.waiting = setTimeout(() => this.send({ kind: "draft", text: this.shared.draft }), 400);
    });
    this.go = button("Ask", () => this.ask(), "llmnb-start");
    this.halt = button("Stop", () => this.stop(), "llmnb-start llmnb-quiet");
    return element("div", "llmnb-ask", {}, this.prompt, this.go, this.halt);
  }

  settings() {
    this.fields = new Map();
    const line = element("div", "llmnb-line llmnb-dim llmnb-sampling", { role: "group", "aria-label": "Sampling" });
    for (const [name, words, empty, help] of FIELDS) {
      const id = `llmnb-chat-${ids.next++}`;
      const input = element("input", "llmnb-field llmnb-small", { id, type: "text", inputmode: "decimal", autocomplete: "off", spellcheck: "false", placeholder: empty, title: help });
      input.addEventListener("keydown", (event) => event.stopPropagation());
      input.addEventListener("change", () => {
        this.shared.sampling = { ...this.shared.sampling, [name]: input.value };
        this.send({ kind: "sampling", values: this.shared.sampling });
      });
      this.fields.set(name, input);
      line.append(element("label", "llmnb-pick", { for: id }, words, input));
    }
    this.more = element("span");
    this.alone = element("span", "llmnb-alone");
    this.wrong = element("div", "llmnb-fault", { role: "alert" });
    line.append(this.more, this.alone);
    return element("div", "", {}, line, this.wrong);
  }

  actions() {
    this.fresh = button("New chat", () => this.send({ kind: "new" }));
    this.saver = button("Save to collection", () => this.unfold());
    this.release = button("Release memory", () => this.send({ kind: "release" }));
    const id = `llmnb-chat-${ids.next++}`;
    this.keep = element("input", "", { type: "checkbox", id });
    this.keep.addEventListener("change", () => this.kept());
    this.name = element("input", "llmnb-field llmnb-name", { type: "text", "aria-label": "Name to keep the chat under", placeholder: "name", autocomplete: "off", spellcheck: "false" });
    this.name.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter") this.kept(true);
    });
    this.reopen = element("select", "llmnb-field", { "aria-label": "Open a kept chat" });
    this.reopen.addEventListener("focus", () => this.send({ kind: "look" }));
    this.reopen.addEventListener("change", () => {
      if (this.reopen.value) this.send({ kind: "open", name: this.reopen.value });
      this.reopen.value = "";
    });
    this.status = element("div", "llmnb-status", { role: "status" });
    const keeping = element("span", "llmnb-pick", {}, this.keep, element("label", "", { for: id, title: "in the database, after each answer" }, "Keep"), this.name);
    const line = element("div", "llmnb-line llmnb-actions", {}, this.fresh, this.saver, keeping, this.reopen, this.release);
    return element("div", "", {}, line, this.saving(), this.status);
  }

  saving() {
    const list = `llmnb-chat-${ids.next++}`;
    this.collections = element("datalist", "", { id: list });
    this.collection = element("input", "llmnb-field llmnb-name", { type: "text", list, autocomplete: "off", spellcheck: "false", placeholder: "collection" });
    this.collection.id = `llmnb-chat-${ids.next++}`;
    this.collection.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter") this.save();
      if (event.key === "Escape") this.unfold(false);
    });
    this.whose = element("select", "llmnb-field");
    this.whose.id = `llmnb-chat-${ids.next++}`;
    this.whoseLabel = element("label", "llmnb-pick", { for: this.whose.id }, "answers of", this.whose);
    const where = element("label", "llmnb-pick", { for: this.collection.id }, "into", this.collection);
    this.form = element("div", "llmnb-line llmnb-saving", { role: "group", "aria-label": "Save to collection", hidden: "" }, this.whoseLabel, where, this.collections, button("Save", () => this.save(), "llmnb-start"), button("Cancel", () => this.unfold(false)));
    return this.form;
  }

  // --- acting ------------------------------------------------------------------------------------------------

  // False when nobody is there to hear it.
  send(message) {
    try {
      this.model.send(message);
      return true;
    } catch (error) {
      console.warn(error);
      Object.assign(this.shared, { trouble: "The kernel of this chat has ended: run its cell again.", said: "" });
      this.shared.draw();
      return false;
    }
  }

  ask() {
    const text = this.prompt.value.trim();
    if (this.shared.phase !== "idle" || !text) {
      this.tell(text ? "An answer is still being given: wait for it, or press Stop." : "Type a question first.");
      return;
    }
    clearTimeout(this.waiting);
    if (!this.send({ kind: "ask", text })) return;
    Object.assign(this.shared, { phase: "answering", asked: text });
    this.shared.draw();
    setTimeout(() => this.shared.asked && this.tell("The kernel is busy: the question is asked when its cell has ended."), 3000);
  }

  tell(said) {
    Object.assign(this.shared, { said, trouble: "" });
    this.shared.draw();
  }

  // While the cell runs the kernel hears no message, only an interrupt.
  stop() {
    if (this.shared.phase !== "answering") return;
    const { blocking } = this.shared;
    this.shared.phase = "stopping";
    this.shared.draw();
    if (blocking) this.model.widget_manager?.kernel?.interrupt();
    this.send({ kind: "stop" });
  }

  compare() {
    const { chosen, choices } = this.shared;
    const other = choices.find(([name]) => !chosen.includes(name));
    if (other) this.choose([...chosen, other[0]]);
    this.selects[this.selects.length - 1]?.focus();
  }

  choose(names) {
    this.shared.chosen = [...new Set(names)];
    this.shared.draw();
    this.send({ kind: "choose", names: this.shared.chosen });
  }

  kept(again = false) {
    const name = this.name.value.trim() || `chat ${new Date().toISOString().slice(0, 16).replace("T", " ")}`;
    if (again) this.keep.checked = true;
    this.name.value = this.keep.checked ? name : this.name.value;
    this.send({ kind: "keep", on: this.keep.checked, name });
  }

  unfold(open = this.form.hidden) {
    if (open) {
      this.send({ kind: "look" });
      if (!this.collection.value) this.collection.value = this.shared.collection;
    }
    this.form.hidden = !open;
    this.saver.setAttribute("aria-expanded", String(open));
    (open ? this.collection : this.saver).focus();
  }

  save() {
    this.send({ kind: "save", collection: this.collection.value.trim(), speaker: this.whose.value });
    this.unfold(false);
    this.tell("Saving …");
  }

  // The question was taken.
  clear() {
    this.prompt.value = "";
    this.grow();
  }

  grow() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${Math.min(this.prompt.scrollHeight + 2, 180)}px`;
  }

  // --- drawing -----------------------------------------------------------------------------------------------

  draw() {
    const { shared } = this;
    this.root.dataset.phase = shared.phase;
    this.nobody.hidden = !shared.empty;
    for (const node of [this.who, this.add, ...this.rest]) node.hidden = Boolean(shared.empty) || !shared.heard;
    if (!shared.heard) return;
    this.drawWho();
    this.drawTurns();
    if (document.activeElement !== this.prompt && this.prompt.value !== shared.draft) {
      this.prompt.value = shared.draft;
      this.grow();
    }
    const idle = shared.phase === "idle";
    this.go.hidden = !idle;
    this.halt.hidden = idle;
    say(this.halt, shared.phase === "stopping" ? "Stopping…" : "Stop");
    off(this.halt, shared.phase === "stopping" ? "it ends with the next token" : "");
    for (const [name, input] of this.fields) {
      if (document.activeElement !== input) input.value = shared.sampling[name] || "";
      input.setAttribute("aria-invalid", String(Boolean(shared.faults[name])));
    }
    say(this.more, shared.more ? `also ${shared.more}` : "");
    say(this.alone, shared.alone ? "each question stands alone: not trained on chats" : "the history goes along");
    say(this.wrong, Object.entries(shared.faults).map(([name, words]) => `${name.replace(/_/g, " ")} ${words}`).join("; "));
    this.drawActions(idle);
  }

  drawActions(idle) {
    const { shared } = this;
    off(this.fresh, idle ? (shared.turns.length ? "" : "it is new") : "while an answer is being given");
    off(this.saver, !shared.speakers.length ? "there is no answer yet" : idle ? "" : "while an answer is being given");
    off(this.release, shared.memory ? "" : "no model is in memory");
    this.keep.checked = Boolean(shared.keep);
    if (document.activeElement !== this.name && shared.keep) this.name.value = shared.keep;
    const offers = JSON.stringify([shared.kept, shared.collections, shared.speakers]);
    if (offers !== this.offered) {
      this.offered = offers;
      this.reopen.replaceChildren(new Option("Open a kept chat", ""), ...shared.kept.map((name) => new Option(name, name)));
      this.reopen.hidden = !shared.kept.length;
      this.collections.replaceChildren(...shared.collections.map((name) => new Option(name, name)));
      this.whose.replaceChildren(...shared.speakers.map(([name, head]) => new Option(head, name)));
      this.whoseLabel.hidden = shared.speakers.length < 2;
    }
    say(this.status, shared.trouble || shared.said);
    this.status.classList.toggle("llmnb-fault", Boolean(shared.trouble));
  }

  drawWho() {
    const { chosen, choices } = this.shared;
    const key = JSON.stringify([chosen, choices]);
    if (key === this.shown) return;
    this.shown = key;
    const at = this.selects.indexOf(document.activeElement);
    const known = new Map(choices);
    this.selects = chosen.map((name, place) => {
      const select = element("select", "llmnb-field", { "aria-label": chosen.length > 1 ? `Answers in column ${place + 1}` : "Answers" });
      if (!known.has(name)) select.append(new Option(name, name));
      const groups = new Map();
      for (const [value, words, group] of choices) {
        if (group && !groups.has(group)) groups.set(group, element("optgroup", "", { label: group }));
        if (group && !groups.get(group).parentNode) select.append(groups.get(group));
        (group ? groups.get(group) : select).append(new Option(words, value));
      }
      select.value = name;
      select.addEventListener("focus", () => this.send({ kind: "look" }));
      select.addEventListener("change", () => this.choose(chosen.map((other, i) => (i === place ? select.value : other))));
      return select;
    });
    this.who.replaceChildren(...this.selects.map((select, place) => this.chosenOne(select, place)));
    if (at >= 0) this.selects[Math.min(at, this.selects.length - 1)]?.focus();
    const free = choices.some(([name]) => !chosen.includes(name));
    off(this.add, chosen.length >= MOST ? `at most ${MOST} answer` : free ? "" : "there is nobody else");
  }

  chosenOne(select, place) {
    const { chosen } = this.shared;
    const node = element("span", "llmnb-pick", {}, select);
    if (chosen.length > 1) {
      const remove = button("Remove", () => this.choose(chosen.filter((_, i) => i !== place)));
      remove.setAttribute("aria-label", `Remove column ${place + 1}`);
      node.append(remove);
    }
    return node;
  }

  drawTurns() {
    const { turns, asked } = this.shared;
    const all = asked ? [...turns, { prompt: asked, sampling: "", replies: [] }] : turns;
    const below = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
    while (this.turns.length > all.length) this.turns.pop().node.remove();
    all.forEach((turn, place) => {
      let shown = this.turns[place];
      if (!shown) {
        shown = { node: element("div", "llmnb-turn"), prompt: element("div", "llmnb-question"), columns: element("div", "llmnb-columns"), foot: element("div", "llmnb-dim"), cells: [] };
        shown.node.append(shown.prompt, shown.columns, shown.foot);
        this.turns.push(shown);
        this.log.append(shown.node);
      }
      say(shown.prompt, turn.prompt);
      say(shown.foot, turn.sampling);
      this.drawReplies(shown, turn.replies);
    });
    this.log.hidden = !all.length;
    if (below) this.log.scrollTop = this.log.scrollHeight;
  }

  drawReplies(shown, replies) {
    while (shown.cells.length > replies.length) shown.cells.pop().node.remove();
    replies.forEach((reply, place) => {
      let cell = shown.cells[place];
      if (!cell) {
        cell = { head: element("div", "llmnb-dim llmnb-reply-head"), text: element("div", "llmnb-chat-text"), note: element("div", "llmnb-dim llmnb-reply-note") };
        cell.node = element("div", "llmnb-reply", { role: "group" }, cell.head, cell.text, cell.note);
        shown.cells.push(cell);
        shown.columns.append(cell.node);
      }
      cell.node.setAttribute("aria-label", `Answer of ${reply.head}`);
      cell.node.dataset.state = reply.state;
      cell.note.classList.toggle("llmnb-fault", reply.state === "failed");
      say(cell.head, reply.head);
      say(cell.text, reply.text);
      say(cell.note, reply.note);
    });
  }
}

export default () => {
  const shared = { heard: false, phase: "opening", turns: [], chosen: [], choices: [], draft: "", asked: "", views: new Set() };
  shared.draw = () => shared.views.forEach((view) => view.draw());
  const take = ({ kind, content }) => {
    if (kind === "all") {
      const lost = shared.asked && content.phase === "idle" && content.turns.at(-1)?.prompt !== shared.asked;
      if (shared.asked && !content.draft && !lost) shared.views.forEach((view) => view.clear());
      const back = lost ? { draft: shared.asked, said: "The kernel did not hear the question: ask it again.", trouble: "" } : {};
      Object.assign(shared, content, { heard: true, asked: "" }, back);
    } else if (!shared.heard) return;
    else if (kind === "state") {
      const late = shared.asked && !content.trouble && content.phase === "idle"; // said before the question was heard
      if (content.trouble) shared.asked = "";
      Object.assign(shared, content, late ? { phase: "answering" } : {});
    } else if (kind === "focus") shared.views.forEach((view) => view.prompt.focus());
    else if (kind === "reply" && shared.turns[content.turn]) shared.turns[content.turn].replies[content.column] = content.reply;
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
