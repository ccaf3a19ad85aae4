// What a reader may do with a section: choose which blocks and columns are shown, sort tables.
// The blocks are in the page already; what is not chosen is taken out until it is.

import { element } from "./charts.mjs";

// Choosing ----------------------------------------------------------------------------------------

const MOST_SEGMENTS = 5;
const COLUMNS = { key: "columns", options: ["main metrics", "all metrics"] };

/** Adds the choices of a section's blocks to it, and shows what is chosen first. */
export function addChoices(section, titles) {
  const nodes = [...section.querySelectorAll(".block[data-choice]")];
  const blocks = nodes.map((node) =>
    ({ node, choice: JSON.parse(node.dataset.choice), anchor: document.createComment("") }));
  const chosen = {};
  const update = () => {
    for (const block of blocks) show(block, matches(block.choice, chosen));
  };
  for (const [first, options] of choicesOf(blocks)) {
    const bar = element("div", { class: "bar" });
    first.node.before(bar);
    for (const [key, names] of Object.entries(options)) {
      chosen[key] = names[0];
      const change = (name) => { chosen[key] = name; update(); };
      bar.append(choiceControl(key, names, change, titles) ?? "");
    }
    if (first === blocks[0]) bar.append(columnsControl(section) ?? "");
  }
  update();
}

/** [[block, {key: options}]]: each key at the first block that has it, its options in order. */
export function choicesOf(blocks) {
  const firsts = new Map();
  const owners = {};
  for (const block of blocks) {
    for (const [key, option] of Object.entries(block.choice)) {
      owners[key] ??= block;
      if (!firsts.has(owners[key])) firsts.set(owners[key], {});
      const options = firsts.get(owners[key])[key] ??= [];
      if (!options.includes(option)) options.push(option);
    }
  }
  return [...firsts];
}

export const matches = (choice, chosen) =>
  Object.entries(choice).every(([key, option]) => chosen[key] === option);

function show({ node, anchor }, isShown) {
  if (isShown && anchor.parentNode) anchor.replaceWith(node);
  else if (!isShown && node.parentNode) node.replaceWith(anchor);
}

/** A control for one of several options: a switch for few, a list for many, nothing for one. */
export function choiceControl(label, options, onChange, titles = {}) {
  const titleOf = (name) => titles[name] ?? name.replaceAll("_", " ");
  if (options.length < 2) return null;
  if (options.length > MOST_SEGMENTS) {
    const entries = options.map((name) => element("option", { value: name }, titleOf(name)));
    const list = element("select", { change: () => onChange(list.value) }, entries);
    return element("label", { class: "choice" }, label, list);
  }
  const group = `choice-${document.querySelectorAll("fieldset").length}-${label}`;
  const segments = options.map((name, number) => {
    const change = () => onChange(name);
    const checked = number === 0;
    const input = element("input", { type: "radio", name: group, value: name, checked, change });
    return element("label", {}, input, element("span", {}, titleOf(name)));
  });
  return element("fieldset", { class: "switch" }, element("legend", {}, label), segments);
}

/** A switch between the main columns and all, where a section has more; it takes the rest out. */
function columnsControl(section) {
  if (!section.querySelector("th.more")) return null;
  const rows = [...section.querySelectorAll("tr")].map((row) => [row, [...row.children]]);
  const change = (name) => {
    const isShown = (cell) => name !== COLUMNS.options[0] || !cell.classList.contains("more");
    for (const [row, cells] of rows) row.replaceChildren(...cells.filter(isShown));
  };
  change(COLUMNS.options[0]);
  return choiceControl(COLUMNS.key, COLUMNS.options, change);
}

// Sorting -----------------------------------------------------------------------------------------

const ARROWS = { none: "", descending: " ↓", ascending: " ↑" };

/** Turns the heads of a table's columns into buttons that sort its rows. */
export function makeSortable(table) {
  const body = table.querySelector("tbody");
  const rows = [...body.querySelectorAll("tr")];
  const heads = [...table.querySelectorAll("thead th[data-column]")];
  let order = { column: null };
  for (const head of heads) {
    const title = head.textContent;
    const sort = () => {
      order = nextOrder(order, head.dataset.column);
      for (const other of heads) markSorted(other, order);
      body.replaceChildren(...sortedRows(rows, order, valueIn));
    };
    head.dataset.title = title;
    head.setAttribute("aria-sort", "none");
    head.replaceChildren(element("button", { type: "button", click: sort }, title));
  }
}

function markSorted(head, { column, descending }) {
  const isSorted = head.dataset.column === column;
  const direction = descending ? "descending" : "ascending";
  const sorted = isSorted ? direction : "none";
  head.setAttribute("aria-sort", sorted);
  head.querySelector("button").replaceChildren(head.dataset.title + ARROWS[sorted]);
}

function valueIn(row, column) {
  const cell = [...row.children].find((candidate) => candidate.dataset.column === column);
  const value = Number.parseFloat(cell?.dataset.value);
  return Number.isNaN(value) ? null : value;
}

/** A column is sorted downwards, then upwards, then not at all. */
export function nextOrder(order, column) {
  if (order.column !== column) return { column, descending: true };
  return order.descending ? { column, descending: false } : { column: null };
}

/** Rows in order; a row without a value counts as the least. */
export function sortedRows(rows, { column, descending }, valueOf) {
  if (!column) return rows;
  const key = (row) => valueOf(row, column) ?? -Number.MAX_VALUE;
  const sign = descending ? -1 : 1;
  return [...rows].sort((first, second) => sign * (key(first) - key(second)));
}
