// Calls to the server that sent the page: with the token of the tab, and never without an end.

const TOKEN = "token";

export const token = {
  get: () => sessionStorage.getItem(TOKEN) ?? "",
  set: (value) => sessionStorage.setItem(TOKEN, value),
};

export class NoTokenError extends Error {}

// Resolves to the reply with its body as `read` gives it; rejects with what to tell a person.
export async function ask(path, read, { timeoutMs, signal, headers, ...options }) {
  const late = new AbortController();
  const timer = setTimeout(
    () => late.abort(new Error(`no answer within ${timeoutMs / 1000} s`)), timeoutMs);
  const authorization = token.get() ? { Authorization: `Bearer ${token.get()}` } : {};
  try {
    const reply = await fetch(path, {
      ...options,
      headers: { ...authorization, ...headers },
      signal: signal ? AbortSignal.any([signal, late.signal]) : late.signal,
    });
    if (reply.status === 401) throw new NoTokenError("a valid access token is needed");
    if (!reply.ok) throw new Error(await reason(reply));
    return { reply, body: await reply[read]() };
  } catch (error) {
    if (late.signal.aborted) throw late.signal.reason;
    throw error instanceof TypeError ? new Error("the server cannot be reached") : error;
  } finally {
    clearTimeout(timer);
  }
}

async function reason(reply) {
  const text = await reply.text();
  try {
    return JSON.parse(text).error ?? text;
  } catch {
    return text || `status ${reply.status} ${reply.statusText}`;
  }
}
