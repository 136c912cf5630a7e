// The mode switch: radio buttons, so that the arrow keys work as everywhere.

import { element } from "./dom.js";

/** In the order of the switch; the first is the default. */
export const MODES = {
  auto: "The router decides who answers",
  local: "The small model on this machine, alone",
  speculate: "The small model drafts, the large one verifies",
  guide: "The large model begins, the small one finishes",
  cloud: "The large model, alone",
};

/** Offer the server's modes. */
export function modeSwitch(fieldset, available, chosen, changed) {
  const options = Object.keys(MODES).filter((mode) => available.includes(mode));
  fieldset.replaceChildren(
    fieldset.querySelector("legend"),
    ...options.map((mode) => {
      const input = element("input", { type: "radio", name: "mode", value: mode });
      input.checked = mode === chosen;
      input.addEventListener("change", () => changed(mode));
      return element("label", { title: MODES[mode] }, [input, element("span", {}, [mode[0].toUpperCase() + mode.slice(1)])]);
    }),
  );
}
