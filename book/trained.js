// Figures whose model trains or writes in a worker, so that the page goes on scrolling: chapters 07, 08 and 19.
(() => {
  "use strict";
  const { figures, make, makeVoice, script, controlsFor, textField, megabytes, drawn, range } = window.bookLive;

  // ---- Work beside the page --------------------------------------------------------------------------------------------

  // A worker made from the engine, some functions and a job: job(tell) gives back what is to be done with each message.
  const startWorker = (job, functions, told) => {
    const named = Object.entries(functions).map(([name, body]) => `const ${name} = ${body};\n`).join("");
    const guarded = "onmessage = ({ data }) => { try { act(data) } catch (error) { postMessage({ error: error.message }) } };";
    const source = `(${window.bookLive.engine})();\n${named}const act = (${job})(data => postMessage(data));\n${guarded}`;
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" })), worker = new Worker(url);
    worker.onmessage = ({ data }) => told(data);
    worker.onerror = ({ message }) => told({ error: message });
    return { ask: message => worker.postMessage(message), end() { worker.terminate(); URL.revokeObjectURL(url) } };
  };

  const wrong = message => `This doesn't work here: ${message}`;

  // Lines in one box, each with a colour and a dash of its own; values beyond the box are drawn at its edge.
  const STROKES = ["light-dark(#0b5fa5, #8ac4ff)", "light-dark(#9a4a00, #ffb066)", "light-dark(#1c6b3c, #7fd8a0)", "light-dark(#7a3a8c, #dcaaf0)"];
  const strokeOf = number => ({ color: STROKES[number % 4], dash: ["none", "7 4", "2 4"][Math.floor(number / 4) % 3] });
  const makeLine = number => drawn("polyline", { fill: "none", "stroke-width": 2, "vector-effect": "non-scaling-stroke",
    style: `stroke: ${strokeOf(number).color}; stroke-dasharray: ${strokeOf(number).dash}` });
  const makeBox = (width, words) => drawn("svg", { viewBox: `0 0 ${width} 100`, preserveAspectRatio: "none", role: "img", class: "curve", "aria-label": words });
  const height = share => 100 - 96 * Math.min(Math.max(Number.isFinite(share) ? share : 1, 0), 1);
  const key = (number, text) => make("span", { class: "key" }, make("i", { style: `border-top-color: ${strokeOf(number).color}` }), text);

  // ---- Chapter 07: the learning rate, on chapter 00's model ---------------------------------------------------------------

  // Train chapter 00's model at a rate that grows during the warm-up and falls to zero in a straight line, step by step.
  const trainAtRate = tell => ({ run, config, weights, batches, rate, warmup }) => {
    const { model } = Live.makeModel({ config, weights: Live.decodeBase64(weights) }), losses = [];
    const optimizer = new Live.AdamW(model, { lr: rate, weight_decay: 0.1 }), steps = batches.length;
    let told = performance.now();
    batches.forEach((rows, step) => {
      losses.push(model.backward(rows.map(row => row.slice(0, -1)), rows.map(row => row.slice(1))));
      optimizer.step(rate * Math.min(1, (step + 1) / warmup) * (1 - step / steps));
      if (performance.now() - told < 40 && step + 1 < steps) return;
      tell({ run, losses, ended: step + 1 === steps });
      told = performance.now();
    });
  };

  const RATES = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1], MOST = 8;
  const endOf = losses => losses.slice(-20).reduce((a, b) => a + b) / 20; // as Figure 7.5 has it

  // The first weights of chapter 00's model, and the batches of a hundred steps.
  const countingStart = () => {
    const { config, weights, starts, length, losses } = window.bookLive.counting, batch = starts.length / losses.length;
    const rows = [...starts].map(start => range(0, length - 1).map(i => (+start + i) % 10));
    return { config, weights, batches: range(0, 99).map(step => rows.slice(step * batch, (step + 1) * batch)) };
  };

  figures.rates = figure => {
    const controls = controlsFor({ learning_rate: RATES, warm_up_steps: [0, 5, 10, 20, 40] }, { learning_rate: 0.001, warm_up_steps: 0 }, () => {});
    const go = make("button", { type: "button" }, "Train 100 steps"), clear = make("button", { type: "button" }, "Clear");
    const curves = makeBox(100, "Training losses: no run yet."), ends = makeBox(10, "Losses at the end: no run yet.");
    const list = make("tbody"), status = make("p", { class: "note" }, `No run yet. The first one loads ${megabytes(figure)}.`);
    const table = make("table", { class: "runs", hidden: "" }, make("thead", {}, make("tr", {}, ...["run", "learning rate", "warm-up", "loss at the end"].map(
      text => make("th", { scope: "col" }, text)))), list);
    controls.box.append(go, clear);
    figure.replaceChildren(
      make("p", {}, "Chapter 00's model learns to count again, here in the page, from the notebook's first weights and on its batches. " +
                    "Choose a rate, train, choose another: the runs stay."), controls.box,
      make("p", { class: "note" }, "Loss at each step, from 0 at the bottom to 3 nats per digit and more at the top:"), curves,
      make("p", { class: "note" }, "Mean loss of the last 20 steps against the learning rate, from 0.0001 on the left to 1 on the right:"), ends, table, status);
    const say = makeVoice(figure);
    let all = [], count = 0, worker = null;
    const told = ({ error, run, losses, ended }) => {
      const one = all.find(one => one.run === run);
      if (error) { status.textContent = wrong(error); worker = null; return }
      if (!one) return; // cleared meanwhile
      one.line.setAttribute("points", losses.map((loss, i) => `${i},${height(loss / 3)}`).join(" "));
      status.textContent = `Run ${run}: step ${losses.length} of 100, loss ${losses.at(-1).toFixed(3)}.`;
      if (!ended) return;
      const end = endOf(losses), text = Number.isFinite(end) ? end.toFixed(3) : "no number any more";
      one.said.textContent = text; one.end = end;
      one.dot.setAttribute("d", `M ${1 + 2 * (4 + Math.log10(one.rate))} ${height(end / 3)} h 0`);
      curves.setAttribute("aria-label", `Training losses of ${all.length} ${all.length === 1 ? "run" : "runs"}; the table below has their ends.`);
      ends.setAttribute("aria-label", all.filter(one => one.end !== undefined).map(one => `rate ${one.rate}: ${one.said.textContent}`).join("; "));
      const words = `Run ${run}, rate ${one.rate}, warm-up ${one.warmup}: mean loss of the last 20 steps ${text} nats per digit.`;
      status.textContent = words;
      figure.dataset.losses = JSON.stringify(losses);
      say(words);
    };
    go.onclick = async () => {
      try { await Promise.all([script("engine.js"), script("counting.js")]) } catch (error) { status.textContent = wrong(error.type); return }
      const { learning_rate: rate, warm_up_steps: warmup } = controls.at, number = count++, { color } = strokeOf(number);
      if (all.length === MOST) forget(all[0]);
      const one = { run: count, rate, warmup, line: makeLine(number), said: make("td", {}, "…"), dot: drawn("path", {
        class: "dot", "vector-effect": "non-scaling-stroke", style: `stroke: ${color}` }) };
      one.row = make("tr", {}, make("th", { scope: "row" }, key(number, String(count))), make("td", {}, String(rate)), make("td", {}, String(warmup)), one.said);
      all.push(one); curves.append(one.line); ends.append(one.dot); list.append(one.row);
      table.hidden = false;
      delete figure.dataset.losses;
      worker ??= startWorker(trainAtRate, {}, told);
      worker.ask({ run: one.run, ...countingStart(), rate, warmup });
    };
    const forget = one => {
      for (const part of [one.line, one.dot, one.row]) part.remove();
      all = all.filter(other => other !== one);
    };
    clear.onclick = () => {
      all.forEach(forget);
      worker?.end();
      worker = null; count = 0; table.hidden = true; status.textContent = "No run yet.";
      curves.setAttribute("aria-label", "Training losses: no run yet."); ends.setAttribute("aria-label", "Losses at the end: no run yet.");
    };
  };

  // ---- Chapter 08: the minute's model writes -----------------------------------------------------------------------------

  // Weights that were rounded to 255 steps a row: each row's numbers times its step.
  const unpack = ({ config, rows, floats }) => {
    const small = new Int8Array(Live.decodeBase64(rows)), large = new Float32Array(Live.decodeBase64(floats)), weights = {};
    let at = 0, next = 0;
    for (const [name, [outs, ins]] of Object.entries(Live.weightShapes(Live.fullConfig(config)))) {
      if (!ins) { weights[name] = large.slice(next, next += outs); continue }
      weights[name] = new Float32Array(outs * ins);
      for (let r = 0; r < outs; r++, next++) for (let i = 0; i < ins; i++, at++) weights[name][r * ins + i] = large[next] * small[at];
    }
    return new Live.Model(config, weights);
  };

  // Write as many characters as are asked for, and the time that they took.
  const writeOnRequest = tell => {
    let model, tokenizer, text;
    return ({ poet, start, more }) => {
      if (poet) { model = unpack(poet); tokenizer = Live.readTokenizer(poet.tokenizer) }
      if (start) {
        const { prompt, settings, seed } = start;
        text = Live.write(model, tokenizer.encode(prompt), Infinity, { sampling: settings, random: Live.makeRandom(seed) });
      }
      const began = performance.now(), ids = [];
      for (let i = 0; i < more; i++) ids.push(text.next().value);
      if (more) tell({ written: tokenizer.decode(ids), seconds: (performance.now() - began) / 1000 });
    };
  };

  const LONGEST = 2000, PART = 20; // characters: of one text, and between two looks at the page

  figures.poet = figure => {
    const field = textField("it goes on from", "ROMEO:", 60, value => { prompt = value });
    const controls = controlsFor({ temperature: range(0, 2, 0.1), top_p: range(0.05, 1, 0.05) }, { temperature: 0.8, top_p: 1 }, () => {});
    const go = make("button", { type: "button" }, "Write"), written = make("div", { class: "poem", role: "group", tabindex: "0", "aria-label": "What the model writes" });
    const status = make("p", { class: "note" }, `The first press loads the model: ${megabytes(figure)}.`);
    controls.box.append(go);
    figure.replaceChildren(make("p", {}, "The model that “make shakespeare” trains in about a minute writes here, one character after another:"),
                           field, controls.box, written, status);
    const say = makeVoice(figure);
    let prompt = "ROMEO:", worker = null, busy = false, seconds = 0, count = 0, text = "";
    const stop = words => {
      busy = false; go.textContent = "Write"; status.textContent = words;
      figure.dataset.written = text;
      say(`${words} ${text}`);
    };
    const told = ({ error, written: part, seconds: took }) => {
      if (error) return stop(error);
      const below = written.scrollHeight - written.scrollTop - written.clientHeight < 40; // where nobody has scrolled up
      text += part; written.textContent = text; count += part.length; seconds += took;
      if (below) written.scrollTop = written.scrollHeight;
      const words = `${count} characters, ${Math.round(count / seconds)} a second.`;
      status.textContent = words;
      if (!busy || count >= LONGEST) return stop(words);
      worker.ask({ more: PART });
    };
    go.onclick = async () => {
      if (busy) { busy = false; return }
      busy = true; go.textContent = "Stop"; text = prompt; count = seconds = 0; written.textContent = text;
      delete figure.dataset.written;
      if (!worker) {
        status.textContent = "The model is being loaded.";
        try { await Promise.all([script("engine.js"), script("poet.js")]) } catch (error) { return stop(wrong(error.type)) }
        worker = startWorker(writeOnRequest, { unpack }, told);
        worker.ask({ poet: window.bookLive.poet });
      }
      const { temperature, top_p } = controls.at;
      worker.ask({ start: { prompt, settings: { temperature, top_p }, seed: Date.now() % 2 ** 31 }, more: PART });
    };
  };

  // ---- Chapter 19: the phase change ----------------------------------------------------------------------------------------

  // torch's generator on a CPU, the Mersenne twister of Matsumoto and Nishimura (1998), and the draws of the chapter's cells.
  const torchRandom = seed => {
    const state = new Uint32Array(624);
    state[0] = seed;
    for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ state[i - 1] >>> 30) + i;
    let at = 624;
    const renew = () => {
      for (let i = 0; i < 624; i++) {
        const y = state[i] & 0x80000000 | state[(i + 1) % 624] & 0x7fffffff;
        state[i] = state[(i + 397) % 624] ^ y >>> 1 ^ (y & 1 ? 0x9908b0df : 0);
      }
      at = 0;
    };
    const next = () => {
      if (at === 624) renew();
      let y = state[at++];
      y ^= y >>> 11; y ^= y << 7 & 0x9d2c5680; y ^= y << 15 & 0xefc60000;
      return (y ^ y >>> 18) >>> 0;
    };
    const share = () => (next() & 0xffffff) / 2 ** 24;
    const normal = count => { // for multiples of 16: eight numbers and the eight after them make sixteen
      const x = Float32Array.from({ length: count }, share);
      for (let i = 0; i < count; i += 16) for (let j = i; j < i + 8; j++) {
        const radius = Math.sqrt(-2 * Math.log(1 - x[j])), angle = 2 * Math.PI * x[j + 8];
        x[j] = radius * Math.cos(angle); x[j + 8] = radius * Math.sin(angle);
      }
      return x;
    };
    const uniform = (count, bound) => Float32Array.from({ length: count }, () => share() * 2 * bound - bound);
    return { share, below: count => next() % count, normal, uniform };
  };

  // Rows of different tokens, each followed by its copy.
  const repeated = (count, length, random) => Array.from({ length: count }, () => {
    const drawn = Array.from({ length: 64 }, random.share);
    const half = drawn.map((_, i) => i).sort((a, b) => drawn[a] - drawn[b]).slice(0, length);
    return [...half, ...half];
  });

  // The chapter's AttentionOnly: the book's model with feed-forward networks that are zero, and stay so, as no gradient reaches them.
  const attentionOnly = (layers, random) => {
    const weights = { "token_embedding.weight": random.normal(4096) }, ones = () => new Float32Array(64).fill(1);
    for (let layer = 0; layer < layers; layer++) {
      const block = `blocks.${layer}.`;
      for (const part of "qkvo") weights[`${block}attention.${part}_proj.weight`] = random.uniform(4096, 1 / 8);
      for (const part of ["attention", "feedforward"]) weights[`${block}${part}_norm.weight`] = ones();
      for (const part of ["up", "down"]) weights[`${block}feedforward.${part}.weight`] = new Float32Array(512);
    }
    Object.assign(weights, { "final_norm.weight": ones(), "lm_head.weight": random.uniform(4096, 1 / 8) });
    return new Live.Model({ vocab_size: 64, context_length: 64, d_model: 64, n_layers: layers, n_heads: 4, d_ff: 8, activation: "relu2",
                            tied_embeddings: false }, weights);
  };

  // The targets of the second copy, without its first token; -100 doesn't count.
  const secondCopy = rows => rows.map(row => row.map((_, i) => i < row.length / 2 || i === row.length - 1 ? -100 : row[i + 1]));

  // The loss on the second copy, and the best head's score of each kind: equations (19.1) and (19.2).
  const look = (model, rows) => {
    const maps = [], length = rows[0].length, half = length / 2, best = [0, 0];
    const logits = model.forward(null, rows, { maps }).data;
    const mean = (map, head, first, back) => {
      let sum = 0;
      for (let b = 0; b < rows.length; b++) for (let t = first; t < length; t++) sum += map[((b * 4 + head) * length + t) * length + t - back];
      return sum / rows.length / (length - first);
    };
    for (const map of maps) for (let head = 0; head < 4; head++) {
      best[0] = Math.max(best[0], mean(map, head, 1, 1));
      best[1] = Math.max(best[1], mean(map, head, half, half - 1));
    }
    return [Live.crossEntropy(logits, secondCopy(rows).flat(), 64), ...best];
  };

  // The chapter's `grow`: 250 steps, a look every ten.
  const grow = tell => ({ layers, seed, steps }) => {
    const model = attentionOnly(layers, torchRandom(seed)), random = torchRandom(seed), test = repeated(16, 32, torchRandom(1000));
    const optimizer = new Live.AdamW(model, { lr: 0.01, betas: [0.9, 0.999], weight_decay: 0 }), began = performance.now();
    for (let step = 0; step <= steps; step++) {
      if (step % 10 === 0) tell({ step, seconds: (performance.now() - began) / 1000, seen: look(model, test) });
      const rows = repeated(32, 8 + random.below(25), random);
      model.backward(rows, secondCopy(rows));
      optimizer.step();
    }
  };

  const GROWN = { steps: 250, functions: { torchRandom, repeated, attentionOnly, secondCopy, look } };

  figures.growth = figure => {
    const names = ["loss / log 64", "previous-token score", "induction score"], { steps, functions } = GROWN;
    const controls = controlsFor({ layers: [2, 1].map(String), seed: ["0", "1", "2"] }, { layers: "2", seed: "0" }, () => {});
    const go = make("button", { type: "button" }, "Train it"), status = make("p", { class: "note" }, `Not trained yet. The first run loads ${megabytes(figure)}.`);
    const curve = makeBox(steps, "Loss and scores: no step yet."), lines = names.map((_, i) => makeLine(i));
    curve.append(...lines); controls.box.append(go);
    figure.replaceChildren(
      make("p", {}, "The same model grows again in this page, from the notebook's first weights and on its batches: 250 steps."), controls.box, curve,
      make("p", { class: "note" }, "From 0 at the bottom to 1 at the top: ", ...names.map((name, i) => key(i, name))), status);
    const say = makeVoice(figure);
    let worker = null;
    go.onclick = async () => {
      try { await script("engine.js") } catch (error) { status.textContent = wrong(error.type); return }
      worker?.end();
      const seen = [], { layers, seed } = controls.at;
      status.textContent = "The first steps are under way.";
      delete figure.dataset.looks;
      worker = startWorker(grow, functions, ({ error, step, seconds, seen: [loss, ...scores] = [] }) => {
        if (error) { status.textContent = wrong(error); return }
        seen.push([step, loss, ...scores]);
        lines.forEach((line, i) => line.setAttribute("points", seen.map(row => `${row[0]},${height(i ? row[i + 1] : row[1] / Math.log(64))}`).join(" ")));
        const rate = step / seconds, left = Math.ceil((steps - step) / rate);
        const words = `Step ${step} of ${steps}: loss ${loss.toFixed(2)}, previous-token score ${scores[0].toFixed(2)}, induction score ${scores[1].toFixed(2)}`;
        status.textContent = words + (step === 0 ? "." : step < steps ? `; ${rate.toFixed(1)} steps a second, ${left} s to go.` : `, after ${seconds.toFixed(0)} s.`);
        curve.setAttribute("aria-label", `${words}. The loss began at ${seen[0][1].toFixed(2)}.`);
        figure.dataset.looks = JSON.stringify(seen);
        if (step === steps) { go.textContent = "Train it again"; say(status.textContent) } else if (step % 50 === 0) say(words);
      });
      worker.ask({ layers: +layers, seed: +seed, steps });
    };
  };

  Object.assign(window.bookLive.parts, { torchRandom, unpack });
})();
