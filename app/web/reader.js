/** The dialog with one document's text as the service keeps it, and the passage of it that somebody wants to see. */

import { fetchDocument } from "./api.js";
import { button, byId, closeByClickBeside, el, errorBox, smallPrint } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { byline, titleOf } from "./words.js";

export function listenForReader() {
  closeByClickBeside(byId("reader-dialog"));
}

/** A document's title; it opens the text, at the source's passage if it is that of a source. */
export function titleButton(item, source) {
  return button(titleOf(item), { "aria-haspopup": "dialog", onclick: () => openDocument(item, source) });
}

/** By a request and not by a link: a link to the document's page could not bring the reader's key along. */
async function openDocument(item, source) {
  const dialog = byId("reader-dialog");
  const text = byId("reader-text");
  const closing = new AbortController();
  dialog.addEventListener("close", () => closing.abort(), { once: true });
  byId("reader-title").textContent = titleOf(item);
  byId("reader-facts").replaceChildren(smallPrint(item, byline(item.metadata)));
  text.replaceChildren();
  dialog.showModal();
  await load();

  async function load() {
    try {
      const whole = await fetchDocument(item.id, closing.signal);
      text.replaceChildren(...render(whole.text, source ? chunksOf(source, whole.chunks) : []));
      text.querySelector(".cited-passage")?.scrollIntoView({ block: "nearest" });
    } catch (error) {
      if (error.name !== "AbortError") text.replaceChildren(errorBox(error, load));
    }
  }
}

/** The chunks that a source's passage is made of: the one that it names, maybe one beside it. None if they changed. */
function chunksOf({ chunk_id: id, text: passage }, chunks) {
  const named = Number(id.slice(id.lastIndexOf("#") + 1));
  return chunks.filter(({ index, text }) => Math.abs(index - named) <= 1 && passage.includes(text));
}

/** The text with some chunks of it apart. The server counts whole characters; some are two to JavaScript. */
function render(text, chunks) {
  if (!chunks.length) return renderMarkdown(text);
  const characters = Array.from(text);
  const piece = (start, end) => renderMarkdown(characters.slice(start, end).join(""));
  const { start } = chunks[0];
  const { end } = chunks.at(-1);
  return [...piece(0, start), el("div", { class: "passage cited-passage" }, ...piece(start, end)), ...piece(end)];
}
