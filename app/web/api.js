/** The routes of the server that the page uses. */

import { request, requestJson, RequestError, sendForm, serverEvents } from "./http.js";

const MODEL = "cleave";
const DOCUMENTS_PER_PAGE = 50;

/** The chunks of one streamed completion. A stream that ends without `[DONE]` was cut off. */
export async function* completionChunks({ messages, rag }, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ model: MODEL, messages, rag, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const { data } of serverEvents(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new RequestError(chunk.error.message, chunk.error.code);
    yield chunk;
  }
  throw new RequestError("The connection closed before the answer was complete.");
}

/** The profile that answers here, and the language models that are served by themselves. */
export async function fetchModels() {
  const { data } = await requestJson("/v1/models");
  return { profile: data.find(({ id }) => id === MODEL), others: data.filter((one) => one.owned_by !== MODEL) };
}

/** A page of documents: the first, or the one behind the document `after`. */
export function fetchDocuments({ after, limit = DOCUMENTS_PER_PAGE } = {}) {
  const query = new URLSearchParams({ limit, ...(after && { after }) });
  return requestJson(`/v1/documents?${query}`);
}

export function deleteDocument(id) {
  return requestJson(`/v1/documents/${encodeURIComponent(id)}`, { method: "DELETE" });
}

/** A document with its text, and where in that its chunks are. */
export function fetchDocument(id, signal) {
  return requestJson(`/v1/documents/${encodeURIComponent(id)}`, { signal });
}

/** The metadata fields of the documents, with their values and how many documents have each. */
export async function fetchFacets() {
  return (await requestJson("/v1/facets")).data;
}

/** Send a file; give the ingestion that takes it in. `onSent` hears the share that has been sent. */
export function uploadFile(file, { onSent, signal }) {
  const form = new FormData();
  form.append("files", file);
  return sendForm("/v1/documents?background=true", form, { onSent, signal });
}

/** Follow an ingestion: `progress` and `result` events as they come, each with its content, then one `end`. */
export async function* followIngestion(id) {
  for await (const { event, data } of serverEvents(await request(`/v1/ingestions/${id}/events`))) {
    const content = JSON.parse(data);
    if (event === "error") throw new RequestError(content.error.message, content.error.code);
    yield { event, content };
    if (event === "end") return;
  }
  throw new RequestError("The connection closed before the end was told; the ingestion goes on.");
}

export function cancelIngestion(id) {
  return requestJson(`/v1/ingestions/${id}/cancel`, { method: "POST" });
}
