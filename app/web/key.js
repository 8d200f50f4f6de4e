/** The reader's key, for a service that asks for one: in a dialog, kept until the tab is closed. */

import { byId } from "./dom.js";

const STORED_AS = "cleave-key";
let question = null;

export function hasKey() {
  return sessionStorage.getItem(STORED_AS) !== null;
}

/** The headers that send the key, if there is one. */
export function keyHeaders() {
  return hasKey() ? { authorization: `Bearer ${sessionStorage.getItem(STORED_AS)}` } : {};
}

/** Ask for a key, with the server's words why; false if none is given. Requests that fail together ask once. */
export function askForKey(why) {
  question ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    byId("key-refusal").textContent = why;
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      question = null;
      const key = byId("key").value.trim();
      byId("key").value = "";
      const isGiven = dialog.returnValue === "use" && key !== "";
      if (isGiven) sessionStorage.setItem(STORED_AS, key);
      resolve(isGiven);
    }, { once: true });
    dialog.showModal();
  });
  return question;
}
