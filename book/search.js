// How the search box reads a question: small words go, endings go, one letter may be wrong, and some words mean others.
// In search.js of the site the sections of the book, MiniSearch and stemmer (see assets.py) stand before this.
window.bookSearch = (() => {
  const SMALL = new Set(`a about an and are as at be by can did do does for from get had has have how i if in into is it
    its let like make me my no not of on or our so than that the their them then there these they this those to us use
    was we were what when where which who why will with would you your`.split(/\s+/));
  // What readers call things that the book calls otherwise; both sides are stemmed.
  const MEANS = {
    sqrt: "root scale", overfit: "heart held", overfitting: "heart held", memorize: "heart", finetune: "tuning", finetuning: "tuning",
    tune: "tuning", chatbot: "chat conversation", gpu: "device", speed: "fast", slow: "fast", quicker: "fast", ram: "memory",
    quantization: "int8 packed", quantize: "int8 packed", hallucinate: "knows", hallucination: "knows", embed: "embedding",
    backprop: "gradient backward", mlp: "feed forward", ffn: "feed forward", rope: "rotary", autoregressive: "generation",
    inference: "generation", decode: "generation decoding", install: "make demo", download: "fetch", dataset: "data", crash: "resume",
    interrupted: "resume", loss: "surprise", bpe: "tokenizer pair", sampling: "temperature", kv: "cache", order: "position",
  };
  const known = new Map();  // most words come again and again
  const stem = word => {
    const small = word.toLowerCase().normalize("NFKD").replace(/\p{M}/gu, "");
    return SMALL.has(small) || !small ? null : stemmer(small);
  };
  const term = word => {
    if (!known.has(word)) known.set(word, stem(word));
    return known.get(word);
  };
  const means = new Map(Object.entries(MEANS).map(([word, others]) => [stemmer(word), others.split(" ").map(term)]));
  // Chapters before appendices, checks last; a name of the package comes first where exactly that name is asked for.
  const weight = ({ page, section, url }, question) => {
    if (page === "Index of the package") return section === question ? 6 : 0.4;
    return url.startsWith("exercises/") ? 0.4 : bookChapters.has(url.split("#")[0]) ? 1.6 : 1;
  };
  let engine;
  const index = () => {
    if (engine) return engine;
    engine = new MiniSearch({ fields: ["page", "head", "text"], storeFields: ["page", "section", "url", "text"], processTerm: term });
    engine.addAll(bookIndex.map(([page, section, url, text], id) => ({ id, page, section, url, text, head: section || page })));
    return engine;
  };
  // The sections that answer a question, best first; `terms` are the words found in each.
  return question => index().search(question, {
    boost: { page: 2, head: 4 },
    prefix: word => word.length > 2,
    fuzzy: word => word.length > 3 ? 1 : 0,
    weights: { fuzzy: 0.3, prefix: 0.4 },
    boostTerm: (word, i, words) => words.slice(0, i).some(before => means.get(before)?.includes(word)) ? 0.5 : 1,
    processTerm: word => { const own = term(word); return own && means.has(own) ? [own, ...means.get(own)] : own },
    boostDocument: (id, word, stored) => weight(stored, question),
  });
})();
