// Scales, tones and charts of the report page, without a browser.

import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";
import {
  drawGroup, element, extent, format, formatInterval, formatTick, intervalChart, lineChart, linear,
  logarithmic, niceTicks, pathOf, readoutAt, tones, toneTable,
} from "../../nla_ray/report/rendering/charts.mjs";
import { observers, openDocument } from "./fake_dom.mjs";

const toneOf = toneTable({
  verbalizers: ["gold", "sft", "grpo", "shuffled"],
  controls: ["shuffled"],
  scorers: ["judge", "reward"],
});
const figure = (value, low, high) => ({ value, low, high, n: 60, families: 33 });
const attribute = (node, name) => Number(node.getAttribute(name));

beforeEach(openDocument);

test("numbers have three digits, large ones one, and none is a dash", () => {
  assert.deepEqual([0.98765, -0.5, 12.34, null].map(format), ["0.988", "-0.500", "12.3", "–"]);
  assert.deepEqual([-0.0004, -0, -0.0006].map(format), ["0.000", "0.000", "-0.001"]);
  assert.equal(formatInterval({ low: -0.25, high: 23.456 }), "[-0.250, 23.5]");
  assert.deepEqual([0.1 + 0.2, 1000, 0.00012346].map(formatTick), ["0.3", "1000", "0.0001235"]);
});

test("an extent covers finite values, with space around a single one", () => {
  assert.deepEqual(extent([3, null, 1, NaN, 2]), [1, 3]);
  assert.deepEqual(extent([0, 10], 0.1), [-1, 11]);
  assert.deepEqual(extent([2, 2]), [1.8, 2.2]);
  assert.deepEqual(extent([0]), [-0.5, 0.5]);
  assert.deepEqual(extent([]), [0, 1]);
});

test("scales map their domain to their range", () => {
  assert.equal(linear([0, 10], [100, 200])(2.5), 125);
  assert.equal(linear([0, 1], [10, 0])(0.25), 7.5);
  assert.ok(Math.abs(logarithmic([1, 100], [0, 80])(10) - 40) < 1e-9);
});

test("ticks are round values inside the domain", () => {
  assert.deepEqual(niceTicks([0, 10], 5), [0, 2, 4, 6, 8, 10]);
  assert.deepEqual(niceTicks([0.13, 0.52], 4).map(formatTick), ["0.2", "0.3", "0.4", "0.5"]);
  assert.deepEqual(niceTicks([-1, 1], 2), [-1, 0, 1]);
});

test("no two series look alike, controls are quiet, and gold is ink", () => {
  const names = ["gold", "a", "b", "c", "d", "e", "f", "x", "y"];
  const table = tones(names, { ink: ["gold"], quiet: ["x", "y"] });
  assert.equal(table.gold.className, "tone-ink");
  assert.deepEqual([table.x.quiet, table.y.className, table.a.quiet], [true, "tone-quiet", false]);
  const looks = names.map((name) => JSON.stringify(table[name]));
  assert.equal(new Set(looks).size, names.length);
  assert.notEqual(table.x.mark, table.y.mark);
  assert.equal(toneOf("never heard of").className, "tone-1");
});

test("a path leaves out points without a value", () => {
  const points = [{ x: 0, y: 1 }, { x: 1, y: null }, { x: 2, y: 3 }];
  const same = (value) => value;
  assert.equal(pathOf(points, same, same), "M0.0 1.0L2.0 3.0");
  assert.equal(pathOf([], same, same), "");
});

test("intervals stand on their side of the zero line, hollow where they hold zero", () => {
  const mark = (value, low, high, isHollow) =>
    ({ title: "a − b", series: "grpo", figure: figure(value, low, high), is_hollow: isHollow });
  const chart = {
    label: "differences",
    has_zero: true,
    x_label: "",
    rows: [
      { label: "first", note: "0.5", marks: [mark(0.5, 0.25, 1, false)] },
      { label: "second", note: "0", marks: [mark(0, -0.5, 0.25, true)] },
    ],
  };
  const svg = intervalChart(chart, 216, toneOf);
  const zero = attribute(svg.querySelector(".zero"), "x1");
  const lines = svg.querySelectorAll("g .interval");
  const domain = [-0.56, 1.06]; // -0.5 to 1 with a margin of 4%
  const pixels = 200 / (domain[1] - domain[0]);
  assert.ok(Math.abs(zero - (8 - domain[0] * pixels)) < 1e-9);
  assert.ok(Math.abs(attribute(lines[0], "x1") - zero - 0.25 * pixels) < 1e-9);
  assert.ok(Math.abs(attribute(lines[1], "x1") - zero + 0.5 * pixels) < 1e-9);
  const hollow = svg.querySelectorAll(".mark").map((node) => node.classes.includes("hollow"));
  assert.deepEqual(hollow, [false, true]);
  const title = svg.querySelector("g title").textContent;
  assert.equal(title, "a − b: 0.500 [0.250, 1.000], n 60");
  assert.deepEqual(svg.querySelectorAll(".note").map((node) => node.textContent), ["0.5", "0"]);
});

test("the zero line leaves the labels of rows free", () => {
  const marks = [{ title: "a − b", series: "grpo", figure: figure(0.5, 0.25, 1) }];
  const rows = ["first", "second"].map((label) => ({ label, note: "", marks }));
  const svg = intervalChart({ label: "", rows, has_zero: true, x_label: "" }, 216, toneOf);
  const zeros = svg.querySelectorAll(".zero");
  const labels = svg.querySelectorAll(".row-label");
  assert.equal(zeros.length, 2);
  zeros.forEach((zero, number) => {
    assert.ok(attribute(zero, "y1") > attribute(labels[number], "y"));
    assert.ok(attribute(zero, "y2") > attribute(zero, "y1"));
  });
  assert.ok(attribute(zeros[0], "y2") < attribute(labels[1], "y") - 10);
  const plain = intervalChart({ label: "", rows, has_zero: false, x_label: "" }, 216, toneOf);
  assert.equal(plain.querySelector(".zero"), null);
});

const curve = (overrides = {}) => ({
  kind: "lines",
  label: "10-way by tokens",
  caption: "",
  x_label: "tokens",
  x_domain: null,
  is_logarithmic: false,
  height: 240,
  reference: null,
  rules: [],
  series: [
    { name: "grpo", points: [{ x: 0, y: 0, low: -1, high: 1 }, { x: 4, y: 1, low: 0, high: 2 }] },
    { name: "shuffled", points: [{ x: 0, y: 0.5, low: null, high: null }] },
  ],
  ...overrides,
});

test("a line chart draws a line for each series and a band where it has intervals", () => {
  const svg = lineChart(curve(), 268, toneOf);
  assert.equal(svg.getAttribute("aria-label"), "10-way by tokens");
  assert.equal(svg.querySelectorAll(".line").length, 2);
  assert.equal(svg.querySelectorAll(".band").length, 1);
  const [x, y] = svg.querySelector(".line").getAttribute("d").slice(1).split("L")[0].split(" ");
  assert.equal(Number(x), 48); // the left end of the axis
  const tall = [-1.18, 2.18]; // -1 to 2 with a margin of 6%
  const expected = 204 + (0 - tall[0]) / (tall[1] - tall[0]) * (8 - 204);
  assert.ok(Math.abs(Number(y) - expected) < 0.06);
  assert.ok(svg.querySelectorAll("text").some((node) => node.textContent === "tokens"));
});

test("rules and a reference are drawn with their names", () => {
  const reference = { name: "chance", points: [{ x: 0, y: 0.5 }, { x: 4, y: 0.1 }] };
  const rules = [{ x: 2, series: "grpo", title: "grpo: warning at step 2" }];
  const svg = lineChart(curve({ reference, rules }), 268, toneOf);
  assert.equal(svg.querySelectorAll("path.chance").length, 1);
  assert.equal(svg.querySelector("g title").textContent, "grpo: warning at step 2");
  assert.equal(attribute(svg.querySelector(".rule"), "x1"), 148); // the middle of 48 to 248
});

test("a readout says what every series has at the nearest x", () => {
  const reference = { name: "chance", points: [{ x: 0, y: 0.5, low: null }] };
  const lines = readoutAt(curve({ reference }), 0);
  const values = ["grpo 0.000 [-1.000, 1.000]", "shuffled 0.500", "chance 0.500"];
  assert.deepEqual(lines, ["tokens 0", ...values]);
  assert.deepEqual(readoutAt(curve({ x_label: "" }), 4), ["step 4", "grpo 1.000 [0.000, 2.000]"]);
  const svg = document.body.appendChild(lineChart(curve(), 268, toneOf));
  svg.clientWidth = 268;
  svg.fire("pointermove", { clientX: 230, clientY: 50 });
  const tip = document.getElementById("tip");
  assert.equal(tip.hidden, false);
  assert.deepEqual(tip.children.map((node) => node.textContent), readoutAt(curve(), 4));
  svg.fire("pointerleave");
  assert.equal(tip.hidden, true);
});

test("a group has one legend, captions, and charts that are drawn at the width they get", () => {
  const charts = [curve({ caption: "first" }), curve({ caption: "second" })];
  const group = { charts, legend: ["grpo", "read_by_a_human"], is_wide: false };
  const box = element("div", {}, drawGroup(group, toneOf));
  const entries = box.querySelectorAll(".legend li").map((node) => node.textContent);
  assert.deepEqual(entries, ["grpo", "read by a human"]);
  const captions = box.querySelectorAll("figcaption").map((node) => node.textContent);
  assert.deepEqual(captions, ["first", "second"]);
  assert.equal(box.querySelectorAll(".chart svg").length, 0);
  for (const frame of box.querySelectorAll(".chart")) frame.clientWidth = 300;
  for (const observer of observers) observer.callback();
  assert.equal(box.querySelectorAll(".chart svg").length, 2);
  assert.equal(attribute(box.querySelector(".chart svg"), "width"), 300);
});
