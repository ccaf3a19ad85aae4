// As much of a browser as the scripts of the report page ask for: nodes, simple selectors, events.
// Sizes are set by the test; nothing is laid out.

class FakeNode {
  constructor(tag) {
    this.tagName = tag.toUpperCase();
    this.attributes = {};
    this.childNodes = [];
    this.parentNode = null;
    this.listeners = {};
    this.style = {};
    this.clientWidth = 0;
    this.dataset = new Proxy(this.attributes, {
      get: (attributes, name) => attributes[dataName(name)],
      set: (attributes, name, value) => {
        attributes[dataName(name)] = String(value);
        return true;
      },
    });
    this.classList = { contains: (name) => this.classes.includes(name) };
  }

  get classes() { return (this.attributes.class ?? "").split(" ").filter(Boolean); }
  get children() { return this.childNodes.filter((child) => child instanceof FakeNode); }
  get id() { return this.attributes.id; }
  get hidden() { return "hidden" in this.attributes; }
  set hidden(value) {
    if (value) this.attributes.hidden = "";
    else delete this.attributes.hidden;
  }
  get checked() { return "checked" in this.attributes; }
  set checked(value) {
    if (value) this.attributes.checked = "";
    else delete this.attributes.checked;
  }
  get value() { return this.typed ?? this.attributes.value; }
  set value(words) { this.typed = words; }
  get textContent() {
    return this.childNodes
      .map((child) => child instanceof FakeNode ? child.textContent : child).join("");
  }

  setAttribute(name, value) { this.attributes[name] = String(value); }
  getAttribute(name) { return this.attributes[name] ?? null; }
  addEventListener(name, listener) { (this.listeners[name] ??= []).push(listener); }
  fire(name, event = {}) {
    const fired = { target: this, preventDefault() {}, ...event };
    for (const listener of this.listeners[name] ?? []) listener(fired);
  }

  append(...added) { this.insert(this.childNodes.length, added); }
  appendChild(node) { this.append(node); return node; }
  before(...added) {
    this.parentNode.insert(this.parentNode.childNodes.indexOf(this), added);
  }
  insert(index, added) {
    for (const node of added) node.remove?.();
    this.childNodes.splice(index, 0, ...added.map((node) => adopted(this, node)));
  }
  remove() {
    if (!this.parentNode) return;
    this.parentNode.childNodes = this.parentNode.childNodes.filter((child) => child !== this);
    this.parentNode = null;
  }
  replaceChildren(...added) {
    for (const child of this.children) child.parentNode = null;
    this.childNodes = [];
    this.append(...added);
  }
  replaceWith(node) {
    const { parentNode } = this;
    const index = parentNode.childNodes.indexOf(this);
    this.remove();
    parentNode.insert(index, [node]);
  }

  querySelectorAll(selector) {
    const alternatives = selector.split(",").map((part) => part.trim().split(/\s+/));
    return descendants(this).filter((node) =>
      alternatives.some((compounds) => matchesPath(node, compounds)));
  }
  querySelector(selector) { return this.querySelectorAll(selector)[0] ?? null; }
  closest(selector) {
    const alternatives = selector.split(",").map((part) => part.trim());
    const isMatch = (node) => alternatives.some((compound) => matchesCompound(node, compound));
    for (let node = this; node; node = node.parentNode) if (isMatch(node)) return node;
    return null;
  }
  getBoundingClientRect() { return { left: 0, top: 0, width: this.clientWidth || 100 }; }
  get viewBox() {
    const [, , width] = this.attributes.viewBox.split(" ").map(Number);
    return { baseVal: { width } };
  }
  focus() { document.activeElement = this; }
  select() {}
  scrollIntoView() {}
}

const dataName = (name) => `data-${name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`;
const descendants = (node) => node.children.flatMap((child) => [child, ...descendants(child)]);

function adopted(parent, node) {
  if (!(node instanceof FakeNode)) return String(node);
  node.parentNode = parent;
  return node;
}

/** A compound of a tag, .class, #id, [name] and [name=value]. */
function matchesCompound(node, compound) {
  return compound.match(/^\w+|[.#][\w-]+|\[[^\]]+\]/g).every((part) => {
    if (part[0] === ".") return node.classes.includes(part.slice(1));
    if (part[0] === "#") return node.id === part.slice(1);
    if (part[0] !== "[") return node.tagName === part.toUpperCase();
    const [name, value] = part.slice(1, -1).split("=");
    return name in node.attributes && (value === undefined || node.attributes[name] === value);
  });
}

function matchesPath(node, compounds) {
  if (!matchesCompound(node, compounds.at(-1))) return false;
  const rest = compounds.slice(0, -1);
  if (!rest.length) return true;
  for (let parent = node.parentNode; parent; parent = parent.parentNode) {
    if (matchesPath(parent, rest)) return true;
  }
  return false;
}

/** What is watched, so that a test can say that something came near or changed its size. */
export const observers = [];

class FakeObserver {
  constructor(callback) {
    this.callback = callback;
    this.watched = new Set();
    observers.push(this);
  }
  observe(node) { this.watched.add(node); }
  disconnect() { this.watched.clear(); }
}

/** Puts an empty document and what belongs to it in place of a browser's; returns the body. */
export function openDocument() {
  observers.length = 0;
  const document = new FakeNode("document");
  document.createElement = (tag) => new FakeNode(tag);
  document.createElementNS = (_, tag) => new FakeNode(tag);
  document.createComment = () => new FakeNode("comment");
  document.getElementById = (id) => document.querySelector(`#${id}`);
  document.body = document.appendChild(new FakeNode("body"));
  Object.assign(globalThis, {
    document,
    ResizeObserver: class extends FakeObserver {},
    IntersectionObserver: class extends FakeObserver {},
    requestAnimationFrame: (draw) => draw(),
    innerWidth: 1000,
  });
  return document.body;
}
