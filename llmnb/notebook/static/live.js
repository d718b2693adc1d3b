// The live view of one run. It draws what the kernel says and remembers nothing else: `snapshot` replaces the
// curve, `append` adds to it, `detail` answers a zoom. Every render says `ready`, and gets a snapshot.
// uPlot stands in front of this text (see live.py).

const HEIGHT = 240;
const ROOM = { x: 28, top: 8 };

function curveOf(message, buffers) {
  const column = (i) => {
    const view = buffers[i];
    return new Float64Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
  };
  return { steps: column(0), loss: column(1), smooth: column(2), evalSteps: column(3), evalLoss: column(4) };
}

function joined(a, b) {
  const out = new Float64Array(a.length + b.length);
  out.set(a);
  out.set(b, a.length);
  return out;
}

function extended(old, more) {
  const out = {};
  for (const name of Object.keys(old)) out[name] = joined(old[name], more[name]);
  return out;
}

// uPlot wants one x for all series, and null where there is a gap.
function tableOf(curve) {
  const gaps = (values) => Array.from(values, (v) => (Number.isFinite(v) ? v : null));
  const train = [Array.from(curve.steps), gaps(curve.loss), gaps(curve.smooth)];
  if (!curve.evalSteps.length) return [...train, train[0].map(() => undefined)];
  const evaluated = [Array.from(curve.evalSteps), gaps(curve.evalLoss)];
  if (!curve.steps.length) return [evaluated[0], evaluated[0].map(() => null), evaluated[0].map(() => null), evaluated[1]];
  return uPlot.join([train, evaluated]);
}

// The next of 1, 2, 5, 10, 20, 50, … above a step: the axis grows rarely, and never past the end of the run.
function roomFor(step, total) {
  let room = 10;
  for (let i = 0; room < step; i++) room *= i % 3 === 1 ? 2.5 : 2;
  return total && total >= step ? Math.min(room, total) : room;
}

function number(value) {
  return Math.round(value).toString().replace(/\B(?=(\d{3})+(?!\d))/g, "\u202f");
}

function figure(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value !== 0 && (Math.abs(value) < 0.001 || Math.abs(value) >= 1e6)) return value.toPrecision(3);
  return Math.abs(value) >= 1000 ? number(value) : value.toFixed(3);
}

function element(tag, name, attributes = {}, text = "") {
  const node = document.createElement(tag);
  if (name) node.className = name;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  return node;
}

// Words change in place, and only when they differ, so that nothing moves and no screen reader repeats itself.
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const KEYS = {
  loss: ['<path d="M0 5H18" stroke="var(--llmnb-accent)" stroke-opacity=".5"/>', "loss"],
  smooth: ['<path d="M0 5H18" stroke="var(--llmnb-accent)" stroke-width="2"/>', "smoothed"],
  eval: ['<path d="M0 5H18" stroke="var(--llmnb-text)"/><circle cx="9" cy="5" r="3" fill="var(--llmnb-text)"/>', "eval"],
  saved: ['<circle cx="9" cy="5" r="3.5" fill="none" stroke="var(--llmnb-dim)" stroke-width="1.5"/>', "checkpoint"],
  best: ['<path d="M9 0L14 5L9 10L4 5Z" fill="var(--llmnb-text)"/>', "best"],
};

function keyNode(name) {
  const [drawing, word] = KEYS[name];
  const node = element("span", "llmnb-key");
  node.innerHTML = `<svg width="18" height="10" fill="none" aria-hidden="true">${drawing}</svg>`;
  node.append(word + " ");
  const value = element("b");
  if (name === "loss" || name === "smooth" || name === "eval") node.append(value);
  return { node, value };
}

class View {
  constructor(el, model, shared) {
    Object.assign(this, { el, model, shared, zoom: null, detail: null, low: null, high: null, plot: null });
    this.id = Math.random().toString(36).slice(2);
    this.build();
    this.watchTheme();
    this.resizer = new ResizeObserver(() => this.fit());
    this.resizer.observe(this.frame);
  }

  build() {
    const root = (this.root = element("div", "llmnb-live", { "data-run": this.model.get("run") }));
    const head = element("div", "llmnb-head");
    this.title = element("span", "llmnb-title");
    this.state = element("span", "llmnb-state", { role: "status" });
    this.progress = element("span", "llmnb-progress");
    this.step = element("span");
    this.track = element("span", "llmnb-track", { role: "progressbar", "aria-label": "steps done", "aria-valuemin": 0, "aria-valuemax": 100 });
    this.bar = element("span", "llmnb-bar");
    this.bar.style.display = "block";
    this.track.append(this.bar);
    this.left = element("span", "llmnb-left");
    this.progress.append(this.step, this.track, this.left);
    head.append(this.title, this.state, this.progress);

    const keys = element("div", "llmnb-keys");
    this.at = element("span", "llmnb-key");
    this.keys = {};
    for (const name of Object.keys(KEYS)) {
      this.keys[name] = keyNode(name);
      keys.append(this.keys[name].node);
    }
    keys.append(this.at);
    this.reset = element("button", "llmnb-reset", { type: "button", hidden: "" }, "Show all steps");
    this.reset.addEventListener("click", () => this.zoomTo(null));
    keys.append(this.reset);

    this.frame = element("div", "llmnb-plot", { role: "img", "aria-label": "training loss by step" });
    this.empty = element("div", "llmnb-empty", {}, "The curve begins with the first logged step.");
    this.frame.append(this.empty);
    this.foot = element("div", "llmnb-foot");
    this.saved = element("div", "llmnb-saved");
    this.alert = element("div", "llmnb-alert", { role: "alert" });
    root.append(head, this.alert, keys, this.frame, this.foot, this.saved);
    this.el.append(root);
  }

  // --- words -------------------------------------------------------------------------------------------------

  words(status) {
    say(this.title, status.title);
    say(this.state, status.state);
    say(this.step, status.step);
    say(this.alert, status.alert);
    const known = status.share !== null;
    this.track.style.display = known ? "" : "none";
    if (known) {
      const percent = Math.floor(status.share * 100);
      this.bar.style.width = `${percent}%`;
      this.track.setAttribute("aria-valuenow", percent);
      this.track.setAttribute("aria-valuetext", [status.step, status.left].filter(Boolean).join(", "));
    }
    say(this.left, status.left && known ? `${Math.floor(status.share * 100)} %, ${status.left}` : status.left);
    this.list(this.foot, status.facts.map(([label, value]) => [label, value]), "llmnb-fact");
    this.list(this.saved, status.checkpoints.length ? [["checkpoints", ""], ...status.checkpoints.map((c) => ["", c])] : [], "");
    this.keys.saved.node.style.display = status.marks.length ? "" : "none";
    this.keys.best.node.style.display = status.marks.some((m) => m[1]) ? "" : "none";
    this.keys.eval.node.style.display = this.shared.curve && this.shared.curve.evalSteps.length ? "" : "none";
    this.root.dataset.status = status.state;
    this.root.dataset.points = status.points;
    this.root.dataset.seq = this.shared.seq;
  }

  list(parent, pairs, name) {
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

  // The values under the pointer with their step, else the newest.
  readout() {
    if (!this.plot) return;
    const place = this.plot.cursor.idx;
    const data = this.plot.data;
    const near = (column) => {
      let i = place === null || place === undefined ? data[0].length - 1 : place;
      while (i >= 0 && (data[column][i] === undefined || (place === null && data[column][i] === null))) i--;
      return i >= 0 ? data[column][i] : null;
    };
    say(this.keys.loss.value, figure(near(1)));
    say(this.keys.smooth.value, figure(near(2)));
    say(this.keys.eval.value, figure(near(3)));
    say(this.at, place === null || place === undefined ? "" : `at step ${number(data[0][place])}`);
  }

  // --- the chart -----------------------------------------------------------------------------------------------

  colours() {
    const style = getComputedStyle(this.root);
    const of = (name) => style.getPropertyValue(`--llmnb-${name}`).trim() || "gray";
    this.ink = { text: of("text"), dim: of("dim"), grid: of("grid"), ground: of("ground"), accent: of("accent"), font: style.fontFamily };
  }

  options() {
    const axis = {
      stroke: () => this.ink.dim,
      font: `11px ${this.ink.font}`,
      grid: { stroke: () => this.ink.grid, width: 1 },
      ticks: { show: false },
      gap: 6,
    };
    return {
      width: Math.max(200, this.frame.clientWidth),
      height: HEIGHT,
      padding: [ROOM.top, 12, 0, 0],
      legend: { show: false },
      cursor: { y: false, points: { size: 7, fill: (u, i) => (i === 3 ? this.ink.text : this.ink.accent) }, drag: { x: true, y: false, setScale: false }, dblclick: null,
        bind: { dblclick: () => () => { this.zoomTo(null); return null; } } },
      scales: { x: { time: false, range: (u, low, high) => this.rangeX() }, y: { range: (u, low, high) => this.rangeY(low, high) } },
      axes: [
        { ...axis, size: ROOM.x, values: (u, ticks) => ticks.map((t) => (Number.isInteger(t) ? number(t) : "")) },
        { ...axis, size: 52, values: (u, ticks) => ticks.map((t) => (Math.abs(t) >= 1000 ? number(t) : String(+t.toPrecision(6)))) },
      ],
      series: [
        {},
        { stroke: () => this.ink.accent, alpha: 0.5, width: 1, points: { size: 4, fill: () => this.ink.accent, width: 0 } },
        { stroke: () => this.ink.accent, width: 2, points: { show: false } },
        { stroke: () => this.ink.text, width: 1, spanGaps: false, points: { show: true, size: 6, fill: () => this.ink.text, width: 0 } },
      ],
      hooks: {
        draw: [(u) => this.drawCheckpoints(u)],
        setCursor: [() => this.readout()],
        setSelect: [(u) => { if (u.select.width > 4) this.zoomTo([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]); }],
      },
    };
  }

  rangeX() {
    if (this.zoom) return this.zoom;
    const { curve, status } = this.shared;
    const last = Math.max(curve.steps.length ? curve.steps[curve.steps.length - 1] : 0, curve.evalSteps.length ? curve.evalSteps[curve.evalSteps.length - 1] : 0);
    const ended = ["done", "failed", "stopped", "lost"].includes(status.state);
    return [0, ended ? Math.max(1, last) : roomFor(last, status.total)];
  }

  // Kept while the data fits it and fills it well enough, so that the axis does not jump while one reads it.
  rangeY(low, high) {
    if (low === null || high === null || !Number.isFinite(low) || !Number.isFinite(high)) return [0, 1];
    const span = this.high - this.low;
    const fits = this.low !== null && low >= this.low && high <= this.high && high - low > 0.5 * span;
    if (!fits) {
      const air = (high - low || Math.abs(high) || 1) * 0.12;
      this.low = low >= 0 && low - air < 0 ? 0 : low - air;
      this.high = high + air;
    }
    return [this.low, this.high];
  }

  drawCheckpoints(u) {
    const { ctx, bbox } = u;
    const scale = devicePixelRatio;
    ctx.save();
    for (const [step, best] of this.shared.status.marks) {
      const x = u.valToPos(step, "x", true);
      if (x < bbox.left - 1 || x > bbox.left + bbox.width + 1) continue;
      const y = bbox.top + bbox.height;
      ctx.beginPath();
      ctx.lineWidth = 1.5 * scale;
      ctx.strokeStyle = best ? this.ink.text : this.ink.dim;
      ctx.fillStyle = best ? this.ink.text : this.ink.ground;
      const r = (best ? 5 : 3.5) * scale;
      if (best) {
        ctx.moveTo(x, y - r); ctx.lineTo(x + r, y); ctx.lineTo(x, y + r); ctx.lineTo(x - r, y); ctx.closePath();
      } else ctx.arc(x, y, r, 0, 2 * Math.PI);
      ctx.fill();
      ctx.stroke();
    }
    ctx.restore();
  }

  zoomTo(range) {
    this.zoom = range;
    this.detail = null;
    this.low = this.high = null;
    this.reset.hidden = !range;
    if (this.plot) this.plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    if (range) this.model.send({ kind: "range", range, view: this.id });
    this.draw();
  }

  draw() {
    const { curve, status } = this.shared;
    if (!status) return;
    this.words(status);
    const shown = (this.zoom && this.detail) || curve;
    this.empty.hidden = Boolean(curve.steps.length || curve.evalSteps.length);
    if (!this.empty.hidden) {
      const over = ["done", "failed", "stopped", "lost"].includes(status.state);
      say(this.empty, over ? "No step was logged." : "The curve begins with the first logged step.");
      return;
    }
    const table = tableOf(shown);
    if (!this.plot) {
      this.colours();
      this.plot = new uPlot(this.options(), table, this.frame);
    } else this.plot.setData(table);
    this.readout();
  }

  fit() {
    const width = this.frame.clientWidth;
    if (this.plot && width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  watchTheme() {
    const again = () => { this.colours(); if (this.plot) this.plot.redraw(false, true); };
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
    if (this.plot) this.plot.destroy();
  }
}

export default () => {
  const shared = { seq: -1, curve: null, status: null, views: new Set(), asked: 0 };
  const ask = (model) => {
    if (Date.now() - shared.asked < 500) return;
    shared.asked = Date.now();
    model.send({ kind: "ready" });
  };
  const take = (model, message, buffers) => {
    if (message.kind === "detail") {
      for (const view of shared.views) if (view.id === message.view && view.zoom) { view.detail = curveOf(message, buffers); view.draw(); }
      return;
    }
    if (message.kind === "append") {
      if (!shared.curve || message.base !== shared.seq) return ask(model);
      shared.curve = extended(shared.curve, curveOf(message, buffers));
    } else if (message.kind === "snapshot") shared.curve = curveOf(message, buffers);
    else return;
    shared.seq = message.seq;
    shared.status = message.status;
    for (const view of shared.views) view.draw();
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
      return () => { shared.views.delete(view); view.close(); };
    },
  };
};
