// From logits to tokens: the filters of transformer_llm.generation.Sampling in the same order, and the same draw.
(() => {
  "use strict";
  const Live = globalThis.Live ??= {};

  const DEFAULTS = { temperature: 1, top_k: null, top_p: null, min_p: null, repetition_penalty: 1 };

  // Settings, checked, with those left out filled in.
  function sampling(values = {}) {
    for (const name of Object.keys(values)) {
      if (!(name in DEFAULTS)) {
        Live.refuse(`Sampling has no field ${JSON.stringify(name)}; its fields are ${Object.keys(DEFAULTS).join(", ")}.`);
      }
    }
    const s = { ...DEFAULTS, ...values };
    if (s.temperature !== 0) Live.checkNumber("temperature, unless it is 0,", s.temperature, 0.001);
    if (s.top_k !== null) Live.checkNumber("top_k", s.top_k, 1, Infinity, true);
    for (const name of ["top_p", "min_p"]) if (s[name] !== null) Live.checkNumber(name, s[name], 0, 1);
    Live.checkNumber("repetition_penalty", s.repetition_penalty, 0.01);
    return s;
  }

  const single = Math.fround; // settings are rounded to float32, as the package's tensors are

  // ---- Filters: each gets logits and returns them with minus infinity where a token is removed ---------------------------

  const keepFrom = (logits, threshold) => logits.map(x => x < threshold ? -Infinity : x);
  const sorted = logits => Float32Array.from(logits).sort().reverse(); // the largest first
  const largest = logits => logits.reduce((a, b) => Math.max(a, b), -Infinity);

  // Divide positive logits of tokens that have occurred by the penalty, and multiply negative ones by it.
  function penaliseSeen(logits, seen, penalty) {
    return logits.map((x, token) => !seen.has(token) ? x : x > 0 ? x / single(penalty) : x * single(penalty));
  }

  const topK = (logits, k) => k >= logits.length ? logits : keepFrom(logits, sorted(logits)[k - 1]);

  // The fewest most probable tokens that have probability p together, equation (8.2).
  function topP(logits, p) {
    if (p === 1) return logits;
    const ordered = sorted(logits), probabilities = Live.softmax(ordered);
    let before = 0, kept = 1; // the most probable token stays whatever p is
    while (kept < ordered.length && single(before += probabilities[kept - 1]) < single(p)) kept++;
    return keepFrom(logits, ordered[kept - 1]);
  }

  const minP = (logits, p) => p === 0 ? logits : keepFrom(logits, single(largest(logits) + single(Math.log(p))));

  // The logits after each filter that is on, by its name: repetition penalty, temperature, top-k, top-p, min-p.
  function filterSteps(logits, settings, seen = null) {
    const s = sampling(settings), steps = [{ name: "logits", logits: Float32Array.from(logits) }];
    const then = (name, on, filter) => { if (on) steps.push({ name, logits: filter(steps.at(-1).logits) }) };
    then("repetition_penalty", seen && s.repetition_penalty !== 1, x => penaliseSeen(x, seen, s.repetition_penalty));
    if (s.temperature === 0) return steps; // the most probable token is taken: only the penalty counts
    then("temperature", s.temperature !== 1, x => x.map(logit => logit / single(s.temperature)));
    then("top_k", s.top_k !== null, x => topK(x, s.top_k));
    then("top_p", s.top_p !== null, x => topP(x, s.top_p));
    then("min_p", s.min_p !== null, x => minP(x, s.min_p));
    return steps;
  }

  const filterLogits = (logits, settings, seen) => filterSteps(logits, settings, seen).at(-1).logits;

  // ---- Drawing ---------------------------------------------------------------------------------------------------------

  // The first of the largest scores.
  function best(scores) {
    let at = 0;
    for (let i = 1; i < scores.length; i++) if (scores[i] > scores[at]) at = i;
    return at;
  }

  // A token with the softmax's probabilities: the largest logit - log(noise), equation (8.6), where noise holds an
  // exponential number for each token.
  const draw = (logits, noise) => best(logits.map((x, i) => x - Math.log(noise[i])));

  // Random numbers from a seed: a counter whose bits are mixed. random() lies between 0 and 1, without either.
  function makeRandom(seed = 0) {
    let state = seed | 0;
    const mix = (x, shift, factor) => Math.imul(x ^ x >>> shift, factor);
    const random = () => {
      state = state + 0x9e3779b9 | 0;
      const mixed = mix(mix(state, 16, 0x85ebca6b), 13, 0xc2b2ae35);
      return (((mixed ^ mixed >>> 16) >>> 0) + 0.5) / 2 ** 32;
    };
    random.exponential = n => Float32Array.from({ length: n }, () => -Math.log(random()));
    random.normal = () => Math.sqrt(-2 * Math.log(random())) * Math.cos(2 * Math.PI * random());
    return random;
  }

  // ---- Writing ---------------------------------------------------------------------------------------------------------

  // The tokens that the model sees while it writes, at most context_length of them: a text without room for its next
  // token forgets all but its newest half window, and what is left is read again from position 0.
  class TextWindow {
    constructor(model, ids, use_cache) {
      Object.assign(this, { model, ids: [...ids], read: 0, cache: use_cache ? model.newCache() : null });
    }

    nextLogits() {
      const limit = this.model.config.context_length;
      if (this.ids.length > limit) {
        this.ids = this.ids.slice(-Math.max(1, limit >> 1));
        this.read = 0;
        this.cache?.crop(0);
      }
      const fresh = this.cache ? this.ids.slice(this.read) : this.ids;
      this.read = this.ids.length;
      return this.model.logits(fresh, { cache: this.cache, last_only: true });
    }
  }

  // Write token by token; take as many as you like. `noise(step)` replaces the random numbers, as tests need it.
  function* write(model, ids, max_new_tokens, options = {}) {
    const { random = makeRandom(), noise = null, stops = [], use_cache = true } = options;
    const s = sampling(options.sampling), window = new TextWindow(model, ids, use_cache), seen = new Set(ids);
    if (ids.length > model.config.context_length) {
      Live.refuse(`The prompt has ${ids.length} tokens, but the model's context_length is ` +
                  `${model.config.context_length}; shorten the prompt.`);
    }
    for (let step = 0; step < max_new_tokens; step++) {
      const scores = window.nextLogits(), logits = filterLogits(scores, s, seen);
      if (!Number.isFinite(largest(scores))) Live.refuse("The model's logits are not numbers, so it can't write.");
      const numbers = () => noise ? noise(step) : random.exponential(logits.length);
      const token = s.temperature === 0 ? best(logits) : draw(logits, numbers());
      window.ids.push(token);
      seen.add(token);
      yield token;
      if (stops.includes(token)) return;
    }
  }

  Object.assign(Live, { sampling, filterSteps, filterLogits, draw, best, makeRandom, TextWindow, write });
})();
