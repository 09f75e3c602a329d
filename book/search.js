// How the search box reads a question: small words go, endings go, one letter may be wrong, and some words mean others.
// In search.js of the site the sections of the book, MiniSearch and stemmer (see assets.py) stand before this.
window.bookSearch = (() => {
  const SMALL = new Set(`a about an and are as at be by can did do does for from get had has have how i if in into is it
    its let like make me my no not of on or our so than that the their them then there these they this those to us use
    was we were what when where which who why will with would you your`.split(/\s+/));
  // What readers call things that the book calls otherwise, beside the other names in the glossary; both sides are stemmed.
  const MEANS = {
    sqrt: "√d", overfit: "heart held", memorize: "heart", chatbot: "chat conversation", gpu: "device", speed: "fast", slow: "fast", quicker: "fast", ram: "memory",
    quantization: "int8 packed", quantize: "int8 packed", hallucinate: "knows", hallucination: "knows", backprop: "gradient backward",
    backpropagation: "gradient backward", mlp: "feed forward", ffn: "feed forward", autoregressive: "generation",
    inference: "generation", decode: "generation decoding", install: "make demo", download: "fetch", dataset: "data", crash: "resume",
    interrupted: "resume", loss: "surprise", sampling: "temperature", order: "position",
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
  // "Fine-tuning" is one word, whichever way it is written.
  const split = text => MiniSearch.getDefault("tokenize")(text.replace(/\b(fine|back)[- ](tun|prop)/gi, "$1$2"));
  // The names of each entry of the glossary: its heading, and what comes after "Also:" in its text.
  const namesOf = ({ section, text }) => [section.replace(/ \(.*/, ""), ...(/^\s*Also: ([^.]*)\./.exec(text)?.[1].split(", ") ?? [])];
  const phrase = text => split(text).map(term).filter(Boolean).join(" ");
  let glossary;
  const otherNames = question => {
    glossary ??= bookIndex.filter(([page]) => page === "Glossary")
      .map(([, section, , text]) => [...new Set(namesOf({ section, text }).map(phrase))]).filter(names => names.length > 1);
    const asked = ` ${phrase(question)} `;
    return glossary.filter(names => names.some(name => asked.includes(` ${name} `))).flat().join(" ").split(" ")
      .filter(word => word && !asked.includes(` ${word} `));
  };
  // Chapters before appendices, these before the glossary, checks last; a name of the package comes first where exactly that name is asked for.
  const weight = ({ page, section, url }, question) => {
    if (page === "Index of the package") return section === question ? 6 : 0.4;
    if (page === "Glossary") return 0.35;
    return url.startsWith("exercises/") ? 0.4 : bookChapters.has(url.split("#")[0]) ? 1.6 : 1;
  };
  let engine;
  const index = () => {
    if (engine) return engine;
    engine = new MiniSearch({ tokenize: split, fields: ["page", "head", "text"], storeFields: ["page", "section", "url", "text"], processTerm: term });
    engine.addAll(bookIndex.map(([page, section, url, text], id) => ({ id, page, section, url, text, head: section || page })));
    return engine;
  };
  // The sections that answer a question, best first; `terms` are the words found in each.
  return question => {
    const added = new Set(otherNames(question));
    return index().search([question, ...added].join(" "), {
      boost: { page: 2, head: 4 },
      prefix: word => word.length > 2,
      fuzzy: word => word.length > 3 ? 1 : 0,
      weights: { fuzzy: 0.3, prefix: 0.4 },
      boostTerm: (word, i, words) => added.has(word) ? 0.5 : words.slice(0, i).some(before => means.get(before)?.includes(word)) ? 0.5 : 1,
      processTerm: word => { const own = term(word); return own && means.has(own) ? [own, ...means.get(own)] : own },
      boostDocument: (id, word, stored) => weight(stored, question),
    });
  };
})();
