// The field for the question and its keys.

const MAX_HEIGHT_PX = 220;

/**
 * @param form holds #question, #send and #stop
 * @param send called with the text
 * @param stop called by the Stop button and by Escape, while an answer is under way
 */
export function composer(form, { send, stop }) {
  const field = form.querySelector("#question");
  const sendButton = form.querySelector("#send");
  const stopButton = form.querySelector("#stop");
  let isAnswering = false;

  const fit = () => {
    field.style.height = "auto";
    field.style.height = `${Math.min(field.scrollHeight, MAX_HEIGHT_PX)}px`;
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = field.value.trim();
    if (!text || isAnswering) return;
    field.value = "";
    fit();
    send(text);
  });
  field.addEventListener("input", fit);
  field.addEventListener("keydown", (event) => {
    // While an input method composes a character, Enter is its own.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && isAnswering && !document.querySelector("dialog[open]")) stop();
  });
  stopButton.addEventListener("click", stop);

  return {
    answering(value) {
      const focused = document.activeElement === stopButton;
      isAnswering = value;
      sendButton.hidden = value;
      stopButton.hidden = !value;
      if (focused && !value) field.focus();
    },
    focus: () => field.focus(),
  };
}
