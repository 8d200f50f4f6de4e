/** The dialog with the list of documents: what is there, page by page, and deleting it. */

import { deleteDocument, fetchDocuments } from "./api.js";
import { announce, button, byId, closeByClickBeside, el, errorBox, smallPrint } from "./dom.js";
import { titleButton } from "./reader.js";
import { byline, number, plural, titleOf } from "./words.js";

const list = { total: 0, lastId: null };

export function listenForDocuments() {
  byId("open-documents").addEventListener("click", openDocuments);
  byId("more-documents").addEventListener("click", () => loadDocuments({ more: true }));
  closeByClickBeside(byId("documents-dialog"));
}

export function openDocuments() {
  const dialog = byId("documents-dialog");
  if (dialog.open) return;
  dialog.showModal();
  loadDocuments();
}

export function setTotal(total) {
  list.total = total;
  byId("document-count").textContent = number(total);
  byId("documents-total").textContent = plural(total, "document");
  byId("no-documents").hidden = total > 0;
}

/** The first page of documents, or the next one after those that are shown. */
export async function loadDocuments({ more = false } = {}) {
  const notice = byId("documents-notice");
  const rows = byId("document-list");
  const next = byId("more-documents");
  next.disabled = true; // A second click would add the same page again.
  try {
    const page = await fetchDocuments({ after: more ? list.lastId : null });
    notice.replaceChildren();
    if (!more) rows.replaceChildren();
    rows.append(...page.data.map(documentRow));
    list.lastId = page.data.at(-1)?.id ?? list.lastId;
    next.hidden = !page.has_more;
    setTotal(page.total);
  } catch (error) {
    notice.replaceChildren(errorBox(error, () => loadDocuments({ more })));
  }
  next.disabled = false;
}

function documentRow(item) {
  const added = new Date(item.ingested_at * 1000).toLocaleDateString(undefined, { dateStyle: "medium" });
  const size = `${plural(item.num_characters, "character")} · ${plural(item.num_chunks, "chunk")}`;
  const row = el("li", { class: "document-row", "data-id": item.id },
    el("div", {},
      el("p", { class: "title", dir: "auto" }, titleButton(item)),
      smallPrint(item, byline(item.metadata), size, `added ${added}`)),
    el("div", { class: "actions" }));
  offerDelete(row, item);
  return row;
}

function offerDelete(row, item) {
  const attributes = { class: "quiet delete", "aria-label": `Delete ${titleOf(item)}` };
  row.querySelector(".actions").replaceChildren(
    button("Delete", { ...attributes, onclick: () => confirmDelete(row, item) }));
}

/** In the row itself, so that it stays in sight what is about to go. */
function confirmDelete(row, item) {
  const keep = () => {
    offerDelete(row, item);
    row.querySelector(".delete").focus();
  };
  row.querySelector(".actions").replaceChildren(
    button("Delete for good", {
      class: "danger confirm-delete", "aria-label": `Delete for good: ${titleOf(item)}`, onclick: () => remove(row, item),
    }),
    button("Keep", { class: "quiet keep", onclick: keep }));
  row.querySelector(".keep").focus();
}

async function remove(row, item) {
  row.querySelectorAll("button").forEach((each) => { each.disabled = true; });
  try {
    await deleteDocument(item.id);
  } catch (error) {
    offerDelete(row, item);
    byId("documents-notice").replaceChildren(errorBox(error));
    return;
  }
  const neighbour = row.nextElementSibling ?? row.previousElementSibling;
  row.remove();
  setTotal(list.total - 1);
  announce(`Deleted ${titleOf(item)}.`);
  (neighbour?.querySelector("button") ?? byId("file-input")).focus();
}
