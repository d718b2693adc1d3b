// The charts of the run view: curves as tables, and two plots that share their steps. They know uPlot, which stands in
// front of this text, and nothing of the kernel. live_parts.js and live.js stand behind it (see live.py).

const HEIGHT = { loss: 240, rates: 240 };
const ROOM = { x: 28, top: 8 };
const COLUMNS = ["steps", "loss", "smooth", "evalSteps", "evalLoss", "rateSteps", "rate", "normSteps", "norm"];
const OTHERS = 5;
const DASHES = [[], [8, 3], [3, 3], [10, 3, 2, 3], [1, 3]];

function floats(view) {
  return new Float64Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

function curveOf(buffers) {
  return Object.fromEntries(COLUMNS.map((name, i) => [name, floats(buffers[i])]));
}

// Room to spare behind each column, so that an append copies what is new and not what was there.
function joined(a, b) {
  const end = a.length + b.length;
  let out;
  if (a.shelf && a.shelf.used === a.length && a.shelf.byteLength >= end * 8) out = a.shelf;
  else {
    out = new ArrayBuffer(Math.max(64, end * 2) * 8);
    new Float64Array(out).set(a);
  }
  new Float64Array(out).set(b, a.length);
  out.used = end;
  const view = new Float64Array(out, 0, end);
  view.shelf = out;
  return view;
}

function extended(old, more) {
  return Object.fromEntries(COLUMNS.map((name) => [name, more[name].length ? joined(old[name], more[name]) : old[name]]));
}

// uPlot wants one x for all series, null where there is a gap, and undefined where a series says nothing.
function gaps(values, log) {
  return Array.from(values, (v) => (Number.isFinite(v) && (!log || v > 0) ? v : null));
}

function together(tables, series) {
  const said = tables.filter((table) => table[0].length);
  if (said.length === 1 && said[0] === tables[0] && tables[0].length === series + 1) return tables[0];
  const merged = said.length ? uPlot.join(said) : [[]];
  const out = [merged[0]];
  let at = 1;
  for (const table of tables)
    for (let i = 1; i < table.length; i++) out.push(table[0].length ? merged[at++] : merged[0].map(() => undefined));
  return out;
}

function lossTable(curve, others, log) {
  const own = [Array.from(curve.steps), gaps(curve.loss, log), gaps(curve.smooth, log)];
  const evaluated = [Array.from(curve.evalSteps), gaps(curve.evalLoss, log)];
  const more = others.map((other) => [Array.from(other.steps), gaps(other.smooth, log)]);
  return together([own, evaluated, ...more], 3 + more.length);
}

function ratesTable(curve) {
  return together([[Array.from(curve.rateSteps), gaps(curve.rate)], [Array.from(curve.normSteps), gaps(curve.norm)]], 2);
}

// The next of 1, 2, 5, 10, 20, 50, … above a step: the axis grows rarely, and never past the end of the run.
function roomFor(step, total) {
  let room = 10;
  for (let i = 0; room < step; i++) room *= i % 3 === 1 ? 2.5 : 2;
  return total && total >= step ? Math.min(room, total) : room;
}

function figure(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value !== 0 && (Math.abs(value) < 0.001 || Math.abs(value) >= 1e6)) return value.toPrecision(3);
  return Math.abs(value) >= 1000 ? number(value) : value.toFixed(3);
}

function tiny(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(2).replace(/\.?0+e/, "e") : String(+value.toPrecision(3));
}

// A scale that keeps its ends while the data fits them and fills them well enough: it does not jump while one reads it.
class Steady {
  constructor(log = false, floor = null) {
    Object.assign(this, { log, floor, low: null, high: null });
  }

  range(low, high) {
    if (low === null || high === null || !Number.isFinite(low) || !Number.isFinite(high)) return this.log ? [0.1, 1] : [0, 1];
    const place = (v) => (this.log ? Math.log10(v) : v);
    const fits = this.low !== null && low >= this.low && high <= this.high;
    const fills = fits && place(high) - place(Math.min(low, this.floor ?? low)) > 0.5 * (place(this.high) - place(this.low));
    if (fits && fills) return [this.low, this.high];
    if (this.log) {
      const air = Math.max(Math.log10(high / low) * 0.12, 0.02);
      [this.low, this.high] = [low / 10 ** air, high * 10 ** air];
    } else {
      const bottom = this.floor === null ? low : Math.min(low, this.floor);
      const air = (high - bottom || Math.abs(high) || 1) * 0.12;
      this.low = bottom === this.floor || (low >= 0 && low - air < 0) ? Math.min(bottom, 0) : low - air;
      this.high = high + air;
    }
    return [this.low, this.high];
  }
}

// What both plots have in common. `owner` is the view: its ink, its range of steps, its readout.
class Chart {
  constructor(owner, frame, height) {
    Object.assign(this, { owner, frame, height, plot: null });
  }

  axis(more) {
    const ink = () => this.owner.ink;
    return { stroke: () => ink().dim, font: `11px ${ink().font}`, grid: { stroke: () => ink().grid, width: 1 }, ticks: { show: false }, gap: 6, ...more };
  }

  common(right) {
    return {
      width: Math.max(160, this.frame.clientWidth),
      height: this.height,
      padding: [ROOM.top, right, 0, 0],
      legend: { show: false },
      cursor: {
        y: false,
        drag: { x: true, y: false, setScale: false },
        dblclick: null,
        bind: { dblclick: () => () => { this.owner.zoomTo(null); return null; } },
        points: { size: 7, fill: (u, i) => u.series[i].stroke(u, i) },
        sync: { key: this.owner.id, scales: ["x", null], filters: { pub: (kind) => kind === "mousemove" || kind === "mouseleave" } },
      },
      hooks: {
        setCursor: [() => this.owner.readout()],
        setSelect: [(u) => { if (u.select.width > 4) this.owner.zoomTo([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]); }],
      },
    };
  }

  steps() {
    return this.axis({ size: ROOM.x, values: (u, ticks) => ticks.map((t) => (Number.isInteger(t) ? number(t) : "")) });
  }

  set(table) {
    if (this.plot) this.plot.setData(table);
    else this.plot = new uPlot(this.options(), table, this.frame);
  }

  // The value under the pointer, else the newest.
  near(column) {
    if (!this.plot || !this.plot.data[column]) return null;
    const place = this.plot.cursor.idx, data = this.plot.data;
    let i = place === null || place === undefined ? data[0].length - 1 : place;
    while (i >= 0 && (data[column][i] === undefined || (place === null && data[column][i] === null))) i--;
    return i >= 0 ? data[column][i] : null;
  }

  get step() {
    const place = this.plot?.cursor.idx;
    return place === null || place === undefined ? null : this.plot.data[0][place];
  }

  fit() {
    const width = this.frame.clientWidth;
    if (this.plot && width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: this.height });
  }

  clear() {
    if (this.plot) this.plot.destroy();
    this.plot = null;
  }
}

class LossChart extends Chart {
  constructor(owner, frame) {
    super(owner, frame, HEIGHT.loss);
    this.scale = new Steady();
    this.log = false;
    this.others = 0;
  }

  show(curve, others, log) {
    if (log !== this.log || others.length !== this.others) this.clear();
    if (log !== this.log) this.scale = new Steady(log);
    Object.assign(this, { log, others: others.length });
    this.set(lossTable(curve, others, log));
  }

  options() {
    const ink = () => this.owner.ink;
    const common = this.common(20);
    const more = Array.from({ length: this.others }, (_, i) => ({ stroke: () => ink().others[i], width: 1.5, dash: DASHES[i], points: { show: false } }));
    return {
      ...common,
      hooks: { ...common.hooks, draw: [(u) => this.drawCheckpoints(u)] },
      scales: {
        x: { time: false, range: () => this.owner.rangeX() },
        y: { distr: this.log ? 3 : 1, log: 10, range: (u, low, high) => this.scale.range(low, high) },
      },
      axes: [
        this.steps(),
        this.axis({ size: 52, ...(this.log ? { splits: (u) => this.decades(u), filter: (u, splits) => splits } : {}), values: (u, ticks) => ticks.map((t) => (Math.abs(t) >= 1000 ? number(t) : String(+t.toPrecision(6)))) }),
      ],
      series: [
        {},
        { stroke: () => ink().accent, alpha: 0.5, width: 1, points: { size: 4, fill: () => ink().accent, width: 0 } },
        { stroke: () => ink().accent, width: 2, points: { show: false } },
        { stroke: () => ink().text, width: 1, spanGaps: false, points: { show: true, size: 6, fill: () => ink().text, width: 0 } },
        ...more,
      ],
    };
  }

  // Marks at 1, 2, 5 of each decade; within less than one, at equal distances.
  decades(u) {
    const { min, max } = u.scales.y, out = [];
    for (let power = Math.floor(Math.log10(min)); power <= Math.ceil(Math.log10(max)); power++)
      for (const digit of [1, 2, 5]) if (digit * 10 ** power >= min && digit * 10 ** power <= max) out.push(digit * 10 ** power);
    if (out.length > 2) return out.length > 8 ? out.filter((v) => Math.abs(Math.log10(v) - Math.round(Math.log10(v))) < 1e-9) : out;
    const unit = 10 ** Math.floor(Math.log10((max - min) / 2));
    const step = [1, 2, 5, 10].map((m) => m * unit).find((m) => (max - min) / m <= 6);
    const even = [];
    for (let v = Math.ceil(min / step) * step; v <= max; v += step) even.push(+v.toPrecision(8));
    return even;
  }

  drawCheckpoints(u) {
    const { ctx, bbox } = u;
    const scale = devicePixelRatio, ink = this.owner.ink;
    ctx.save();
    ctx.setLineDash([]); // another run's may still be set
    for (const [step, best] of this.owner.shared.status.marks) {
      const x = u.valToPos(step, "x", true);
      if (x < bbox.left - 1 || x > bbox.left + bbox.width + 1) continue;
      const y = bbox.top + bbox.height;
      ctx.beginPath();
      ctx.lineWidth = 1.5 * scale;
      ctx.strokeStyle = best ? ink.text : ink.dim;
      ctx.fillStyle = best ? ink.text : ink.ground;
      const r = (best ? 5 : 3.5) * scale;
      if (best) {
        ctx.moveTo(x, y - r); ctx.lineTo(x + r, y); ctx.lineTo(x, y + r); ctx.lineTo(x - r, y); ctx.closePath();
      } else ctx.arc(x, y, r, 0, 2 * Math.PI);
      ctx.fill();
      ctx.stroke();
    }
    ctx.restore();
  }
}

class RatesChart extends Chart {
  constructor(owner, frame) {
    super(owner, frame, HEIGHT.rates);
    this.rate = new Steady(false, 0);
    this.norm = new Steady(false, 0);
  }

  show(curve) {
    this.set(ratesTable(curve));
  }

  options() {
    const ink = () => this.owner.ink;
    return {
      ...this.common(0),
      scales: {
        x: { time: false, range: () => this.owner.rangeX() },
        rate: { range: (u, low, high) => this.rate.range(low, high) },
        norm: { range: (u, low, high) => this.norm.range(low, high) },
      },
      axes: [
        this.steps(),
        this.axis({ scale: "rate", size: 56, stroke: () => ink().accent, values: (u, ticks) => ticks.map((t) => (t === 0 ? "0" : tiny(t))) }),
        this.axis({ scale: "norm", side: 1, size: 46, grid: { show: false }, values: (u, ticks) => ticks.map((t) => String(+t.toPrecision(4))) }),
      ],
      series: [
        {},
        { scale: "rate", stroke: () => ink().accent, width: 2, points: { show: false } },
        { scale: "norm", stroke: () => ink().dim, width: 1, points: { show: false } },
      ],
    };
  }
}
