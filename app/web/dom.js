/**
 * Making and changing nodes. What the server sends was written by others: it enters the page as text nodes only, and
 * an address becomes a link only through `link`. Nothing here or elsewhere parses HTML; the page's policy forbids it.
 */

export const byId = (id) => document.getElementById(id);

/** Make an element. `on…` attributes are listeners, strings among the children become text nodes. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...present(children));
  return node;
}

/** Leave out what is not there, so that a part can be written as `condition && node`. */
export function present(nodes) {
  return nodes.filter((node) => node instanceof Node || typeof node === "string" && node !== "");
}

/** A button that does not submit the form around it. */
export function button(label, attributes) {
  return el("button", { type: "button", ...attributes }, label);
}

/** A link to a whole web address, else null: a path in a foreign text does not mean one on this server. */
export function link(address, ...label) {
  if (!/^https?:\/\//i.test(address) || !URL.canParse(address)) return null;
  return el("a", { href: new URL(address).href, target: "_blank", rel: "noopener noreferrer" }, ...label);
}

/** Facts about a document in one line, as far as they are there; last its own web address, shown by the host. */
export function smallPrint({ url }, ...facts) {
  const parts = present([...facts, URL.canParse(url ?? "") && link(url, new URL(url).host)]);
  return el("p", { class: "small", dir: "auto" }, ...parts.flatMap((part, i) => (i ? [" · ", part] : [part])));
}

/** What went wrong, for the reader, with a way to try again if there is one. */
export function errorBox(error, retry) {
  return el("div", { class: "error", role: "alert" },
    el("p", {}, error.message),
    error.detail && el("p", { class: "small" }, error.detail),
    retry && button("Try again", { class: "retry", onclick: retry }));
}

/** Have screen readers read a text when they have time. */
export function announce(text) {
  byId("announcer").textContent = text;
}

/** Change only what differs: a selection, or the focus on a marker, survives the rest streaming in. */
export function patch(parent, fresh) {
  const old = [...parent.childNodes];
  fresh.forEach((node, i) => {
    if (i >= old.length) parent.append(node);
    else if (!old[i].isEqualNode(node)) patchNode(old[i], node);
  });
  old.slice(fresh.length).forEach((node) => node.remove());
}

function patchNode(old, fresh) {
  const isSameTag = old.cloneNode(false).isEqualNode(fresh.cloneNode(false));
  if (old instanceof Element && isSameTag) patch(old, [...fresh.childNodes]);
  else if (old instanceof Text && fresh instanceof Text && fresh.data.startsWith(old.data)) {
    old.appendData(fresh.data.slice(old.data.length));
  } else old.replaceWith(fresh);
}

/** A dialog closes by Escape and by its buttons; by a click beside it too, where the browser does not know how. */
export function closeByClickBeside(dialog) {
  if ("closedBy" in dialog) return;
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
}
