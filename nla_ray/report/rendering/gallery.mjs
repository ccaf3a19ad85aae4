// The gallery: texts beside what was said of their activations; searched, filtered, sorted, and
// drawn a few at a time.

import { counted, element, format, spaced } from "./charts.mjs";

const CARDS_AT_ONCE = 12;
const SORTS = {
  order: "order of the report",
  domain: "domain",
  precision: "words found",
  centred_cosine: "centred cosine",
  cosine: "cosine",
  rank_10way: "rank among 10",
};

export const wordsOf = (described) => described.segments.map(([content]) => content).join("");

/** The row's own claim precision; where it has none, the share of marked words that were found. */
export function precisionOf(described) {
  if (described.precision != null) return described.precision;
  const marks = described.segments.map(([, mark]) => mark).filter(Boolean);
  if (!marks.length) return 0;
  return marks.filter((mark) => mark === "found").length / marks.length;
}

/** Draws the gallery of `rows` into a section. `names`: {controls, scorers}, the judge first. */
export function drawGallery(section, rows, { controls, scorers }, toneOf) {
  const names = [...new Set(rows.flatMap((row) => Object.keys(row.descriptions)))];
  const shown = new Set(names.filter((name) => !controls.includes(name)));
  const chosen = {
    query: "",
    domain: "",
    sort: "order",
    of: names.findLast((name) => shown.has(name)) ?? names[0],
    under: scorers[0],
    reversed: false,
  };
  const count = element("p", { role: "status", class: "count" });
  const list = element("div", { class: "cards" });
  const end = element("div");
  const searched = rows.map((row) => ({ row, words: searchable(row) }));
  let found = [];

  const drawMore = () => {
    const next = found.slice(list.children.length, list.children.length + CARDS_AT_ONCE);
    const speakers = names.filter((name) => shown.has(name));
    list.append(...next.map((row) => card(row, speakers, toneOf)));
    nearEnd.disconnect();
    // Observed anew, so that an end that is still near is told of again.
    if (list.children.length < found.length) nearEnd.observe(end);
  };
  const whenNear = (entries) => entries.at(-1).isIntersecting && drawMore();
  const nearEnd = new IntersectionObserver(whenNear, { rootMargin: "800px" });
  const update = () => {
    found = sorted(filtered(searched, chosen), chosen);
    count.replaceChildren(`${counted(found.length)} of ${counted(rows.length)} activations`);
    list.replaceChildren();
    drawMore();
  };
  section.append(toolbar({ rows, names, scorers, shown, chosen, update }), count, list, end);
  listenToKeys(section.querySelector("input[type=search]"), list, drawMore);
  update();
}

// Choosing rows -----------------------------------------------------------------------------------

export const searchable = (row) => {
  const descriptions = Object.values(row.descriptions).map(wordsOf);
  return [row.activation_id, row.text, ...descriptions].join("\n").toLowerCase();
};

/** Rows of the domain that hold every word of the query. */
export function filtered(searched, { query, domain }) {
  const parts = query.toLowerCase().split(/\s+/).filter(Boolean);
  const isFound = ({ row, words }) =>
    (!domain || row.domain === domain) && parts.every((part) => words.includes(part));
  return searched.filter(isFound).map(({ row }) => row);
}

/** Rows, the highest value first unless reversed; rows without the value are last either way. */
export function sorted(rows, { sort, of, under, reversed }) {
  if (sort === "order") return reversed ? [...rows].reverse() : rows;
  const isByName = sort === "domain";
  const sign = (reversed ? -1 : 1) * (isByName ? 1 : -1);
  const keyed = rows.map((row) => ({ row, key: sortKey(row, sort, of, under) }));
  const compare = ({ key: first }, { key: second }) =>
    sign * (isByName ? first.localeCompare(second) : first - second);
  const withKey = keyed.filter(({ key }) => key != null).sort(compare);
  const without = keyed.filter(({ key }) => key == null);
  return [...withKey, ...without].map(({ row }) => row);
}

function sortKey(row, sort, of, under) {
  if (sort === "domain") return row.domain;
  const described = row.descriptions[of];
  if (sort === "precision") return described && precisionOf(described);
  return described?.scores?.[under]?.[sort];
}

// Controls ----------------------------------------------------------------------------------------

const SEARCH_DELAY_MS = 120;

function toolbar({ rows, names, scorers, shown, chosen, update }) {
  const set = (key, value) => { chosen[key] = value; update(); };
  const list = (label, key, options, titleOf) => {
    const entries = options.map((option) =>
      element("option", { value: option, selected: option === chosen[key] }, titleOf(option)));
    const select = element("select", { name: key, change: () => set(key, select.value) }, entries);
    return element("label", { class: "choice" }, label, select);
  };
  const domains = [...new Set(rows.map((row) => row.domain))].sort();
  const boxes = names.map((name) => checkBox(name, shown, update));
  return element("div", { class: "toolbar" },
    searchBox((query) => set("query", query)),
    list("domain", "domain", ["", ...domains], (name) => name ? spaced(name) : "all"),
    list("sort by", "sort", Object.keys(SORTS), (name) => SORTS[name]),
    list("of", "of", names, spaced),
    list("under", "under", scorers, spaced),
    reverseButton((reversed) => set("reversed", reversed)),
    element("fieldset", { class: "checks" }, element("legend", {}, "show"), boxes));
}

function searchBox(onSearch) {
  let waiting;
  const later = () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => onSearch(box.value), SEARCH_DELAY_MS);
  };
  const placeholder = "words of texts and descriptions";
  const box = element("input", { type: "search", placeholder, input: later });
  return element("label", { class: "choice" }, "search", box);
}

function reverseButton(onTurn) {
  let reversed = false;
  const turn = () => {
    reversed = !reversed;
    button.setAttribute("aria-pressed", reversed);
    onTurn(reversed);
  };
  const attributes = { type: "button", "aria-pressed": "false", click: turn };
  const button = element("button", attributes, "reverse");
  return button;
}

function checkBox(name, shown, update) {
  const toggle = () => {
    shown[box.checked ? "add" : "delete"](name);
    update();
  };
  const attributes = { type: "checkbox", value: name, checked: shown.has(name), change: toggle };
  const box = element("input", attributes);
  return element("label", {}, box, spaced(name));
}

const STEPS = { j: 1, k: -1, ArrowDown: 1, ArrowUp: -1 };

/** `/` goes to the search, Escape to the list, j and k (on a card arrows too) to the next card. */
function listenToKeys(search, list, drawMore) {
  const go = (number) => {
    if (number >= list.children.length) drawMore();
    const target = list.children[Math.max(0, Math.min(number, list.children.length - 1))];
    target?.focus({ preventScroll: true });
    target?.scrollIntoView({ block: "nearest" });
  };
  const goToSearch = () => {
    search.focus();
    search.select();
  };
  const actionFor = ({ key, target }) => {
    if (target === search) return key === "Escape" ? () => go(0) : null;
    if (target.closest("input, select, textarea")) return null;
    if (key === "/") return goToSearch;
    const current = [...list.children].indexOf(target.closest(".card"));
    const isLetter = key.length === 1;
    if (!(key in STEPS) || (current < 0 && !isLetter)) return null;
    return () => go(current < 0 ? 0 : current + STEPS[key]);
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const action = actionFor(event);
    if (!action) return;
    event.preventDefault();
    action();
  });
}

// Cards -------------------------------------------------------------------------------------------

const MARK_TITLES = { found: "found in the text", missing: "not found in the text" };
const SCORE_HEADS = ["", "centred", "cosine", "2-way", "rank"];

export function card(row, names, toneOf) {
  const label = `${spaced(row.domain)}, ${row.activation_id}`;
  const said = names.filter((name) => row.descriptions[name]).map((name) =>
    description(name, row.descriptions[name], toneOf));
  return element("article", { class: "card", tabindex: 0, "aria-label": label },
    element("header", {},
      element("strong", {}, spaced(row.domain)),
      element("code", {}, breakable(row.activation_id))),
    element("div", { class: "sides" }, element("pre", { class: "source" }, row.text), said));
}

/** A dotted name that may be broken after its dots, not inside its words. */
const breakable = (name) => name.split(/(?<=[-._/])/).flatMap((part) => [part, element("wbr")]);

function description(name, described, toneOf) {
  const share = Math.round(100 * precisionOf(described));
  const facts = [`${described.tokens} tokens`, `${share}% of words found`];
  if (!described.closed) facts.push("cut off");
  const words = wordsOf(described) ? described.segments.map(segment) : element("em", {}, "(empty)");
  const hasScores = Object.keys(described.scores ?? {}).length > 0;
  const classes = `said ${toneOf(name).className}`;
  return element("div", { class: classes, "data-verbalizer": name },
    element("h3", {}, spaced(name), element("small", {}, facts.join(" · "))),
    element("pre", {}, words),
    hasScores && scoresTable(described.scores));
}

const segment = ([content, mark]) =>
  mark ? element("mark", { class: mark, title: MARK_TITLES[mark] }, content) : content;

function scoresTable(scores) {
  const heads = SCORE_HEADS.map((head) => element("th", { scope: "col" }, head));
  const rows = Object.entries(scores).map(([scorer, score]) => {
    const outcome = score.top1 ? "✓" : "✗";
    const cells = [
      format(score.centred_cosine),
      format(score.cosine),
      score.top1 == null ? "–" : outcome,
      score.rank_10way ?? "–",
    ];
    return element("tr", {}, element("th", { scope: "row" }, spaced(scorer)),
      cells.map((content) => element("td", {}, content)));
  });
  return element("table", { class: "scores" },
    element("thead", {}, element("tr", {}, heads)), element("tbody", {}, rows));
}
