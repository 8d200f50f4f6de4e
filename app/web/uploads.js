/** Files into the service: chosen or dropped anywhere on the page, one after the other, each with its progress. */

import { uploadFile } from "./api.js";
import { loadDocuments, openDocuments } from "./documents.js";
import { announce, button, byId, el } from "./dom.js";
import { fileSize, plural } from "./words.js";

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

/** One request for each file: the results come as they are there, and a file too large fails alone. */
async function upload(files) {
  openDocuments();
  const lines = files.map((file) => new UploadLine(file));
  byId("upload-results").replaceChildren(...lines.map(({ node }) => node));
  for (const line of lines) await line.run();
  await loadDocuments();
}

/** A file on its way, and what became of it. */
class UploadLine {
  constructor(file) {
    this.file = file;
    this.stopping = new AbortController();
    this.bar = el("progress", { "aria-label": `Progress of ${file.name}`, max: "1", value: "0" });
    this.text = el("span", { class: "small outcome" }, "waiting");
    this.stop = button("Cancel", {
      class: "quiet cancel", "aria-label": `Cancel ${file.name}`, onclick: () => this.stopping.abort(),
    });
    this.node = el("li", { class: "upload" },
      el("span", { class: "file", dir: "auto" }, file.name),
      el("span", { class: "small" }, fileSize(file.size)),
      this.stop,
      this.bar,
      this.text);
  }

  async run() {
    const { ok, text } = await this.send();
    this.node.classList.add(ok ? "done" : "failed");
    this.text.textContent = text;
    announce(`${this.file.name}: ${text}`);
    this.bar.remove();
    this.stop.remove();
  }

  async send() {
    try {
      this.stopping.signal.throwIfAborted();
      await this.file.slice(0, 1).arrayBuffer(); // A dropped folder is a file that cannot be read.
    } catch (error) {
      if (error.name === "AbortError") return { ok: false, text: "cancelled" };
      return { ok: false, text: "failed: cannot be read. If it is a folder, drop the files in it." };
    }
    try {
      const options = { signal: this.stopping.signal, onSent: (share) => this.showSent(share) };
      return describeReceipts(await uploadFile(this.file, options));
    } catch (error) {
      return { ok: false, text: error.name === "AbortError" ? "cancelled" : `failed: ${error.message}` };
    }
  }

  showSent(share) {
    this.bar.value = share;
    this.text.textContent = share < 1 ? `sending, ${Math.floor(100 * share)}%` : "reading and indexing";
    if (share >= 1) this.bar.removeAttribute("value"); // How long that takes is not known.
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
