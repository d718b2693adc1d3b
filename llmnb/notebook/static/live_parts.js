// The parts of the run view that are words: keys, progress, controls, the log, other runs. They know the page only.

function list(parent, pairs, name) {
  while (parent.children.length > pairs.length) parent.lastChild.remove();
  pairs.forEach(([label, value], i) => {
    let node = parent.children[i];
    if (!node) {
      node = element("span", name);
      node.append(element("span", "llmnb-dim"), element("span"));
      parent.append(node);
    }
    say(node.children[0], label && value ? `${label} ` : label);
    say(node.children[1], value);
  });
}

const line = (stroke, more = "") => `<path d="M0 5H18" stroke="${stroke}" ${more}/>`;
const KEYS = {
  loss: [line("var(--llmnb-accent)", 'stroke-opacity=".5"'), "loss"],
  smooth: [line("var(--llmnb-accent)", 'stroke-width="2"'), "smoothed"],
  eval: [line("var(--llmnb-text)") + '<circle cx="9" cy="5" r="3" fill="var(--llmnb-text)"/>', "eval"],
  saved: ['<circle cx="9" cy="5" r="3.5" fill="none" stroke="var(--llmnb-dim)" stroke-width="1.5"/>', "checkpoint", true],
  best: ['<path d="M9 0L14 5L9 10L4 5Z" fill="var(--llmnb-text)"/>', "best", true],
  rate: [line("var(--llmnb-accent)", 'stroke-width="2"'), "learning rate"],
  norm: [line("var(--llmnb-dim)"), "gradient norm"],
};

function keyNode(drawing, word, bare) {
  const node = element("span", "llmnb-key");
  node.innerHTML = `<svg width="18" height="10" fill="none" aria-hidden="true">${drawing}</svg>`;
  const name = element("span", "llmnb-key-name", {}, word);
  const value = element("b");
  node.append(name, " ");
  if (!bare) node.append(value);
  return { node, name, value };
}

function otherKey(i, word) {
  const key = keyNode(line(`var(--llmnb-other${i + 1})`, `stroke-width="2" stroke-dasharray="${DASHES[i].join(" ")}"`), word);
  key.node.classList.add("llmnb-other");
  return key;
}

class Head {
  constructor() {
    this.node = element("div", "llmnb-head");
    this.title = element("span", "llmnb-title");
    this.state = element("span", "llmnb-state", { role: "status" });
    this.progress = element("span", "llmnb-progress");
    this.step = element("span", "llmnb-step");
    this.track = element("span", "llmnb-track", { role: "progressbar", "aria-label": "steps done", "aria-valuemin": 0, "aria-valuemax": 100 });
    this.bar = element("span", "llmnb-bar");
    this.track.append(this.bar);
    this.left = element("span", "llmnb-left");
    this.progress.append(this.step, this.track, this.left);
    this.node.append(this.title, this.state, this.progress);
  }

  show(status) {
    say(this.title, status.title);
    say(this.state, status.state);
    say(this.step, status.step);
    const known = status.share !== null;
    this.track.style.display = known ? "" : "none";
    if (known) {
      const percent = Math.floor(status.share * 100);
      this.bar.style.width = `${percent}%`;
      this.track.setAttribute("aria-valuenow", percent);
      this.track.setAttribute("aria-valuetext", [status.step, status.left].filter(Boolean).join(", "));
    }
    say(this.left, status.left && known ? `${Math.floor(status.share * 100)} %, ${status.left}` : status.left);
  }
}

// Stop and keep, Kill (asked twice), Resume: each answers at once, and says why when it cannot be pressed.
class Controls {
  constructor(view) {
    this.view = view;
    this.node = element("div", "llmnb-controls");
    this.asked = false;
    const button = (what, name) => {
      const node = element("button", name);
      node.addEventListener("click", () => this.press(what));
      this.node.append(node);
      return node;
    };
    this.buttons = { stop: button("stop", "llmnb-button"), kill: button("kill", "llmnb-plain"), resume: button("resume", "llmnb-button") };
    this.printed = element("button", "llmnb-plain llmnb-log-opener");
    this.printed.addEventListener("click", () => view.choose({ printed: !view.choices.printed }));
    this.why = element("span", "llmnb-why llmnb-dim");
    this.node.append(this.printed, this.why);
  }

  press(what) {
    const { status } = this.view.shared;
    if (status.reasons[what] || this.view.shared.pending) return;
    if (what === "kill" && !this.asked) {
      this.asked = true;
      setTimeout(() => { this.asked = false; this.view.words(); }, 6000);
      return this.view.words();
    }
    this.asked = false;
    this.view.press(what);
  }

  show(status, pending) {
    const doing = pending || status.doing;
    const words = {
      stop: doing === "stop" ? "Stopping …" : "Stop and keep",
      kill: doing === "kill" ? "Ending …" : this.asked ? `Kill: press again to ${status.loses}` : "Kill",
      resume: doing === "resume" ? "Resuming …" : "Resume",
    };
    const ended = ENDED.includes(status.state);
    for (const [what, node] of Object.entries(this.buttons)) {
      const busy = doing && doing !== what && !(doing === "stop" && what === "kill");
      const why = doing === what ? "it is on its way" : busy ? "wait for the other" : status.reasons[what];
      say(node, words[what]);
      node.setAttribute("aria-disabled", String(Boolean(why)));
      node.title = why;
    }
    this.buttons.resume.hidden = !ended && doing !== "resume";
    this.buttons.kill.classList.toggle("llmnb-fault", this.asked);
    say(this.why, doing ? "" : this.reason(status.reasons, ended));
    const open = this.view.choices.printed;
    say(this.printed, open ? "log ▾" : "log ▸");
    this.printed.setAttribute("aria-expanded", String(open));
  }

  // Each reason once, behind the names that it is for.
  reason(reasons, ended) {
    const names = { stop: "Stop and keep", kill: "Kill", resume: "Resume" };
    const grouped = new Map();
    for (const [what, why] of Object.entries(reasons)) if (why && (ended || what !== "resume")) grouped.set(why, [...(grouped.get(why) || []), names[what]]);
    return [...grouped].map(([why, who]) => `${who.join(", ")}: ${why}`).join("; ");
  }
}

class Log {
  constructor() {
    this.node = element("div", "llmnb-log", { hidden: "" });
    this.notes = element("div", "llmnb-notes");
    this.text = element("pre", "llmnb-printed", { tabindex: 0, "aria-label": "the end of what the run's process printed" });
    this.node.append(this.notes, this.text);
  }

  show(open, log) {
    this.node.hidden = !open;
    if (!open) return;
    list(this.notes, (log ? log.notes : []).map((note) => ["", note]), "llmnb-note");
    const stays = this.text.scrollTop + this.text.clientHeight < this.text.scrollHeight - 8;
    say(this.text, !log ? "Reading …" : log.text || "Its process has printed nothing that can be reached from here.");
    if (!stays) this.text.scrollTop = this.text.scrollHeight;
  }
}

// Other runs: a list to choose from, and a table of what differs.
class Beside {
  constructor(view) {
    this.view = view;
    this.open = false;
    this.opener = element("button", "llmnb-plain llmnb-compare-opener", { "aria-expanded": "false" });
    this.opener.addEventListener("click", () => this.toggle());
    this.node = element("div", "llmnb-beside");
    this.list = element("div", "llmnb-runs", { role: "group", "aria-label": "runs to compare with" });
    this.trouble = element("div", "llmnb-alert", { role: "alert" });
    this.table = element("table", "llmnb-table");
    this.scroll = element("div", "llmnb-scroll");
    this.scroll.append(this.table);
    this.node.append(this.list, this.trouble, this.scroll);
    this.listed = this.tabled = "";
  }

  toggle() {
    this.open = !this.open;
    if (this.open) this.view.model.send({ kind: "runs" });
    this.view.words();
  }

  show() {
    const { runs, others } = this.view.shared;
    const chosen = this.view.choices.compare;
    say(this.opener, `compare with ${chosen.length ? `${chosen.length} ${chosen.length === 1 ? "run" : "runs"}` : "…"} ${this.open ? "▾" : "▸"}`);
    this.opener.setAttribute("aria-expanded", String(this.open));
    this.list.hidden = !this.open;
    if (this.open) this.offer(runs, chosen);
    say(this.trouble, others.trouble || "");
    this.draw(others.table);
  }

  offer(runs, chosen) {
    const key = JSON.stringify([runs, chosen]);
    if (key === this.listed) return;
    const focused = document.activeElement && this.list.contains(document.activeElement) ? document.activeElement.value : null;
    this.listed = key;
    const rows = (runs || []).map(([id, words]) => {
      const label = element("label", "llmnb-choice");
      const box = element("input", "", { type: "checkbox", value: id });
      box.checked = chosen.includes(id);
      box.disabled = !box.checked && chosen.length >= OTHERS;
      box.addEventListener("change", () => this.view.choose({ compare: box.checked ? [...chosen, id] : chosen.filter((run) => run !== id) }));
      label.append(box, element("span", "", {}, words));
      label.title = id;
      return label;
    });
    const said = runs === null ? "Reading …" : runs.length ? "" : "There is no other run in this database.";
    if (said) rows.push(element("span", "llmnb-dim", {}, said));
    if (chosen.length >= OTHERS) rows.push(element("span", "llmnb-dim", {}, `At most ${OTHERS} runs at once.`));
    this.list.replaceChildren(...rows);
    if (focused) this.list.querySelector(`input[value="${CSS.escape(focused)}"]`)?.focus();
  }

  draw(table) {
    const key = JSON.stringify(table);
    if (key === this.tabled) return;
    this.tabled = key;
    this.scroll.hidden = !table;
    if (!table) return;
    const row = (tag, cells) => {
      const node = element("tr");
      cells.forEach((cell, i) => node.append(element(i && tag === "td" ? "td" : "th", "", { scope: i && tag === "td" ? "" : tag === "th" ? "col" : "row" }, cell)));
      return node;
    };
    this.table.replaceChildren(row("th", ["", ...table.heads]), ...table.rows.map((cells) => row("td", cells)));
    this.table.setAttribute("aria-label", "what differs between the runs");
    if (!table.settings) {
      const none = element("caption", "llmnb-dim", {}, "The settings are the same.");
      this.table.prepend(none);
    }
  }
}
