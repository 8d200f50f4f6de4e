/**
 * Markdown as nodes. `marked` reads it; its tokens become elements here, one by one, and what is no Markdown of the
 * kinds below stays text: HTML too. Nothing is loaded: an image becomes a link to it.
 */

import { el, link, present } from "./dom.js";
import { Marked } from "./vendor/marked/marked.esm.js";

const MAX_CHARACTERS = 50_000;

/** `[1]` cites a source, whatever else Markdown makes of brackets. The space before it goes: it stands at its word. */
const CITATION = /^ ?\[(\d{1,3})\](?!\()/;
const citation = {
  name: "citation",
  level: "inline",
  start: (text) => text.match(/ ?\[\d/)?.index,
  tokenizer(text) {
    const match = CITATION.exec(text);
    return match ? { type: "citation", raw: match[0], n: Number(match[1]) } : undefined;
  },
};
const none = () => undefined;
const marked = new Marked({
  breaks: true,
  extensions: [citation],
  // HTML is text. And a text must not redefine `[1]` as a link of its own.
  tokenizer: { html: none, tag: none, def: none },
});

/** The blocks of a text. `cite(n)` makes the marker of source n, or nothing where there is no such source. */
export function renderMarkdown(text, { cite = none, heading = "h3" } = {}) {
  return tokensOf(text).flatMap((token) => renderToken(token, { cite, heading }));
}

/** Thousands of nested quotes exhaust the stack, and a very long text the reader: such a text is shown as it is. */
function tokensOf(text) {
  try {
    if (text.length <= MAX_CHARACTERS) return marked.lexer(text);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  return [{ type: "paragraph", tokens: [{ type: "text", raw: text, text }] }];
}

function renderToken(token, how) {
  const inner = () => (token.tokens ?? []).flatMap((one) => renderToken(one, how));
  const wrapped = (tag, attributes) => [el(tag, attributes, ...inner())];
  switch (token.type) {
    case "space": return [];
    case "paragraph": return wrapped("p");
    case "heading": return wrapped(how.heading, { class: "heading" });
    case "blockquote": return wrapped("blockquote");
    case "strong":
    case "em":
    case "del": return wrapped(token.type);
    case "hr":
    case "br": return [el(token.type)];
    case "list": return [renderList(token, how)];
    case "table": return [renderTable(token, how)];
    case "code": return [el("pre", { tabindex: "0" }, el("code", {}, token.text))];
    case "codespan": return [el("code", {}, token.text)];
    case "checkbox": return [token.checked ? "☑ " : "☐ "];
    case "link": return present([link(token.href, ...inner()) ?? token.raw]);
    case "image": return present([link(token.href, token.text || token.href) ?? token.raw]);
    case "citation": return [how.cite(token.n) ?? token.raw];
    case "text": return token.tokens ? inner() : [token.text];
    case "escape": return [token.text];
    default: return [token.raw];
  }
}

function renderList({ ordered, start, items, loose }, how) {
  const nodes = items.map(({ tokens }) => el("li", {}, ...tokens.flatMap((token) => renderToken(token, how))));
  return el(ordered ? "ol" : "ul", { class: loose && "loose", start: ordered ? start : undefined }, ...nodes);
}

function renderTable({ header, rows }, how) {
  const row = (cells, tag) => el("tr", {}, ...cells.map(({ tokens, align }) =>
    el(tag, { class: align && `align-${align}`, scope: tag === "th" && "col" },
      ...tokens.flatMap((token) => renderToken(token, how)))));
  return el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, el("table", {},
    el("thead", {}, row(header, "th")),
    el("tbody", {}, ...rows.map((cells) => row(cells, "td")))));
}
