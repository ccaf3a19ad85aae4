// Elements, scales and charts as inline SVG. Knows nothing of reports. Colours come from CSS: a tone is a class that sets
// --tone, with a dash and a mark of its own, so that no series is told from another by colour alone.

const fill = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value != null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child != null && child !== false));
  return node;
};
const element = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const shape = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// Numbers and scales ---------------------------------------------------------------------------------------------------

const format = (value) => value == null ? "–" : Math.abs(value) >= 10 ? value.toFixed(1) : value.toFixed(3);
const formatInterval = ({ low, high }) => `[${format(low)}, ${format(high)}]`;
const formatTick = (value) => String(Number(value.toPrecision(4)));

function extent(values, margin = 0) {
  const known = values.filter(Number.isFinite);
  if (!known.length) return [0, 1];
  const low = Math.min(...known), high = Math.max(...known);
  const space = (high - low) * margin || (high === low ? Math.abs(high) * 0.1 || 0.5 : 0);
  return [low - space, high + space];
}

const linear = ([low, high], [start, end]) => (value) => start + (value - low) / (high - low || 1) * (end - start);
const logarithmic = (domain, range) => (value) => linear(domain.map(Math.log), range)(Math.log(value));

function niceTicks([low, high], count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, place) => (first + place) * step);
}

// Tones ----------------------------------------------------------------------------------------------------------------

const NUM_HUES = 6;
const DASHES = [null, "7 3", "2 3", "9 3 2 3", "4 2", "1 4"];
const MARKS = ["M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", "M-3.5-3.5h7v7h-7z", "M0-5l5 5l-5 5l-5-5z", "M0-4.5l4.6 8h-9.2z",
  "M0 4.5l4.6-8h-9.2z", "M-5-1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z"];

/** A tone for each name, in order: hues for what is looked at, ink for the ceiling, grey for controls. */
function tones(names, { ink = [], quiet = [] } = {}) {
  let hues = 0, greys = 0;
  return Object.fromEntries(names.map((name) => {
    const isQuiet = quiet.includes(name), place = isQuiet ? greys++ + 1 : ink.includes(name) ? 0 : hues++;
    const className = isQuiet ? "tone-quiet" : ink.includes(name) ? "tone-ink" : `tone-${place % NUM_HUES}`;
    return [name, { className, quiet: isQuiet, dash: DASHES[place % DASHES.length], mark: MARKS[place % MARKS.length] }];
  }));
}

const OTHER_TONE = { className: "tone-1", quiet: false, dash: null, mark: MARKS[0] };
const mark = (tone, x, y, hollow = false) =>
  shape("path", { d: tone.mark, transform: `translate(${x} ${y})`, class: hollow ? "mark hollow" : "mark" });

/** entries: [[title, tone]]. */
const legend = (entries) => element("ul", { class: "legend" }, entries.map(([title, tone]) => element("li", { class: tone.className },
  shape("svg", { width: 26, height: 12, "aria-hidden": "true" },
    line(0, 6, 26, 6, "line", { "stroke-dasharray": tone.dash }), mark(tone, 13, 6)), title)));

// What every chart has -------------------------------------------------------------------------------------------------

/** A frame that draws itself anew whenever its width changes. */
function responsive(draw) {
  const frame = element("div", { class: "chart" });
  let drawn = 0;
  const redraw = () => {
    const width = Math.floor(frame.clientWidth);
    if (width && width !== drawn) frame.replaceChildren(draw(drawn = width));
  };
  new ResizeObserver(() => requestAnimationFrame(redraw)).observe(frame);
  return frame;
}

const canvas = (label, width, height, ...children) =>
  shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...children);
const text = (content, x, y, attributes = {}) => shape("text", { x, y, ...attributes }, content);
const line = (x1, y1, x2, y2, className, attributes = {}) => shape("line", { x1, y1, x2, y2, class: className, ...attributes });

const SPACE_OF_TICK = 32;

function horizontalAxis(scale, ticks, top, bottom) {
  let last = -Infinity;
  return ticks.flatMap((tick) => {
    const x = scale(tick);
    if (x - last < SPACE_OF_TICK) return [];
    last = x;
    return [line(x, top, x, bottom, "grid"), text(formatTick(tick), x, bottom + 14, { "text-anchor": "middle" })];
  });
}

// Intervals ------------------------------------------------------------------------------------------------------------

/** One interval in a table's cell, on the axis of its column. */
function cellInterval(figure, domain, chance) {
  const x = linear(domain, [5, 91]);
  return shape("svg", { viewBox: "0 0 96 12", class: "cell-interval", "aria-hidden": "true" },
    line(0, 6, 96, 6, "grid"),
    chance != null && line(x(chance), 0, x(chance), 12, "chance"),
    line(x(figure.low), 6, x(figure.high), 6, "interval"),
    line(x(figure.value), 1.5, x(figure.value), 10.5, "point"));
}

/**
 * Rows of intervals on one axis; a row holds one interval or several.
 * rows: [{label, note, items: [{name, figure, tone, hollow}]}]; zero: whether the axis has a zero line.
 */
function intervalPlot({ label, rows, width, zero = false, xLabel }) {
  const figures = rows.flatMap((row) => row.items.map((item) => item.figure));
  const domain = extent([...figures.flatMap(({ low, high, value }) => [low, high, value]), ...(zero ? [0] : [])], 0.04);
  const x = linear(domain, [8, width - 8]);
  const heights = rows.map((row) => 22 + 13 * row.items.length), body = heights.reduce((sum, height) => sum + height, 4);
  const svg = canvas(label, width, body + (xLabel ? 36 : 22), horizontalAxis(x, niceTicks(domain, width / 80), 4, body),
    zero && line(x(0), 4, x(0), body, "zero"), xLabel && text(xLabel, width / 2, body + 31, { "text-anchor": "middle" }));
  let top = 4;
  rows.forEach((row, place) => {
    svg.append(text(row.label, 4, top + 14, { class: "row-label" }),
      text(row.note ?? "", width - 4, top + 14, { "text-anchor": "end", class: "note" }));
    row.items.forEach((item, number) => svg.append(intervalMark(item, x, top + 25 + 13 * number)));
    top += heights[place];
  });
  return svg;
}

function intervalMark({ name, figure, tone, hollow }, x, y) {
  return shape("g", { class: tone.className },
    shape("title", {}, `${name}: ${format(figure.value)} ${formatInterval(figure)}, n ${figure.n}`),
    shape("rect", { x: x(figure.low) - 6, y: y - 6, width: x(figure.high) - x(figure.low) + 12, height: 12, class: "target" }),
    line(x(figure.low), y, x(figure.high), y, "interval"), mark(tone, x(figure.value), y, hollow));
}

// Lines ----------------------------------------------------------------------------------------------------------------

const MOST_MARKED_POINTS = 24, MOST_OWN_TICKS = 10, LOG_TICKS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];
const LEFT = 48, RIGHT = 20;

/**
 * Lines with bands over one axis; under the pointer, the values of all lines at the nearest x.
 * series: [{name, tone, points: [{x, y, low, high}]}]; reference: {name, points}; rules: [{x, name, tone}].
 */
function lineChart({ label, series, width, height = 240, log = false, xDomain, xLabel, reference, rules = [] }) {
  const points = series.flatMap((one) => one.points), bottom = height - (xLabel ? 36 : 22);
  const xs = [...new Set(points.map((point) => point.x))].sort((a, b) => a - b), span = xDomain ?? extent(xs);
  const heights = [...points, ...(reference?.points ?? [])].flatMap(({ y, low, high }) => [y, low, high]);
  const tall = extent(heights, 0.06);
  const x = (log ? logarithmic : linear)(span, [LEFT, width - RIGHT]), y = linear(tall, [bottom, 8]);
  const ticks = xs.length <= MOST_OWN_TICKS && !xDomain ? xs
    : log ? LOG_TICKS.filter((tick) => tick >= span[0] && tick <= span[1]) : niceTicks(span, width / 80);
  const svg = canvas(label, width, height, horizontalAxis(x, ticks, 8, bottom),
    verticalAxis(y, niceTicks(tall, height / 50), width - RIGHT),
    xLabel && text(xLabel, (LEFT + width - RIGHT) / 2, height - 5, { "text-anchor": "middle" }),
    rules.map((rule) => shape("g", { class: rule.tone.className }, shape("title", {}, rule.name),
      line(x(rule.x), 8, x(rule.x), bottom, "rule"))),
    reference && shape("path", { d: pathOf(reference.points, x, y), class: "chance" }),
    series.map((one) => drawSeries(one, x, y)));
  return addReadout(svg, { series, reference, xs, x, bottom, xLabel: xLabel ?? "step" });
}

const verticalAxis = (scale, ticks, right) => ticks.flatMap((tick) => [line(LEFT, scale(tick), right, scale(tick), "grid"),
  text(formatTick(tick), 42, scale(tick) + 4, { "text-anchor": "end" })]);

const pathOf = (points, x, y, key = "y") => points.filter((point) => Number.isFinite(point[key]))
  .map((point, place) => `${place ? "L" : "M"}${x(point.x).toFixed(1)} ${y(point[key]).toFixed(1)}`).join("");

function drawSeries({ tone, points }, x, y) {
  const banded = points.filter((point) => Number.isFinite(point.low) && Number.isFinite(point.high));
  const band = pathOf(banded, x, y, "high") + pathOf([...banded].reverse(), x, y, "low").replace("M", "L") + "Z";
  const marked = points.length <= MOST_MARKED_POINTS ? points.filter((point) => Number.isFinite(point.y)) : [];
  return shape("g", { class: tone.className }, banded.length > 1 && !tone.quiet && shape("path", { d: band, class: "band" }),
    shape("path", { d: pathOf(points, x, y), class: "line", "stroke-dasharray": tone.dash }),
    marked.map((point) => mark(tone, x(point.x), y(point.y))));
}

const pointAt = (points, x) => points.find((point) => point.x === x);
const formatPoint = (point) => point?.y == null ? "–" : format(point.y) + (point.low == null ? "" : ` ${formatInterval(point)}`);

function addReadout(svg, { series, reference, xs, x, bottom, xLabel }) {
  const guide = line(0, 8, 0, bottom, "guide", { visibility: "hidden" });
  const show = (event) => {
    const ratio = svg.viewBox.baseVal.width / svg.getBoundingClientRect().width;
    const at = (event.clientX - svg.getBoundingClientRect().left) * ratio;
    const nearest = xs.reduce((best, one) => Math.abs(x(one) - at) < Math.abs(x(best) - at) ? one : best);
    for (const end of ["x1", "x2"]) guide.setAttribute(end, x(nearest));
    guide.setAttribute("visibility", "visible");
    const known = [...series, ...(reference ? [reference] : [])].map(({ name, points }) => [name, pointAt(points, nearest)]);
    showTip([`${xLabel} ${formatTick(nearest)}`, ...known.filter(([, point]) => point?.y != null)
      .map(([name, point]) => `${name} ${formatPoint(point)}`)], event);
  };
  const hide = () => { guide.setAttribute("visibility", "hidden"); hideTip(); };
  svg.append(guide);
  return fill(svg, { pointermove: show, pointerdown: show, pointerleave: hide }, []);
}

const tip = document.body.appendChild(element("div", { id: "tip", hidden: true }));
const hideTip = () => { tip.hidden = true; };
function showTip(lines, { clientX, clientY }) {
  tip.replaceChildren(...lines.map((content) => element("div", {}, content)));
  tip.hidden = false;
  tip.style.left = `${Math.max(4, Math.min(clientX + 14, innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${Math.max(4, clientY - tip.offsetHeight - 14)}px`;
}

/** The numbers of a line chart as a table, made when it is opened: for those who read, copy or print them. */
function numbersOf(series, xLabel) {
  const xs = [...new Set(series.flatMap((one) => one.points.map((point) => point.x)))].sort((a, b) => a - b);
  const details = element("details", {}, element("summary", {}, "Numbers"));
  const row = (x) => [formatTick(x), ...series.map(({ points }) => formatPoint(pointAt(points, x)))];
  const open = () => details.append(table([xLabel, ...series.map((one) => one.name)], xs.map(row), "Numbers"));
  details.addEventListener("toggle", open, { once: true });
  return details;
}

// Tables ---------------------------------------------------------------------------------------------------------------

/** A container that scrolls by itself, with keys too, so that the page never does. */
const scrolling = (label, ...children) => element("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": label }, ...children);
const headsOf = (heads) => element("thead", {}, element("tr", {}, heads.map((head) => element("th", { scope: "col" }, head))));
const bodyOf = (rows) => element("tbody", {}, rows.map(([head, ...cells]) => element("tr", {}, element("th", { scope: "row" }, head),
  cells.map((cell) => element("td", {}, cell)))));
const table = (heads, rows, label) => scrolling(label, element("table", {}, headsOf(heads), bodyOf(rows)));
