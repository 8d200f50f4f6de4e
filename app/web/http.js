/** Requests over HTTP: with the reader's key, errors in the server's words, event streams, uploads with progress. */

import { askForKey, keyHeaders } from "./key.js";
import { plural } from "./words.js";

/** A failed request. `message` is for the reader, `detail` for whoever looks into it. */
export class RequestError extends Error {
  constructor(message, detail = "") {
    super(message);
    this.detail = detail;
  }
}

export async function request(path, options = {}) {
  return accepted(() => fetch(path, { ...options, headers: { ...options.headers, ...keyHeaders() } })
    .catch((error) => { throw connectionError(error, "The server cannot be reached."); }));
}

export async function requestJson(path, options) {
  return (await request(path, options)).json();
}

/** Send a form; `onSent` hears the share that has been sent, from 0 to 1. Not by fetch, which does not tell it. */
export async function sendForm(path, form, { onSent, signal }) {
  const send = () => new Promise((resolve, reject) => {
    signal.throwIfAborted();
    const sending = new XMLHttpRequest();
    sending.open("POST", path);
    for (const [name, value] of Object.entries(keyHeaders())) sending.setRequestHeader(name, value);
    sending.upload.addEventListener("progress", ({ loaded, total }) => onSent(total ? loaded / total : 1));
    sending.addEventListener("load", () => resolve(responseOf(sending)));
    sending.addEventListener("error", () => reject(new RequestError("The connection to the server was lost.")));
    sending.addEventListener("abort", () => reject(signal.reason));
    // Once all is sent, the server works on it, and only its answer says how to end that.
    const abort = () => sending.abort();
    signal.addEventListener("abort", abort, { once: true });
    sending.upload.addEventListener("load", () => signal.removeEventListener("abort", abort));
    sending.send(form);
  });
  return (await accepted(send)).json();
}

/** The events of a server-sent event stream. The API sends one line of data per event; comments are keep-alives. */
export async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
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

/** A response that is no error. Where a key is missing, the reader is asked for one and it is sent again. */
async function accepted(send) {
  const response = await send();
  if (response.ok) return response;
  const error = await responseError(response);
  if (response.status === 401 && await askForKey(error.message)) return accepted(send);
  throw error;
}

/** The server's own words where it sent any: a proxy in front of it may answer with HTML. */
async function responseError(response) {
  const { error } = await response.json().catch(() => ({}));
  const seconds = Number(response.headers.get("retry-after"));
  const wait = seconds > 0 ? ` Try again in ${plural(seconds, "second")}.` : "";
  const message = error?.message ?? "The server could not handle the request.";
  return new RequestError(message + wait, [`HTTP ${response.status}`, error?.code].filter(Boolean).join(", "));
}

/** A stop by the reader stays an AbortError; all else that fetch and read throw means a lost connection. */
function connectionError(error, message) {
  return error.name === "AbortError" ? error : new RequestError(message, error.message);
}

function responseOf(sent) {
  const retryAfter = sent.getResponseHeader("retry-after");
  return new Response(sent.response, { status: sent.status, headers: retryAfter ? { "retry-after": retryAfter } : {} });
}
