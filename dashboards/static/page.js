// The page of one run. Everything it shows comes from `answer(address)`: the server's, or what a report carries along.
// Text of the run (prompts, names) enters the page as text nodes and attributes only, never as markup.

const carried = document.getElementById("answers") && JSON.parse(document.getElementById("answers").textContent);
const main = document.getElementById("main");
const SVG = new Set(["svg", "g", "path", "circle", "rect", "line", "text", "polyline", "defs", "pattern", "linearGradient", "stop"]);

// ---------------------------------------------------------------------------------------------- answers

class Refused extends Error {}

async function answer(address) {
  if (carried) {
    if (address in carried) return carried[address];
    throw new Refused("This report carries the confirmed candidates and the front; for the others open the dashboard.");
  }
  const response = await fetch(address);
  const told = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refused(told.detail ?? `The server answers ${response.status}.`);
  return told;
}

const link = (address) => (carried ? carried[address] : address); // of a picture or a file; undefined where not carried

// --------------------------------------------------------------------------------------------- elements

function el(tag, attributes = {}, ...children) {
  const node = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const signed = (x, digits = 1) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);
const times = (x) => `${x.toFixed(2)}×`;
const score = (x) => x.toPrecision(3); // scores are on scales of their own; what they differ comes in points
const range = (i) => (i.low === undefined ? "" : ` [${signed(i.low)}, ${signed(i.high)}]`);
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const title = (name) => name[0].toUpperCase() + name.slice(1);

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function choice(label, options, value, onchange) {
  const select = el("select", { "aria-label": label, onchange: () => onchange(select.value) },
    Object.entries(options).map(([key, text]) => el("option", { value: key, selected: key === value }, text)));
  return el("label", {}, `${label} `, select);
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + 1e-9; i++) found.push(+(i * step).toPrecision(10));
  return found;
}

function axis(low, high, from, to) {
  const scale = (x) => from + ((x - low) / (high - low)) * (to - from);
  return Object.assign(scale, { low, high });
}

// ----------------------------------------------------------------------------------------------- scatter

const view = {
  x: "speed", y: "alignment", trials: true, confirmed: true, anchors: true, infeasible: true, dropped: false, front: false, speed: 0, loss: 100,
};

const axes = (run) => ({
  speed: { label: "speed-up", long: "speed-up", unit: "×", tell: times },
  alignment: { label: `alignment, ${run.objectives.alignment}`, long: `alignment, ${run.objectives.alignment}, points`, unit: "points", tell: signed },
  quality: { label: `quality, ${run.objectives.quality}`, long: `quality, ${run.objectives.quality}, points`, unit: "points", tell: signed },
});

/** Every mark of the chart: a place on all three axes against the unmodified model, and how it is called. */
function marks(run) {
  const found = [], t = run.trials, base = run.baseline, held = new Set(run.confirmed.map((c) => c.slug));
  for (let i = 0; i < t.number.length; i++) {
    if (t.alignment[i] === null) continue;
    const at = { speed: base.latency / t.latency[i], alignment: t.alignment[i], quality: t.quality[i] };
    const unmodified = t.name[i] === "unmodified";
    const kind = unmodified ? "star" : t.anchor[i] ? "anchor" : !t.feasible[i] ? "infeasible" : t.dropped[i] ? "dropped" : "trial";
    const notes = [
      t.front[i] && "on the front", kind === "infeasible" && "infeasible: a constraint is broken", kind === "dropped" && "dropped on a few pictures",
    ].filter(Boolean);
    const told = `${times(at.speed)} speed, alignment ${signed(at.alignment)}, quality ${signed(at.quality)} points`;
    const label = `${title(t.name[i])}: ${[told, ...notes].join(", ")}`;
    found.push({ kind, slug: t.slug[i], name: t.name[i], at, front: t.front[i], label, seen: kind === "anchor" && held.has(t.slug[i]) });
  }
  for (const c of run.confirmed) {
    const [a, q] = [c.alignment, c.quality];
    const told = `${times(c.speedup)} speed, alignment ${signed(a.delta)}${range(a)}, quality ${signed(q.delta)}${range(q)} points`;
    const note = c.picks.length ? `, pick ${c.picks.join(" and ")}` : c.held ? ", held" : "";
    found.push({
      kind: "confirmed", anchor: c.anchor, slug: c.slug, name: c.name, picks: c.picks, front: true,
      at: { speed: c.speedup, alignment: a.delta, quality: q.delta },
      ends: { alignment: [a.low, a.high], quality: [q.low, q.high] },
      label: `${title(c.name)} on held-out prompts: ${told}${note}`,
    });
  }
  return found;
}

function visible(mark) {
  if (mark.kind === "star") return true;
  if (mark.at.speed < view.speed || Math.min(mark.at.alignment, mark.at.quality) < -view.loss) return false;
  if (view.front && !mark.front && ["trial", "dropped"].includes(mark.kind)) return false;
  if (mark.anchor || mark.kind === "anchor") return view.anchors && (mark.kind !== "confirmed" || view.confirmed);
  return view[mark.kind === "trial" ? "trials" : mark.kind];
}

const shape = {
  star: (x, y) => el("path", { d: `M${x},${y}` + [...Array(10)].map((_, i) => {
    const r = i % 2 ? 4.2 : 10, a = (Math.PI * i) / 5;
    return `${i ? "L" : "m0,-10M"}${(x + r * Math.sin(a)).toFixed(2)},${(y - r * Math.cos(a)).toFixed(2)}`;
  }).join("") + "Z" }),
  diamond: (x, y, r = 7) => el("path", { d: `M${x},${y - r}l${r},${r}l${-r},${r}l${-r},${-r}Z` }),
  circle: (x, y, r) => el("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r }),
};

function scatter(run, width, selected) {
  const height = clamp(width * 0.62, 300, 560), all = axes(run);
  const colour = ["speed", "alignment", "quality"].find((name) => name !== view.x && name !== view.y);
  const shown = marks(run).filter(visible);
  const margin = { left: 46, right: 20, top: 30, bottom: 40 };
  const scale = (name, from, to) => {
    const values = shown.flatMap((m) => [m.at[name], ...(m.ends?.[name] ?? [])]);
    const low = Math.min(...values), high = Math.max(...values), pad = Math.max(0.06 * (high - low), name === "speed" ? 0.02 : 0.5);
    return axis(low - pad, high + pad, from, to);
  };
  const x = scale(view.x, margin.left, width - margin.right), y = scale(view.y, height - margin.bottom, margin.top);
  const spread = shown.map((m) => m.at[colour]).sort((a, b) => a - b);
  const [dim, bright] = [0.05, 0.95].map((q) => spread[Math.floor(q * (spread.length - 1))]);
  const svg = el("svg", { width, height, role: "group", "aria-label": `${all[view.y].label} against ${all[view.x].label}` });

  const zero = { speed: 1, alignment: 0, quality: 0 };
  for (const t of ticks(x.low, x.high, width / 90))
    svg.append(el("line", { class: "gridline", x1: x(t), x2: x(t), y1: margin.top, y2: height - margin.bottom }),
      el("text", { x: x(t), y: height - margin.bottom + 17, "text-anchor": "middle" }, all[view.x].unit === "×" ? `${t}×` : String(t).replace("-", "−")));
  for (const t of ticks(y.low, y.high, height / 60))
    svg.append(el("line", { class: "gridline", x1: margin.left, x2: width - margin.right, y1: y(t), y2: y(t) }),
      el("text", { x: margin.left - 8, y: y(t) + 4, "text-anchor": "end" }, all[view.y].unit === "×" ? `${t}×` : String(t).replace("-", "−")));
  svg.append(
    el("line", { class: "zero", x1: x(zero[view.x]), x2: x(zero[view.x]), y1: margin.top, y2: height - margin.bottom }),
    el("line", { class: "zero", x1: margin.left, x2: width - margin.right, y1: y(zero[view.y]), y2: y(zero[view.y]) }),
    el("text", { x: width - margin.right, y: height - 6, "text-anchor": "end", class: "strong" }, `${all[view.x].long} →`),
    el("text", { x: 0, y: 14, class: "strong" }, `↑ ${all[view.y].long}${width > 480 ? " against the unmodified model" : ""}`));

  // the best of these two axes among what the search saw, as stairs
  let best = -Infinity;
  const stairs = [];
  const feasible = shown.filter((m) => m.kind === "star" || m.kind === "trial" || (m.kind === "anchor" && m.front));
  for (const m of [...feasible].sort((a, b) => b.at[view.x] - a.at[view.x] || b.at[view.y] - a.at[view.y])) {
    if (m.at[view.y] <= best) continue;
    stairs.push(`${x(m.at[view.x])},${y(Math.max(best, y.low))}`, `${x(m.at[view.x])},${y(m.at[view.y])}`);
    best = m.at[view.y];
  }
  svg.append(el("polyline", { class: "stair", points: stairs.slice(1).join(" ") }));

  const order = { dropped: 0, infeasible: 1, trial: 2, anchor: 3, confirmed: 4, star: 5 };
  const placed = [];
  for (const m of shown.sort((a, b) => order[a.kind] - order[b.kind] || a.front - b.front)) {
    const [px, py] = [x(m.at[view.x]), y(m.at[view.y])];
    if (m.ends?.[view.y]) svg.append(el("line", { class: "whisker", x1: px, x2: px, y1: y(m.ends[view.y][0]), y2: y(m.ends[view.y][1]) }));
    if (m.ends?.[view.x]) svg.append(el("line", { class: "whisker", y1: py, y2: py, x1: x(m.ends[view.x][0]), x2: x(m.ends[view.x][1]) }));
    const named = m.kind === "anchor" || m.anchor;
    const node = m.kind === "star" ? shape.star(px, py) : named ? shape.diamond(px, py, m.seen ? 4.5 : 7) : shape.circle(px, py, m.kind === "confirmed" ? 6.5 : m.front ? 5 : m.kind === "dropped" ? 3 : 4);
    const classes = ["point", m.kind, m.front && m.kind === "trial" && "front", m.anchor && "anchor", m.seen && "seen", m.slug === selected && "selected"];
    for (const [name, value] of Object.entries({
      class: classes.filter(Boolean).join(" "), role: "button", tabindex: 0, "aria-label": m.label, "data-key": `${m.kind}/${m.slug}`,
    })) node.setAttribute(name, value);
    node.style.setProperty("--t", clamp((m.at[colour] - dim) / (bright - dim || 1), 0, 1).toFixed(3));
    node.mark = m;
    svg.append(node);
    placed.push({ px, py, m });
  }
  names(svg, placed, width, height);
  const act = (event) => event.target.mark && (event.preventDefault(), open(event.target.mark.slug));
  svg.addEventListener("click", act);
  svg.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") act(event);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !event.target.mark) return;
    event.preventDefault();
    const row = [...svg.querySelectorAll(".point")].sort((a, b) => a.mark.at[view.x] - b.mark.at[view.x]);
    row[clamp(row.indexOf(event.target) + step, 0, row.length - 1)].focus();
  });
  return { svg, colour: all[colour], ends: [dim, bright] };
}

/** Names of anchors, picks and the unmodified model, each at the first free place around its mark. */
function names(svg, placed, width, height) {
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = "12px system-ui, sans-serif";
  const taken = placed.map(({ px, py, m }) => [px, py, ["trial", "infeasible", "dropped"].includes(m.kind) ? 5 : 7]).map(([px, py, r]) => [px - r, py - r, px + r, py + r]);
  const overlap = (a) => taken.reduce((sum, b) => sum + Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1])), 0);
  for (const { px, py, m } of placed) {
    const once = m.kind === "anchor" && (!m.seen || !view.confirmed);
    if (!(m.kind === "star" || once || m.anchor || m.picks?.length)) continue;
    const text = m.picks?.length ? `${m.picks.join(", ")} (${m.name})` : m.name, w = pen.measureText(text).width + 4;
    const places = [];
    for (const far of [12, 26, 42, 60])
      for (const [dx, dy] of [[1, 0], [-1, 0], [0.7, -0.8], [0.7, 0.8], [-0.7, -0.8], [-0.7, 0.8], [0, -1], [0, 1]]) {
        const left = px + dx * far - (dx < 0 ? w : dx ? 0 : w / 2), middle = py + dy * far;
        const box = [left, middle - 8, left + w, middle + 8];
        const outside = box[0] < 46 || box[2] > width || box[1] < 22 || box[3] > height - 40;
        places.push({ box, far, cost: overlap(box) + (outside ? 1e4 : 0) + far });
      }
    const { box, far } = places.reduce((a, b) => (b.cost < a.cost ? b : a));
    taken.push(box);
    const [cx, cy] = [clamp(px, box[0], box[2]), (box[1] + box[3]) / 2];
    if (far > 20) svg.append(el("line", { class: "leader", x1: px, y1: py, x2: cx, y2: cy }));
    svg.append(el("text", { class: "halo", x: box[0] + 2, y: cy + 4, "aria-hidden": true }, text));
  }
}

function overview(run, width, selected) {
  const redraw = (changes) => (Object.assign(view, changes), render());
  const named = Object.fromEntries(Object.entries(axes(run)).map(([key, a]) => [key, a.label]));
  const swap = (one, other) => (value) => redraw(view[other] === value ? { [one]: value, [other]: view[one] } : { [one]: value });
  const check = (key, label) => el("label", {}, el("input", { type: "checkbox", checked: view[key], onchange: () => redraw({ [key]: !view[key] }) }), ` ${label}`);
  const number = (key, before, after, step) => el("label", {}, `${before} `,
    el("input", { type: "number", value: view[key], step, min: 0, onchange: (e) => redraw({ [key]: Number(e.target.value) }) }), ` ${after}`);
  const { svg, colour, ends } = scatter(run, width, selected);
  const readout = el("p", { class: "readout soft", "aria-hidden": true }, "Point at a mark to read it; click or Enter opens it, ← → walk along.");
  const read = (event) => event.target.mark && (readout.textContent = event.target.mark.label);
  svg.addEventListener("pointerover", read);
  svg.addEventListener("focusin", read);
  const tiny = (...children) => el("svg", { width: 16, height: 16, "aria-hidden": true }, ...children);
  const ramp = el("svg", { width: 90, height: 10, "aria-hidden": true },
    el("defs", {}, el("linearGradient", { id: "ramp" }, el("stop", { offset: 0, class: "ramp-low" }), el("stop", { offset: 1, class: "ramp-high" }))),
    el("rect", { width: 90, height: 10, rx: 5, fill: "url(#ramp)" }));
  const legend = (node, text) => el("span", {}, node, text);
  const drawn = (node, classes) => (node.setAttribute("class", `point ${classes}`), node);
  return el("div", { class: "overview" },
    el("div", { class: "row" }, choice("Across", named, view.x, swap("x", "y")), choice("Up", named, view.y, swap("y", "x"))),
    el("div", { class: "row" }, check("trials", "trials"), check("confirmed", "confirmed"), check("anchors", "anchors"), check("infeasible", "infeasible"),
      check("dropped", "dropped early"), check("front", "front only"), number("speed", "at least", "× fast", 0.1), number("loss", "losing at most", "points", 0.5)),
    el("a", { class: "hidden-until-focus", href: "#candidates", onclick: (e) => (e.preventDefault(), document.getElementById("candidates").focus()) }, "Skip the chart"),
    svg,
    readout,
    el("div", { class: "legend" },
      legend(ramp, `${colour.label}: ${colour.tell(ends[0])} to ${colour.tell(ends[1])}${colour.unit === "points" ? " points" : ""}`),
      legend(tiny(drawn(shape.circle(8, 8, 5), "trial front")), "on the front of all three"),
      legend(tiny(drawn(shape.circle(8, 8, 6), "confirmed"), el("line", { class: "whisker", x1: 8, x2: 8, y1: 0, y2: 16 })), "confirmed on held-out prompts, with interval"),
      legend(tiny(drawn(shape.diamond(8, 8), "anchor")), "anchor"),
      legend(tiny(drawn(shape.circle(8, 8, 4), "infeasible")), "infeasible"),
      legend(tiny(drawn(shape.circle(8, 8, 3), "dropped")), "dropped on a few pictures, so a guess")),
    candidates(run, selected));
}

function candidates(run, selected) {
  const held = run.confirmed.length > 0;
  const rows = held ? run.confirmed.map((c) => ({ ...c, speed: c.speedup, a: signed(c.alignment.delta) + range(c.alignment), q: signed(c.quality.delta) + range(c.quality) }))
    : marks(run).filter((m) => m.front && m.kind !== "star").map((m) => ({ slug: m.slug, name: m.name, speed: m.at.speed, a: signed(m.at.alignment), q: signed(m.at.quality) }));
  rows.sort((a, b) => b.speed - a.speed);
  if (!rows.length) return el("div", { id: "candidates", tabindex: -1 });
  return el("div", { id: "candidates", tabindex: -1 },
    el("h3", {}, held ? "Confirmed on held-out prompts" : "Front, as the search saw it"),
    el("p", { class: "note" }, held
      ? `Differences to the unmodified model in points over ${run.confirmed[0].n} pictures of new seeds, with ${(100 * run.level).toFixed(1)} % intervals. Held: alignment can have lost at most ${run.margins[0].toFixed(1)} points, quality ${run.margins[1].toFixed(1)}.`
      : "Differences to the unmodified model in points. The best of many is partly luck: confirm measures it again on held-out prompts."),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Candidates" }, el("table", {},
      el("thead", {}, el("tr", {}, ["candidate", "speed-up", "alignment", "quality", ...(held ? ["held"] : [])].map((name, i) => el("th", { scope: "col", class: i && i < 4 && "number" }, name)))),
      el("tbody", {}, rows.slice(0, 60).map((r) => el("tr", { "aria-current": r.slug === selected && "true" },
        el("th", { scope: "row" }, el("a", { href: `#front/${r.slug}` }, r.name), r.picks?.map((pick) => el("span", { class: "badge" }, pick))),
        el("td", { class: "number" }, times(r.speed)), el("td", { class: "number" }, r.a), el("td", { class: "number" }, r.q),
        held && el("td", {}, r.held ? "yes" : "no")))))));
}

// ----------------------------------------------------------------------------------------------- a policy

const open = (slug) => (location.hash = `#front/${slug}`);

async function panel(run, slugs, width) {
  const shown = await Promise.all(slugs.map((slug) => answer(`api/candidates/${slug}`)));
  const column = width / (shown.length > 1 && width >= 760 ? 2 : 1) - (shown.length > 1 ? 18 : 0);
  const others = Object.fromEntries([["", "nothing"], ...run.confirmed.map((c) => [c.slug, c.name])].filter(([slug]) => slug !== slugs[0]));
  return el("section", { class: "panel", "aria-label": "Policy" },
    el("div", { class: "row" }, el("a", { href: "#front" }, "Close"), run.confirmed.length > 0 &&
      choice("Compare with", others, slugs[1] ?? "", (slug) => (location.hash = `#front/${slugs[0]}${slug && `/${slug}`}`))),
    el("div", { class: `columns ${shown.length > 1 ? "two" : ""}` }, shown.map((one) => head(one, run, column))),
    el("h3", {}, "What it gains and gives up"), metrics(shown, run, width),
    el("h3", {}, "By kind of prompt"),
    el("div", { class: `columns ${shown.length > 1 ? "two" : ""}` }, shown.map((one) => kinds(one, run, column, shown.length > 1))),
    el("h3", {}, "Pictures, same prompt and seed"), gallery(shown, run));
}

function head(one, run, width) {
  const [alignment, quality] = one.metrics;
  const speed = one.speedup && `${times(one.speedup)} ${one.speedup < 1 ? "the speed" : "as fast"}`;
  const where = one.confirmed ? `on ${alignment.n} held-out pictures of new seeds` : "on the search prompts alone: the best of many is partly luck, and this one was not confirmed";
  const change = alignment.delta === undefined ? "" : `; alignment ${signed(alignment.delta)}${range(alignment)}, quality ${signed(quality.delta)}${range(quality)} points`;
  const code = el("pre", { tabindex: 0, "aria-label": "Code that applies the policy" }, one.code ?? "");
  const map = el("div", {}, el("p", { class: "note" }, "Laying out the policy …"));
  answer(`api/plans/${one.slug}`).then((plan) => map.replaceChildren(...layout(plan, width)), (error) => map.replaceChildren(el("p", { class: "note" }, error.message)));
  return el("div", { class: "policy" },
    el("h2", { tabindex: -1 }, title(one.name), one.picks.map((pick) => el("span", { class: "badge" }, pick)), one.held && !one.picks.length && el("span", { class: "badge" }, "held")),
    el("p", { class: "lead" }, `${speed ?? "Speed unknown"}${change}; ${where}.`),
    el("p", { class: "note" }, [`${one.steps} steps`, one.guidance && `guidance ${one.guidance}`, one.predicted && one.confirmed && `${times(one.predicted)} was predicted`, one.seconds && `${one.seconds.toFixed(3)} s a batch`].filter(Boolean).join(", ")),
    one.best_of.map((told) => el("p", { class: "note" }, `The best of ${told.count} pictures by ${told.by}, all drawn and scored ${times(told.speedup)} as fast as one of the unmodified model: ${
      one.metrics.filter(({ name }) => name in told).map(({ name }) => `${name} ${told[name].replaceAll("-", "−")}`).join(", ")}.`)),
    one.code
      ? el("div", { class: "row" }, one.files.map((file, i) => link(`policies/${file}.json`) &&
        el("a", { class: i ? "button" : "button main", href: link(`policies/${file}.json`), download: `${file}.json` }, `Download ${file}.json`)), copy(code))
      : el("p", { class: "note" }, "No rules: the unmodified model, so there is no file to apply."),
    one.code && code,
    el("h3", {}, "What each block does at each step"), map);
}

function copy(code) {
  const button = el("button", { type: "button", "aria-live": "polite", onclick: async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // no clipboard without https: the lines are selected instead
      button.textContent = "Selected: press Ctrl C";
    }
  } }, "Copy the five lines");
  return button;
}

/** A box about the same middle, its sides so much shorter. */
const shrunk = ({ x, y, width, height }, side) => ({ x: x + (width * (1 - side)) / 2, y: y + (height * (1 - side)) / 2, width: width * side, height: height * side });

/** A grid that is one stop of the Tab key: arrows walk over its cells, and what a cell says is read out below. */
function grid(rows, columns, width, describe, { gaps = [], axes: [down, across], label, names: rowNames }) {
  const left = rowNames ? Math.max(...rowNames.map((n) => n.length)) * 6.6 + 12 : 34, foot = 34;
  const w = clamp((width - left - 2) / columns, 4, 30), h = rowNames ? 22 : clamp(360 / rows, 7, 20);
  const top = (r) => 4 + r * h + gaps.filter((g) => g.name && g.first <= r).length * 14;
  const svg = el("svg", { width: left + w * columns, height: top(rows - 1) + h + foot, role: "group", "aria-label": label }, textures(label));
  const readout = el("p", { class: "readout soft", "aria-hidden": true }, "Point at a cell to read it, or walk with the arrow keys.");
  const cells = [];
  for (let r = 0; r < rows; r++)
    for (let c = 0; c < columns; c++) {
      const { text, classes, t, overlays = [], dot, side = 1 } = describe(r, c);
      const box = { x: left + c * w, y: top(r), width: w, height: h };
      const cell = el("rect", { ...shrunk(box, side), class: `cell ${classes}`, role: "img", tabindex: cells.length ? -1 : 0, "aria-label": text, "--t": t });
      Object.assign(cell, { read: text, at: [r, c] });
      cells.push(cell);
      svg.append(cell, ...overlays.map((name) => el("rect", { ...box, class: "texture", fill: `url(#${CSS.escape(label)}-${name})` })));
      if (dot) svg.append(el("circle", { class: "sure", cx: box.x + w / 2, cy: box.y + h / 2, r: 2.4 }));
    }
  const every = Math.ceil(26 / w), tall = Math.ceil(13 / h);
  for (let c = 0; c < columns; c += every) svg.append(el("text", { x: left + (c + 0.5) * w, y: top(rows - 1) + h + 14, "text-anchor": "middle" }, c));
  for (let r = 0; r < rows; r += rowNames ? 1 : tall)
    svg.append(el("text", { x: left - 6, y: top(r) + h / 2 + 4, "text-anchor": "end" }, rowNames ? rowNames[r] : r));
  for (const g of gaps) if (g.name) svg.append(el("text", { x: left, y: top(g.first) - 3, class: "strong" }, g.name));
  svg.append(el("text", { x: left + w * columns, y: top(rows - 1) + h + 29, "text-anchor": "end" }, `${across} →`), el("text", { x: 0, y: top(rows - 1) + h + 29 }, `${down} ↓`));
  const read = (event) => event.target.read && (readout.textContent = event.target.read);
  svg.addEventListener("pointerover", read);
  svg.addEventListener("focusin", read);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!step || !event.target.at) return;
    event.preventDefault();
    const [r, c] = [clamp(event.target.at[0] + step[0], 0, rows - 1), clamp(event.target.at[1] + step[1], 0, columns - 1)];
    event.target.setAttribute("tabindex", -1);
    cells[r * columns + c].setAttribute("tabindex", 0);
    cells[r * columns + c].focus();
  });
  return [el("div", { class: "scroll" }, svg), readout];
}

function textures(id) {
  const pattern = (name, size, angle, ...children) => el("pattern", { id: `${id}-${name}`, width: size, height: size, patternUnits: "userSpaceOnUse", patternTransform: `rotate(${angle})` }, ...children);
  return el("defs", {},
    pattern("skip", 5, 45, el("line", { class: "paper-lines", x1: 0, x2: 0, y1: 0, y2: 5 })),
    pattern("reuse", 5, 0, el("circle", { class: "ink-dots", cx: 2.5, cy: 2.5, r: 1 })),
    pattern("heard", 4, 0, el("line", { class: "heard-lines", x1: 0, x2: 4, y1: 2, y2: 2 })));
}

function layout(plan, width) {
  const words = { c: "computes", s: "is skipped", r: "reuses its last residual" }, kinds = { c: "compute", s: "skip", r: "reuse" };
  const parts = [];
  for (const one of plan.branches) {
    if (plan.branches.length > 1) parts.push(el("h4", {}, `${one.branch}itional rows`));
    const shade = (scale) => clamp(0.25 + (0.75 * Math.abs(Math.log(scale || 0.01))) / Math.log(2), 0, 1).toFixed(3);
    const describe = (block, step) => {
      const kind = one.kinds[block][step], heard = one.heard[one.scales[block][step] - 1];
      const classes = heard && kind === "c" ? "heard" : kinds[kind];
      const overlays = [kind !== "c" && kinds[kind], heard && "heard"].filter(Boolean);
      return { text: `Block ${block}, step ${step}: ${words[kind]}${heard ? `, ${heard.label}` : ""}`, classes, t: heard && shade(heard.scale), overlays };
    };
    const c = one.counts, total = c.computed + c.skipped + c.reused;
    parts.push(...grid(plan.blocks, plan.steps, width, describe, {
      gaps: plan.bands, axes: ["block", "step"], label: `map-${one.branch}-${Math.random().toString(36).slice(2, 8)}`,
    }), key(one, plan), el("p", { class: "note" }, `Of ${total} block calls ${c.computed} compute, ${c.reused} reuse, ${c.skipped} skip; ${c.scaled} hear the text at another loudness.`));
  }
  if (plan.rules.length) parts.push(el("ul", { class: "rules" }, plan.rules.map((rule) => el("li", {}, rule))));
  return parts;
}

function key(one, plan) {
  const id = `key-${Math.random().toString(36).slice(2, 8)}`;
  const patch = (classes, texture, t) => el("svg", { width: 22, height: 14, "aria-hidden": true }, textures(id),
    el("rect", { width: 22, height: 14, class: `cell ${classes}`, "--t": t }), texture && el("rect", { width: 22, height: 14, class: "texture", fill: `url(#${id}-${texture})` }));
  const c = one.counts;
  return el("div", { class: "legend" },
    el("span", {}, patch("compute"), "compute"), c.reused > 0 && el("span", {}, patch("reuse", "reuse"), "reuse"), c.skipped > 0 && el("span", {}, patch("skip", "skip"), "skip"),
    c.scaled > 0 && el("span", {}, patch("heard", "heard", 0.45), patch("heard", "heard", 1), "text scaled, stronger is darker"),
    plan.bands.length > 1 && el("span", {}, plan.bands.map((b) => `${b.name} ${b.first} to ${b.first + b.count - 1}`).join(", ")));
}

function whisker(i, domain, width = 150) {
  const x = axis(-domain, domain, 4, width - 4);
  return el("svg", { width, height: 16, "aria-hidden": true }, el("line", { class: "zero", x1: x(0), x2: x(0), y1: 0, y2: 16 }),
    i.low !== undefined && el("line", { class: "whisker", x1: x(i.low), x2: x(i.high), y1: 8, y2: 8 }),
    el("circle", { class: "bar", cx: x(i.delta), cy: 8, r: 4 }));
}

function metrics(shown, run, width) {
  const measured = shown.flatMap((one) => one.metrics).filter((m) => !m.fidelity && m.delta !== undefined);
  const domain = Math.max(1, ...measured.flatMap((m) => [m.low, m.high].map(Math.abs)));
  const role = { [run.objectives.alignment]: "alignment", [run.objectives.quality]: "quality" };
  const widths = shown[0].metrics.filter((m) => !m.fidelity && (m.scale ?? 1) !== 1).map((m) => `; 100 points of ${m.name} are ${m.scale}`).join("");
  const two = shown.length > 1;
  const cells = (m) => {
    if (m.value === undefined) return [el("td", { colspan: two ? 1 : 4 }, "too few prompts for an interval")];
    if (m.fidelity) return [!two && el("td", {}), el("td", { class: "number" }, m.value.toFixed(m.name === "psnr" ? 1 : 3) + (m.name === "psnr" ? " dB" : "")), el("td", { class: "soft", colspan: two ? 1 : 2 }, "likeness to the unmodified picture")];
    return [!two && el("td", { class: "number" }, score(m.baseline)), el("td", { class: "number" }, score(m.value)),
      el("td", { class: "number" }, `${signed(m.delta)}${range(m)}`), (!two || width > 900) && el("td", {}, whisker(m, domain))];
  };
  const heads = two ? shown.flatMap((one) => [title(one.name), "points", ...(width > 900 ? [""] : [])]) : ["unmodified", "policy", "points", ""];
  const levels = [...new Set(shown.map((one) => (one.confirmed ? `${(100 * one.metrics[0].level).toFixed(1)} % intervals, 95 % for all confirmed together` : "95 % intervals")))];
  return el("div", {}, el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Metrics" }, el("table", {},
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "evaluator"), heads.map((name) => el("th", { scope: "col", class: name && "number" }, name)))),
    el("tbody", {}, shown[0].metrics.map((m, i) => el("tr", {}, el("th", { scope: "row" }, m.name, role[m.name] && m.name !== role[m.name] && el("span", { class: "soft" }, ` ${role[m.name]}`)), shown.map((one) => cells(one.metrics[i]))))))),
  el("p", { class: "note" }, `Differences in points (hundredths of the score${widths}), paired by prompt and seed; ${levels.join("; ")}.`));
}

function kinds(one, run, width, named) {
  const roles = ["alignment", "quality"], label = 118, room = Math.max(80, (width - label - 24) / 2), h = 24;
  const domain = Math.max(1, ...one.kinds.flatMap((k) => roles.flatMap((r) => [k[r].low ?? k[r].delta, k[r].high ?? k[r].delta].map(Math.abs))));
  const told = one.kinds.map((k) => `${k.kind}: alignment ${signed(k.alignment.delta)}${range(k.alignment)}, quality ${signed(k.quality.delta)}${range(k.quality)} points over ${k.n} pictures`);
  const svg = el("svg", { width: label + 2 * room + 20, height: one.kinds.length * h + 44, role: "img", "aria-label": told.join("; ") });
  roles.forEach((role, i) => {
    const x = axis(-domain, domain, label + i * (room + 20), label + i * (room + 20) + room), foot = one.kinds.length * h + 22;
    svg.append(el("text", { x: x(0), y: 12, "text-anchor": "middle", class: "strong" }, role), el("line", { class: "zero", x1: x(0), x2: x(0), y1: 18, y2: foot }));
    for (const t of ticks(-domain, domain, room / 52)) svg.append(el("text", { x: x(t), y: foot + 15, "text-anchor": "middle" }, t ? signed(t, 0) : "0"));
    one.kinds.forEach((k, row) => {
      const y = 20 + row * h, v = k[role].delta;
      svg.append(el("rect", { class: `bar ${v < 0 ? "down" : ""}`, x: Math.min(x(0), x(v)), width: Math.abs(x(v) - x(0)), y: y + 5, height: h - 10, rx: 2 }));
      if (k[role].low !== undefined) svg.append(el("line", { class: "whisker", x1: x(k[role].low), x2: x(k[role].high), y1: y + h / 2, y2: y + h / 2 }));
    });
  });
  one.kinds.forEach((k, row) => svg.append(el("text", { x: 0, y: 20 + row * h + h / 2 + 4 }, k.kind.replaceAll("_", " "))));
  return el("div", {}, named && el("p", { class: "note" }, title(one.name)), svg, el("p", { class: "note" }, "Points against the unmodified model; 95 % intervals, not corrected for the number of kinds."));
}

// ---------------------------------------------------------------------------------------------- pictures

function gallery(shown, run) {
  const state = { by: "alignment", kind: "", order: "ends", count: 6 }, [one, other] = shown, box = el("div", {});
  const without = shown.find((o) => o.pictures.count === 0);
  if (without) return el("p", {}, `Pictures are kept for confirmed candidates alone; ${without.name} has its scores only.`);
  if (other && one.pictures.before !== other.pictures.before) return el("p", {}, "These two were measured on different prompts.");
  const p = one.pairs, q = other?.pairs;
  const gain = (i) => (q ? q[`${state.by}_after`][i] - p[`${state.by}_after`][i] : p[`${state.by}_after`][i] - p[`${state.by}_before`][i]);
  const all = [...Array(Math.min(...shown.map((o) => o.pictures.count))).keys()].filter((i) => shown.every((o) => link(`pictures/${o.pictures.after}/${i}.png`)));
  const draw = () => {
    const rows = all.filter((i) => !state.kind || p.kind[i] === state.kind).sort((a, b) => gain(a) - gain(b) || a - b);
    const lost = rows.filter((i) => gain(i) < 0).slice(0, state.count), won = rows.filter((i) => gain(i) > 0).reverse().slice(0, state.count);
    const grid = (list) => el("div", { class: other ? "pairs triple" : "pairs" }, list.map((i) => (other ? triple(one, other, i) : pair(one, i, state.by))));
    const [worse, better] = other ? [`${title(one.name)} is better`, `${title(other.name)} is better`] : [`Lost most ${state.by}`, `Gained most ${state.by}`];
    box.replaceChildren(...(state.order === "ends"
      ? [[worse, lost], [better, won]].flatMap(([text, list]) => (list.length ? [el("p", { class: "note" }, `${text}, ${list.length} of ${all.length} kept pictures`), grid(list)] : [el("p", { class: "note" }, `${text}: none.`)]))
      : [grid({ worst: rows, best: rows.reverse(), file: [...rows].sort((a, b) => a - b) }[state.order])]));
  };
  const set = (name) => (value) => ((state[name] = value), draw());
  draw();
  return el("div", {}, el("div", { class: "row" },
    choice("Show", { ends: "worst and best", worst: "all, worst first", best: "all, best first", file: "all, in order" }, state.order, set("order")),
    choice("by", { alignment: "alignment", quality: "quality" }, state.by, set("by")),
    choice("of", { "": "every kind", ...Object.fromEntries([...new Set(p.kind)].map((k) => [k, k.replaceAll("_", " ")])) }, "", set("kind"))),
  !other && el("label", { class: "row note" }, "unmodified left of the line", el("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": "Move the line of every picture", oninput: (e) => {
    for (const input of box.querySelectorAll("input")) (input.value = e.target.value), input.dispatchEvent(new Event("input"));
  } }), `${one.name} right of it; drag here for all, or on a picture`), box);
}

function image(address, alt, classes = "") {
  return el("img", { src: link(address), alt, loading: "lazy", class: classes, onload: (e) => e.target.classList.toggle("pixels", e.target.naturalWidth <= 128) });
}

function caption(o, i) {
  const p = o.pairs;
  return el("figcaption", {}, el("b", {}, p.prompt[i]), `${p.kind[i].replaceAll("_", " ")}, seed ${p.seed[i]}`);
}

function pair(one, i, by) {
  const p = one.pairs;
  const wipe = el("div", { class: "wipe" }, image(`pictures/${one.pictures.before}/${i}.png`, `Unmodified model: ${p.prompt[i]}`),
    image(`pictures/${one.pictures.after}/${i}.png`, `${title(one.name)}: ${p.prompt[i]}`, "after"),
    el("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": `Unmodified model up to here, ${one.name} beyond: ${p.prompt[i]}`, oninput: (e) => wipe.style.setProperty("--cut", `${e.target.value}%`) }));
  const scores = `${by} ${score(p[`${by}_before`][i])} → ${score(p[`${by}_after`][i])}`;
  const note = caption(one, i);
  note.append(el("br"), scores);
  return el("figure", { class: "pair" }, wipe, note);
}

function triple(one, other, i) {
  const side = (address, name, told) => el("div", {}, image(address, `${name}: ${one.pairs.prompt[i]}`), `${name} ${told}`);
  return el("figure", { class: "pair" }, el("div", { class: "three" },
    side(`pictures/${one.pictures.before}/${i}.png`, "unmodified", score(one.pairs.alignment_before[i])),
    side(`pictures/${one.pictures.after}/${i}.png`, one.name, score(one.pairs.alignment_after[i])),
    side(`pictures/${other.pictures.after}/${i}.png`, other.name, score(other.pairs.alignment_after[i]))), caption(one, i));
}

// ----------------------------------------------------------------------------------------- search and probe

function searching(run, width) {
  const s = run.search, failures = new Map();
  run.trials.reason.forEach((reason, i) => reason && failures.set(reason, [...(failures.get(reason) ?? []), run.trials.number[i]]));
  const facts = {
    Trials: `${s.complete} complete, ${s.failed} failed, ${s.running} running, ${s.wanted} wanted`,
    "Time left": s.left === null ? null : `about ${duration(s.left)}, at ${duration(s.pace)} a trial lately`,
    "Last trial": s.last && new Date(1000 * s.last).toLocaleString(),
    Pictures: `${s.images} a trial`,
    Sampler: s.sampler,
    Device: s.device && `${s.device}, ${s.dtype}`,
  };
  return el("section", { "aria-label": "Search" }, el("h2", {}, "Search"),
    el("dl", {}, Object.entries(facts).filter(([, text]) => text).flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)])),
    s.workers.length > 0 && [el("h3", {}, "Workers"), workers(s, run.state === "searching"), el("p", { class: "note" }, "Load: the share of the last trials' time that a worker was measuring.")],
    run.hypervolume && el("h3", {}, "Hypervolume against pictures spent"),
    run.hypervolume && history(run.hypervolume, Math.min(width, 900)),
    run.hypervolume && el("p", { class: "note" }, "What the front commands beyond ten points less alignment and quality than the unmodified model, in point × point × share of time saved, as the search saw it."),
    el("h3", {}, "Failures"),
    failures.size === 0 ? el("p", {}, "None with a reason.") : el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "reason"), el("th", { scope: "col" }, "trials"))),
      el("tbody", {}, [...failures].map(([reason, numbers]) => el("tr", {}, el("td", { class: "wrap" }, reason), el("td", { class: "wrap" }, numbers.slice(0, 12).join(", ") + (numbers.length > 12 ? ` and ${numbers.length - 12} more` : "")))))));
}

function workers(s, live) {
  const bar = (load) => el("svg", { width: 120, height: 10, "aria-hidden": true }, el("rect", { class: "compute", width: 120, height: 10, rx: 5 }), el("rect", { class: "bar", width: 120 * load, height: 10, rx: 5 }));
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Workers" }, el("table", { class: "narrow" },
    el("thead", {}, el("tr", {}, ["worker", "trials", "load", "", live && "now"].filter((name) => name !== false).map((name, i) => el("th", { scope: "col", class: (i === 1 || i === 2) && "number" }, name)))),
    el("tbody", {}, s.workers.map((w) => el("tr", {}, el("th", { scope: "row" }, w.worker), el("td", { class: "number" }, w.trials),
      el("td", { class: "number" }, w.load === null ? "" : `${Math.round(100 * w.load)} %`), el("td", {}, w.load !== null && bar(w.load)),
      live && el("td", {}, w.now === null ? "waits" : `trial ${w.now}`))))));
}

function history(h, width) {
  const height = 240, top = Math.max(...h.value) || 1, last = h.images.at(-1) || 1;
  const x = axis(0, last, 46, width - 16), y = axis(0, top * 1.08, height - 38, 12), path = [];
  h.images.forEach((n, i) => path.push(`${x(n).toFixed(1)},${y(h.value[Math.max(0, i - 1)]).toFixed(1)}`, `${x(n).toFixed(1)},${y(h.value[i]).toFixed(1)}`));
  return el("svg", { width, height, role: "img", "aria-label": `Hypervolume ${h.value.at(-1)} after ${last} pictures` },
    ticks(0, top * 1.08, 5).flatMap((t) => [el("line", { class: "gridline", x1: 46, x2: width - 16, y1: y(t), y2: y(t) }), el("text", { x: 38, y: y(t) + 4, "text-anchor": "end" }, String(t))]),
    ticks(0, last, width / 120).map((t) => el("text", { x: x(t), y: height - 20, "text-anchor": "middle" }, t.toLocaleString("en"))),
    el("text", { x: width - 16, y: height - 3, "text-anchor": "end", class: "strong" }, "pictures →"), el("polyline", { class: "stair history", points: path.join(" ") }));
}

async function probing(width) {
  const p = await answer("api/probe"), windows = new Set(p.window), effect = (i) => p.effect[i] + (windows.size > 1 ? `, ${p.window[i]}` : "");
  const pictures = {};
  p.kind.forEach((kind, i) => (pictures[kind] = Math.max(pictures[kind] ?? 0, p.n[i])));
  const part = (i) => p.n[i] / pictures[p.kind[i]]; // fewer pictures tell less, and must not be the loudest
  const most = Math.max(...p.delta.map((d, i) => Math.abs(d ?? 0) * Math.sqrt(part(i)))) || 1, blocks = Math.max(...p.block) + 1;
  const rows = [...new Set(p.block.map((_, i) => effect(i)))], kinds = [...new Set(p.kind)];
  const across = clamp(Math.floor(width / 560), 1, Math.min(3, kinds.length)), column = (width - 44 * (across - 1)) / across;
  const patch = (classes, t, side = 1) => el("svg", { width: 22, height: 14, "aria-hidden": true }, el("rect", { ...shrunk({ x: 0, y: 0, width: 22, height: 14 }, side), class: `cell ${classes}`, "--t": t }));
  return el("section", { "aria-label": "Probe" }, el("h2", {}, "Probe"),
    el("p", {}, "Each block by itself: how much alignment changes when it alone is acted on, per kind of prompt. Focus a map and walk with the arrow keys."),
    el("div", { class: "legend" },
      el("span", {}, patch("gain", 0.3), patch("gain", 0.65), patch("gain", 1), "gain"), el("span", {}, patch("loss", 0.3), patch("loss", 0.65), patch("loss", 1), "loss"),
      el("span", {}, `up to ${most.toFixed(0)} points, shaded by the root`),
      el("span", {}, el("svg", { width: 10, height: 14, "aria-hidden": true }, el("circle", { class: "sure", cx: 5, cy: 7, r: 2.4 })), "the 95 % interval leaves out zero"),
      p.n.some((_, i) => part(i) < 1) && el("span", {}, patch("loss", 0.65, 0.4), "small: of fewer pictures"),
      el("span", {}, patch("unmeasured"), "not measured")),
    el("div", { class: "maps", "--across": across }, kinds.map((kind) => {
      const at = new Map();
      p.kind.forEach((k, i) => k === kind && at.set(`${effect(i)}/${p.block[i]}`, i));
      const describe = (r, block) => {
        const i = at.get(`${rows[r]}/${block}`), d = i === undefined ? null : p.delta[i];
        if (d === null) return { text: `Block ${block}, ${rows[r]}: not measured`, classes: "unmeasured" };
        const ends = p.low[i] === null ? "" : ` [${signed(p.low[i])}, ${signed(p.high[i])}]`;
        const on = part(i) < 1 ? ` on ${p.n[i]} of ${pictures[kind]} pictures` : "";
        return { text: `Block ${block}, ${rows[r]}: ${signed(d)}${ends} points${on}`, classes: d < 0 ? "loss" : "gain", t: Math.sqrt(Math.min(1, Math.abs(d) / most)).toFixed(3), side: Math.sqrt(part(i)), dot: p.low[i] > 0 || (p.high[i] !== null && p.high[i] < 0) };
      };
      return el("div", {}, el("h3", {}, title(String(kind).replaceAll("_", " "))), grid(rows.length, blocks, column, describe, { axes: ["effect", "block"], label: `probe-${kind}`, names: rows }));
    })));
}

// ------------------------------------------------------------------------------------------ routes and life

let run = null, tag = null, drawn = 0, shownPanel = null;

async function render() {
  if (!run) return;
  const turn = ++drawn, [asked, ...slugs] = location.hash.slice(1).split("/").filter(Boolean).map(decodeURIComponent);
  const tab = ["search", "probe"].includes(asked) ? asked : "front";
  document.getElementById("name").textContent = run.name;
  document.getElementById("sentence").textContent = run.sentence;
  document.title = `${slugs.length ? `${slugs.join(" and ")} · ` : ""}${run.name} · blocktune`;
  document.getElementById("to-probe").hidden = !run.probe;
  for (const name of ["front", "probe", "search"]) {
    const to = document.getElementById(`to-${name}`);
    if (name === tab) to.setAttribute("aria-current", "page");
    else to.removeAttribute("aria-current");
  }
  const focused = document.activeElement?.dataset?.key, scrolled = document.querySelector(".overview")?.scrollTop ?? 0, width = main.clientWidth;
  if (!run.trials || (tab === "front" && !run.baseline)) return main.replaceChildren();
  try {
    if (tab === "search") return void main.replaceChildren(searching(run, width));
    if (tab === "probe") {
      if (!main.querySelector('[aria-label="Probe"]')) main.replaceChildren(el("p", { class: "note" }, "Reading the probe …"));
      const drawing = await probing(width);
      return void (turn === drawn && main.replaceChildren(drawing));
    }
    const wide = innerWidth >= 1180 && slugs.length > 0, share = slugs.length > 1 ? 6 / 17 : 10 / 21;
    const left = wide ? Math.floor((width - 44) * share) - 8 : width, right = wide ? Math.floor((width - 44) * (1 - share)) : width;
    const key = JSON.stringify([slugs, right, slugs.map((slug) => run.confirmed.find((c) => c.slug === slug))]);
    if (slugs.length && shownPanel?.key !== key) {
      const node = await panel(run, slugs.slice(0, 2), right).catch((error) => {
        if (!(error instanceof Refused)) throw error;
        return el("section", { class: "panel" }, el("div", { class: "row" }, el("a", { href: "#front" }, "Close")), el("h2", { tabindex: -1 }, title(slugs[0])), el("p", {}, error.message));
      });
      if (turn !== drawn) return;
      shownPanel = { key, node, fresh: shownPanel?.slug !== slugs.join("/"), slug: slugs.join("/") };
    }
    main.replaceChildren(el("div", { class: `split ${slugs.length ? "open" : ""} ${slugs.length > 1 ? "two" : ""}` }, overview(run, left, slugs[0]), slugs.length > 0 && shownPanel.node));
    main.querySelector(".overview").scrollTop = scrolled;
    if (focused) [...main.querySelectorAll("[data-key]")].find((node) => node.dataset.key === focused)?.focus({ preventScroll: true });
    if (slugs.length && shownPanel.fresh) {
      shownPanel.fresh = false;
      shownPanel.node.querySelector("h2").focus({ preventScroll: wide });
    }
  } catch (error) {
    if (!(error instanceof Refused || error instanceof TypeError)) throw error;
    main.replaceChildren(el("p", {}, error.message));
  }
}

async function refresh() {
  try {
    const response = await fetch("api/run");
    if (response.headers.get("ETag") !== tag) {
      run = await response.json();
      tag = response.headers.get("ETag");
      await render();
    }
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    tag = null;
    document.getElementById("sentence").textContent = "The server of this page does not answer; shown is what it told last.";
  }
  setTimeout(refresh, document.hidden ? 10000 : 2000);
}

addEventListener("hashchange", () => {
  if (!location.hash.startsWith("#front/")) shownPanel = null;
  render();
});
let resizing;
addEventListener("resize", () => (clearTimeout(resizing), (resizing = setTimeout(render, 120))));

if (carried) {
  run = carried["api/run"];
  render();
} else refresh();
