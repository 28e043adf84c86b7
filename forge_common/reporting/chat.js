// Sends what is typed to the server of forge_common.chat and shows the tokens as they come. What the model writes is only ever text.
(() => {
  const model = JSON.parse(document.getElementById("model").textContent);
  const element = (id) => document.getElementById(id);
  const [log, form, status] = ["log", "ask", "status"].map(element);
  const fields = form.elements;
  let turns = []; // of the conversation: the user's and the assistant's in turn
  let running = null; // the AbortController of the request that runs

  const add = (parent, kind, text) => {
    const part = parent.appendChild(document.createElement(kind.startsWith("token") ? "span" : "div"));
    part.className = kind;
    part.textContent = text;
    return part;
  };

  // "cpp 97.2%, trunk 2.8%": the candidates with at least half a percent, the heaviest first.
  const named = (names, values) =>
    names
      .map((name, index) => [values[index], name])
      .filter(([value]) => value >= 0.005)
      .sort(([one], [other]) => other - one)
      .map(([value, name]) => `${name} ${(100 * value).toFixed(1)}%`)
      .join(", ");

  const show = (place, names, token) => {
    if (!token.text) return; // the rest of its character follows
    if (!token.heads.length) return place.append(token.text);
    const heaviest = token.heads.indexOf(Math.max(...token.heads));
    const span = add(place, "token", token.text);
    span.tabIndex = 0;
    span.style.setProperty("--c", `var(--c${model.colours[model.names.indexOf(names[heaviest])]})`);
    span.style.setProperty("--a", token.heads[heaviest]);
    span.dataset.candidate = names[heaviest];
    const lines = [JSON.stringify(token.text), `weights of the heads  ${named(names, token.heads)}`];
    span.dataset.tip = [...lines, `gates of the layers   ${named(names, token.layers)}`].join("\n");
  };

  async function* linesOf(response) {
    const decoder = new TextDecoder();
    let rest = "";
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = parts.pop();
      yield* parts.map((part) => JSON.parse(part));
    }
  }

  // The fields as the server wants them; a wrong number is for the server to refuse, with its reason.
  const request = () => {
    const content = { without: [] };
    for (const name of ["temperature", "top_p", "max_new_tokens", "seed"])
      if (fields[name].value !== "") content[name] = Number(fields[name].value);
    content.seed ??= Math.floor(Math.random() * 1e9);
    for (const box of form.querySelectorAll("[name=module]")) if (!box.checked) content.without.push(box.value);
    if (model.chat && fields.system.value.trim()) content.system = fields.system.value;
    return content;
  };

  const generate = async (text, asChat) => {
    const content = request();
    if (asChat) content.messages = [...turns, { role: "user", content: text }];
    else content.prompt = text;
    const turn = add(log, "turn", "");
    if (asChat) add(turn, "asked", text);
    const place = add(turn, "text", asChat ? "" : text);
    running = new AbortController();
    const start = performance.now();
    let answer = "";
    let count = 0;
    let stopped = false;
    let problem = "the connection ended before the text. Is forge_common.chat still running?";
    try {
      const response = await fetch("/generate", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content), signal: running.signal,
      });
      let names = [];
      for await (const line of linesOf(response)) {
        if (line.error) problem = line.error;
        else if (line.end) problem = "";
        else if (line.names) {
          names = line.names;
          if (line.turns_left_out) add(turn, "note", `The context is full: turns left out at the beginning: ${line.turns_left_out}.`);
          if (line.tokens_left_out) add(turn, "note", `The context is full: tokens left out at the beginning: ${line.tokens_left_out}.`);
        } else {
          count += 1;
          answer += line.text;
          const atEnd = innerHeight + scrollY >= document.body.scrollHeight - 40;
          show(place, names, line);
          if (atEnd) scrollTo(0, document.body.scrollHeight);
          status.textContent = `${count} tokens`;
        }
      }
    } catch (error) {
      if (error.name === "AbortError") stopped = true;
    }
    const seconds = (performance.now() - start) / 1000;
    status.textContent = `${count} tokens, ${(count / seconds).toFixed(1)} a second, seed ${content.seed}`;
    if (stopped) status.textContent += ", stopped";
    else if (problem) add(turn, "problem", problem);
    if (asChat && (answer || !problem)) turns.push({ role: "user", content: text }, { role: "assistant", content: answer });
    else if (problem && !count) fields.text.value = text;
    scrollTo(0, document.body.scrollHeight);
    running = null;
    state();
  };

  const state = () => {
    element("send").disabled = element("clear").disabled = Boolean(running);
    element("stop").disabled = !running;
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = fields.text.value;
    const asChat = model.chat && !fields.plain.checked;
    if (running || (asChat && !text.trim())) return;
    fields.text.value = "";
    generate(text, asChat);
    state();
  });
  fields.text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  element("stop").addEventListener("click", () => running?.abort());
  element("clear").addEventListener("click", () => {
    turns = [];
    log.replaceChildren();
    status.textContent = "";
    fields.text.focus();
  });
  fields.text.focus(); // not by autofocus, which comes later and may meet a field that is already used
})();
