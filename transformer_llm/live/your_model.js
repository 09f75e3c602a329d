// "Your model": a reader chooses or drops files, and their model writes, shows its attention and its next tokens here.
(() => {
  "use strict";
  const root = document.currentScript.previousElementSibling, part = name => root.querySelector(`[data-part="${name}"]`);
  const SLICE = 25; // milliseconds of work before the page may answer again
  let model, tokenizer, writing = 0;

  const say = (text, wrong = false) => {
    part("status").textContent = text;
    part("status").classList.toggle("wrong", wrong);
  };
  const sentence = error => error instanceof Live.InputError ? error.message : `That failed: ${error.message}.`;
  const guarded = work => async event => {
    try { await work(event) } catch (error) { say(sentence(error), true) }
  };
  const pause = () => new Promise(done => setTimeout(done));
  const make = (name, text = "", attributes = {}) => {
    const element = document.createElement(name);
    element.textContent = text;
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };

  // ---- Files -------------------------------------------------------------------------------------------------------

  // All files below what was dropped; a folder hands its entries out in portions.
  async function filesBelow(entry) {
    const ask = (object, method) => new Promise((done, fail) => object[method](done, fail));
    if (entry.isFile) {
      const file = await ask(entry, "file");
      Object.defineProperty(file, "path", { value: entry.fullPath.slice(1) });
      return [file];
    }
    const reader = entry.createReader(), files = [];
    for (let some; (some = await ask(reader, "readEntries")).length;) {
      for (const inner of some) files.push(...await filesBelow(inner));
    }
    return files;
  }

  // The same by handles, where a browser has them: Chromium refuses entries on a page that was opened from a disk.
  async function filesBehind(handle, path = handle.name) {
    if (handle.kind === "file") {
      const file = await handle.getFile();
      Object.defineProperty(file, "path", { value: path });
      return [file];
    }
    const files = [];
    for await (const inner of handle.values()) files.push(...await filesBehind(inner, `${path}/${inner.name}`));
    return files;
  }

  // What one dropped thing holds; it must be asked at once, before the browser forgets the drop.
  function dropped(item) {
    const entry = item.webkitGetAsEntry();
    if (!entry) return [];
    return item.getAsFileSystemHandle ? item.getAsFileSystemHandle().then(filesBehind) : filesBelow(entry);
  }

  async function open(files) {
    if (!files.length) return;
    writing++; // what is being written stops
    say("Reading…");
    await pause();
    const found = await Live.openFiles(files);
    ({ model, tokenizer } = found);
    const c = model.config, count = Object.values(model.weights).reduce((sum, weight) => sum + weight.data.length, 0);
    fill("layer", c.n_layers);
    fill("head", c.n_heads);
    part("prompt-label").textContent = tokenizer ? "Beginning" : "Beginning, as token ids (there is no tokenizer.json)";
    if (!tokenizer) part("prompt").value = "0";
    part("work").hidden = false;
    say(`${found.note}: ${count.toLocaleString("en")} parameters, ${c.n_layers} layers, ${c.n_heads} heads, ` +
        `${c.vocab_size.toLocaleString("en")} tokens, at most ${c.context_length} at once.`);
    look();
  }

  function fill(name, count) {
    part(name).replaceChildren(...Array.from({ length: count }, (_, i) => make("option", String(i))));
  }

  // ---- Text and tokens ---------------------------------------------------------------------------------------------

  const encode = text => tokenizer ? [...tokenizer.prefix, ...tokenizer.encode(text)] : text.match(/\d+/g)?.map(Number) ?? [];
  const decode = ids => tokenizer ? tokenizer.decode(ids) : `${ids.join(" ")} `;
  const shown = id => tokenizer?.shown(id) || String(id);

  const settings = () => ({
    temperature: Number(part("temperature").value),
    top_k: part("top_k").value === "" ? null : Number(part("top_k").value),
    top_p: part("top_p").value === "" ? null : Number(part("top_p").value),
  });

  async function write() {
    const mine = ++writing, ids = encode(part("prompt").value), random = Live.makeRandom(Number(part("seed").value));
    const stops = tokenizer ? Object.values(tokenizer.special_tokens) : [], feed = tokenizer?.decoder();
    const count = Live.checkNumber("The number of tokens", Number(part("count").value), 1, 100000, true);
    part("text").textContent = part("prompt").value + (tokenizer ? "" : " ");
    let slice = performance.now(), written = 0;
    const start = slice;
    say("Writing…");
    for (const token of Live.write(model, ids, count, { sampling: settings(), random, stops })) {
      if (stops.includes(token)) break;
      part("text").append(feed ? feed.feed(token) : decode([token]));
      written++;
      if (performance.now() - slice > SLICE) {
        await pause();
        slice = performance.now();
      }
      if (mine !== writing) return;
    }
    if (feed) part("text").append(feed.flush());
    const seconds = (performance.now() - start) / 1000;
    say(`${written} tokens in ${seconds.toFixed(1)} s, ${Math.round(written / seconds)} per second.`);
  }

  // ---- Attention and the next token ----------------------------------------------------------------------------------

  const LONGEST = 40; // tokens in the picture
  let seen = null; // the ids and maps that are drawn

  function look() {
    const ids = encode(part("prompt").value).slice(-Math.min(LONGEST, model.config.context_length));
    seen = { ids, maps: model.attentionMaps(ids), at: ids.length - 1 };
    drawMap();
    drawTokens();
    drawNext(ids);
  }

  function drawMap() {
    const { ids, maps } = seen, layer = Number(part("layer").value), head = Number(part("head").value);
    const map = maps[layer][head], canvas = part("map"), n = ids.length, cell = Math.max(4, Math.floor(320 / n));
    canvas.width = canvas.height = n * cell;
    const context = canvas.getContext("2d");
    context.fillStyle = getComputedStyle(root).color;
    for (let i = 0; i < n * n; i++) {
      context.globalAlpha = map[i];
      context.fillRect(i % n * cell, Math.floor(i / n) * cell, cell - 1, cell - 1);
    }
    canvas.setAttribute("aria-label", `Layer ${layer}, head ${head}: one row for each of ${n} tokens, darker where it looks`);
  }

  // The tokens, each as dark as the chosen one looks at it.
  function drawTokens() {
    const { ids, maps, at } = seen, n = ids.length, map = maps[part("layer").value][part("head").value];
    part("tokens").replaceChildren(...ids.map((id, i) => {
      const weight = i <= at ? map[at * n + i] : 0, share = `${Math.round(100 * weight)} %`;
      const button = make("button", shown(id), { type: "button", "aria-pressed": String(i === at), title: share });
      button.style.setProperty("--weight", `${Math.round(70 * weight)}%`);
      button.setAttribute("aria-label", `${shown(id)}, ${share}`);
      button.onclick = () => { seen.at = i; drawTokens(); part("tokens").children[i].focus() };
      return button;
    }));
    const row = Array.from(map.subarray(at * n, at * n + at + 1)), best = row.indexOf(Math.max(...row));
    part("most").textContent = `“${shown(ids[at])}” looks most at “${shown(ids[best])}” (${Math.round(100 * row[best])} %).`;
  }

  function drawNext(ids) {
    const logits = model.logits(ids, { last_only: true }), before = Live.softmax(logits);
    const after = Live.softmax(Live.filterLogits(logits, { ...settings(), temperature: settings().temperature || 1 }));
    const order = [...before.keys()].sort((a, b) => before[b] - before[a]).slice(0, 10);
    const percent = x => `${(100 * x).toFixed(1)} %`;
    part("next").replaceChildren(...order.map(id => {
      const row = make("tr");
      row.append(make("th", shown(id), { scope: "row" }), make("td", percent(before[id])), make("td", percent(after[id])));
      return row;
    }));
  }

  // ---- Controls -------------------------------------------------------------------------------------------------------

  const drop = part("drop");
  for (const name of ["files", "folder"]) part(name).onchange = guarded(event => open([...event.target.files]));
  drop.ondragover = event => { event.preventDefault(); drop.classList.add("over") };
  drop.ondragleave = () => drop.classList.remove("over");
  drop.ondrop = guarded(async event => {
    event.preventDefault();
    drop.classList.remove("over");
    open((await Promise.all([...event.dataTransfer.items].map(dropped))).flat()).catch(error => say(sentence(error), true));
  });
  part("write").onclick = guarded(write);
  part("stop").onclick = () => { writing++; say("Stopped.") };
  part("look").onclick = guarded(look);
  for (const name of ["layer", "head"]) part(name).onchange = guarded(() => { drawMap(); drawTokens() });
  for (const name of ["temperature", "top_k", "top_p"]) part(name).onchange = guarded(() => { if (seen) drawNext(seen.ids) });
  root.hidden = false;
})();
