/** The reader's key, for a service that asks for one: in a dialog, kept until the tab is closed. */

import { byId } from "./dom.js";

const STORED_AS = "cleave-key";
let question = null;

/** The headers that send the key, if there is one. */
export function keyHeaders() {
  const key = sessionStorage.getItem(STORED_AS);
  return key === null ? {} : { authorization: `Bearer ${key}` };
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
