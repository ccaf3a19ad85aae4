// The gallery of the report page, without a browser: what is found, in which order, how it looks.

import assert from "node:assert/strict";
import { beforeEach, mock, test } from "node:test";
import { element, toneTable } from "../../nla_ray/report/rendering/charts.mjs";
import {
  card, drawGallery, filtered, precisionOf, searchable, sorted, wordsOf,
} from "../../nla_ray/report/rendering/gallery.mjs";
import { observers, openDocument } from "./fake_dom.mjs";

const HOSTILE = "</script><img src=x onerror='window.stolen = 1'>";
const NAMES = { controls: ["shuffled"], scorers: ["judge", "reward"] };
const toneOf = toneTable({ verbalizers: ["sft", "shuffled"], ...NAMES });

beforeEach(openDocument);

function described(numFound, numMissing, scores = {}) {
  const found = Array(numFound).fill(["yes", "found"]);
  const missing = Array(numMissing).fill(["no", "missing"]);
  return { segments: [["- ", ""], ...found, ...missing], closed: true, tokens: 7, scores };
}
const rowOf = (number, changes = {}) => ({
  activation_id: `doc${number}@4:0`,
  domain: number % 2 ? "licence" : "code",
  text: `Text number${number}`,
  descriptions: {
    sft: described(1, number, { judge: { centred_cosine: number / 10 } }),
    shuffled: described(0, 1),
  },
  ...changes,
});
const idsOf = (rows) => rows.map((row) => row.activation_id.split("@")[0]);

test("precision is the row's own, or the share of marked words that were found", () => {
  assert.equal(precisionOf(described(1, 3)), 0.25);
  assert.equal(precisionOf({ ...described(1, 3), precision: 0.5 }), 0.5);
  assert.equal(precisionOf(described(0, 0)), 0);
  assert.equal(wordsOf(described(1, 1)), "- yesno");
});

test("rows are found by every word of a query, in text, description or id, and by domain", () => {
  const rows = [rowOf(0), rowOf(1), rowOf(2)];
  const searched = rows.map((row) => ({ row, words: searchable(row) }));
  const found = (query, domain = "") => idsOf(filtered(searched, { query, domain }));
  assert.deepEqual(found("TEXT number1"), ["doc1"]);
  assert.deepEqual(found("doc2"), ["doc2"]);
  assert.deepEqual(found("", "licence"), ["doc1"]);
  assert.deepEqual(found("text", "code"), ["doc0", "doc2"]);
  assert.deepEqual(found("nowhere"), []);
});

test("rows without a score are last whichever way the rest is sorted", () => {
  const rows = [rowOf(1), rowOf(3, { descriptions: {} }), rowOf(2)];
  const order = (sort, reversed) =>
    idsOf(sorted(rows, { sort, of: "sft", under: "judge", reversed }));
  assert.deepEqual(order("centred_cosine", false), ["doc2", "doc1", "doc3"]);
  assert.deepEqual(order("centred_cosine", true), ["doc1", "doc2", "doc3"]);
  assert.deepEqual(order("precision", false), ["doc1", "doc2", "doc3"]);
  assert.deepEqual(order("domain", false), ["doc2", "doc1", "doc3"]);
  assert.deepEqual(order("order", true), ["doc2", "doc3", "doc1"]);
});

test("a card shows texts as texts and marks what was marked", () => {
  const segments = [[HOSTILE, "missing"], [" x", ""], ["word", "found"]];
  const scores = { judge: { centred_cosine: 0.5, cosine: null, top1: true, rank_10way: 3 } };
  const sft = { segments, closed: false, tokens: 7, scores };
  const drawn = card(rowOf(0, { text: HOSTILE, descriptions: { sft } }), ["sft", "grpo"], toneOf);
  assert.equal(drawn.querySelector(".source").textContent, HOSTILE);
  assert.equal(drawn.querySelectorAll("img, script").length, 0);
  assert.equal(drawn.querySelector("mark.missing").textContent, HOSTILE);
  assert.equal(drawn.querySelector("mark.found").textContent, "word");
  assert.equal(drawn.querySelectorAll(".said").length, 1);
  const facts = drawn.querySelector("small").textContent;
  assert.equal(facts, "7 tokens · 50% of words found · cut off");
  assert.equal(drawn.querySelector(".scores tbody").textContent, "judge0.500–✓3");
});

test("an empty description is said to be empty and has no table of scores", () => {
  const sft = { segments: [], closed: true, tokens: 0, scores: {} };
  const drawn = card(rowOf(0, { descriptions: { sft } }), ["sft"], toneOf);
  assert.equal(drawn.querySelector(".said pre").textContent, "(empty)");
  assert.equal(drawn.querySelector("table"), null);
});

test("a gallery draws twelve cards, and more when its end comes near", () => {
  const section = document.body.appendChild(element("section", { id: "examples" }));
  drawGallery(section, Array.from({ length: 30 }, (_, number) => rowOf(number)), NAMES, toneOf);
  const cards = () => section.querySelectorAll(".card").length;
  assert.equal(section.querySelector(".count").textContent, "30 of 30 activations");
  assert.equal(cards(), 12);
  const [nearEnd] = observers;
  nearEnd.callback([{ isIntersecting: false }]);
  assert.equal(cards(), 12);
  nearEnd.callback([{ isIntersecting: true }]);
  nearEnd.callback([{ isIntersecting: true }]);
  assert.equal(cards(), 30);
  assert.equal(nearEnd.watched.size, 0);
});

test("a gallery shows no controls at first, and searches when typing has stopped", () => {
  mock.timers.enable({ apis: ["setTimeout"] });
  const section = document.body.appendChild(element("section", { id: "examples" }));
  drawGallery(section, [rowOf(0), rowOf(1)], NAMES, toneOf);
  const speakers = () => section.querySelectorAll(".said").map((node) => node.dataset.verbalizer);
  assert.deepEqual(speakers(), ["sft", "sft"]);
  const box = section.querySelector("input[value=shuffled]");
  box.checked = true;
  box.fire("change");
  assert.deepEqual(speakers(), ["sft", "shuffled", "sft", "shuffled"]);
  const search = section.querySelector("input[type=search]");
  search.value = "number1";
  search.fire("input");
  assert.equal(section.querySelectorAll(".card").length, 2);
  mock.timers.tick(200);
  assert.equal(section.querySelector(".count").textContent, "1 of 2 activations");
  mock.timers.reset();
});

test("keys walk from card to card and to the search", () => {
  const section = document.body.appendChild(element("section", { id: "examples" }));
  drawGallery(section, [rowOf(0), rowOf(1)], NAMES, toneOf);
  const press = (key, target = document.activeElement ?? document.body) => {
    document.fire("keydown", { key, target });
    return document.activeElement;
  };
  const [first, second] = section.querySelectorAll(".card");
  assert.equal(press("ArrowDown", document.body), undefined);
  assert.equal(press("j", document.body), first);
  assert.equal(press("ArrowDown"), second);
  assert.equal(press("j"), second);
  assert.equal(press("k"), first);
  assert.equal(press("/"), section.querySelector("input[type=search]"));
  assert.equal(press("j"), section.querySelector("input[type=search]"));
  assert.equal(press("Escape"), first);
});
