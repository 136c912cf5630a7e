// The user's own settings: kept in this browser, the API key only until the tab closes.

const STORED = "duet.settings";
const KEY = "duet.api-key";
const DEFAULTS = { mode: null, system: "", temperature: null, max_tokens: null, private: false, provenance: true, theme: "system" };

export class Settings {
  constructor() {
    this.values = { ...DEFAULTS, ...read(localStorage, STORED) };
    this.apiKey = read(sessionStorage, KEY) ?? "";
  }

  get(name) {
    return this.values[name];
  }

  set(changes) {
    this.values = { ...this.values, ...changes };
    write(localStorage, STORED, this.values);
  }

  setApiKey(key) {
    this.apiKey = key;
    write(sessionStorage, KEY, key);
  }
}

function read(storage, name) {
  try {
    return JSON.parse(storage.getItem(name));
  } catch {
    return null; // blocked by the browser, or not ours
  }
}

function write(storage, name, value) {
  try {
    storage.setItem(name, JSON.stringify(value));
  } catch {
    // Blocked by the browser: the settings last as long as the page.
  }
}

/** The dialog: shows the settings in force, and calls `saved` after a change. */
export function settingsDialog(dialog, settings, saved) {
  const form = dialog.querySelector("form");
  const { elements: fields } = form;
  const keyField = form.querySelector("#key-field");

  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "save") return;
    settings.set({
      system: fields.system.value,
      temperature: number(fields.temperature),
      max_tokens: number(fields.max_tokens),
      private: fields.private.checked,
      provenance: fields.provenance.checked,
    });
    settings.setApiKey(fields.api_key.value.trim());
    saved();
  });

  return {
    /** @param askForKey the server has refused a request without the right key */
    open({ askForKey = false } = {}) {
      for (const name of ["system", "temperature", "max_tokens"]) fields[name].value = settings.get(name) ?? "";
      for (const name of ["private", "provenance"]) fields[name].checked = settings.get(name);
      fields.api_key.value = settings.apiKey;
      keyField.hidden &&= !askForKey && !settings.apiKey;
      dialog.returnValue = "";
      dialog.showModal();
      fields[askForKey ? "api_key" : "system"].focus();
    },
  };
}

function number(field) {
  return Number.isFinite(field.valueAsNumber) ? field.valueAsNumber : null;
}
