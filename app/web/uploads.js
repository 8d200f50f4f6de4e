/** Files into the service: chosen or dropped anywhere on the page, one after the other, each with its progress. */

import { cancelIngestion, followIngestion, uploadFile } from "./api.js";
import { loadDocuments, openDocuments } from "./documents.js";
import { announce, button, byId, el } from "./dom.js";
import { RequestError } from "./http.js";
import { fileSize, number, plural } from "./words.js";

export function listenForFiles() {
  byId("file-input").addEventListener("change", ({ target }) => {
    const files = [...target.files];
    target.value = ""; // Else choosing the same file again is no change.
    upload(files);
  });
  // A file that is dropped would else open in place of the page, and the conversation would be gone.
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    if (event.dataTransfer.types.includes("Files")) document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    const files = [...event.dataTransfer.files];
    if (files.length) upload(files);
  });
}

const IS_NEW = new Set(["created", "updated"]);
let queue = Promise.resolve();

/** One request for each file: the results come as they are there, and a file too large fails alone. */
function upload(files) {
  openDocuments();
  const lines = files.map((file) => new UploadLine(file));
  const list = byId("upload-results");
  for (const finished of list.querySelectorAll(".done, .failed")) finished.remove();
  list.append(...lines.map(({ node }) => node));
  queue = queue.then(async () => {
    let hasChanged = false;
    for (const line of lines) hasChanged = await line.run() || hasChanged;
    if (hasChanged) await loadDocuments();
  });
}

/** A file on its way, and what became of it. */
class UploadLine {
  constructor(file) {
    this.file = file;
    this.stopping = new AbortController();
    this.bar = el("progress", { "aria-label": `Progress of ${file.name}`, max: "1", value: "0" });
    this.text = el("span", { class: "small outcome" }, "waiting");
    this.stop = button("Cancel", {
      class: "quiet cancel", "aria-label": `Cancel ${file.name}`, onclick: () => this.cancel(),
    });
    this.node = el("li", { class: "upload" },
      el("span", { class: "file", dir: "auto" }, file.name),
      el("span", { class: "small" }, fileSize(file.size)),
      this.stop,
      this.bar,
      this.text);
  }

  cancel() {
    this.showText("cancelling");
    this.stopping.abort();
    byId("file-input").focus(); // The button is about to go, and the focus with it.
  }

  /** Send it, show what became of it, and tell whether any document is new or changed. */
  async run() {
    const { ok, text, hasChanged = false } = await this.send();
    this.node.classList.add(ok ? "done" : "failed");
    this.showText(text);
    announce(`${this.file.name}: ${text}`);
    this.bar.remove();
    this.stop.remove();
    return hasChanged;
  }

  async send() {
    try {
      this.stopping.signal.throwIfAborted();
      // A dropped folder is a file that cannot be read.
      await this.file.slice(0, 1).arrayBuffer().catch(() => {
        throw new RequestError("cannot be read. If it is a folder, drop the files in it.");
      });
      const options = { signal: this.stopping.signal, onSent: (share) => this.showSent(share) };
      return await this.follow(await uploadFile(this.file, options));
    } catch (error) {
      return error.name === "AbortError" ? { ok: true, text: "cancelled" }
        : { ok: false, text: `failed: ${error.message}` };
    }
  }

  /** All has been sent; now it is read and indexed, document by document. */
  async follow({ id }) {
    const cancel = () => cancelIngestion(id).catch((error) => this.showText(error.message));
    if (this.stopping.signal.aborted) cancel();
    this.stopping.signal.addEventListener("abort", cancel);
    const results = [];
    for await (const { event, content } of followIngestion(id)) {
      if (event === "result") results.push(content);
      if (event === "progress") this.showIngested(content);
      if (event === "end" && content.status !== "completed") {
        const text = content.error ? `${content.status}: ${content.error}` : content.status;
        return { ok: content.status === "cancelled", text, hasChanged: results.length > 0 };
      }
    }
    return { ...describeReceipts(results), hasChanged: results.some(({ status }) => IS_NEW.has(status)) };
  }

  showSent(share) {
    this.bar.value = share;
    this.showText(share < 1 ? `sending, ${Math.floor(100 * share)}%` : "reading and indexing");
    if (share >= 1) this.bar.removeAttribute("value"); // How long that takes is not known yet.
  }

  showIngested({ notice, progress: { num_documents: numDocuments, num_documents_done: numDone } }) {
    const isCounted = numDocuments > 1;
    if (isCounted) this.bar.value = numDone / numDocuments;
    this.showText(notice ?? (isCounted ? `indexing, ${number(numDone)} of ${plural(numDocuments, "document")}`
      : "reading and indexing"));
  }

  showText(text) {
    this.text.textContent = text;
  }
}

/** "created, 3 chunks", or for a file that holds several documents "12 created, 1 failed: no text". */
function describeReceipts(receipts) {
  const reasons = new Set(receipts.map(({ error }) => error).filter(Boolean));
  const why = reasons.size ? `: ${[...reasons].join("; ")}` : "";
  const ok = receipts.every(({ status }) => status !== "failed");
  if (receipts.length === 1) {
    const [{ status, num_chunks: chunks }] = receipts;
    return { ok, text: ok ? `${status}, ${plural(chunks, "chunk")}` : status + why };
  }
  const counts = ["created", "updated", "unchanged", "failed"]
    .map((status) => [receipts.filter((receipt) => receipt.status === status).length, status])
    .filter(([count]) => count);
  return { ok, text: counts.map((pair) => pair.join(" ")).join(", ") + why };
}
