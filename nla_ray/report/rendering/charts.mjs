// Elements, scales and charts as inline SVG. Knows nothing of reports: a chart is data that page.py
// embeds. Colours come from CSS: a tone is a class that sets --tone, with a dash and a mark of its
// own, so that no series is told from another by colour alone.

const SVG = "http://www.w3.org/2000/svg";

export const fill = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value != null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child != null && child !== false));
  return node;
};
export const element = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
export const shape = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

// Numbers and scales ------------------------------------------------------------------------------

/** Three digits after the point; of ten and more one; no negative zero: as content.py. */
export const format = (value) => {
  if (value == null) return "–";
  if (Math.abs(value) >= 10) return value.toFixed(1);
  const written = value.toFixed(3);
  return written === "-0.000" ? "0.000" : written;
};
export const formatInterval = ({ low, high }) => `[${format(low)}, ${format(high)}]`;
export const formatTick = (value) => String(Number(value.toPrecision(4)));
export const counted = (count) => (count ?? 0).toLocaleString("en");
export const spaced = (name) => name.replaceAll("_", " ");

/** Least and most of the finite values, with a margin; of one value some space around it. */
export function extent(values, margin = 0) {
  const finite = values.filter(Number.isFinite);
  if (!finite.length) return [0, 1];
  const low = Math.min(...finite);
  const high = Math.max(...finite);
  const aroundOne = high === low ? Math.abs(high) * 0.1 || 0.5 : 0;
  const space = (high - low) * margin || aroundOne;
  return [low - space, high + space];
}

export const linear = ([low, high], [start, end]) =>
  (value) => start + (value - low) / (high - low || 1) * (end - start);
export const logarithmic = (domain, range) =>
  (value) => linear(domain.map(Math.log), range)(Math.log(value));

/** Round values inside the domain, about `count` of them. */
export function niceTicks([low, high], count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const candidates = [1, 2, 5, 10].map((factor) => factor * power);
  const step = candidates.find((candidate) => candidate >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const length = Math.floor(high / step + 1e-9) - first + 1;
  return Array.from({ length }, (_, number) => (first + number) * step);
}

// Tones -------------------------------------------------------------------------------------------

const NUM_HUES = 6;
const DASHES = [null, "7 3", "2 3", "9 3 2 3", "4 2", "1 4"];
const MARKS = [
  "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
  "M-3.5-3.5h7v7h-7z",
  "M0-5l5 5l-5 5l-5-5z",
  "M0-4.5l4.6 8h-9.2z",
  "M0 4.5l4.6-8h-9.2z",
  "M-5-1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z",
];
const OTHER_TONE = { className: "tone-1", quiet: false, dash: null, mark: MARKS[0] };

/** A tone for each name: hues for what is looked at, ink for the ceiling, grey for controls. */
export function tones(names, { ink = [], quiet = [] } = {}) {
  const tone = (className, number, isQuiet) => ({
    className,
    quiet: isQuiet,
    dash: DASHES[number % DASHES.length],
    mark: MARKS[number % MARKS.length],
  });
  let hues = 0;
  let greys = 1;
  const entries = names.map((name) => {
    if (quiet.includes(name)) return [name, tone("tone-quiet", greys++, true)];
    if (ink.includes(name)) return [name, tone("tone-ink", 0, false)];
    const hue = hues++;
    return [name, tone(`tone-${hue % NUM_HUES}`, hue, false)];
  });
  return Object.fromEntries(entries);
}

/** The tone of every verbalizer and scorer of a page, by name. */
export function toneTable({ verbalizers, controls, scorers }) {
  const ofVerbalizers = tones(verbalizers, { ink: ["gold"], quiet: controls });
  const table = { ...tones(scorers), ...ofVerbalizers };
  return (name) => table[name] ?? OTHER_TONE;
}

const mark = (tone, x, y, hollow = false) => shape("path", {
  d: tone.mark,
  transform: `translate(${x} ${y})`,
  class: hollow ? "mark hollow" : "mark",
});

export const legend = (names, toneOf) => element("ul", { class: "legend" }, names.map((name) => {
  const tone = toneOf(name);
  const dash = line(0, 6, 26, 6, "line", { "stroke-dasharray": tone.dash });
  const frame = { width: 26, height: 12, "aria-hidden": "true" };
  const sample = shape("svg", frame, dash, mark(tone, 13, 6));
  return element("li", { class: tone.className }, sample, spaced(name));
}));

// What every chart has ----------------------------------------------------------------------------

/** Charts of one group under one legend; `draw` makes the SVG of each at the width it has. */
export function drawGroup(group, toneOf) {
  const panels = group.charts.map((chart) => {
    const frame = responsive((width) => DRAWN[chart.kind](chart, width, toneOf));
    if (!chart.caption) return frame;
    return element("figure", {}, element("figcaption", {}, chart.caption), frame);
  });
  const names = group.legend.length ? legend(group.legend, toneOf) : null;
  const isSmall = group.charts.some((chart) => chart.caption);
  if (!isSmall) return [names, ...panels].filter(Boolean);
  const classes = group.is_wide ? "multiples wide" : "multiples";
  const multiples = element("div", { class: classes }, panels);
  return [names, multiples].filter(Boolean);
}

/** A frame that draws itself anew whenever its width changes. */
function responsive(draw) {
  const frame = element("div", { class: "chart" });
  let drawn = 0;
  const redraw = () => {
    const width = Math.floor(frame.clientWidth);
    if (!width || width === drawn) return;
    drawn = width;
    frame.replaceChildren(draw(width));
  };
  new ResizeObserver(() => requestAnimationFrame(redraw)).observe(frame);
  return frame;
}

const canvas = (label, width, height, ...children) => {
  const viewBox = `0 0 ${width} ${height}`;
  return shape("svg", { width, height, viewBox, role: "img", "aria-label": label }, ...children);
};
const text = (content, x, y, attributes = {}) => shape("text", { x, y, ...attributes }, content);
const line = (x1, y1, x2, y2, className, attributes = {}) =>
  shape("line", { x1, y1, x2, y2, class: className, ...attributes });

const SPACE_OF_TICK = 32;

function horizontalAxis(scale, ticks, top, bottom) {
  let last = -Infinity;
  return ticks.flatMap((tick) => {
    const x = scale(tick);
    if (x - last < SPACE_OF_TICK) return [];
    last = x;
    const label = text(formatTick(tick), x, bottom + 14, { "text-anchor": "middle" });
    return [line(x, top, x, bottom, "grid"), label];
  });
}

const verticalAxis = (scale, ticks, right) => ticks.flatMap((tick) => [
  line(LEFT, scale(tick), right, scale(tick), "grid"),
  text(formatTick(tick), LEFT - 6, scale(tick) + 4, { "text-anchor": "end" }),
]);

// Intervals ---------------------------------------------------------------------------------------

const ROW_HEIGHT = 22;
const LABEL_HEIGHT = 18; // the zero line leaves it free
const MARK_HEIGHT = 13;

/** Rows of intervals on one axis; a row holds one interval or several. */
export function intervalChart({ label, rows, has_zero: hasZero, x_label: xLabel }, width, toneOf) {
  const figures = rows.flatMap((row) => row.marks.map(({ figure }) => figure));
  const values = figures.flatMap(({ low, high, value }) => [low, high, value]);
  const domain = extent(hasZero ? [...values, 0] : values, 0.04);
  const x = linear(domain, [8, width - 8]);
  const heights = rows.map((row) => ROW_HEIGHT + MARK_HEIGHT * row.marks.length);
  const bottom = heights.reduce((sum, height) => sum + height, 4);
  const height = bottom + (xLabel ? 36 : 22);
  const svg = canvas(label, width, height,
    horizontalAxis(x, niceTicks(domain, width / 80), 4, bottom),
    xLabel && text(xLabel, width / 2, bottom + 31, { "text-anchor": "middle" }));
  let top = 4;
  rows.forEach((row, number) => {
    const end = top + heights[number];
    svg.append(
      ...(hasZero ? [line(x(0), top + LABEL_HEIGHT, x(0), end, "zero")] : []),
      text(row.label, 4, top + 14, { class: "row-label" }),
      text(row.note, width - 4, top + 14, { "text-anchor": "end", class: "note" }),
      ...row.marks.map((item, count) =>
        intervalMark(item, x, top + ROW_HEIGHT + 3 + MARK_HEIGHT * count, toneOf)));
    top = end;
  });
  return svg;
}

function intervalMark({ title, series, figure, is_hollow: isHollow }, x, y, toneOf) {
  const tone = toneOf(series);
  const start = x(figure.low);
  const end = x(figure.high);
  const words = `${title}: ${format(figure.value)} ${formatInterval(figure)}, n ${figure.n}`;
  const target = { x: start - 6, y: y - 6, width: end - start + 12, height: 12, class: "target" };
  return shape("g", { class: tone.className },
    shape("title", {}, words),
    shape("rect", target),
    line(start, y, end, y, "interval"),
    mark(tone, x(figure.value), y, isHollow));
}

// Lines -------------------------------------------------------------------------------------------

const MOST_MARKED_POINTS = 24;
const MOST_OWN_TICKS = 10;
const LOGARITHMIC_TICKS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];
const LEFT = 48;
const RIGHT = 20;
const TOP = 8;

/** Lines with bands over one axis; under the pointer, the values of all lines at the nearest x. */
export function lineChart(chart, width, toneOf) {
  const { label, series, height, reference, rules, x_label: xLabel } = chart;
  const points = series.flatMap((drawn) => drawn.points);
  const bottom = height - (xLabel ? 36 : 22);
  const xs = [...new Set(points.map((point) => point.x))].sort((first, second) => first - second);
  const span = chart.x_domain ?? extent(xs);
  const tallest = [...points, ...(reference?.points ?? [])];
  const heights = tallest.flatMap(({ y, low, high }) => [y, low, high]);
  const tall = extent(heights, 0.06);
  const x = (chart.is_logarithmic ? logarithmic : linear)(span, [LEFT, width - RIGHT]);
  const y = linear(tall, [bottom, TOP]);
  const middle = (LEFT + width - RIGHT) / 2;
  const svg = canvas(label, width, height,
    horizontalAxis(x, ticksOf(chart, xs, span, width), TOP, bottom),
    verticalAxis(y, niceTicks(tall, height / 50), width - RIGHT),
    xLabel && text(xLabel, middle, height - 5, { "text-anchor": "middle" }),
    rules.map((rule) => shape("g", { class: toneOf(rule.series).className },
      shape("title", {}, rule.title),
      line(x(rule.x), TOP, x(rule.x), bottom, "rule"))),
    reference && shape("path", { d: pathOf(reference.points, x, y), class: "chance" }),
    series.map((drawn) => lineOf(drawn.points, toneOf(drawn.name), x, y)));
  return addReadout(svg, { chart, xs, x, bottom });
}

function ticksOf(chart, xs, span, width) {
  if (xs.length <= MOST_OWN_TICKS && !chart.x_domain) return xs;
  if (!chart.is_logarithmic) return niceTicks(span, width / 80);
  return LOGARITHMIC_TICKS.filter((tick) => tick >= span[0] && tick <= span[1]);
}

/** A line through the points that have a value; `key`: which value of theirs. */
export function pathOf(points, x, y, key = "y") {
  const known = points.filter((point) => Number.isFinite(point[key]));
  const corners = known.map((point) => `${x(point.x).toFixed(1)} ${y(point[key]).toFixed(1)}`);
  return corners.length ? `M${corners.join("L")}` : "";
}

function lineOf(points, tone, x, y) {
  const hasBand = (point) => Number.isFinite(point.low) && Number.isFinite(point.high);
  const banded = points.filter(hasBand);
  const back = pathOf([...banded].reverse(), x, y, "low").replace("M", "L");
  const band = `${pathOf(banded, x, y, "high")}${back}Z`;
  const isMarked = points.length <= MOST_MARKED_POINTS;
  const marked = isMarked ? points.filter((point) => Number.isFinite(point.y)) : [];
  return shape("g", { class: tone.className },
    banded.length > 1 && !tone.quiet && shape("path", { d: band, class: "band" }),
    shape("path", { d: pathOf(points, x, y), class: "line", "stroke-dasharray": tone.dash }),
    marked.map((point) => mark(tone, x(point.x), y(point.y))));
}

const DRAWN = { intervals: intervalChart, lines: lineChart };

// Readout -----------------------------------------------------------------------------------------

const formatPoint = (point) => {
  if (point.low == null) return format(point.y);
  return `${format(point.y)} ${formatInterval(point)}`;
};

/** What a readout says at `x`: the axis, then every line that has a value. */
export function readoutAt({ series, reference, x_label: xLabel }, x) {
  const lines = [...series, ...(reference ? [reference] : [])].flatMap(({ name, points }) => {
    const point = points.find((candidate) => candidate.x === x);
    return point?.y == null ? [] : [`${spaced(name)} ${formatPoint(point)}`];
  });
  return [`${xLabel || "step"} ${formatTick(x)}`, ...lines];
}

function addReadout(svg, { chart, xs, x, bottom }) {
  const guide = line(0, TOP, 0, bottom, "guide", { visibility: "hidden" });
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const pointer = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    const distance = (candidate) => Math.abs(x(candidate) - pointer);
    const nearest = xs.reduce((best, candidate) =>
      distance(candidate) < distance(best) ? candidate : best);
    for (const end of ["x1", "x2"]) guide.setAttribute(end, x(nearest));
    guide.setAttribute("visibility", "visible");
    showTip(readoutAt(chart, nearest), event);
  };
  const hide = () => {
    guide.setAttribute("visibility", "hidden");
    tip().hidden = true;
  };
  svg.append(guide);
  return fill(svg, { pointermove: show, pointerdown: show, pointerleave: hide }, []);
}

const tip = () => document.getElementById("tip")
  ?? document.body.appendChild(element("div", { id: "tip", hidden: true }));

function showTip(lines, { clientX, clientY }) {
  const box = tip();
  box.replaceChildren(...lines.map((content) => element("div", {}, content)));
  box.hidden = false;
  box.style.left = `${Math.max(4, Math.min(clientX + 14, innerWidth - box.offsetWidth - 4))}px`;
  box.style.top = `${Math.max(4, clientY - box.offsetHeight - 14)}px`;
}
