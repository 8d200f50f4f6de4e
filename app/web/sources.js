/** The sources of an answer: markers in its text, cards with the passages, and the cited sentences marked in them. */

import { button, el, present, smallPrint } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { titleButton } from "./reader.js";
import { findSupport, mark, statementBefore } from "./support.js";
import { byline, plural, titleOf } from "./words.js";

const isCalm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** The sources of one turn, by its number; `body` holds the answer's text with the markers. */
export class Sources {
  constructor(number, body) {
    this.node = el("aside", { class: "sources", "aria-label": `Sources of answer ${number}` });
    this.number = number;
    this.body = body;
    this.sources = [];
    this.cards = new Map();
    this.listen();
  }

  /** Show what was found; what of it is cited is known at the end. */
  show(sources) {
    if (this.cards.size || !sources?.length) return;
    this.sources = sources.map((source) => ({ ...source, id: source.document_id }));
    for (const source of this.sources) this.cards.set(source.n, this.card(source));
    this.arrange(new Set(), `Retrieved (${sources.length})`);
  }

  clear() {
    this.sources = [];
    this.cards.clear();
    this.node.replaceChildren();
  }

  /** The answer is whole: cited cards in the open with their sentences marked, the others folded. */
  finish({ cited, isRefused }) {
    this.markSentences();
    const numOthers = this.cards.size - cited.size;
    const retrieved = cited.size ? "Also retrieved, not cited" : "Retrieved";
    this.arrange(cited, `${isRefused ? "Nearest passages, none holds an answer" : retrieved} (${numOthers})`);
  }

  /** A link, not a button: a button lets the line break between it and the word that it belongs to. */
  marker(n) {
    const source = this.sources.find((candidate) => candidate.n === n);
    if (!source) return null;
    const label = `Source ${n}: ${titleOf(source)}`;
    const attributes = { class: "marker", href: `#${this.cardId(n)}`, "data-n": n, title: label, "aria-label": label };
    return el("a", attributes, String(n));
  }

  cardId(n) {
    return `answer-${this.number}-source-${n}`;
  }

  card(source) {
    const passage = el("div", { class: "passage", id: `${this.cardId(source.n)}-passage`, dir: "auto" },
      ...renderMarkdown(source.text, { heading: "p" }));
    const toggle = button("Show the whole passage", {
      class: "toggle", "aria-expanded": "false", "aria-controls": passage.id, onclick: () => this.toggle(source.n),
    });
    const others = source.also_in?.length && `Nearly the same text is in ${source.also_in.join(", ")}.`;
    // Focusable by script: a marker moves the focus here.
    const card = el("li", { class: "source-card", id: this.cardId(source.n), "data-n": source.n, tabindex: "-1" },
      el("span", { class: "number", "aria-hidden": "true" }, String(source.n)),
      el("div", { class: "source" },
        el("p", { class: "title", dir: "auto" }, titleButton(source, source)),
        smallPrint(source, byline(source.metadata)),
        passage,
        toggle,
        others && el("p", { class: "small" }, others)));
    excerpt(card);
    return card;
  }

  toggle(n) {
    const card = this.cards.get(n);
    const isWhole = card.querySelector(".passage").classList.toggle("whole");
    const toggle = card.querySelector(".toggle");
    toggle.setAttribute("aria-expanded", String(isWhole));
    toggle.textContent = isWhole ? "Show less" : "Show the whole passage";
  }

  /** The cards move, so a list that was opened while the answer streamed in stays open. */
  arrange(cited, label) {
    const cards = [...this.cards].sort(([a], [b]) => a - b);
    const used = cards.filter(([n]) => cited.has(n)).map(([, card]) => card);
    const rest = cards.filter(([n]) => !cited.has(n)).map(([, card]) => card);
    for (const card of used) card.classList.add("cited");
    const wasOpen = this.node.querySelector("details")?.open;
    this.node.replaceChildren(...present([
      used.length > 0 && el("h3", {}, plural(used.length, "cited source")),
      used.length > 0 && el("ol", { class: "cards" }, ...used),
      rest.length > 0 && el("details", { class: "retrieved", open: wasOpen },
        el("summary", {}, label),
        el("ol", { class: "cards" }, ...rest)),
    ]));
  }

  /** Mark in the passages the sentences that the markers stand for; all places are found before any is marked. */
  markSentences() {
    const places = new Map();
    for (const [index, marker] of this.markers().entries()) {
      marker.dataset.index = index;
      const passage = this.cards.get(Number(marker.dataset.n)).querySelector(".passage");
      const support = findSupport(passage, statementBefore(marker));
      if (!support) continue;
      const known = [...places.values()].find(({ block, start }) => block === support.block && start === support.start);
      if (known) known.markers.push(index);
      else places.set(index, { ...support, markers: [index] });
    }
    for (const place of places.values()) {
      place.block.classList.add("cites");
      mark(place, { "data-markers": place.markers.join(" ") });
    }
    for (const card of this.cards.values()) excerpt(card);
  }

  markers() {
    return [...this.body.querySelectorAll(".marker")];
  }

  /** A marker lights up its card and its sentence, a card all its sentences and the markers that cite it. */
  listen() {
    for (const [area, selector] of [[this.body, ".marker"], [this.node, ".source-card"]]) {
      const focused = () => area.querySelector(`${selector}:is(:focus, :focus-within)`);
      area.addEventListener("pointerover", ({ target }) => this.light(target.closest(selector) ?? focused()));
      area.addEventListener("pointerleave", () => this.light(focused()));
      area.addEventListener("focusin", ({ target }) => this.light(target.closest(selector)));
      area.addEventListener("focusout", () => this.light(null));
    }
    this.body.addEventListener("click", (event) => {
      const clicked = event.target.closest(".marker");
      if (!clicked) return;
      event.preventDefault(); // Else each look at a source is a step in the browser's history.
      this.reveal(clicked);
    });
  }

  light(node) {
    for (const lit of [...this.node.querySelectorAll(".lit"), ...this.body.querySelectorAll(".lit")]) {
      lit.classList.remove("lit");
    }
    const card = node && this.cards.get(Number(node.dataset.n));
    if (!card) return;
    card.classList.add("lit");
    const isMarker = node !== card;
    const marks = isMarker ? `mark[data-markers~="${node.dataset.index}"]` : "mark";
    for (const one of card.querySelectorAll(marks)) one.classList.add("lit");
    if (isMarker) return;
    for (const one of this.markers()) one.classList.toggle("lit", one.dataset.n === card.dataset.n);
  }

  reveal(marker) {
    const card = this.cards.get(Number(marker.dataset.n));
    const folded = card.closest("details");
    if (folded) folded.open = true;
    card.focus({ preventScroll: true });
    this.light(marker);
    card.scrollIntoView({ block: "nearest", behavior: isCalm() ? "auto" : "smooth" });
  }
}

/** Show of a passage the blocks with cited sentences, or the first paragraph; the rest at a click. */
function excerpt(card) {
  const blocks = [...card.querySelector(".passage").children];
  const cites = blocks.filter((block) => block.matches(".cites") || block.querySelector(".cites"));
  const shown = cites.length ? cites : [blocks.find((block) => block.matches("p:not(.heading)")) ?? blocks[0]];
  for (const block of blocks) block.classList.toggle("shown", shown.includes(block));
  card.querySelector(".toggle").hidden = blocks.every((block) => shown.includes(block));
}
