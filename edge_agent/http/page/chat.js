// The conversation: what was said, and one answer at a time under way.

import { Answer, FAILED, STOPPED } from "./answer.js";
import { ask, RequestFailed } from "./stream.js";

export class Chat {
  constructor(settings) {
    this.settings = settings;
    /** {role, content}, without the system prompt. */
    this.messages = [];
    this.controller = null;
  }

  get isAnswering() {
    return this.controller !== null;
  }

  /** Add a question. One before it that got no answer is no part of the conversation. */
  say(text) {
    if (this.messages.at(-1)?.role === "user") this.messages.pop();
    this.messages.push({ role: "user", content: text });
  }

  clear() {
    this.stop();
    this.messages = [];
  }

  stop() {
    this.controller?.abort();
  }

  /**
   * Ask the last question of the conversation.
   *
   * @param answer takes the events
   * @param changed called after each of them
   * @returns the RequestFailed that ended it, or null
   */
  async answer(answer, changed) {
    const controller = new AbortController();
    this.controller = controller;
    const { messages } = this;
    let failure = null;
    try {
      const options = { apiKey: this.settings.apiKey, signal: controller.signal };
      for await (const event of ask(this.request(messages, answer.mode), options)) {
        answer.apply(event, performance.now());
        changed();
      }
      if (!answer.isOver) answer.end(FAILED, "The server ended the answer early. Try again.");
    } catch (error) {
      if (error.name === "AbortError") {
        answer.end(STOPPED);
      } else if (error instanceof RequestFailed) {
        failure = error;
        answer.end(FAILED, error.message);
      } else {
        throw error;
      }
    } finally {
      if (answer.text) messages.push({ role: "assistant", content: answer.text });
      if (this.controller === controller) this.controller = null;
      changed();
    }
    return failure;
  }

  /** Take back the last answer, so that its question can be asked again. */
  forgetAnswer() {
    if (this.messages.at(-1)?.role === "assistant") this.messages.pop();
  }

  begin(mode) {
    return new Answer(mode, performance.now());
  }

  request(messages, mode) {
    const own = { mode, private: this.settings.get("private") || null };
    for (const name of ["temperature", "max_tokens"]) own[name] = this.settings.get(name);
    const settings = Object.fromEntries(Object.entries(own).filter(([, value]) => value !== null));
    const system = this.settings.get("system").trim();
    return { messages: system ? [{ role: "system", content: system }, ...messages] : [...messages], settings };
  }
}
