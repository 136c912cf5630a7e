// One request to the server: its events as they come, and its failures in words for a person.

const CHAT = "api/chat";
const MODELS = "v1/models";

/** The server refused or cannot be reached; `status` is the HTTP status, 0 where there was no reply. */
export class RequestFailed extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The modes that the server offers. */
export async function modes(apiKey) {
  const response = await send(MODELS, { headers: headers(apiKey) });
  return (await response.json()).data.map((model) => model.duet.mode);
}

/**
 * Ask, and yield events ({type, ...}) until the stream ends or `signal` aborts.
 *
 * @param request the JSON body
 * @throws RequestFailed, or an AbortError
 */
export async function* ask(request, { apiKey, signal }) {
  const response = await send(CHAT, {
    method: "POST",
    headers: { ...headers(apiKey), "content-type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await read(reader);
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line) yield JSON.parse(line);
    }
  }
}

async function send(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    throw unreachable(error);
  }
  if (!response.ok) throw new RequestFailed(await reason(response), response.status);
  return response;
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    throw unreachable(error);
  }
}

function unreachable(error) {
  if (error.name === "AbortError") return error;
  return new RequestFailed("The server cannot be reached. Is `duet serve` still running?", 0);
}

/** The message of an error in OpenAI's shape, or the status. */
async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

function headers(apiKey) {
  return apiKey ? { authorization: `Bearer ${apiKey}` } : {};
}
