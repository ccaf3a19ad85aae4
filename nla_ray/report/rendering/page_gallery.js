// The gallery: texts beside what was said of their activations; searched, filtered, sorted, and drawn a few at a time.

const CARDS_AT_ONCE = 12;
const SORTS = {
  order: "order of the report", domain: "domain", precision: "words found", centred_cosine: "centred cosine", cosine: "cosine",
  rank_10way: "rank among 10",
};

const wordsOf = (described) => described.segments.map(([content]) => content).join("");

/** The row's own claim precision, or the share of marked words that were found where it has none. */
function precisionOf(described) {
  const marks = described.segments.map(([, mark]) => mark).filter(Boolean);
  return described.precision ?? (marks.length ? marks.filter((mark) => mark === "found").length / marks.length : 0);
}

function drawGallery(section, rows) {
  const names = keysOf(rows.map((row) => row.descriptions)), shown = new Set(names.filter((name) => !isControl(name)));
  const lastTrained = names.findLast((name) => shown.has(name)) ?? names[0];
  const chosen = { query: "", domain: "", sort: "order", of: lastTrained, under: scorers[0], reversed: false };
  const count = element("p", { role: "status", class: "count" }), list = element("div", { class: "cards" }), end = element("div");
  const searched = rows.map((row) => ({ row, words: searchable(row) }));
  let found = [];

  const drawMore = () => {
    const next = found.slice(list.children.length, list.children.length + CARDS_AT_ONCE);
    list.append(...next.map((row) => card(row, names.filter((name) => shown.has(name)))));
    nearEnd.disconnect();
    if (list.children.length < found.length) nearEnd.observe(end); // anew, so that an end that is still near is told of again
  };
  const nearEnd = new IntersectionObserver((entries) => entries.at(-1).isIntersecting && drawMore(), { rootMargin: "800px" });
  const update = () => {
    found = sorted(filtered(searched, chosen), chosen);
    count.replaceChildren(`${counted(found.length)} of ${counted(rows.length)} activations`);
    list.replaceChildren();
    drawMore();
  };
  section.append(toolbar({ rows, names, shown, chosen, update }), count, list, end);
  listenToKeys(section.querySelector("input[type=search]"), list, drawMore);
  update();
}

// Choosing rows --------------------------------------------------------------------------------------------------------

const searchable = (row) => [row.activation_id, row.text, ...Object.values(row.descriptions).map(wordsOf)].join("\n").toLowerCase();

/** Rows of the domain that hold every word of the query. */
function filtered(searched, { query, domain }) {
  const parts = query.toLowerCase().split(/\s+/).filter(Boolean);
  return searched.filter(({ row, words }) => (!domain || row.domain === domain) && parts.every((part) => words.includes(part)))
    .map(({ row }) => row);
}

/** Rows in order, the highest value first unless reversed; rows without the value are last either way. */
function sorted(rows, { sort, of, under, reversed }) {
  if (sort === "order") return reversed ? [...rows].reverse() : rows;
  const sign = (reversed ? -1 : 1) * (sort === "domain" ? 1 : -1);
  const keyed = rows.map((row) => ({ row, key: sortKey(row, sort, of, under) }));
  const compare = (a, b) => sign * (sort === "domain" ? a.key.localeCompare(b.key) : a.key - b.key);
  return [...keyed.filter(({ key }) => key != null).sort(compare), ...keyed.filter(({ key }) => key == null)].map(({ row }) => row);
}

function sortKey(row, sort, of, under) {
  if (sort === "domain") return row.domain;
  const described = row.descriptions[of];
  return sort === "precision" ? described && precisionOf(described) : described?.scores?.[under]?.[sort];
}

// Controls -------------------------------------------------------------------------------------------------------------

const SEARCH_DELAY_MS = 120;

function toolbar({ rows, names, shown, chosen, update }) {
  const set = (key, value) => { chosen[key] = value; update(); };
  const list = (label, key, options, titles) => {
    const select = element("select", { name: key, change: () => set(key, select.value) },
      options.map((option) => element("option", { value: option, selected: option === chosen[key] }, titles(option))));
    return element("label", { class: "choice" }, label, select);
  };
  const domains = [...new Set(rows.map((row) => row.domain))].sort();
  return element("div", { class: "toolbar" }, searchBox((query) => set("query", query)),
    list("domain", "domain", ["", ...domains], (name) => name ? spaced(name) : "all"),
    list("sort by", "sort", Object.keys(SORTS), (name) => SORTS[name]), list("of", "of", names, spaced),
    list("under", "under", scorers, spaced), reverseButton((reversed) => set("reversed", reversed)),
    element("fieldset", { class: "checks" }, element("legend", {}, "show"), names.map((name) => checkBox(name, shown, update))));
}

function searchBox(onSearch) {
  let waiting;
  const later = () => { clearTimeout(waiting); waiting = setTimeout(() => onSearch(box.value), SEARCH_DELAY_MS); };
  const box = element("input", { type: "search", placeholder: "words of texts and descriptions", input: later });
  return element("label", { class: "choice" }, "search", box);
}

function reverseButton(onTurn) {
  let reversed = false;
  const turn = () => { reversed = !reversed; button.setAttribute("aria-pressed", reversed); onTurn(reversed); };
  const button = element("button", { type: "button", "aria-pressed": "false", click: turn }, "reverse");
  return button;
}

function checkBox(name, shown, update) {
  const toggle = () => { shown[box.checked ? "add" : "delete"](name); update(); };
  const box = element("input", { type: "checkbox", value: name, checked: shown.has(name), change: toggle });
  return element("label", {}, box, spaced(name));
}

const STEPS = { j: 1, k: -1, ArrowDown: 1, ArrowUp: -1 };

/** `/` goes to the search, Escape from it to the list; j and k go from card to card, on a card the arrows too. */
function listenToKeys(search, list, drawMore) {
  const go = (place) => {
    if (place >= list.children.length) drawMore();
    const target = list.children[Math.max(0, Math.min(place, list.children.length - 1))];
    target?.focus({ preventScroll: true });
    target?.scrollIntoView({ block: "nearest" });
  };
  const act = ({ key, target }) => {
    const current = target.closest(".card");
    if (target === search) return key === "Escape" && [go, 0];
    if (target.closest("input, select, textarea")) return null;
    if (key === "/") return [() => { search.focus(); search.select(); }];
    return key in STEPS && (current || key.length === 1) && [go, current ? [...list.children].indexOf(current) + STEPS[key] : 0];
  };
  document.addEventListener("keydown", (event) => {
    const [action, place] = !(event.ctrlKey || event.metaKey || event.altKey) && act(event) || [];
    if (!action) return;
    event.preventDefault();
    action(place);
  });
}

// Cards ----------------------------------------------------------------------------------------------------------------

const MARK_TITLES = { found: "found in the text", missing: "not found in the text" };

function card(row, names) {
  return element("article", { class: "card", tabindex: 0, "aria-label": `${spaced(row.domain)}, ${row.activation_id}` },
    element("header", {}, element("strong", {}, spaced(row.domain)), element("code", {}, breakable(row.activation_id))),
    element("div", { class: "sides" }, element("pre", { class: "source" }, row.text),
      names.filter((name) => row.descriptions[name]).map((name) => description(name, row.descriptions[name]))));
}

function description(name, described) {
  const share = Math.round(100 * precisionOf(described));
  const facts = [`${described.tokens} tokens`, `${share}% of words found`, described.closed ? [] : "cut off"];
  const segment = ([content, mark]) => mark ? element("mark", { class: mark, title: MARK_TITLES[mark] }, content) : content;
  return element("div", { class: `said ${toneOf(name).className}`, "data-verbalizer": name },
    element("h3", {}, spaced(name), element("small", {}, facts.flat().join(" · "))),
    element("pre", {}, wordsOf(described) ? described.segments.map(segment) : element("em", {}, "(empty)")),
    isFilled(described.scores) && scoresTable(described.scores));
}

const scoresTable = (scores) => element("table", { class: "scores" }, headsOf(["", "centred", "cosine", "2-way", "rank"]),
  bodyOf(Object.entries(scores).map(([scorer, score]) => [spaced(scorer), format(score.centred_cosine), format(score.cosine),
    score.top1 == null ? "–" : score.top1 ? "✓" : "✗", score.rank_10way ?? "–"])));
