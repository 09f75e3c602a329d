// Models from files: safetensors, config.json and tokenizer.json, as the book (or transformers) saves them.
(() => {
  "use strict";
  const Live = globalThis.Live ??= {};
  const LARGEST = 700e6; // bytes of weights: more would fill a tab's memory, since each becomes four bytes

  const megabytes = bytes => `${(bytes / 1e6).toLocaleString("en", { maximumFractionDigits: 1 })} MB`;

  function decodeBase64(text) {
    return Uint8Array.from(atob(text.trim()), character => character.charCodeAt(0)).buffer;
  }

  // ---- safetensors: eight bytes of length, a JSON header, and the numbers ------------------------------------------------

  // Half precision: a sign, five bits of exponent, ten of fraction.
  function halfToNumber(bits) {
    const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    return exponent === 31 ? (fraction ? NaN : sign * Infinity) : sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }

  const KINDS = { // bytes a number, and how they become float32
    F32: [4, bytes => new Float32Array(bytes)],
    F16: [2, bytes => Float32Array.from(new Uint16Array(bytes), halfToNumber)],
    BF16: [2, bytes => new Float32Array(Uint32Array.from(new Uint16Array(bytes), bits => bits << 16).buffer)],
  };

  function readHeader(buffer, name) {
    const damaged = why => Live.refuse(`${name} is not a readable safetensors file: ${why}; copy it again.`);
    if (buffer.byteLength < 8) damaged(`it has only ${buffer.byteLength} bytes`);
    const length = Number(new DataView(buffer).getBigUint64(0, true));
    if (length > buffer.byteLength - 8) damaged("its header is longer than the file");
    try {
      return [JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length))), 8 + length];
    } catch {
      return damaged("its header is not JSON");
    }
  }

  // Each tensor by its name, as float32 numbers whatever the file holds.
  function readSafetensors(buffer, name = "model.safetensors") {
    const [header, start] = readHeader(buffer, name), tensors = {};
    for (const [tensor, entry] of Object.entries(header)) {
      if (tensor === "__metadata__") continue;
      const { dtype, shape, data_offsets } = entry, [bytes, convert] = KINDS[dtype] ?? [];
      if (!bytes) {
        Live.refuse(`${name} holds ${tensor} as ${dtype}, but this page reads F32, F16 and BF16; save the model in one.`);
      }
      const [from, to] = data_offsets.map(offset => start + offset);
      if (to > buffer.byteLength || to - from !== bytes * shape.reduce((a, b) => a * b, 1)) {
        Live.refuse(`${name} is incomplete: ${tensor} should end at byte ${to}, and the file has ${buffer.byteLength}; ` +
                    "copy it again.");
      }
      tensors[tensor] = { dtype, shape, data: convert(buffer.slice(from, to)) };
    }
    return tensors;
  }

  // ---- config.json -----------------------------------------------------------------------------------------------------

  const LLAMA = {
    "token_embedding": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head", "blocks": "model.layers",
    "attention_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm",
    "attention.q_proj": "self_attn.q_proj", "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj", "attention.o_proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
    "feedforward.gate": "mlp.gate_proj", "feedforward.up": "mlp.up_proj", "feedforward.down": "mlp.down_proj",
  };
  const GPT2 = {
    "token_embedding": "transformer.wte", "position_embedding": "transformer.wpe", "final_norm": "transformer.ln_f",
    "lm_head": "lm_head", "blocks": "transformer.h", "attention_norm": "ln_1", "feedforward_norm": "ln_2",
    "attention.q_proj": "attn.c_attn", "attention.k_proj": "attn.c_attn", "attention.v_proj": "attn.c_attn",
    "attention.o_proj": "attn.c_proj", "feedforward.up": "mlp.c_fc", "feedforward.down": "mlp.c_proj",
  };
  const FAMILIES = { // transformers' model_type: its names, and how it differs from the plain Llama
    gpt2: [GPT2, { norm: "layernorm", position: "learned", bias: true }],
    llama: [LLAMA, {}],
    mistral: [LLAMA, {}],
    qwen2: [LLAMA, { qkv_bias: true }],
    qwen3: [LLAMA, { qk_norm: true }],
    olmo2: [{ ...LLAMA, attention_norm: "post_attention_layernorm", feedforward_norm: "post_feedforward_layernorm" },
            { qk_norm: true, qk_norm_whole: true, norm_placement: "output" }],
  };
  const FIELDS = {
    vocab_size: "vocab_size", context_length: "max_position_embeddings", d_model: "hidden_size",
    n_layers: "num_hidden_layers", n_heads: "num_attention_heads", n_kv_heads: "num_key_value_heads",
    head_dim: "head_dim", d_ff: "intermediate_size", norm_eps: "rms_norm_eps",
  };
  const GPT2_FIELDS = {
    vocab_size: "vocab_size", context_length: "n_positions", d_model: "n_embd", n_layers: "n_layer",
    n_heads: "n_head", d_ff: "n_inner", norm_eps: "layer_norm_epsilon",
  };
  // every field that this page understands or may ignore: another could change what the model computes
  const KNOWN = new Set(["model_type", "architectures", "tie_word_embeddings", "initializer_range", "use_cache", "dtype",
    "torch_dtype", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path", "hidden_act",
    "activation_function", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window",
    "max_window_layers", "attention_bias", "mlp_bias", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    ...Object.values(FIELDS), ...Object.values(GPT2_FIELDS)]);

  const parsed = (json, name) => {
    try { return typeof json === "string" ? JSON.parse(json) : json }
    catch { return Live.refuse(`${name} is not JSON; it is damaged, or of another kind.`) }
  };

  // A config.json in the book's own words: {config, family}; family is null where the book wrote it.
  function readConfig(json) {
    const values = parsed(json, "config.json"), family = values?.model_type ?? null;
    if (!values || typeof values !== "object") Live.refuse("config.json holds no configuration; it is damaged.");
    if (family === null) return { config: Live.fullConfig(values), family };
    if (!(family in FAMILIES)) {
      Live.refuse(`The architecture ${family} can't be read; this page runs ${Object.keys(FAMILIES).join(", ")}.`);
    }
    const unknown = Object.keys(values).find(name => !KNOWN.has(name) && values[name] !== null);
    if (unknown) Live.refuse(`config.json sets ${unknown}, which this page doesn't know; save the model with the book.`);
    return { config: Live.fullConfig(family === "gpt2" ? gpt2Config(values) : rotaryConfig(family, values)), family };
  }

  function taken(values, fields, extra) {
    const config = { ...extra };
    for (const [ours, theirs] of Object.entries(fields)) if (theirs in values) config[ours] = values[theirs];
    return config;
  }

  function gpt2Config(values) {
    const activation = { gelu: "gelu", gelu_new: "gelu_tanh" }[values.activation_function ?? "gelu_new"];
    if (!activation) Live.refuse(`activation_function must be gelu or gelu_new, not ${values.activation_function}.`);
    const tied_embeddings = values.tie_word_embeddings ?? true;
    return taken(values, GPT2_FIELDS, { ...FAMILIES.gpt2[1], activation, tied_embeddings });
  }

  function rotaryConfig(family, values) {
    const act = values.hidden_act ?? "silu", rope = values.rope_parameters ?? values.rope_scaling ?? {};
    if (act !== "silu") Live.refuse(`hidden_act must be silu, not ${act}.`);
    if (Boolean(values.attention_bias) !== Boolean(values.mlp_bias)) {
      Live.refuse("config.json sets only one of attention_bias and mlp_bias, but this page has both or neither.");
    }
    if (family === "mistral" && values.sliding_window === undefined) Live.refuse("config.json lacks sliding_window.");
    const windowed = family === "mistral" || values.use_sliding_window;
    const rope_base = rope.rope_theta ?? values.rope_theta ?? 10000;
    return taken(values, FIELDS, {
      norm_eps: family === "olmo2" ? 1e-5 : 1e-6, bias: Boolean(values.mlp_bias), ...FAMILIES[family][1], rope_base,
      rope_scaling: ropeScaling(rope, values), window: windowed && "sliding_window" in values ? values.sliding_window : null,
      tied_embeddings: values.tie_word_embeddings ?? false,
    });
  }

  function ropeScaling(rope, values) {
    const kind = rope.rope_type ?? rope.type ?? "default", { rope_type, type, rope_theta, ...fields } = rope;
    if (kind === "default") return null;
    const { original_max_position_embeddings: original, ...rest } = fields;
    const trained = kind === "dynamic" ? values.max_position_embeddings : original ?? values.max_position_embeddings;
    return { kind, ...rest, original_context_length: trained };
  }

  // ---- Weights under the book's names ------------------------------------------------------------------------------------

  const swapped = ({ shape: [rows, columns], data }) => { // GPT-2's files hold matrices as (in, out)
    const turned = new Float32Array(data.length);
    for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) turned[c * rows + r] = data[r * columns + c];
    return { shape: [columns, rows], data: turned };
  };

  // One of our weights from a file of transformers: renamed, transposed, or a third of GPT-2's joined projection.
  function theirWeight(tensors, family, name, shape) {
    const [, layer, module, kind] = /^(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)$/.exec(name), names = FAMILIES[family][0];
    const theirs = [...(layer ? [names.blocks, layer] : []), names[module], kind].join(".");
    let tensor = tensors[theirs] ?? tensors[theirs.replace(/^transformer\./, "")];
    if (!tensor) Live.refuse(`The weights lack ${theirs}; they are incomplete, or of another kind.`);
    if (family === "gpt2" && layer && tensor.shape.length === 2) tensor = swapped(tensor);
    if (names[module] !== "attn.c_attn") return tensor;
    const size = tensor.data.length / 3, part = "qkv".indexOf(module.at(-6));
    return { shape, data: tensor.data.slice(part * size, (part + 1) * size) };
  }

  function ourWeights(tensors, config, family) {
    const plain = name => name.replace(/_orig_mod\./g, "");
    if (family === null) return Object.fromEntries(Object.entries(tensors).map(([name, t]) => [plain(name), t]));
    return Object.fromEntries(Object.entries(Live.weightShapes(config)).map(([name, shape]) =>
      [name, theirWeight(tensors, family, name, shape)]));
  }

  // A model and its tokenizer from what the files hold: config.json's text, safetensors' bytes (one buffer, or
  // several), and tokenizer.json's text or null.
  function makeModel({ config, weights, tokenizer = null }) {
    const read = readConfig(config), buffers = Array.isArray(weights) ? weights : [weights];
    const tensors = Object.assign({}, ...buffers.map(buffer => readSafetensors(buffer)));
    const model = new Live.Model(read.config, ourWeights(tensors, read.config, read.family));
    for (const { name, data } of Object.values(model.weights)) {
      if (!data.every(Number.isFinite)) Live.refuse(`${name} holds a number that isn't finite; take an older checkpoint.`);
    }
    const reader = tokenizer === null ? null : Live.readTokenizer(tokenizer);
    if (reader && reader.vocab_size > model.config.vocab_size) {
      Live.refuse(`The tokenizer has ${reader.vocab_size} tokens, but the model only ${model.config.vocab_size}; ` +
                  "take the tokenizer.json that was saved with it.");
    }
    return { model, tokenizer: reader };
  }

  // ---- What a reader drops ------------------------------------------------------------------------------------------------

  const pathOf = file => file.path || file.webkitRelativePath || file.name;
  const WANTED = /^(config\.json|tokenizer\.json|model(-\d{5}-of-\d{5})?\.safetensors)$/;

  // The files of one model: of a run with several checkpoints, those of the newest.
  function chooseFiles(files) {
    const folders = new Map();
    for (const file of files) {
      const parts = pathOf(file).split("/"), name = parts.pop(), folder = parts.join("/");
      if (WANTED.test(name)) folders.set(folder, { ...folders.get(folder), [name]: file });
    }
    const weightsOf = chosen => Object.keys(chosen ?? {}).filter(name => name.endsWith(".safetensors")).sort();
    const whole = [...folders.keys()].filter(folder => weightsOf(folders.get(folder)).length).sort();
    if (!whole.length) Live.refuse("There is no model.safetensors among these files; drop the folder that the book saved.");
    const folder = whole.at(-1), chosen = folders.get(folder);
    if (!chosen["config.json"]) Live.refuse(`There is no config.json beside ${weightsOf(chosen)[0]}; drop both together.`);
    return { folder, chosen, weights: weightsOf(chosen).map(name => chosen[name]) };
  }

  // The model in files that a reader chose or dropped; nothing is read before its size is known to fit.
  async function openFiles(files) {
    const { folder, chosen, weights } = chooseFiles(Array.from(files));
    const bytes = weights.reduce((sum, file) => sum + file.size, 0);
    if (bytes > LARGEST) {
      Live.refuse(`The weights have ${megabytes(bytes)}, and a page can hold ${megabytes(LARGEST)}; use the book's ` +
                  "command line for this model.");
    }
    for (const name of ["config.json", "tokenizer.json"]) {
      if (chosen[name]?.size > 50e6) Live.refuse(`${name} has ${megabytes(chosen[name].size)}; it is of another kind.`);
    }
    const text = async name => chosen[name] ? chosen[name].text() : null;
    const made = makeModel({
      config: await text("config.json"), tokenizer: await text("tokenizer.json"),
      weights: await Promise.all(weights.map(file => file.arrayBuffer())),
    });
    return { ...made, note: `${folder || weights[0].name}, ${megabytes(bytes)}` };
  }

  Object.assign(Live, { LARGEST, decodeBase64, readSafetensors, readConfig, makeModel, chooseFiles, openFiles });
})();
