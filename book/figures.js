// Figures that compute in the page. Each takes a <figure>, whose content is there without a script, and fills it anew.
(() => {
  "use strict";
  const { figures, make, makeControl, makeVoice, name, script, calm } = window.bookLive;

  const drawn = (kind, attributes, ...inside) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...inside);
    return element;
  };
  const range = (low, high, step = 1) => Array.from({ length: Math.round((high - low) / step) + 1 }, (_, i) => +(low + i * step).toFixed(6));

  // Controls by their settings' names: { window: range(1, 8) }, with where they start; `changed` gets all values.
  const controlsFor = (settings, start, changed) => {
    const at = { ...start };
    const parts = Object.entries(settings).map(([key, values]) => {
      const tick = values.length === 2 && typeof values[0] === "boolean";
      const kind = tick ? "tick" : typeof values[0] === "string" ? "list" : "slider";
      return makeControl({ kind, label: key.replaceAll("_", " "), values: values.map(value => value.toLocaleString("en")),
                           start: values.indexOf(start[key]) }, i => { at[key] = values[i]; changed(at) });
    });
    return { at, parts, box: make("div", { class: "controls" }, ...parts.map(part => part.box)) };
  };

  // What a figure's scripts weigh, as the build noted it.
  const megabytes = figure => `${(figure.dataset.bytes / 1e6).toFixed(2)} MB`;

  // A field for the reader's own text.
  const textField = (label, text, longest, changed) => {
    const id = name(), input = make("input", { id, type: "text", maxlength: longest, spellcheck: "false", autocomplete: "off" });
    input.value = text;
    input.oninput = () => changed(input.value);
    return make("div", { class: "control" }, make("label", { for: id }, label), input);
  };

  // ---- Chapter 01: four heads set by hand, on the reader's own letters ---------------------------------------------------

  const HEADS = ["one back", "same letter", "the first", "the mean"];

  // The weights of one head for each place of a text; a match is worth 8 after the scale, as in the chapter.
  const headWeights = (text, { head, causal, window, scale, temperature }) => {
    const letters = [...text], match = (scale ? 8 : 8 * Math.sqrt(8)) / temperature;
    const matches = { "one back": (i, j) => j === i - 1, "same letter": (i, j) => letters[i] === letters[j],
                      "the first": (i, j) => j === 0, "the mean": () => false }[head];
    return letters.map((_, i) => {
      const parts = letters.map((_, j) => {
        const open = (!causal || j <= i) && i - j < window;
        return open ? Math.exp(matches(i, j) ? match : 0) : 0;
      });
      const sum = parts.reduce((a, b) => a + b, 0);
      return parts.map(part => part / sum);
    });
  };

  figures.heads = figure => {
    let text = "abacabad";
    const map = make("div", { class: "map", role: "img" }), told = make("p", { class: "note" });
    const controls = controlsFor(
      { head: HEADS, window: range(1, 24), temperature: range(0.25, 16, 0.25), causal: [false, true], scale: [false, true] },
      { head: "same letter", window: 24, temperature: 1, causal: true, scale: true }, () => show());
    const field = textField("your text", text, 24, value => { text = value || " "; show() });
    const lead = make("p", {}, "The four heads on letters of your own. Choose one, and move its mask, its scale and its temperature:");
    figure.replaceChildren(lead, field, controls.box, make("div", { class: "scroll" }, map), told);
    const say = makeVoice(figure);
    const show = () => {
      const weights = headWeights(text, controls.at), letters = [...text], n = letters.length;
      map.style.gridTemplateColumns = `1.4rem repeat(${n}, minmax(.55rem, 1.9rem))`;
      map.replaceChildren(make("b"), ...letters.map(letter => make("b", {}, letter)), ...weights.flatMap((row, i) => [
        make("b", {}, letters[i]), ...row.map(weight => make("i", { style: `--share: ${(100 * weight).toFixed(1)}%` }))]));
      const last = weights[n - 1], top = last.indexOf(Math.max(...last));
      const words = `The last letter, ${letters[n - 1]}, gives ${letters[top]} at place ${top} the weight ${last[top].toFixed(3)}, ` +
                    `and ${last.filter(weight => weight > 0.01).length} of ${n} places more than 0.01.`;
      map.setAttribute("aria-label", `Attention weights of the head “${controls.at.head}”. ${words}`);
      told.textContent = `Rows look, columns are looked at. ${words}`;
      say(words);
    };
    show();
  };

  // ---- Chapter 03: clocks ------------------------------------------------------------------------------------------------

  figures.clocks = figure => {
    const pairs = range(0, 7), hands = pairs.map(() => drawn("line", { x1: 0, y1: 0, "stroke-width": .12, stroke: "currentColor" }));
    const turns = pairs.map(() => make("span"));
    const row = make("div", { class: "clocks", role: "img" }, ...pairs.map(pair => make("div", {},
      drawn("svg", { viewBox: "-1.1 -1.1 2.2 2.2" }, drawn("circle", { r: 1, fill: "none", stroke: "currentColor", "stroke-width": .04 }), hands[pair]),
      make("span", {}, `pair ${pair}`), turns[pair])));
    const show = ({ position, base }) => {
      const angles = pairs.map(pair => position * base ** (-2 * pair / 16));
      angles.forEach((angle, pair) => {
        hands[pair].setAttribute("x2", Math.sin(angle)); hands[pair].setAttribute("y2", -Math.cos(angle));
        turns[pair].textContent = `${(angle / 2 / Math.PI).toFixed(2)} turns`;
      });
      const words = `At position ${position} and base ${base} the hands have made ` +
                    `${angles.map(angle => (angle / 2 / Math.PI).toFixed(2)).join(", ")} turns.`;
      row.setAttribute("aria-label", words);
      say(words);
    };
    const controls = controlsFor({ position: range(0, 500), base: [10, 100, 1000, 10000, 500000] }, { position: 0, base: 10000 }, show);
    figure.replaceChildren(controls.box, row);
    const say = makeVoice(figure);
    show(controls.at);
  };

  // ---- Chapter 05: merges on the reader's own sentence -------------------------------------------------------------------

  const WORDS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;
  const readable = bytes => {
    const text = new TextDecoder().decode(Uint8Array.from(bytes));
    return text.includes("\ufffd") ? bytes.map(byte => byte.toString(16).padStart(2, "0").toUpperCase()).join("")
                                   : text.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  };

  // Chapter 05's small tokenizer, trained on one sentence: its words as ids after at most `most` merges, the last pair, the next.
  const ownMerges = (sentence, most) => {
    const tokens = range(0, 255).map(byte => [byte]), words = (sentence.match(WORDS) ?? []).map(word => [...new TextEncoder().encode(word)]);
    const called = pair => pair.map(id => readable(tokens[id])).join("+");
    let last = null, done = 0;
    for (;;) {
      const counts = new Map();
      for (const ids of words) for (let i = 0; i + 1 < ids.length; i++) {
        const key = ids[i] * 65536 + ids[i + 1]; // the order of pairs is the order of these numbers
        counts.set(key, (counts.get(key) ?? 0) + 1);
      }
      const [key, count] = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0])[0] ?? [];
      const next = key === undefined ? null : [key >> 16, key & 65535];
      if (!next || done === most) {
        return { pieces: words.flat().map(id => ({ id, text: readable(tokens[id]) })), done,
                 last: last ? `last merge: ${last}` : "no merge yet", next: next ? `next: ${called(next)}, ${count === 1 ? "once" : `${count} times`}` : "no pair is left" };
      }
      last = called(next); done++;
      tokens.push([...tokens[next[0]], ...tokens[next[1]]]);
      for (const ids of words) for (let i = 0; i + 1 < ids.length; i++) {
        if (ids[i] === next[0] && ids[i + 1] === next[1]) ids.splice(i, 2, tokens.length - 1);
      }
    }
  };

  figures.merges = figure => {
    let sentence = "the cat sat on the mat, and that cat had a hat";
    const pieces = make("p", { class: "pieces" }), told = make("p", { class: "note" });
    const controls = controlsFor({ merges: range(0, 60) }, { merges: 20 }, () => show());
    const next = make("button", { type: "button" }, "Next merge");
    next.onclick = () => { if (controls.at.merges < 60) { controls.parts[0].set(++controls.at.merges); show() } };
    controls.box.append(next);
    figure.replaceChildren(textField("your sentence", sentence, 200, value => { sentence = value; show() }), controls.box, pieces, told);
    const say = makeVoice(figure);
    const show = () => {
      const { pieces: all, done, last, next: following } = ownMerges(sentence, controls.at.merges);
      pieces.replaceChildren(...all.map(({ id, text }) => make("span", {}, text, make("small", {}, id))));
      told.textContent = `${done} ${done === 1 ? "merge" : "merges"}: ${all.length} tokens; ${last}; ${following}`;
      say(told.textContent);
    };
    show();
  };

  // ---- Chapter 08: all rules on one distribution -------------------------------------------------------------------------

  const NEXT = ["mat", "sofa", "cat", "floor", "chair", "bed", "roof", "moon", "the", "idea"];
  const SCORES = [2.8, 2.4, 2.0, 1.6, 1.2, 0.8, 0.3, -0.4, -0.8, -1.5];

  // The probabilities after the rules; at temperature 0 all of them go to the most probable word.
  const afterRules = ({ temperature, top_k, top_p, min_p, penalty }) => {
    const logits = Live.filterLogits(SCORES, { temperature, top_k, top_p, min_p, repetition_penalty: penalty }, new Set([2, 8]));
    const best = logits.indexOf(Math.max(...logits));
    return temperature ? Live.softmax(logits) : logits.map((_, i) => +(i === best));
  };

  figures.rules = async figure => {
    await script("engine.js");
    const before = Live.softmax(Float32Array.from(SCORES)), told = make("p", { class: "note" });
    const bars = NEXT.map(() => ({ bar: make("i"), said: make("td") }));
    const table = make("table", { class: "bars" }, make("thead", {}, make("tr", {}, ...["word", "probability", "before", "after"].map(text => make("th", { scope: "col" }, text)))),
      make("tbody", {}, ...NEXT.map((word, i) => make("tr", {}, make("th", { scope: "row" }, word),
        make("td", { "aria-hidden": "true" }, make("b", { style: `--share: ${100 * before[i]}%` }), bars[i].bar), make("td", {}, before[i].toFixed(3)), bars[i].said))));
    const controls = controlsFor({ temperature: range(0, 3, 0.1), top_k: range(1, 10), top_p: range(0, 1, 0.05), min_p: range(0, 1, 0.05), penalty: range(1, 3, 0.1) },
                                 { temperature: 1, top_k: 10, top_p: 1, min_p: 0, penalty: 1 }, () => show());
    const words = make("p", { class: "note", "aria-live": "polite" }), draw = make("button", { type: "button" }, "Draw 20 words");
    const random = Live.makeRandom(0);
    draw.onclick = () => {
      const shares = afterRules(controls.at).map(Math.log);
      words.textContent = range(1, 20).map(() => NEXT[Live.draw(shares, random.exponential(NEXT.length))]).join(" · ");
    };
    controls.box.append(draw);
    figure.replaceChildren(controls.box, table, told, words);
    const say = makeVoice(figure);
    const show = () => {
      const after = afterRules(controls.at), left = after.filter(share => share > 0).length;
      NEXT.forEach((_, i) => {
        bars[i].bar.style.setProperty("--share", `${100 * after[i]}%`);
        bars[i].said.textContent = after[i] > 0 ? after[i].toFixed(3) : "removed";
      });
      told.textContent = `${left} of 10 words are left; ${NEXT[after.indexOf(Math.max(...after))]} has ${Math.max(...after).toFixed(3)}.`;
      say(told.textContent);
    };
    show();
  };

  // ---- Home: chapter 00's model trains here ------------------------------------------------------------------------------

  figures.counting = async figure => {
    await Promise.all([script("engine.js"), script("counting.js")]);
    const { config, weights, starts, length, losses } = window.bookLive.counting, steps = losses.length, batch = starts.length / steps;
    const line = drawn("polyline", { fill: "none", stroke: "currentColor", "stroke-width": 2, "vector-effect": "non-scaling-stroke" });
    const curve = drawn("svg", { viewBox: `0 0 ${steps} 100`, preserveAspectRatio: "none", role: "img", class: "curve", "aria-label": "The training loss: no step yet." }, line);
    const status = make("p", { class: "note" }), written = make("p", { class: "written" });
    const go = make("button", { type: "button" }, "Train it"), list = makeControl(
      { kind: "list", label: "count from", values: range(0, 9).map(String), start: 7 }, digit => count(digit));
    const lead = make("p", {}, `Here the same model trains again, in this page (${megabytes(figure)}), from the notebook's first weights and on its batches:`);
    figure.replaceChildren(lead, make("div", { class: "controls" }, go, list.box), curve, status, written);
    const say = makeVoice(figure);
    let model, run = 0, digit = 7;
    const count = from => {
      digit = from;
      const ids = [from];
      for (const token of Live.write(model, ids, 11, { sampling: { temperature: 0 } })) ids.push(token);
      written.textContent = ids.slice(0, 12).join(" → ");
      return written.textContent;
    };
    const fresh = () => { ({ model } = Live.makeModel({ config, weights: Live.decodeBase64(weights) })) };
    const train = () => {
      fresh();
      const optimizer = new Live.AdamW(model, { lr: 0.01, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, decay_vectors: true });
      const seen = [], mine = ++run;
      let busy = 0;
      const slice = () => {
        if (mine !== run) return;
        const began = performance.now();
        do {
          const step = seen.length, rows = [...starts.slice(step * batch, (step + 1) * batch)].map(start => range(0, length - 1).map(i => (+start + i) % 10));
          seen.push(model.backward(rows.map(row => row.slice(0, -1)), rows.map(row => row.slice(1))));
          optimizer.step(0.01 * (1 - step / steps));
        } while (seen.length < steps && performance.now() - began < 12);
        busy += performance.now() - began;
        line.setAttribute("points", seen.map((loss, i) => `${i},${100 - 40 * Math.min(loss, 2.5)}`).join(" "));
        const ended = seen.length === steps, words = `Step ${seen.length} of ${steps}: loss ${seen.at(-1).toFixed(3)} nats per digit`;
        status.textContent = words + (ended ? `, after ${(busy / 1000).toFixed(1)} s of computing.` : "");
        curve.setAttribute("aria-label", `The training loss falls from ${seen[0].toFixed(2)} to ${seen.at(-1).toFixed(4)}.`);
        count(digit);
        if (!ended) return void setTimeout(slice, 0);
        go.textContent = "Train it again";
        figure.dataset.losses = JSON.stringify(seen);
        say(`${status.textContent} From ${digit} it writes ${written.textContent}.`);
      };
      slice();
    };
    go.onclick = train;
    fresh(); count(digit); status.textContent = "Not trained yet.";
    if (calm.matches) return;
    new IntersectionObserver((all, seen) => { if (all.some(one => one.isIntersecting)) { seen.disconnect(); train() } }).observe(figure);
  };

  Object.assign(window.bookLive, { drawn, range, controlsFor, textField, megabytes, parts: { headWeights, ownMerges, afterRules } });
})();
