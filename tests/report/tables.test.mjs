// Choosing blocks and columns, and sorting tables of the report page, without a browser.

import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";
import { element } from "../../nla_ray/report/rendering/charts.mjs";
import {
  addChoices, choiceControl, choicesOf, makeSortable, matches, nextOrder, sortedRows,
} from "../../nla_ray/report/rendering/tables.mjs";
import { openDocument } from "./fake_dom.mjs";

beforeEach(openDocument);

const block = (choice, ...children) =>
  element("div", { class: "block", "data-choice": JSON.stringify(choice) }, children);
const textsOf = (node, selector) =>
  node.querySelectorAll(selector).map((found) => found.textContent);
const inputOf = (section, value) =>
  section.querySelectorAll("input").find((input) => input.value === value);

test("a choice matches when every key of it is chosen", () => {
  assert.ok(matches({}, { scorer: "judge" }));
  assert.ok(matches({ scorer: "judge" }, { scorer: "judge", metric: "top1" }));
  assert.ok(!matches({ scorer: "judge", metric: "delta" }, { scorer: "judge", metric: "top1" }));
});

test("choices stand at the first block that has their key", () => {
  const judge = { scorer: "judge", metric: "a" };
  const reward = { scorer: "reward", metric: "b" };
  const blocks = [judge, reward, { other: "c" }].map((choice) => ({ choice }));
  assert.deepEqual(choicesOf(blocks), [
    [blocks[0], { scorer: ["judge", "reward"], metric: ["a", "b"] }],
    [blocks[2], { other: ["c"] }],
  ]);
});

test("the first option is shown, and another when it is chosen", () => {
  const section = document.body.appendChild(element("section", {},
    block({ scorer: "judge" }, "of the judge"),
    element("p", {}, "between"),
    block({ scorer: "reward" }, "of the reward scorer")));
  addChoices(section, {});
  assert.deepEqual(textsOf(section, ".block"), ["of the judge"]);
  assert.equal(inputOf(section, "judge").checked, true);
  inputOf(section, "reward").fire("change");
  assert.deepEqual(textsOf(section, ".block"), ["of the reward scorer"]);
  assert.equal(section.children.at(-1).textContent, "of the reward scorer");
  inputOf(section, "judge").fire("change");
  assert.deepEqual(textsOf(section, ".block"), ["of the judge"]);
});

test("a single option asks for no choice, many are a list", () => {
  assert.equal(choiceControl("scorer", ["judge"], () => {}), null);
  const chosen = [];
  const names = ["a", "b", "c", "d", "e", "long_name"];
  const control = choiceControl("figure", names, (name) => chosen.push(name), { a: "Title of a" });
  const list = control.querySelector("select");
  const titles = textsOf(list, "option");
  assert.deepEqual([titles[0], titles[5]], ["Title of a", "long name"]);
  list.value = "c";
  list.fire("change");
  assert.deepEqual(chosen, ["c"]);
});

test("columns beyond the main ones are shown when they are asked for", () => {
  const cells = (tag) =>
    [element("th", {}, "name"), element(tag, {}, "main"), element(tag, { class: "more" }, "more")];
  const table = element("table", {},
    element("thead", {}, element("tr", {}, cells("th"))),
    element("tbody", {}, element("tr", {}, cells("td"))));
  const section = element("section", {}, block({ scorer: "judge" }, table));
  document.body.append(section);
  addChoices(section, {});
  assert.deepEqual(textsOf(section, "tbody td"), ["main"]);
  inputOf(section, "all metrics").fire("change");
  assert.deepEqual(textsOf(section, "tbody td"), ["main", "more"]);
  inputOf(section, "main metrics").fire("change");
  assert.deepEqual(textsOf(section, "thead th"), ["name", "main"]);
});

test("a column is sorted downwards, then upwards, then not at all", () => {
  const first = nextOrder({ column: null }, "top1");
  assert.deepEqual(first, { column: "top1", descending: true });
  const second = nextOrder(first, "top1");
  assert.deepEqual(second, { column: "top1", descending: false });
  assert.deepEqual(nextOrder(second, "top1"), { column: null });
  assert.deepEqual(nextOrder(second, "delta"), { column: "delta", descending: true });
});

test("a row without a value counts as the least", () => {
  const values = { a: 1, b: null, c: 3 };
  const rows = ["a", "b", "c"];
  const sort = (order) => sortedRows(rows, order, (row) => values[row]);
  assert.deepEqual(sort({ column: "x", descending: true }), ["c", "a", "b"]);
  assert.deepEqual(sort({ column: "x", descending: false }), ["b", "a", "c"]);
  assert.deepEqual(sort({ column: null }), rows);
});

test("heads of columns become buttons that sort by the full value, not by what is written", () => {
  const row = (name, value) => element("tr", { "data-row": name }, element("th", {}, name),
    element("td", { "data-column": "top1", "data-value": value }, "0.500"));
  const table = element("table", {},
    element("thead", {}, element("tr", {},
      element("th", {}, "verbalizer"), element("th", { "data-column": "top1" }, "2-way"))),
    element("tbody", {}, row("low", 0.5001), row("none", null), row("high", 0.5002)));
  makeSortable(table);
  const head = table.querySelector("th[data-column=top1]");
  const press = () => {
    head.querySelector("button").fire("click");
    const order = table.querySelectorAll("tbody tr").map((found) => found.dataset.row);
    return [order.join(" "), head.textContent, head.getAttribute("aria-sort")];
  };
  assert.deepEqual(press(), ["high low none", "2-way ↓", "descending"]);
  assert.deepEqual(press(), ["none low high", "2-way ↑", "ascending"]);
  assert.deepEqual(press(), ["low none high", "2-way", "none"]);
});
