// node tests/live.js FOLDER: answer the questions in FOLDER/cases.json with the engine in transformer_llm/live, all in one
// process. The answers go to FOLDER/answers.json, and long rows of numbers to FOLDER/NAME.f32, for tests/test_live.py.
"use strict";
const { readFileSync, writeFileSync, readdirSync, statSync } = require("fs");
const { join } = require("path");
const { runInThisContext } = require("vm");

const engine = join(__dirname, "..", "transformer_llm", "live"), folder = process.argv[2];
for (const file of ["model.js", "sampling.js", "tokens.js", "files.js"]) {
  runInThisContext(readFileSync(join(engine, file), "utf8"), { filename: file });
}

// What the site's figures compute, without a page: they draw only when they are called.
globalThis.window = { bookLive: { figures: {} } };
for (const file of ["figures.js", "trained.js"]) {
  runInThisContext(readFileSync(join(__dirname, "..", "book", file), "utf8"), { filename: file });
}

const bufferOf = path => { const b = readFileSync(path); return b.buffer.slice(b.byteOffset, b.byteOffset + b.length) };
const numbers = path => new Float32Array(bufferOf(join(folder, path)));
const bytesOf = row => Buffer.from(row.buffer, row.byteOffset, row.byteLength);
const modelOf = ({ config, weights }) => new Live.Model(config, Live.readSafetensors(bufferOf(join(folder, weights))));

// What a browser gives for the files in a folder.
function filesIn(path, inside = "") {
  return readdirSync(path).flatMap(name => {
    const at = join(path, name), place = join(inside, name);
    if (statSync(at).isDirectory()) return filesIn(at, place);
    return [{ name, path: place, size: statSync(at).size, text: async () => readFileSync(at, "utf8"),
              arrayBuffer: async () => bufferOf(at) }];
  });
}

function readCached(model, ids, pieces) {
  const cache = model.newCache();
  return pieces.flatMap(count => {
    const start = cache.length;
    return [...model.logits(ids.slice(start, start + count), { cache })];
  });
}

const answers = {
  model({ name, config, weights, inputs, targets, pieces }) {
    const model = modelOf({ config, weights }), parts = [model.logits(inputs)];
    parts.push(...model.attentionMaps(inputs.slice(0, 1)).flat());
    if (pieces) parts.push(Float32Array.from(readCached(model, inputs[0], pieces)));
    const loss = model.backward(inputs, targets);
    parts.push(...Object.values(model.weights).map(weight => weight.grad));
    writeFileSync(join(folder, `${name}.f32`), Buffer.concat(parts.map(bytesOf)));
    return { loss, plain: model.loss(inputs, targets), names: Object.keys(model.weights), config: model.config };
  },

  training({ config, weights, batches, options, clip, rates }) {
    const model = modelOf({ config, weights }), optimizer = new Live.AdamW(model, options);
    const steps = batches.map(([inputs, targets], step) => {
      const loss = model.backward(inputs, targets), norm = Live.clipGradients(model, clip);
      optimizer.step(rates[step]);
      return { loss, norm };
    });
    const counted = [...Live.write(model, [7], 31, { sampling: { temperature: 0 } })];
    return { steps, counted };
  },

  schedule({ options, steps }) {
    return steps.map(step => Live.scheduleFactor(step, options));
  },

  filter({ logits, settings, seen }) {
    const filtered = Live.filterLogits(numbers(logits), settings, seen && new Set(seen));
    return [...filtered].map(x => x === -Infinity ? null : x);
  },

  text({ config, weights, prompt, count, settings, noise, vocab, stops }) {
    const model = modelOf({ config, weights }), all = noise && numbers(noise);
    const options = { sampling: settings, stops, noise: all && (step => all.subarray(step * vocab, (step + 1) * vocab)) };
    return [true, false].map(use_cache => [...Live.write(model, prompt, count, { ...options, use_cache })]);
  },

  random({ seed, count }) {
    const random = Live.makeRandom(seed), logits = [0, 1, 2];
    const drawn = [0, 0, 0];
    for (let i = 0; i < count; i++) drawn[Live.draw(logits, random.exponential(3))]++;
    const normal = Array.from({ length: count }, random.normal), mean = normal.reduce((a, b) => a + b) / count;
    return { drawn, mean, square: normal.reduce((a, b) => a + b * b) / count };
  },

  tokens({ json, texts, ids, special }) {
    const tokenizer = Live.readTokenizer(readFileSync(join(folder, json), "utf8"));
    const stream = row => { const d = tokenizer.decoder(); return row.map(id => d.feed(id)).join("") + d.flush() };
    return { encoded: texts.map(text => tokenizer.encode(text, { special })), decoded: ids.map(row => tokenizer.decode(row)),
             streamed: ids.map(stream), vocab_size: tokenizer.vocab_size, special: tokenizer.special_tokens,
             prefix: tokenizer.prefix, words: texts.map(text => tokenizer.splitWords?.(text) ?? null) };
  },

  characters({ text }) {
    return Live.characterTokenizer(text).characters;
  },

  merges({ json, word }) {
    return Live.readTokenizer(readFileSync(join(folder, json), "utf8")).mergeSteps(word);
  },

  learn({ text, count }) {
    return Live.learnMerges(text, count).map(({ pair, token, count }) => ({ pair, token, count }));
  },

  async folder({ path, ids }) {
    const { model, tokenizer, note } = await Live.openFiles(filesIn(join(folder, path)));
    return { logits: [...model.logits(ids)], vocab_size: tokenizer?.vocab_size ?? null, note };
  },

  safetensors({ path }) {
    const tensors = Live.readSafetensors(bufferOf(join(folder, path)));
    return Object.fromEntries(Object.entries(tensors).map(([name, t]) => [name, { ...t, data: [...t.data].map(String) }]));
  },

  heads({ text, settings }) {
    return settings.map(one => window.bookLive.parts.headWeights(text, one));
  },

  own({ sentence, most }) {
    return most.map(count => window.bookLive.parts.ownMerges(sentence, count));
  },

  rules({ settings }) {
    return settings.map(one => [...window.bookLive.parts.afterRules(one)]);
  },

  twister({ seed, count }) {
    const random = window.bookLive.parts.torchRandom(seed);
    return { shares: Array.from({ length: count }, random.share), below: Array.from({ length: count }, () => random.below(25)),
             normal: [...random.normal(64)], uniform: [...random.uniform(40, 0.125)] };
  },

  refusal({ code }) {
    return new Function("Live", "bytes", `return (async () => { ${code} })()`)(Live, path => bufferOf(join(folder, path)));
  },
};

async function main() {
  const given = {};
  for (const one of JSON.parse(readFileSync(join(folder, "cases.json"), "utf8"))) {
    try {
      given[one.name] = { value: (await answers[one.kind](one)) ?? null };
    } catch (error) {
      given[one.name] = error instanceof Live.InputError ? { refused: error.message } : { failed: error.stack };
    }
  }
  writeFileSync(join(folder, "answers.json"), JSON.stringify(given));
}

main();
