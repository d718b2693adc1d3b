// The run view. It draws what the kernel says and remembers nothing else: `snapshot` replaces the curves, `append` adds
// to them, `detail` answers a zoom. Every render says `ready`, and gets a snapshot with what the person chose before.
// uPlot, live_charts.js and live_parts.js stand in front of this text (see live.py).

const ENDED = ["done", "failed", "stopped", "lost"];
const PATIENCE = 8000;
const HEARD_WITHIN = 3000; // milliseconds that a choice needs to the kernel and back, at most

class View {
  constructor(el, model, shared) {
    Object.assign(this, { el, model, shared });
    this.id = Math.random().toString(36).slice(2);
    this.build();
    this.watchTheme();
    this.resizer = new ResizeObserver(() => { this.loss.fit(); this.rates.fit(); });
    for (const frame of [this.lossFrame, this.ratesFrame]) this.resizer.observe(frame);
  }

  get choices() {
    return this.shared.status.choices;
  }

  build() {
    const root = (this.root = element("div", "llmnb-live", { "data-run": this.model.get("run") }));
    this.head = new Head();
    this.alert = element("div", "llmnb-alert", { role: "alert" });
    const charts = element("div", "llmnb-charts");
    this.keys = {};
    const column = (names, label, tools) => {
      const node = element("div", "llmnb-chart");
      const keys = element("div", "llmnb-keys");
      for (const name of names) {
        this.keys[name] = keyNode(...KEYS[name]);
        keys.append(this.keys[name].node);
      }
      const at = element("span", "llmnb-at");
      keys.append(at);
      if (tools) keys.append(tools);
      const frame = element("div", "llmnb-plot", { role: "img", "aria-label": label });
      const empty = element("div", "llmnb-empty");
      frame.append(empty);
      node.append(keys, frame);
      charts.append(node);
      return { keys, frame, empty, at };
    };
    const left = column(["loss", "smooth", "eval", "saved", "best"], "training loss by step", this.tools());
    const right = column(["rate", "norm"], "learning rate and gradient norm by step");
    [this.lossKeys, this.lossFrame, this.lossEmpty, this.lossAt] = [left.keys, left.frame, left.empty, left.at];
    [this.ratesFrame, this.ratesEmpty, this.ratesAt] = [right.frame, right.empty, right.at];
    this.others = [];
    this.loss = new LossChart(this, this.lossFrame);
    this.rates = new RatesChart(this, this.ratesFrame);
    const foot = element("div", "llmnb-foot");
    this.facts = element("span", "llmnb-facts");
    this.beside = new Beside(this);
    foot.append(this.facts, this.beside.opener);
    this.saved = element("div", "llmnb-saved");
    this.controls = new Controls(this);
    this.said = element("div", "llmnb-alert", { role: "alert" });
    this.log = new Log();
    root.append(this.head.node, this.alert, charts, foot, this.beside.node, this.saved, this.controls.node, this.said, this.log.node);
    this.el.append(root);
  }

  tools() {
    const tools = element("span", "llmnb-tools");
    this.reset = element("button", "llmnb-reset", { hidden: "" }, "Show all steps");
    this.reset.addEventListener("click", () => this.zoomTo(null));
    const smooth = element("label", "llmnb-tool", {}, "smooth ");
    this.smooth = element("input", "llmnb-field", { type: "text", inputmode: "decimal", size: 4, title: "0 to below 1: the share of the past in the smoothed line" });
    this.smooth.addEventListener("change", () => this.smoothBy(this.smooth.value));
    smooth.append(this.smooth);
    const log = element("label", "llmnb-tool");
    this.logScale = element("input", "", { type: "checkbox" });
    this.logScale.addEventListener("change", () => this.choose({ log: this.logScale.checked }));
    log.append(this.logScale, " log scale");
    tools.append(this.reset, smooth, log);
    return tools;
  }

  // --- what a person does ------------------------------------------------------------------------------------------

  choose(choices) {
    Object.assign(this.shared.status.choices, choices);
    for (const name of Object.keys(choices)) this.shared.chosen.set(name, Date.now());
    this.model.send({ kind: "choose", choices });
    this.shared.draw();
  }

  press(what) {
    this.shared.pending = what;
    this.shared.silent = "";
    clearTimeout(this.shared.timer);
    this.shared.timer = setTimeout(() => {
      if (this.shared.pending !== what) return;
      this.shared.pending = "";
      this.shared.silent = "The kernel does not answer: it runs a cell and does this afterwards, or it was restarted and this cell must be run again.";
      this.shared.words();
    }, PATIENCE);
    this.model.send({ kind: "press", what });
    this.shared.words();
  }

  smoothBy(text) {
    const weight = Number(text.replace(",", "."));
    const bad = !text.trim() || !(weight >= 0 && weight < 1);
    this.smooth.setAttribute("aria-invalid", String(bad));
    this.smooth.title = bad ? "a number from 0 to below 1, like 0.6" : "0 to below 1: the share of the past in the smoothed line";
    this.shared.wrong = bad ? "smooth: a number from 0 to below 1, like 0.6" : "";
    if (bad) this.words();
    else this.choose({ smooth: weight });
  }

  zoomTo(range) {
    for (const chart of [this.loss, this.rates]) chart.plot?.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.shared.detail = null;
    this.loss.scale = new Steady(this.choices.log);
    this.choose({ zoom: range });
  }

  // --- words -------------------------------------------------------------------------------------------------------

  words() {
    const { status, curve, pending } = this.shared;
    if (!status) return;
    this.head.show(status);
    say(this.alert, status.alert);
    list(this.facts, status.facts, "llmnb-fact");
    list(this.saved, status.checkpoints.length ? [["checkpoints", ""], ...status.checkpoints.map((c) => ["", c])] : [], "");
    const seen = { saved: status.marks.length, best: status.marks.some((m) => m[1]), eval: curve && curve.evalSteps.length };
    for (const [name, there] of Object.entries(seen)) this.keys[name].node.style.display = there ? "" : "none";
    this.controls.show(status, pending);
    say(this.said, this.shared.wrong || this.shared.silent || status.said);
    if (document.activeElement !== this.smooth && !this.shared.wrong) this.smooth.value = String(this.choices.smooth);
    this.logScale.checked = this.choices.log;
    this.reset.hidden = !this.choices.zoom;
    this.log.show(this.choices.printed, this.shared.log);
    this.beside.show();
    this.names();
    this.root.dataset.status = status.state;
    this.root.dataset.points = status.points;
    this.root.dataset.seq = this.shared.seq;
  }

  // The other runs' keys behind our own.
  names() {
    const { runs } = this.shared.others;
    while (this.others.length > runs.length) this.others.pop().node.remove();
    while (this.others.length < runs.length) {
      const key = otherKey(this.others.length, "");
      this.others.push(key);
      this.lossKeys.insertBefore(key.node, this.lossAt);
    }
    runs.forEach((run, i) => say(this.others[i].name, run.title));
  }

  // The values under the pointer with their step, else the newest.
  readout() {
    for (const [name, column, words] of [["loss", 1, figure], ["smooth", 2, figure], ["eval", 3, figure]]) say(this.keys[name].value, words(this.loss.near(column)));
    this.others.forEach((key, i) => say(key.value, figure(this.loss.near(4 + i))));
    say(this.keys.rate.value, tiny(this.rates.near(1)));
    say(this.keys.norm.value, figure(this.rates.near(2)));
    for (const [chart, node] of [[this.loss, this.lossAt], [this.rates, this.ratesAt]]) say(node, chart.step === null ? "" : `at step ${number(chart.step)}`);
  }

  // --- the charts ----------------------------------------------------------------------------------------------------

  colours() {
    const style = getComputedStyle(this.root);
    const of = (name) => style.getPropertyValue(`--llmnb-${name}`).trim() || "gray";
    const others = Array.from({ length: OTHERS }, (_, i) => of(`other${i + 1}`));
    this.ink = { text: of("text"), dim: of("dim"), grid: of("grid"), ground: of("ground"), accent: of("accent"), font: style.fontFamily, others };
  }

  rangeX() {
    if (this.choices.zoom) return this.choices.zoom;
    const { curve, status, others } = this.shared;
    const last = (steps) => (steps.length ? steps[steps.length - 1] : 0);
    const own = Math.max(last(curve.steps), last(curve.evalSteps));
    const room = ENDED.includes(status.state) ? Math.max(1, own) : roomFor(own, status.total);
    return [0, Math.max(room, ...others.runs.map((run) => last(run.steps)))];
  }

  draw() {
    const { curve, status, detail, others } = this.shared;
    if (!status || !curve) return;
    this.words();
    const shown = (this.choices.zoom && detail) || curve;
    const over = ENDED.includes(status.state);
    if (!this.ink) this.colours();
    const place = (chart, there, empty, words, show) => {
      empty.hidden = there;
      if (there) show();
      else {
        chart.clear();
        say(empty, words);
      }
    };
    const some = Boolean(curve.steps.length || curve.evalSteps.length || others.runs.length);
    place(this.loss, some, this.lossEmpty, over ? "No step was logged." : "The curve begins with the first logged step.", () => this.loss.show(shown, others.runs, this.choices.log));
    const rates = Boolean(curve.rateSteps.length || curve.normSteps.length);
    place(this.rates, rates, this.ratesEmpty, some ? "Neither is logged." : "", () => this.rates.show(shown));
    this.readout();
  }

  watchTheme() {
    const again = () => {
      this.colours();
      for (const chart of [this.loss, this.rates]) chart.plot?.redraw(false, true);
    };
    this.theme = new MutationObserver(() => requestAnimationFrame(again));
    for (const node of [document.body, document.documentElement])
      this.theme.observe(node, { attributes: true, attributeFilter: ["class", "style", "data-jp-theme-name", "data-jp-theme-light", "data-vscode-theme-kind"] });
    // a theme's style sheet may arrive after its name was set
    this.late = new MutationObserver(() => setTimeout(again, 60));
    this.late.observe(document.head, { childList: true });
  }

  close() {
    this.theme.disconnect();
    this.late.disconnect();
    this.resizer.disconnect();
    for (const chart of [this.loss, this.rates]) chart.clear();
  }
}

function sharedOf() {
  const shared = { seq: -1, curve: null, status: null, detail: null, log: null, runs: null, others: { runs: [], table: null, trouble: "" }, pending: "", silent: "", wrong: "", views: new Set(), asked: 0, chosen: new Map() };
  shared.draw = () => shared.views.forEach((view) => view.draw());
  shared.words = () => shared.views.forEach((view) => view.words());
  return shared;
}

export default () => {
  const shared = sharedOf();
  const ask = (model) => {
    if (Date.now() - shared.asked < 500) return;
    shared.asked = Date.now();
    model.send({ kind: "ready" });
  };
  const curves = (model, message, buffers) => {
    if (message.kind === "append") {
      if (!shared.curve || message.base !== shared.seq) return ask(model);
      shared.curve = extended(shared.curve, curveOf(buffers));
    } else shared.curve = curveOf(buffers);
    shared.seq = message.seq;
    shared.silent = "";
    if ("doing" in message.status || "state" in message.status || "said" in message.status) shared.pending = "";
    const { choices } = message.status;
    // An answer to a choice before must not take back the newest one.
    if (choices && shared.status) for (const [name, at] of shared.chosen) if (Date.now() - at < HEARD_WITHIN) choices[name] = shared.status.choices[name];
    shared.status = { ...shared.status, ...message.status };
    shared.draw();
  };
  const take = (model, message, buffers) => {
    const { kind } = message;
    if (kind === "snapshot" || kind === "append") return curves(model, message, buffers);
    if (kind === "anyone") return shared.views.size && model.send({ kind: "ready" });
    if (kind === "detail") shared.detail = curveOf(buffers);
    else if (kind === "log") shared.log = message;
    else if (kind === "runs") shared.runs = message.runs;
    else if (kind === "others") {
      const runs = message.runs.map((run, i) => ({ ...run, steps: floats(buffers[2 * i]), smooth: floats(buffers[2 * i + 1]) }));
      shared.others = { runs, table: message.table, trouble: message.trouble };
    } else return;
    if (kind === "detail" || kind === "others") shared.draw();
    else shared.words();
  };
  return {
    initialize({ model }) {
      const listen = (message, buffers) => take(model, message, buffers);
      model.on("msg:custom", listen);
      return () => model.off("msg:custom", listen);
    },
    render({ model, el }) {
      const view = new View(el, model, shared);
      shared.views.add(view);
      view.draw();
      model.send({ kind: "ready" });
      return () => {
        shared.views.delete(view);
        view.close();
        if (!shared.views.size) model.send({ kind: "gone" });
      };
    },
  };
};
