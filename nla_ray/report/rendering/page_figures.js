// The sections made of figures: which part of the report each shows, and how. Every number is taken from the report as it is.

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const report = read("report"), vocabulary = read("vocabulary");
const MAIN_METRICS = ["top1", "top1_2way", "top1_10way", "top1_10way_hard", "centred_cosine", "delta", "fve"];

const isFilled = (value) => value != null && Object.keys(value).length > 0;
const training = Object.fromEntries(Object.entries(read("training")).filter(([, records]) => isFilled(records)));
const keysOf = (objects) => [...new Set(objects.flatMap((one) => Object.keys(one ?? {})))];
const isControl = (name) => vocabulary.controls.includes(name);
const verbalizers = Object.keys(report.results ?? {});
/** The independent scorer first: it is what is shown before anyone chooses. */
const judgeFirst = (names) => [...names].sort((first, second) => (second === "judge") - (first === "judge"));
const scorers = judgeFirst(keysOf(Object.values(report.results ?? {})));
const scorerTones = tones(scorers);
const verbalizerTones = tones([...new Set([...verbalizers, ...Object.keys(training)])], { ink: ["gold"], quiet: vocabulary.controls });
const toneOf = (name) => verbalizerTones[name] ?? scorerTones[name] ?? OTHER_TONE;

const counted = (count) => (count ?? 0).toLocaleString("en");
const spaced = (name) => name.replaceAll("_", " ");
const titleOf = (name) => name.split(".").map((part) => vocabulary.titles[part] ?? spaced(part)).join(": ");
const definitionOf = (name) => vocabulary.definitions[name];
const pointOf = (x, figure) => ({ x, y: figure?.value, low: figure?.low, high: figure?.high });
const panel = (title, draw) => element("figure", {}, element("figcaption", {}, title), responsive(draw));
const seriesLegend = (names) => legend(names.map((name) => [spaced(name), toneOf(name)]));

// Choices --------------------------------------------------------------------------------------------------------------

const MOST_SEGMENTS = 5;

/** A control for one of several options: a switch for few, a list for many, nothing for one. */
function choice(label, options, onChange) {
  if (options.length < 2) return null;
  if (options.length > MOST_SEGMENTS) {
    const list = element("select", { change: () => onChange(list.value) },
      options.map((name) => element("option", { value: name }, titleOf(name))));
    return element("label", { class: "choice" }, label, list);
  }
  const group = `choice-${document.querySelectorAll("fieldset").length}`;
  const segment = (name, place) => element("label", {},
    element("input", { type: "radio", name: group, value: name, checked: place === 0, change: () => onChange(name) }),
    element("span", {}, titleOf(name)));
  return element("fieldset", { class: "switch" }, element("legend", {}, label), options.map(segment));
}

/** Appends a choice for each entry of `options`, and what `draw(chosen)` makes of the first ones; again after every change. */
function drawChoosable(section, options, draw) {
  const chosen = Object.fromEntries(Object.entries(options).map(([label, names]) => [label, names[0]]));
  const bar = element("div", { class: "bar" }), output = element("div");
  const redraw = () => output.replaceChildren(...[draw(chosen)].flat());
  section.append(bar, output);
  for (const [label, names] of Object.entries(options)) {
    const change = (name) => { chosen[label] = name; redraw(); };
    bar.append(choice(label, names, change) ?? "");
  }
  redraw();
}

// Opening and lists ----------------------------------------------------------------------------------------------------

function drawHeader(header) {
  const { base = {}, gates = [] } = report, passed = gates.filter((gate) => gate.passed).length;
  const lines = [
    "A verbalizer puts hidden activations of a language model into words; scorers that read only the words say how much of "
      + "the activation is left.",
    `${counted(report.n)} activations of ${counted(report.documents)} ${report.split} documents; `
      + (report.split === "test" ? "no ancestor learned from or chose on any of them; " : "settings are chosen on them, so this is no evidence; ")
      + `${counted(report.documents_left_out)} documents left out.`,
    `Base ${base.name} (${String(base.digest).slice(0, 12)}), layer ${base.layer} of ${base.num_layers}, ${base.d_model} `
      + `dimensions, injected at norm ${base.injection_norm}.`,
  ];
  const verdict = [badge(passed === gates.length), ` ${passed} of ${gates.length} gates passed`];
  header.append(...lines.map((content) => element("p", {}, content)), gates.length ? element("p", { class: "verdict" }, verdict) : "");
}

const RELATIONS = { ">=": "≥", "<=": "≤" };
const badge = (passed) => element("span", { class: passed ? "badge pass" : "badge fail" }, passed ? "✓ PASS" : "✗ FAIL");
/** A dotted name that may be broken after its dots, not inside its words. */
const breakable = (name) => name.split(/(?<=[-._/])/).flatMap((part) => [part, element("wbr")]);

function drawGates(section, gates) {
  section.append(element("ul", { class: "gates" }, gates.map(({ name, passed, value, relation, threshold }) => element("li", {},
    badge(passed), element("code", {}, breakable(name)),
    element("span", { class: "bound" }, `${value?.toFixed(4) ?? "–"} ${RELATIONS[relation] ?? relation} ${threshold}`)))));
}

const drawWarnings = (section, warnings) => section.append(...warnings.map((warning) => element("p", { class: "warning" }, warning)));
const drawNotes = (section, notes) => section.append(element("ul", {}, notes.map((note) => element("li", {}, note))));

function drawLineage(section, lineage) {
  const uses = (documents) => Object.entries(documents ?? {}).map(([use, count]) => `${use} ${counted(count)}`).join(", ") || "–";
  section.append(table(["artifact", "fingerprint", "configuration", "made", "documents"], Object.entries(lineage).map(([name, one]) =>
    [name, one.fingerprint, one.config_hash, one.created, uses(one.documents)]), "Lineage"));
}

// Tables of figures ----------------------------------------------------------------------------------------------------

function drawResults(section, results) {
  const known = keysOf(Object.values(results).flatMap(Object.values)), order = {};
  const main = MAIN_METRICS.filter((metric) => known.includes(metric));
  const columns = { "main metrics": main, "all metrics": [...new Set([...main, ...known])] };
  drawChoosable(section, { scorer: scorers, columns: Object.keys(columns) }, (chosen) => figureTable({ label: "Results",
    rows: verbalizers, columns: columns[chosen.columns], order, figureAt: (row, metric) => results[row][chosen.scorer]?.[metric] }));
}

function drawClaims(section, claims) {
  section.append(figureTable({ label: "Claims", rows: Object.keys(claims), columns: keysOf(Object.values(claims)), order: {},
    figureAt: (row, figure) => claims[row][figure] }));
}

/** Verbalizers by figures, each interval on the axis of its column. `order` keeps how it is sorted: {column, descending}. */
function figureTable({ label, rows, columns, order, figureAt }) {
  const wrapper = scrolling(label);
  const sortBy = (column) => {
    Object.assign(order, nextOrder(order, column));
    draw();
    wrapper.querySelector(`th[data-column="${CSS.escape(column)}"] button`).focus();
  };
  const axisOf = (column) => extent([report.chance?.[column], ...rows.flatMap((row) => {
    const { value, low, high } = figureAt(row, column) ?? {};
    return [value, low, high];
  })]);
  const head = () => element("tr", {}, element("th", { scope: "col" }, "verbalizer"),
    columns.map((column) => columnHead(column, order, sortBy)));
  const row = (name) => element("tr", { class: isControl(name) ? "quiet" : null, "data-row": name },
    element("th", { scope: "row" }, spaced(name)),
    columns.map((column) => figureCell(column, figureAt(name, column), axisOf(column))));
  const draw = () => wrapper.replaceChildren(element("table", { class: "figures" },
    element("thead", {}, head()), element("tbody", {}, sortedRows(rows, order, figureAt).map(row))));
  draw();
  return wrapper;
}

/** A column is sorted downwards, then upwards, then not at all. */
function nextOrder(order, column) {
  if (order.column !== column) return { column, descending: true };
  return order.descending ? { column, descending: false } : { column: null };
}

function sortedRows(rows, { column, descending }, figureAt) {
  if (!column) return rows;
  const value = (row) => figureAt(row, column)?.value ?? -Number.MAX_VALUE;
  return [...rows].sort((first, second) => (descending ? -1 : 1) * (value(first) - value(second)));
}

function columnHead(column, order, sortBy) {
  const sorted = order.column !== column ? "none" : order.descending ? "descending" : "ascending";
  const arrow = { none: "", descending: " ↓", ascending: " ↑" }[sorted];
  return element("th", { scope: "col", "data-column": column, title: definitionOf(column), "aria-sort": sorted },
    element("button", { type: "button", click: () => sortBy(column) }, titleOf(column) + arrow));
}

function figureCell(column, figure, domain) {
  if (figure?.value == null) return element("td", { "data-column": column }, "–");
  return element("td", { "data-column": column, title: `n ${figure.n}, ${figure.documents} documents` },
    element("span", { class: "value" }, format(figure.value)), " ", element("span", { class: "range" }, formatInterval(figure)),
    cellInterval(figure, domain, report.chance?.[column]));
}

function drawAgreement(section, agreement) {
  const rows = Object.entries(agreement).map(([name, both]) => [name, leaves(both)]);
  const columns = keysOf(rows.map(([, values]) => values));
  section.append(table(["verbalizer", ...columns.map(titleOf)],
    rows.map(([name, values]) => [spaced(name), ...columns.map((column) => format(values[column]))]), "Agreement"));
}

/** {a: {b: 1}} -> {"a.b": 1}; a figure counts as its value. */
function leaves(value, prefix = "") {
  return Object.fromEntries(Object.entries(value).flatMap(([name, inner]) => {
    if (inner === null || typeof inner !== "object") return [[prefix + name, inner]];
    return "value" in inner ? [[prefix + name, inner.value]] : Object.entries(leaves(inner, `${prefix}${name}.`));
  }));
}

/** What was tried before the settings were chosen: a row an experiment, paired differences with the SFT verbalizer. */
function drawExperiments(section, tried) {
  const figures = keysOf(tried.map((one) => one.minus_sft));
  const told = (figure) => figure ? `${format(figure.value)} ${formatInterval(figure)}` : "–";
  section.append(table(["changed", ...figures, "n", "kept"],
    tried.map((one) => [one.changed, ...figures.map((name) => told(one.minus_sft[name])), counted(one.n), one.kept]), "Experiments"));
}

// Intervals ------------------------------------------------------------------------------------------------------------

function drawPaired(section, paired) {
  drawChoosable(section, { scorer: judgeFirst(keysOf(Object.values(paired))) }, ({ scorer }) => {
    const metrics = keysOf(Object.values(paired).map((by) => by[scorer]));
    return element("div", { class: "multiples" }, metrics.map((metric) => panel(titleOf(metric), (width) => intervalPlot({
      label: `${titleOf(metric)}: paired differences`, rows: pairedRows(paired, scorer, metric), zero: true, width }))));
  });
}

const pairedRows = (paired, scorer, metric) => Object.entries(paired).filter(([, by]) => by[scorer]?.[metric]?.value != null)
  .map(([pair, by]) => {
    const figure = by[scorer][metric], [first, second] = pair.split("-"), name = `${spaced(first)} − ${spaced(second)}`;
    return { label: name, note: `${format(figure.value)} ${formatInterval(figure)}`,
      items: [{ name, figure, tone: toneOf(first), hollow: figure.low <= 0 && figure.high >= 0 }] };
  });

function drawDomains(section, domains) {
  const figures = keysOf(Object.values(domains).flatMap(Object.values)), names = keysOf(Object.values(domains)).filter((name) => !isControl(name));
  drawChoosable(section, { figure: figures }, ({ figure }) => [seriesLegend(names), responsive((width) => intervalPlot({
    label: `${titleOf(figure)} by domain`, xLabel: titleOf(figure), width,
    rows: Object.entries(domains).map(([domain, by]) => domainRow(domain, by, figure)) }))]);
}

function domainRow(domain, by, figure) {
  const items = Object.entries(by).filter(([name, figures]) => !isControl(name) && figures[figure]?.value != null)
    .map(([name, figures]) => ({ name: `${spaced(domain)}, ${spaced(name)}`, figure: figures[figure], tone: toneOf(name) }));
  return { label: spaced(domain), note: items.length ? `n ${items[0].figure.n}` : "", items };
}

function drawConfusion(section, confusion) {
  const lastTrainedFirst = Object.keys(confusion).reverse();
  drawChoosable(section, { verbalizer: lastTrainedFirst }, ({ verbalizer }) => confusionTable(confusion[verbalizer]));
}

function confusionTable(counts) {
  const domains = Object.keys(counts), named = [...new Set([...domains, ...keysOf(Object.values(counts))])];
  const row = (domain) => {
    const total = Object.values(counts[domain]).reduce((sum, count) => sum + count, 0);
    return element("tr", {}, element("th", { scope: "row" }, spaced(domain)),
      named.map((name) => confusionCell(domain, name, counts[domain][name] ?? 0, total)));
  };
  const heads = ["true ↓  named →", ...named.map((name) => element("span", {}, spaced(name)))];
  return scrolling("Confusion matrix", element("table", { class: "confusion" }, headsOf(heads), element("tbody", {}, domains.map(row))));
}

function confusionCell(domain, name, count, total) {
  const title = `${count} of ${total} ${spaced(domain)} named ${spaced(name)}`;
  const cell = element("td", { class: domain === name ? "right" : null, title }, count || "·");
  cell.style.setProperty("--share", `${(100 * count / (total || 1)).toFixed(1)}%`);
  return cell;
}

// Curves ---------------------------------------------------------------------------------------------------------------

/** A line chart of what each name has at each x, its legend, and its numbers: `pointsOf(name)` -> [{x, y, low, high}]. */
function curves(names, pointsOf, options) {
  const series = seriesOf(names, pointsOf);
  return [seriesLegend(names), responsive((width) => lineChart({ ...options, series, width })), numbersOf(series, options.xLabel)];
}

const seriesOf = (names, pointsOf) => names.map((name) => ({ name: spaced(name), tone: toneOf(name), points: pointsOf(name) }))
  .filter(({ points }) => points.length);

function drawPrefix(section, prefix) {
  const metrics = keysOf(Object.values(prefix).flatMap(Object.values).flat()).filter((name) => name !== "tokens");
  drawChoosable(section, { scorer: judgeFirst(keysOf(Object.values(prefix))), metric: metrics }, ({ scorer, metric }) =>
    curves(Object.keys(prefix), (name) => (prefix[name][scorer] ?? []).map((one) => pointOf(one.tokens, one[metric])),
      { label: `${titleOf(metric)} by tokens kept`, xLabel: "tokens kept" }));
}

function drawRetrieval(section, retrieval) {
  const ks = new Set(Object.values(retrieval).flatMap(Object.values).flat().map((one) => one.k));
  const reference = { name: "chance", points: [...ks].sort((first, second) => first - second).map((k) => ({ x: k, y: 1 / k })) };
  drawChoosable(section, { scorer: judgeFirst(keysOf(Object.values(retrieval))) }, ({ scorer }) =>
    curves(Object.keys(retrieval), (name) => (retrieval[name][scorer] ?? []).map((one) => pointOf(one.k, one.top1)),
      { label: "Top-1 among k activations", xLabel: "k, the number of activations", log: true, reference }));
}

function drawBestOf(section, bestOf) {
  const names = keysOf(bestOf).filter((name) => name !== "samples");
  drawChoosable(section, { metric: keysOf(bestOf.flatMap((one) => names.map((name) => one[name]))) }, ({ metric }) =>
    curves(names, (name) => bestOf.map((one) => pointOf(one.samples, one[name]?.[metric])),
      { label: `${titleOf(metric)} by samples`, xLabel: "samples", log: true }));
}

function drawCalibration(section, bins) {
  const figures = keysOf(bins).filter((name) => !name.startsWith("confidence"));
  const axis = { xDomain: extent(bins.flatMap((bin) => [bin.confidence_low, bin.confidence_high])), xLabel: "confidence (middle of the bin)" };
  section.append(element("div", { class: "multiples wide" }, figures.map((figure) => {
    const name = titleOf(figure.replace("_", "."));
    const points = bins.map((bin) => pointOf((bin.confidence_low + bin.confidence_high) / 2, bin[figure]));
    const series = [{ name, tone: OTHER_TONE, points }];
    const chart = panel(name, (width) => lineChart({ ...axis, label: `${name} by confidence`, series, width }));
    return element("div", {}, chart, numbersOf(series, axis.xLabel));
  })));
}

const GROWTH = { labels: "labels that SFT learned from", steps: "step of GRPO", layers: "layer" };

/** A chart for each axis of growth; each with the figures that were measured along it to choose from. */
function drawGrowth(section, growth) {
  for (const [axis, bySeries] of Object.entries(growth)) {
    const names = judgeFirst(Object.keys(bySeries)), figures = keysOf(Object.values(bySeries).flat()).filter((name) => name !== "at");
    drawChoosable(section, { figure: figures }, ({ figure }) =>
      curves(names, (name) => bySeries[name].map((point) => pointOf(point.at, point[figure])),
        { label: `${titleOf(figure)} by ${GROWTH[axis]}`, xLabel: GROWTH[axis] }));
  }
}

const REINFORCED = {
  reward: "reward of a step", "monitor/judge_centred_cosine": "judge’s centred cosine, validation",
  "monitor/rewarded": "what the reward scorer pays, validation", kl: "KL to the start", "completions/mean_length": "tokens of a completion",
  "monitor/distinct_share": "distinct descriptions, validation", "monitor/claim_precision": "words in text, validation",
};
const SUPERVISED = { loss: "loss", eval_loss: "loss, validation", eval_centred_cosine: "centred cosine, validation" };

function drawTraining(section) {
  const isReinforced = (name) => training[name].some((record) => "reward" in record || "monitor/rewarded" in record);
  const names = Object.keys(training);
  drawSteps(section, names.filter(isReinforced), REINFORCED);
  drawSteps(section, names.filter((name) => !isReinforced(name)), SUPERVISED);
}

/** Small multiples over one axis of steps. */
function drawSteps(section, names, panels) {
  if (!names.length) return;
  const xDomain = extent(names.flatMap((name) => training[name].map((record) => record.step)));
  const rules = names.flatMap((name) => training[name].filter((record) => record["monitor/warned"] === 1)
    .map(({ step }) => ({ x: step, tone: toneOf(name), name: `${spaced(name)}: warning at step ${step}` })));
  const pointsOf = (key) => (name) => training[name].filter((record) => record[key] != null)
    .map((record) => ({ x: record.step, y: record[key], low: record[`${key}_low`], high: record[`${key}_high`] }));
  section.append(seriesLegend(names), element("div", { class: "multiples" }, Object.entries(panels).map(([key, title]) => {
    const series = seriesOf(names, pointsOf(key)), axis = { xDomain, rules, height: 170 };
    return series.length > 0 && panel(title, (width) => lineChart({ ...axis, label: `${title} by step`, series, width }));
  })));
}
