// Behaviour of the operator's page. The server renders everything, escaped; this script fetches the page anew, moves
// over what differs, and sends what buttons and forms ask for. It never builds markup from data.
"use strict";
(() => {
  const period = 5000;
  const token = new URLSearchParams(location.search).get("token");
  const message = document.getElementById("message");
  const refreshBox = document.getElementById("refresh");
  const filter = document.getElementById("filter");
  document.documentElement.dataset.js = "on";

  // Whoever came with ?token= goes on with it; a password is repeated by the browser itself.
  const credentials = () => (token ? { "X-Admin-Token": token } : {});

  function say(text, bad) {
    message.textContent = text;
    message.className = bad ? "bad" : "good";
  }

  // patch makes an element look like another one and touches only what differs, so that focus, selection and scroll
  // positions stay. Elements marked data-keep belong to the user.
  function patch(have, want) {
    if (have.nodeType !== want.nodeType || have.nodeName !== want.nodeName || key(have) !== key(want)) {
      have.replaceWith(want);
      return;
    }
    if (have.nodeType !== Node.ELEMENT_NODE) {
      if (have.nodeValue !== want.nodeValue) have.nodeValue = want.nodeValue;
      return;
    }
    if (have.hasAttribute("data-keep")) return;
    for (const { name } of [...have.attributes]) if (!want.hasAttribute(name)) have.removeAttribute(name);
    for (const { name, value } of want.attributes) if (have.getAttribute(name) !== value) have.setAttribute(name, value);
    const rows = new Map();
    for (const child of have.children) if (key(child) !== "" && !rows.has(key(child))) rows.set(key(child), child);
    let at = have.firstChild;
    for (const next of [...want.childNodes]) {
      const row = next.nodeType === Node.ELEMENT_NODE && key(next) !== "" ? rows.get(key(next)) : undefined;
      if (row) {
        rows.delete(key(row));
        if (row !== at) have.insertBefore(row, at);
        at = row.nextSibling;
        patch(row, next);
      } else if (at && !(at.nodeType === Node.ELEMENT_NODE && key(at) !== "")) {
        const old = at;
        at = at.nextSibling;
        patch(old, next);
      } else {
        have.insertBefore(next, at);
      }
    }
    while (at) {
      const old = at;
      at = at.nextSibling;
      old.remove();
    }
  }
  const key = (node) => (node.dataset && node.dataset.key) || "";

  let running = null;
  async function refresh() {
    if (running) running.abort();
    const mine = (running = new AbortController());
    try {
      const query = filter.value.trim() ? "?" + new URLSearchParams({ q: filter.value.trim() }) : "";
      const answer = await fetch("./" + query, { headers: credentials(), cache: "no-store", signal: mine.signal });
      if (!answer.ok) throw new Error(answer.status === 401 ? "the gateway no longer accepts the credentials" : "status " + answer.status);
      const next = new DOMParser().parseFromString(await answer.text(), "text/html");
      patch(document.querySelector("main"), next.querySelector("main"));
      document.title = next.title;
      document.getElementById("updated").textContent = next.getElementById("updated").textContent;
      document.body.classList.remove("stale");
    } catch (e) {
      if (mine.signal.aborted) return;
      document.body.classList.add("stale");
      say("The page could not be refreshed: " + e.message, true);
    } finally {
      if (running === mine) running = null;
    }
  }

  async function call(method, args) {
    say(method + " ...");
    try {
      const answer = await fetch("prpc/Admin." + method, {
        method: "POST",
        headers: { "Content-Type": "application/json", ...credentials() },
        body: JSON.stringify(args),
      });
      if (!answer.ok) {
        const text = await answer.text();
        let why = text || "status " + answer.status;
        try {
          why = JSON.parse(text).error || why;
        } catch {
          // Not the error of an RPC.
        }
        say(method + " failed: " + why, true);
        return false;
      }
      say(method + " done.");
    } catch (e) {
      say(method + " failed: " + e.message, true);
      return false;
    }
    await refresh();
    return true;
  }

  function values(form) {
    const out = {};
    for (const field of form.elements) {
      if (!field.name) continue;
      if (field.type === "checkbox") out[field.name] = field.checked;
      else if (field.value === "" && "optional" in field.dataset) continue;
      else if (field.type === "number") out[field.name] = Number(field.value);
      else out[field.name] = field.value;
    }
    return out;
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.fill) {
      const form = document.getElementById(button.dataset.fill);
      const args = JSON.parse(button.dataset.args);
      form.reset();
      for (const [name, value] of Object.entries(args)) form.elements.namedItem(name).value = value ?? "";
      form.closest("details").open = true;
      form.querySelector("input:not([type=hidden])").focus();
      return;
    }
    if (!button.dataset.call) return;
    if (button.dataset.confirm && !window.confirm(button.dataset.confirm)) return;
    button.disabled = true;
    call(button.dataset.call, JSON.parse(button.dataset.args)).finally(() => (button.disabled = false));
  });

  document.addEventListener("submit", async (event) => {
    const form = event.target;
    if (form.classList.contains("filter")) {
      event.preventDefault();
      refresh();
      return;
    }
    if (!form.dataset.call) return;
    event.preventDefault();
    const method = (event.submitter && event.submitter.dataset.method) || form.dataset.call;
    if (await call(method, values(form))) {
      for (const field of form.querySelectorAll("input[type=password]")) field.value = "";
    }
  });

  let typing = 0;
  filter.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(refresh, 300);
  });
  setInterval(() => {
    if (refreshBox.checked && !document.hidden && !running) refresh();
  }, period);
  document.addEventListener("visibilitychange", () => {
    if (refreshBox.checked && !document.hidden) refresh();
  });
})();
