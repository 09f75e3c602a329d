// Text to token ids and back, from the tokenizer.json that the book writes: byte-level byte-pair encoding, characters.
(() => {
  "use strict";
  const Live = globalThis.Live ??= {};
  const utf8 = new TextEncoder();
  const reader = fatal => new TextDecoder("utf-8", { ignoreBOM: true, fatal });

  const shorten = value => {
    const text = JSON.stringify(value) ?? String(value);
    return text.length <= 40 ? text : `${text.slice(0, 37)}...`;
  };

  // ---- Bytes: files write each as one visible character, Ġ for the space ------------------------------------------------

  const isShown = b => b >= 33 && b <= 126 || b >= 161 && b <= 172 || b >= 174;
  const BYTES = [...Array(256).keys()].sort((a, b) => isShown(b) - isShown(a) || a - b); // in the order of their ids
  const SHOWN = BYTES.indexOf(0);
  const CHARACTERS = [];
  BYTES.forEach((byte, i) => CHARACTERS[byte] = String.fromCodePoint(i < SHOWN ? byte : 256 + i - SHOWN));
  const BYTE_OF = new Map(CHARACTERS.map((character, byte) => [character, byte]));

  const visible = bytes => Array.from(bytes, byte => CHARACTERS[byte]).join("");
  const isVisible = text => [...text].every(character => BYTE_OF.has(character));
  const bytesOf = text => Uint8Array.from([...text], character => BYTE_OF.get(character));

  function joinBytes(parts) {
    const all = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
    let at = 0;
    for (const part of parts) { all.set(part, at); at += part.length }
    return all;
  }

  function checkText(text) {
    if (typeof text !== "string") Live.refuse(`A tokenizer encodes a text, not ${shorten(text)}.`);
    if (/\p{Surrogate}/u.test(text)) Live.refuse("The text holds half a character; remove it.");
    return text;
  }

  // ---- Patterns that cut a text into words ------------------------------------------------------------------------------

  const SPACE = String.raw`\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000`; // Python's \s, not JavaScript's
  const ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
  const LINES = String.raw` ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`;
  const UPPER = String.raw`[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]`, LOWER = String.raw`[\p{Ll}\p{Lm}\p{Lo}\p{M}]`;
  const PATTERNS = { // as in transformer_llm.tokenizer
    gpt2: String.raw`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`,
    smollm: String.raw`\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+`,
    llama3: String.raw`${ENDINGS}|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|${LINES}`,
    qwen2: String.raw`${ENDINGS}|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|${LINES}`,
    cl100k: String.raw`'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*` +
      String.raw`|\s++$|\s*[\r\n]|\s+(?!\S)|\s`,
    o200k: String.raw`[^\r\n\p{L}\p{N}]?${UPPER}*${LOWER}+${ENDINGS}?|[^\r\n\p{L}\p{N}]?${UPPER}+${LOWER}*${ENDINGS}?` +
      String.raw`|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+`,
  };

  // A pattern in JavaScript's dialect: spaces as Python counts them, both cases spelled out.
  function expression(pattern) {
    const cases = letter => letter === "s" ? "[sSſ]" : `[${letter}${letter.toUpperCase()}]`;
    const spelled = pattern.replace(/\(\?i:([^)]*)\)/g, (_, inner) =>
      `(?:${inner.replace(/\[sdmt\]/, "[sdmtSDMTſ]").replace(/(?<!\[[^\]]*)[a-z]/g, cases)})`);
    const possessive = spelled.replace(/\+\+/g, "+");
    const outside = possessive.replace(/\[[^\]]*\]|\\[sS]/g, part => {
      if (part === "\\s") return `[${SPACE}]`;
      return part === "\\S" ? `[^${SPACE}]` : part.replace(/\\s/g, SPACE);
    });
    return new RegExp(outside, "gu");
  }

  function patternName(step) {
    const steps = step.type === "Sequence" ? step.pretokenizers : [step], last = steps.at(-1);
    const kinds = steps.map(part => part.type).join(" + ");
    if (last?.add_prefix_space) Live.refuse("The tokenizer puts a space before each text, which this page can't read.");
    if (kinds === "ByteLevel" && last.use_regex !== false) return "gpt2";
    if (kinds === "Digits + ByteLevel" && steps[0].individual_digits) return "smollm";
    const written = kinds === "Split + ByteLevel" && last.use_regex === false ? steps[0].pattern?.Regex : null;
    const name = Object.keys(PATTERNS).find(known => PATTERNS[known] === written);
    return name ?? Live.refuse(`The tokenizer cuts words with ${shorten(written ?? kinds)}, but this page knows only the ` +
                               `patterns ${Object.keys(PATTERNS).join(", ")}.`);
  }

  // ---- What both tokenizers share ---------------------------------------------------------------------------------------

  class Tokenizer {
    special_tokens = {};
    prefix = [];

    bytes(ids) {
      return joinBytes(Array.from(ids, id => this.values.get(id) ??
        Live.refuse(`Token id ${id} is not in the vocabulary, whose ids run from 0 to ${this.vocab_size - 1}.`)));
    }

    decode(ids) { return reader(false).decode(this.bytes(ids)) }

    // Text as soon as its bytes are complete, one token at a time.
    decoder() {
      const waiting = reader(false);
      return { feed: id => waiting.decode(this.bytes([id]), { stream: true }), flush: () => waiting.decode() };
    }
  }

  class CharTokenizer extends Tokenizer {
    kind = "characters";

    constructor(characters) { // in the order of their ids
      super();
      this.characters = characters;
      this.vocab_size = characters.length;
      this.ids = new Map(characters.map((character, id) => [character, id]));
      this.values = new Map(characters.map((character, id) => [id, utf8.encode(character)]));
    }

    encode(text) {
      return [...checkText(text)].map((character, at) => this.ids.get(character) ??
        Live.refuse(`Character ${JSON.stringify(character)} at position ${at} is not among the ${this.vocab_size} that ` +
                    "this tokenizer knows; leave it out."));
    }

    shown(id) { return this.characters[id] }
  }

  // One token for each character of a text, in the order of their code points.
  const characterTokenizer = text => new CharTokenizer([...new Set(checkText(text))].sort((a, b) =>
    a.codePointAt(0) - b.codePointAt(0)));

  // ---- Byte-pair encoding -----------------------------------------------------------------------------------------------

  class BPETokenizer extends Tokenizer {
    kind = "bpe";

    constructor({ vocab, merges, special, added, normalized, pattern, ignore_merges, nfc, prefix }) {
      super();
      Object.assign(this, { vocab, special_tokens: special, added_tokens: added, pattern, ignore_merges, nfc, prefix });
      this.words = expression(PATTERNS[pattern]);
      this.values = new Map([...vocab].map(([token, id]) => [id, bytesOf(token)]));
      for (const [name, id] of Object.entries(added)) this.values.set(id, utf8.encode(name));
      this.vocab_size = [...this.values.keys()].reduce((a, b) => Math.max(a, b)) + 1;
      this.ranks = new Map(); // "left right" as ids -> rank and the merged token's id
      const names = new Set(Object.values(added));
      merges.forEach(([left, right], rank) => {
        const pair = [left, right, left + right].map(token => vocab.get(token) ??
          Live.refuse(`The tokenizer's merge ${shorten(left + " " + right)} names a token that its vocabulary lacks.`));
        if (!names.has(pair[2])) this.ranks.set(`${pair[0]} ${pair[1]}`, { rank, id: pair[2] });
      });
      this.normalized = normalized;
      this.cache = new Map();
    }

    splitWords(text) { return text.match(this.words) ?? [] }

    shown(id) { return visible(this.values.get(id) ?? []) }

    // Text and added tokens in turn: the earliest first, and of those that begin together the longest.
    cut(text, special) {
      const plain = name => special || !(name in this.special_tokens);
      const names = Object.keys(this.added_tokens).filter(plain), pieces = [];
      const compose = piece => this.nfc ? piece.normalize("NFC") : piece;
      const late = new Map(names.filter(name => this.normalized.has(name)).map(name => [compose(name), name]));
      for (const [piece, name] of cutAt(text, names.filter(each => !this.normalized.has(each)))) {
        for (const [part, found] of cutAt(compose(piece), [...late.keys()])) pieces.push([part, late.get(found) ?? null]);
        if (name !== null) pieces.at(-1)[1] = name;
      }
      return pieces;
    }

    encode(text, { special = true } = {}) {
      const ids = [];
      for (const [piece, name] of this.cut(checkText(text), special)) {
        for (const word of this.splitWords(piece)) ids.push(...this.encodeWord(word));
        if (name !== null) ids.push(this.added_tokens[name]);
      }
      return ids;
    }

    encodeWord(word) {
      if (this.cache.has(word)) return this.cache.get(word);
      if (this.cache.size > 20000) this.cache.clear();
      const whole = this.ignore_merges && !(word in this.added_tokens) ? this.vocab.get(visible(utf8.encode(word))) : null;
      const ids = whole != null ? [whole] : this.mergeSteps(word, false).at(-1).ids;
      this.cache.set(word, ids);
      return ids;
    }

    // How a word's bytes become tokens: before the first merge, and after each. Of all neighbours that were ever
    // merged, those that were merged first in training come first, and of equals the leftmost.
    mergeSteps(word, all = true) {
      const ids = Array.from(utf8.encode(word), byte => this.vocab.get(CHARACTERS[byte])).filter(id => id !== undefined);
      const rankAt = i => this.ranks.get(`${ids[i]} ${ids[i + 1]}`)?.rank ?? Infinity;
      const ranks = ids.map((_, i) => rankAt(i)), steps = [{ ids: [...ids], pair: null, rank: null, at: null }];
      for (;;) {
        let at = 0;
        for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[at]) at = i;
        const rank = ranks[at] ?? Infinity, pair = [ids[at], ids[at + 1]];
        if (rank === Infinity) break;
        ids.splice(at, 2, this.ranks.get(pair.join(" ")).id);
        ranks.splice(at, 1);
        for (const i of [at - 1, at]) if (i >= 0) ranks[i] = rankAt(i);
        if (all) steps.push({ ids: [...ids], pair, rank, at });
      }
      if (!all) return [{ ids }];
      for (const step of steps) step.shown = step.ids.map(id => this.shown(id));
      return steps;
    }
  }

  // [text, name], [text, name], ..., [text, null]
  function cutAt(text, names) {
    const escaped = names.filter(Boolean).sort((a, b) => b.length - a.length)
      .map(name => name.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"));
    const pieces = escaped.length ? text.split(new RegExp(`(${escaped.join("|")})`, "u")) : [text];
    return pieces.flatMap((piece, i) => i % 2 ? [] : [[piece, pieces[i + 1] ?? null]]);
  }

  // Chapter 05's training on a short text: the most frequent pair first, and among equals the one with smallest ids.
  function learnMerges(text, n_merges) {
    const counts = new Map(), tokens = BYTES.map(byte => CHARACTERS[byte]), learned = [];
    for (const word of checkText(text).match(expression(PATTERNS.gpt2)) ?? []) counts.set(word, (counts.get(word) ?? 0) + 1);
    const words = [...counts].map(([word, count]) => ({ count, ids: Array.from(utf8.encode(word), b => BYTES.indexOf(b)) }));
    while (learned.length < n_merges) {
      const pair = mostFrequentPair(words);
      if (!pair) break;
      for (const word of words) word.ids = mergedIds(word.ids, pair, tokens.length);
      const shown = pair.ids.map(id => tokens[id]);
      tokens.push(shown.join(""));
      learned.push({ pair: shown, token: tokens.at(-1), count: pair.count,
                     words: words.map(word => ({ shown: word.ids.map(id => tokens[id]), count: word.count })) });
    }
    return learned;
  }

  function mostFrequentPair(words) {
    const pairs = new Map();
    for (const { ids, count } of words) {
      for (let i = 0; i + 1 < ids.length; i++) {
        const key = `${ids[i]} ${ids[i + 1]}`, pair = pairs.get(key) ?? { ids: [ids[i], ids[i + 1]], count: 0 };
        pair.count += count;
        pairs.set(key, pair);
      }
    }
    const order = (a, b) => b.count - a.count || a.ids[0] - b.ids[0] || a.ids[1] - b.ids[1];
    return [...pairs.values()].sort(order)[0];
  }

  function mergedIds(ids, pair, id) {
    const merged = [];
    for (let i = 0; i < ids.length; i++) {
      const both = ids[i] === pair.ids[0] && ids[i + 1] === pair.ids[1];
      merged.push(both ? id : ids[i]);
      if (both) i++;
    }
    return merged;
  }

  // ---- tokenizer.json ---------------------------------------------------------------------------------------------------

  // The tokenizer in a file's text, or in what JSON.parse made of it.
  function readTokenizer(json) {
    let parts = json;
    try { if (typeof json === "string") parts = JSON.parse(json) } catch { parts = null }
    const model = parts?.model;
    if (!model || typeof model.vocab !== "object" || !Array.isArray(model.merges)) {
      Live.refuse("This is not a tokenizer.json: it has no vocabulary with merges; take the one saved with the model.");
    }
    for (const name of ["dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"]) {
      if (model[name]) Live.refuse(`The tokenizer sets ${name} to ${shorten(model[name])}, which this page can't read.`);
    }
    const vocab = new Map(Object.entries(model.vocab)), added = parts.added_tokens ?? [];
    checkIds([...vocab.values(), ...added.filter(token => !vocab.has(token.content)).map(token => token.id)]);
    if (parts.pre_tokenizer) return readBytePairs(parts, vocab, added);
    if (model.merges.length || added.length || [...vocab.keys()].some(text => [...text].length !== 1)) {
      Live.refuse("The tokenizer has no pre_tokenizer, but only character vocabularies can be read without one.");
    }
    return new CharTokenizer([...vocab.keys()].sort((a, b) => vocab.get(a) - vocab.get(b)));
  }

  function checkIds(ids) {
    const wrong = ids.find(id => !Number.isInteger(id) || id < 0);
    if (wrong !== undefined) Live.refuse(`The tokenizer's ids must be whole numbers, but one is ${shorten(wrong)}.`);
    if (new Set(ids).size < ids.length) Live.refuse("The tokenizer gives two tokens the same id; the file is damaged.");
  }

  function readBytePairs(parts, vocab, list) {
    const merges = parts.model.merges.map(merge => typeof merge === "string" ? merge.split(" ") : merge);
    const odd = list.find(token => token.single_word || token.lstrip || token.rstrip);
    if (odd) Live.refuse(`The added token ${shorten(odd.content)} swallows spaces, which this page can't read.`);
    const steps = parts.normalizer ? parts.normalizer.normalizers ?? [parts.normalizer] : [];
    const other = steps.find(step => step.type !== "NFC");
    if (other) Live.refuse(`The tokenizer's normalizer ${shorten(other.type)} can't be read, only NFC.`);
    const made = new Set(merges.flatMap(([left, right]) => [left, right, left + right])); // names that merges use too
    const added = Object.fromEntries(list.map(token => [token.content, token.id]));
    const isName = token => token in added && !made.has(token) && !BYTE_OF.has(token);
    const tokens = new Map([...vocab].filter(([token]) => !isName(token)));
    const strange = [...tokens.keys()].find(token => !isVisible(token));
    if (strange) Live.refuse(`The tokenizer's token ${shorten(strange)} is not written in byte-level characters.`);
    return new BPETokenizer({
      vocab: tokens, merges, added, pattern: patternName(parts.pre_tokenizer), prefix: prefixOf(parts.post_processor),
      special: Object.fromEntries(list.filter(token => token.special).map(token => [token.content, token.id])),
      normalized: new Set(list.filter(token => token.normalized).map(token => token.content)),
      ignore_merges: Boolean(parts.model.ignore_merges), nfc: steps.length > 0,
    });
  }

  // The ids that the model expects before each text; encode doesn't add them.
  function prefixOf(step) {
    const steps = (step?.type === "Sequence" ? step.processors : [step]).filter(part => part && part.type !== "ByteLevel");
    if (!steps.length) return [];
    const single = steps[0].single ?? [];
    if (steps.length > 1 || steps[0].type !== "TemplateProcessing" || !single.at(-1)?.Sequence) {
      Live.refuse(`The tokenizer's post_processor ${shorten(steps[0].type)} adds tokens in a way that can't be read.`);
    }
    return single.slice(0, -1).flatMap(part => steps[0].special_tokens[part.SpecialToken.id].ids);
  }

  Object.assign(Live, { readTokenizer, characterTokenizer, learnMerges, CharTokenizer, BPETokenizer });
})();
