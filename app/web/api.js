/** Requests to the server: errors in its own words, streams event by event, uploads with their progress. */

import { plural } from "./words.js";

const MODEL = "cleave";
const DOCUMENTS_PER_PAGE = 100;

/** A failed request. `message` is for the reader, `detail` for whoever looks into it. */
export class RequestError extends Error {
  constructor(message, detail = "") {
    super(message);
    this.detail = detail;
  }
}

export async function request(path, options) {
  const response = await fetch(path, options).catch((error) => {
    throw connectionError(error, "The server cannot be reached.");
  });
  if (!response.ok) throw await responseError(response);
  return response;
}

export async function requestJson(path, options) {
  return (await request(path, options)).json();
}

/** The model that answers from the documents, and the language models beside it. */
export async function fetchModels() {
  const { data } = await requestJson("/v1/models");
  return { profile: data.find(({ id }) => id === MODEL), others: data.filter(({ id }) => id !== MODEL) };
}

/** A page of documents: the first, or the one behind the document `after`. */
export function fetchDocuments({ after, limit = DOCUMENTS_PER_PAGE } = {}) {
  const query = new URLSearchParams({ limit, ...(after && { after }) });
  return requestJson(`/v1/documents?${query}`);
}

export function deleteDocument(id) {
  return requestJson(`/v1/documents/${encodeURIComponent(id)}`, { method: "DELETE" });
}

/** The metadata fields that documents have, with their values and how many documents have each. */
export async function fetchFacets() {
  return (await requestJson("/v1/facets")).data;
}

/** The chunks of one streamed completion. A stream that ends without `[DONE]` was cut off. */
export async function* completionChunks({ messages, rag }, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ model: MODEL, messages, rag, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const { data } of serverEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new RequestError(chunk.error.message, chunk.error.code);
    yield chunk;
  }
  throw new RequestError("The connection closed before the answer was complete.");
}

/** Send a file; give the receipts of its documents. `onSent` hears the share that has been sent, from 0 to 1. */
export function uploadFile(file, { onSent, signal }) {
  const form = new FormData();
  form.append("files", file);
  // Not fetch: it does not say how much of a request has been sent.
  const sending = new XMLHttpRequest();
  sending.open("POST", "/v1/documents");
  sending.upload.addEventListener("progress", ({ loaded, total }) => onSent(total ? loaded / total : 1));
  signal.addEventListener("abort", () => sending.abort());
  return new Promise((resolve, reject) => {
    sending.addEventListener("load", () => resolve(new Response(sending.response, {
      status: sending.status, headers: { "retry-after": sending.getResponseHeader("retry-after") ?? "" },
    })));
    sending.addEventListener("error", () => reject(new RequestError("The server cannot be reached.")));
    sending.addEventListener("abort", () => reject(new DOMException("Stopped", "AbortError")));
    sending.send(form);
  }).then(async (response) => {
    if (!response.ok) throw await responseError(response);
    return (await response.json()).data;
  });
}

/** A stop by the reader stays an AbortError; all else that fetch and read throw means a lost connection. */
function connectionError(error, message) {
  return error.name === "AbortError" ? error : new RequestError(message, error.message);
}

/** The server's own words where it sent any: a proxy in front of it may answer with HTML. */
async function responseError(response) {
  const { error } = await response.json().catch(() => ({}));
  const seconds = Number(response.headers.get("retry-after"));
  const wait = seconds > 0 ? ` Try again in ${plural(seconds, "second")}.` : "";
  const message = error?.message ?? "The server could not handle the request.";
  return new RequestError(message + wait, [`HTTP ${response.status}`, error?.code].filter(Boolean).join(", "));
}

/** The events of a server-sent event stream. The API sends one line of data per event; comments are keep-alives. */
async function* serverEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  let event = "message";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        throw connectionError(error, "The connection to the server was lost.");
      });
      if (done) return;
      const lines = (pending + value).split("\n");
      pending = lines.pop();
      for (const line of lines) {
        if (line === "") event = "message";
        else if (line.startsWith("event:")) event = line.slice("event:".length).trim();
        else if (line.startsWith("data:")) yield { event, data: line.slice("data:".length).trim() };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
