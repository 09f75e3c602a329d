// The book's transformer in a web page: the same configurations, values and gradients as transformer_llm.transformer.
// A classic script without a module, a request or a page: it also runs in a worker and in node. Appendix 77 explains it.
(() => {
  "use strict";
  const Live = globalThis.Live ??= {};

  // What a reader did wrong, in one sentence that a page can show as it is.
  class InputError extends Error {
    name = "InputError";
  }
  const refuse = sentence => { throw new InputError(sentence) };

  const isNumber = (value, low, high = Infinity) => Number.isFinite(value) && value >= low && value <= high;

  function checkNumber(name, value, low, high = Infinity, whole = false) {
    if (isNumber(value, low, high) && (!whole || Number.isInteger(value))) return value;
    const range = high === Infinity ? `of at least ${low}` : `from ${low} to ${high}`;
    return refuse(`${name} must be a ${whole ? "whole " : ""}number ${range}, not ${JSON.stringify(value) ?? value}.`);
  }

  // ---- Configuration -------------------------------------------------------------------------------------------------

  const DEFAULTS = {
    vocab_size: 8192, context_length: 256, d_model: 256, n_layers: 6, n_heads: 4, n_kv_heads: null, head_dim: null,
    d_ff: null, norm: "rmsnorm", norm_placement: "pre", norm_eps: 1e-5, position: "rotary", rope_base: 10000,
    rope_interleaved: false, rope_scaling: null, activation: "swiglu", bias: false, qkv_bias: null, output_bias: false,
    tied_embeddings: true, qk_norm: false, qk_norm_whole: false, window: null, dropout: 0, init_std: 0.02,
    zero_init_residual: false,
  };
  const CHOICES = {
    norm: ["layernorm", "rmsnorm"],
    norm_placement: ["pre", "post", "output"],
    position: ["learned", "sinusoidal", "rotary", "alibi", "none"],
    activation: ["gelu", "gelu_tanh", "relu2", "swiglu"],
  };
  const SIZES = ["vocab_size", "context_length", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff"];

  const usualWidth = c => c.activation === "swiglu" ? Math.ceil(8 * c.d_model / 48) * 16 : 4 * c.d_model;

  // A whole configuration from config.json's fields: what is missing is filled in, what can't be is refused.
  function fullConfig(values) {
    for (const name of Object.keys(values)) {
      if (!(name in DEFAULTS)) refuse(`The model configuration has no field ${JSON.stringify(name)}.`);
    }
    const c = { ...DEFAULTS, ...values };
    for (const [name, allowed] of Object.entries(CHOICES)) {
      if (!allowed.includes(c[name])) refuse(`${name} must be one of ${allowed.join(", ")}, not ${c[name]}.`);
    }
    c.n_kv_heads ??= c.n_heads;
    if (c.head_dim === null && c.d_model % c.n_heads) {
      refuse(`d_model must be a multiple of n_heads=${c.n_heads} when head_dim isn't given, not ${c.d_model}.`);
    }
    c.head_dim ??= c.d_model / c.n_heads;
    c.d_ff ??= usualWidth(c);
    c.qkv_bias ??= c.bias;
    checkConfig(c);
    if (c.rope_scaling) c.rope_scaling = fullScaling(c.rope_scaling, c);
    return c;
  }

  function checkConfig(c) {
    for (const name of SIZES) checkNumber(name, c[name], 1, Infinity, true);
    if (c.window !== null) checkNumber("window", c.window, 1, Infinity, true);
    for (const name of ["norm_eps", "dropout"]) checkNumber(name, c[name], 0, 1);
    checkNumber("rope_base", c.rope_base, 1);
    if (c.n_heads % c.n_kv_heads) refuse(`n_kv_heads must divide n_heads=${c.n_heads}, not be ${c.n_kv_heads}.`);
    const pairs = { rotary: "head_dim", sinusoidal: "d_model" }[c.position];
    if (pairs && c[pairs] % 2) refuse(`${pairs} must be even for ${c.position} positions, not ${c[pairs]}.`);
  }

  const SCALING = {
    kind: null, factor: 1, low_freq_factor: 1, high_freq_factor: 4, original_context_length: null, divisors: [],
    beta_fast: 32, beta_slow: 1, truncate: true, attention_factor: null,
  };
  const KINDS = ["linear", "dynamic", "yarn", "llama3", "divisors"];

  function fullScaling(values, c) {
    const s = { ...SCALING, ...values };
    if (!KINDS.includes(s.kind)) refuse(`rope_scaling kind must be one of ${KINDS.join(", ")}, not ${s.kind}.`);
    if (s.original_context_length === null && ["yarn", "dynamic"].includes(s.kind)) {
      refuse(`rope_scaling kind="${s.kind}" needs original_context_length, the length of training.`);
    }
    s.original_context_length ??= 8192;
    s.attention_factor ??= s.kind === "yarn" && s.factor > 1 ? 0.1 * Math.log(s.factor) + 1 : 1;
    checkNumber("rope_scaling factor", s.factor, 1);
    if (s.kind === "divisors" && s.divisors.length !== c.head_dim / 2) {
      refuse(`rope_scaling needs ${c.head_dim / 2} divisors, one for each pair, not ${s.divisors.length}.`);
    }
    return s;
  }

  // Each weight's name and shape, in the order in which torch lists them.
  function weightShapes(c) {
    const shapes = {};
    if (c.output_bias) shapes.output_bias = [c.vocab_size];
    shapes["token_embedding.weight"] = [c.vocab_size, c.d_model];
    if (c.position === "learned") shapes["position_embedding.weight"] = [c.context_length, c.d_model];
    for (let layer = 0; layer < c.n_layers; layer++) blockShapes(shapes, c, `blocks.${layer}.`);
    if (c.norm_placement !== "post") normShapes(shapes, c, "final_norm");
    if (!c.tied_embeddings) shapes["lm_head.weight"] = [c.vocab_size, c.d_model];
    return shapes;
  }

  function normShapes(shapes, c, name) {
    shapes[`${name}.weight`] = [c.d_model];
    if (c.norm === "layernorm" && c.bias) shapes[`${name}.bias`] = [c.d_model];
  }

  function blockShapes(shapes, c, block) {
    const matrix = (name, outs, ins, bias) => {
      shapes[`${block}${name}.weight`] = [outs, ins];
      if (bias) shapes[`${block}${name}.bias`] = [outs];
    };
    const queries = c.n_heads * c.head_dim, keys = c.n_kv_heads * c.head_dim;
    normShapes(shapes, c, `${block}attention_norm`);
    matrix("attention.q_proj", queries, c.d_model, c.qkv_bias);
    matrix("attention.k_proj", keys, c.d_model, c.qkv_bias);
    matrix("attention.v_proj", keys, c.d_model, c.qkv_bias);
    matrix("attention.o_proj", c.d_model, queries, c.bias);
    if (c.qk_norm) {
      shapes[`${block}attention.q_norm.weight`] = [c.qk_norm_whole ? queries : c.head_dim];
      shapes[`${block}attention.k_norm.weight`] = [c.qk_norm_whole ? keys : c.head_dim];
    }
    normShapes(shapes, c, `${block}feedforward_norm`);
    if (c.activation === "swiglu") matrix("feedforward.gate", c.d_ff, c.d_model, c.bias);
    matrix("feedforward.up", c.d_ff, c.d_model, c.bias);
    matrix("feedforward.down", c.d_model, c.d_ff, c.bias);
  }

  // ---- Two products, in which nearly all of the time goes --------------------------------------------------------------

  const kernels = {
    // y[r, o] = sum over i of x[r, i] w[o, i]: every row of x against every row of w.
    dots(y, x, w, rows, outs, ins) {
      for (let r = 0; r < rows; r++) {
        for (let o = 0; o < outs; o++) {
          const a = r * ins, b = o * ins, even = ins - ins % 4;
          let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
          for (let i = 0; i < even; i += 4) {
            s0 += x[a + i] * w[b + i];
            s1 += x[a + i + 1] * w[b + i + 1];
            s2 += x[a + i + 2] * w[b + i + 2];
            s3 += x[a + i + 3] * w[b + i + 3];
          }
          for (let i = even; i < ins; i++) s0 += x[a + i] * w[b + i];
          y[r * outs + o] = s0 + s1 + (s2 + s3);
        }
      }
    },

    // out[n, i] += sum over m of a[n * down + m * along] b[m, i]: a mixture of b's rows for every row of out.
    mixtures(out, a, b, count, parts, width, down, along) {
      for (let n = 0; n < count; n++) {
        const to = n * width, even = parts - parts % 4;
        for (let m = 0; m < parts; m++) {
          const at = n * down + m * along, from = m * width;
          if (m < even) { // four rows of b at once: out is read and written a quarter as often
            const g0 = a[at], g1 = a[at + along], g2 = a[at + 2 * along], g3 = a[at + 3 * along];
            const b1 = from + width, b2 = b1 + width, b3 = b2 + width;
            for (let i = 0; i < width; i++) {
              out[to + i] += g0 * b[from + i] + g1 * b[b1 + i] + g2 * b[b2 + i] + g3 * b[b3 + i];
            }
            m += 3;
          } else {
            const g = a[at];
            for (let i = 0; i < width; i++) out[to + i] += g * b[from + i];
          }
        }
      }
    },
  };

  // ---- Steps of the computation: each computes now, and puts onto the tape how its gradients flow back -------------------

  const newRows = (count, width) => ({ count, width, data: new Float32Array(count * width), grad: null });
  const gradOf = x => x.grad ??= new Float32Array(x.data.length);

  function addToRows(y, row) {
    const width = row.length;
    for (let at = 0; at < y.length; at += width) for (let i = 0; i < width; i++) y[at + i] += row[i];
  }

  function addRows(sum, y) {
    const width = sum.length;
    for (let at = 0; at < y.length; at += width) for (let i = 0; i < width; i++) sum[i] += y[at + i];
  }

  // y = x Wᵀ + b. Backwards: dx = dy W, dW = dyᵀ x, db = the sum of dy's rows.
  function linear(tape, x, weight, bias) {
    const [outs, ins] = weight.shape, y = newRows(x.count, outs);
    kernels.dots(y.data, x.data, weight.data, x.count, outs, ins);
    if (bias) addToRows(y.data, bias.data);
    tape?.push(() => {
      const dy = gradOf(y);
      kernels.mixtures(gradOf(x), dy, weight.data, x.count, outs, ins, outs, 1);
      kernels.mixtures(gradOf(weight), dy, x.data, outs, x.count, ins, 1, outs);
      if (bias) addRows(gradOf(bias), dy);
    });
    return y;
  }

  function add(tape, x, z) {
    const y = newRows(x.count, x.width);
    for (let i = 0; i < y.data.length; i++) y.data[i] = x.data[i] + z.data[i];
    tape?.push(() => {
      const dy = gradOf(y), dx = gradOf(x), dz = gradOf(z);
      for (let i = 0; i < dy.length; i++) { dx[i] += dy[i]; dz[i] += dy[i] }
    });
    return y;
  }

  function multiply(tape, x, z) {
    const y = newRows(x.count, x.width);
    for (let i = 0; i < y.data.length; i++) y.data[i] = x.data[i] * z.data[i];
    tape?.push(() => {
      const dy = gradOf(y), dx = gradOf(x), dz = gradOf(z);
      for (let i = 0; i < dy.length; i++) { dx[i] += dy[i] * z.data[i]; dz[i] += dy[i] * x.data[i] }
    });
    return y;
  }

  // LayerNorm (centred) or RMSNorm of vectors as long as the weight: a row holds one of them, or one for each head.
  function normalise(tape, x, weight, bias, eps, centred) {
    const width = weight.data.length, y = newRows(x.count, x.width), unit = new Float32Array(x.data.length);
    const scales = new Float64Array(x.data.length / width);
    for (let v = 0; v < scales.length; v++) {
      const from = v * width;
      let mean = 0, square = 0;
      if (centred) for (let i = 0; i < width; i++) mean += x.data[from + i] / width;
      for (let i = 0; i < width; i++) square += (x.data[from + i] - mean) ** 2 / width;
      scales[v] = 1 / Math.sqrt(square + eps);
      for (let i = 0; i < width; i++) {
        unit[from + i] = (x.data[from + i] - mean) * scales[v];
        y.data[from + i] = unit[from + i] * weight.data[i] + (bias ? bias.data[i] : 0);
      }
    }
    tape?.push(() => normaliseBack(gradOf(y), gradOf(x), unit, scales, weight, bias, centred));
    return y;
  }

  function normaliseBack(dy, dx, unit, scales, weight, bias, centred) {
    const width = weight.data.length, dw = gradOf(weight), db = bias && gradOf(bias);
    for (let v = 0; v < scales.length; v++) {
      const from = v * width;
      let mean = 0, along = 0; // of the unit vector's gradient, and of its part along the unit vector
      for (let i = 0; i < width; i++) {
        const g = dy[from + i];
        dw[i] += g * unit[from + i];
        if (db) db[i] += g;
        if (centred) mean += g * weight.data[i] / width;
        along += g * weight.data[i] * unit[from + i] / width;
      }
      for (let i = 0; i < width; i++) {
        dx[from + i] += scales[v] * (dy[from + i] * weight.data[i] - mean - unit[from + i] * along);
      }
    }
  }

  // The normal distribution's density, and its distribution function Φ(x) = 1/2 + φ(x) (x + x³/3 + x⁵/(3·5) + ...).
  const density = x => Math.exp(-x * x / 2) / Math.sqrt(2 * Math.PI);

  function distribution(x) {
    if (x > 6 || x < -6) return x > 0 ? 1 : 0;
    const square = x * x;
    let term = x, sum = x;
    for (let n = 3; term > 1e-9 || term < -1e-9; n += 2) sum += term *= square / n;
    return 0.5 + density(x) * sum;
  }

  const BEND = Math.sqrt(2 / Math.PI), CUBE = 0.044715; // GPT-2's approximation of Φ by a tanh

  // Each activation writes its value to y[i], and its slope to dy[i] where somebody will ask for it.
  const ACTIVATIONS = {
    gelu(x, i, y, slope) {
      const share = distribution(x);
      y[i] = x * share;
      if (slope) slope[i] = share + x * density(x);
    },
    gelu_tanh(x, i, y, slope) {
      const bent = Math.tanh(BEND * (x + CUBE * x * x * x));
      y[i] = 0.5 * x * (1 + bent);
      if (slope) slope[i] = 0.5 * (1 + bent) + 0.5 * x * (1 - bent * bent) * BEND * (1 + 3 * CUBE * x * x);
    },
    relu2(x, i, y, slope) {
      const kept = Math.max(x, 0);
      y[i] = kept * kept;
      if (slope) slope[i] = 2 * kept;
    },
    swiglu(x, i, y, slope) { // SiLU, which the gate of SwiGLU takes
      const share = 1 / (1 + Math.exp(-x));
      y[i] = x * share;
      if (slope) slope[i] = share * (1 + x * (1 - share));
    },
  };

  function activate(tape, x, name) {
    const bend = ACTIVATIONS[name], y = newRows(x.count, x.width);
    const slope = tape && new Float32Array(x.data.length);
    for (let i = 0; i < x.data.length; i++) bend(x.data[i], i, y.data, slope);
    tape?.push(() => {
      const dy = gradOf(y), dx = gradOf(x);
      for (let i = 0; i < dy.length; i++) dx[i] += dy[i] * slope[i];
    });
    return y;
  }

  // ---- Positions -------------------------------------------------------------------------------------------------------

  const single = Math.fround; // rounded where the package rounds to float32

  // How far each pair turns from one token to the next, rounded as `rotary_frequencies` does.
  function frequencies(width, base, scaling, length) {
    const pairs = Array.from({ length: width / 2 }, (_, i) => single(2 * i / width));
    if (!scaling) return pairs.map(power => single(1 / single(base ** power)));
    const stretched = stretch(base, width, scaling, length);
    return slow(pairs.map(power => single(1 / single(stretched ** power))), base, scaling);
  }

  // "dynamic" scaling: the longer the text, the larger the base.
  function stretch(base, width, s, length) {
    if (s.kind !== "dynamic" || length <= s.original_context_length) return base;
    const longer = single(length * s.factor / s.original_context_length - (s.factor - 1));
    return single(base * single(longer ** (width / (width - 2))));
  }

  function slow(turns, base, s) {
    const clamp = x => Math.min(Math.max(x, 0), 1);
    if (s.kind === "divisors") return turns.map((f, i) => single(f / s.divisors[i]));
    if (s.kind === "linear") return turns.map(f => single(f / s.factor));
    if (s.kind === "llama3") { // equation (3.7): pairs with few turns in the original context are slowed
      return turns.map(f => {
        const rounds = s.original_context_length * f / (2 * Math.PI);
        const kept = clamp((rounds - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor));
        return single((1 - kept) * f / s.factor + kept * f);
      });
    }
    return s.kind === "yarn" ? slowByPairs(turns, base, s) : turns;
  }

  // Equation (3.8): from one pair to another, ever more of the slowing.
  function slowByPairs(turns, base, s) {
    const half = turns.length;
    const pair = n => half * Math.log(s.original_context_length / (n * 2 * Math.PI)) / Math.log(base);
    let first = pair(s.beta_fast), last = pair(s.beta_slow);
    if (s.truncate) [first, last] = [Math.floor(first), Math.ceil(last)];
    [first, last] = [Math.max(first, 0), Math.min(last, 2 * half - 1)];
    if (first === last) last += 0.001;
    return turns.map((f, i) => {
      const kept = 1 - Math.min(Math.max((i - first) / (last - first), 0), 1);
      return single((1 - kept) / (s.factor * base ** (i / half)) + f * kept);
    });
  }

  // Cosines and sines of positions from `past` on, one row a position.
  function angleTable(past, count, width, base, scaling) {
    const turns = frequencies(width, base, scaling, past + count), half = width / 2;
    const cos = new Float32Array(count * half), sin = new Float32Array(count * half);
    const factor = scaling ? scaling.attention_factor : 1;
    for (let p = 0; p < count; p++) {
      for (let i = 0; i < half; i++) {
        const angle = single((past + p) * turns[i]);
        cos[p * half + i] = Math.cos(angle) * factor;
        sin[p * half + i] = Math.sin(angle) * factor;
      }
    }
    return { cos, sin, half, count };
  }

  // Turn every pair of numbers of every head; `way` -1 turns back, which is what gradients do.
  function turn(to, from, width, angles, interleaved, way) {
    const { cos, sin, half, count } = angles, step = interleaved ? 1 : half;
    for (let start = 0; start < from.length; start += 2 * half) {
      const row = Math.floor(start / width) % count * half;
      for (let i = 0; i < half; i++) {
        const a = start + (interleaved ? 2 * i : i), c = cos[row + i], s = way * sin[row + i];
        to[a] += from[a] * c - from[a + step] * s;
        to[a + step] += from[a] * s + from[a + step] * c;
      }
    }
  }

  function rotate(tape, x, angles, interleaved) {
    const y = newRows(x.count, x.width);
    turn(y.data, x.data, x.width, angles, interleaved, 1);
    tape?.push(() => turn(gradOf(x), gradOf(y), x.width, angles, interleaved, -1));
    return y;
  }

  // ALiBi's slopes: 2^(-8/n), 2^(-16/n), ...; between powers of two, every other one of the next larger power.
  function alibiSlopes(heads) {
    const smaller = 2 ** Math.floor(Math.log2(heads));
    const slopes = Array.from({ length: smaller }, (_, i) => 2 ** (-8 * (i + 1) / smaller));
    const between = Array.from({ length: smaller }, (_, i) => 2 ** (-4 * (2 * i + 1) / smaller));
    return [...slopes, ...between].slice(0, heads);
  }

  // ---- Attention -------------------------------------------------------------------------------------------------------

  // Call `each` for every head of every query: where its weights, its query and its first key begin, and which keys,
  // from `first` to `last`, it may see: not those after its own, and with a window none much before.
  function everyQuery(s, each) {
    for (let b = 0; b < s.batch; b++) {
      for (let h = 0; h < s.n_heads; h++) {
        const key = (b * s.keys * s.n_kv_heads + Math.floor(h * s.n_kv_heads / s.n_heads)) * s.head_dim;
        for (let i = 0; i < s.queries; i++) {
          const last = s.past + i, first = s.window === null ? 0 : Math.max(0, last - s.window + 1);
          const row = ((b * s.n_heads + h) * s.queries + i) * s.keys;
          each(row, ((b * s.queries + i) * s.n_heads + h) * s.head_dim, key, first, last, h);
        }
      }
    }
  }

  // The dot product of `width` numbers of a and b, and its counterpart: add so much of b to a.
  function dot(a, from, b, at, width) {
    let sum = 0;
    for (let d = 0; d < width; d++) sum += a[from + d] * b[at + d];
    return sum;
  }

  function addPart(a, from, share, b, at, width) {
    for (let d = 0; d < width; d++) a[from + d] += share * b[at + d];
  }

  // softmax(q kᵀ / √head_dim) v; where positions are ALiBi's, each score loses slope times distance.
  function attend(tape, q, k, v, s) {
    const y = newRows(q.count, q.width), width = s.head_dim, step = s.n_kv_heads * width, scale = 1 / Math.sqrt(width);
    const weights = new Float32Array(s.batch * s.n_heads * s.queries * s.keys);
    everyQuery(s, (row, query, key, first, last, head) => {
      const slope = s.slopes ? s.slopes[head] : 0;
      let top = -Infinity, sum = 0;
      for (let j = first; j <= last; j++) {
        const score = dot(q.data, query, k.data, key + j * step, width) * scale - slope * (last - j);
        weights[row + j] = score;
        if (score > top) top = score;
      }
      for (let j = first; j <= last; j++) sum += weights[row + j] = Math.exp(weights[row + j] - top);
      for (let j = first; j <= last; j++) {
        weights[row + j] /= sum;
        addPart(y.data, query, weights[row + j], v.data, key + j * step, width);
      }
    });
    s.maps?.push(weights);
    tape?.push(() => attendBack(weights, q, k, v, y, s));
    return y;
  }

  function attendBack(weights, q, k, v, y, s) {
    const width = s.head_dim, step = s.n_kv_heads * width, scale = 1 / Math.sqrt(width);
    const dy = gradOf(y), dq = gradOf(q), dk = gradOf(k), dv = gradOf(v), dw = new Float64Array(s.keys);
    everyQuery(s, (row, query, key, first, last) => {
      let mean = 0;
      for (let j = first; j <= last; j++) {
        addPart(dv, key + j * step, weights[row + j], dy, query, width);
        dw[j] = dot(dy, query, v.data, key + j * step, width);
        mean += weights[row + j] * dw[j];
      }
      for (let j = first; j <= last; j++) {
        const share = weights[row + j] * (dw[j] - mean) * scale;
        addPart(dq, query, share, k.data, key + j * step, width);
        addPart(dk, key + j * step, share, q.data, query, width);
      }
    });
  }

  // ---- Loss ------------------------------------------------------------------------------------------------------------

  // log of the sum of exp over one row, without overflow
  function logSum(x, from, width) {
    let top = -Infinity, sum = 0;
    for (let i = 0; i < width; i++) top = Math.max(top, x[from + i]);
    for (let i = 0; i < width; i++) sum += Math.exp(x[from + i] - top);
    return top + Math.log(sum);
  }

  // Mean surprise at the targets in nats; with `grad`, also its gradient: probabilities, minus one at the target.
  function crossEntropy(logits, targets, vocab, grad = null) {
    const count = Math.max(1, targets.filter(target => target !== -100).length);
    let total = 0;
    targets.forEach((target, r) => {
      if (target === -100) return;
      const from = r * vocab, norm = logSum(logits, from, vocab);
      total += norm - logits[from + target];
      if (!grad) return;
      for (let i = 0; i < vocab; i++) grad[from + i] = Math.exp(logits[from + i] - norm) / count;
      grad[from + target] -= 1 / count;
    });
    return total / count;
  }

  function softmax(logits) {
    const norm = logSum(logits, 0, logits.length);
    return Float32Array.from(logits, x => Math.exp(x - norm));
  }

  // ---- The model -------------------------------------------------------------------------------------------------------

  // Keys and values of the tokens read so far, for every layer of one sequence.
  class Cache {
    constructor(config, capacity) {
      const width = config.n_kv_heads * config.head_dim, empty = () => new Float32Array(capacity * width);
      this.layers = Array.from({ length: config.n_layers }, () => ({ k: { data: empty() }, v: { data: empty() } }));
      Object.assign(this, { width, capacity, length: 0 });
    }

    update(layer, k, v) {
      const kept = this.layers[layer];
      kept.k.data.set(k.data, this.length * this.width);
      kept.v.data.set(v.data, this.length * this.width);
      return kept;
    }

    crop(length) { this.length = checkNumber("length", length, 0, this.length, true) }
  }

  class Model {
    constructor(config, weights) {
      this.config = fullConfig(config);
      this.weights = takeWeights(weights, weightShapes(this.config));
      this.slopes = this.config.position === "alibi" ? alibiSlopes(this.config.n_heads) : null;
    }

    // New weights: Normal(0, init_std), smaller or zero for what a block adds; norms are one, biases zero.
    static random(config, random) {
      const c = fullConfig(config), weights = {};
      const added = c.zero_init_residual ? 0 : c.init_std / Math.sqrt(2 * c.n_layers);
      for (const [name, shape] of Object.entries(weightShapes(c))) {
        const std = /(o_proj|down)\.weight$/.test(name) ? added : c.init_std;
        const draw = shape.length === 2 ? () => std * random.normal() : () => /norm.*weight$/.test(name) ? 1 : 0;
        weights[name] = Float32Array.from({ length: shape.reduce((a, b) => a * b) }, draw);
      }
      return new Model(c, weights);
    }

    newCache(capacity = this.config.context_length) { return new Cache(this.config, capacity) }

    // Scores for the token after each one: batch · seq · vocab numbers, or the last token's with `last_only`.
    logits(ids, options = {}) { return this.forward(null, asBatch(ids), options).data }

    // Who looks at whom: maps[layer][head] holds seq · seq weights, one row a query.
    attentionMaps(ids) {
      const batch = asBatch(ids), maps = [], size = batch[0].length ** 2;
      this.forward(null, batch, { maps });
      return maps.map(map => Array.from({ length: this.config.n_heads }, (_, h) => map.subarray(h * size, (h + 1) * size)));
    }

    // Mean cross-entropy of the next tokens, in nats; targets of -100 don't count.
    loss(inputs, targets) {
      return crossEntropy(this.logits(inputs), checkTargets(targets, inputs, this.config), this.config.vocab_size);
    }

    // The same, and every weight's gradient in its `grad`.
    backward(inputs, targets) {
      const c = this.config, tape = [];
      if (c.dropout) refuse(`The model has dropout=${c.dropout}, but this page trains without; set dropout to 0.`);
      for (const weight of Object.values(this.weights)) gradOf(weight).fill(0);
      const logits = this.forward(tape, asBatch(inputs), {});
      const loss = crossEntropy(logits.data, checkTargets(targets, inputs, c), c.vocab_size, gradOf(logits));
      while (tape.length) tape.pop()();
      return loss;
    }

    forward(tape, batch, { cache = null, last_only = false, maps = null }) {
      const c = this.config, w = this.weights, past = cache ? cache.length : 0, queries = batch[0].length;
      checkReading(c, batch, cache, past);
      const s = { ...c, batch: batch.length, queries, past, keys: past + queries, slopes: this.slopes, maps };
      if (c.position === "rotary") s.angles = angleTable(past, queries, c.head_dim, c.rope_base, c.rope_scaling);
      let x = this.embed(tape, batch, past);
      for (let layer = 0; layer < c.n_layers; layer++) x = this.block(tape, x, s, layer, cache);
      if (cache) cache.length += queries;
      if (c.norm_placement !== "post") x = this.norm(tape, x, "final_norm");
      if (last_only) x = lastRows(x, batch.length);
      return linear(tape, x, w["lm_head.weight"] ?? w["token_embedding.weight"], w.output_bias);
    }

    norm(tape, x, name) {
      const w = this.weights, c = this.config;
      return normalise(tape, x, w[`${name}.weight`], w[`${name}.bias`], c.norm_eps, c.norm === "layernorm");
    }

    linear(tape, x, name) {
      return linear(tape, x, this.weights[`${name}.weight`], this.weights[`${name}.bias`]);
    }

    // Each token's vector, and its position's where those are added.
    embed(tape, batch, past) {
      const c = this.config, ids = batch.flat(), seq = batch[0].length, x = newRows(ids.length, c.d_model);
      const table = this.weights["token_embedding.weight"], learned = this.weights["position_embedding.weight"];
      const scale = c.position === "sinusoidal" ? Math.sqrt(c.d_model) : 1;
      const waves = c.position === "sinusoidal" ? angleTable(past, seq, c.d_model, 10000, null) : null;
      const place = r => (past + r % seq) * c.d_model;
      ids.forEach((id, r) => {
        for (let i = 0; i < c.d_model; i++) {
          let at = learned ? learned.data[place(r) + i] : 0;
          if (waves) at = (i % 2 ? waves.cos : waves.sin)[r % seq * waves.half + (i >> 1)];
          x.data[r * c.d_model + i] = table.data[id * c.d_model + i] * scale + at;
        }
      });
      tape?.push(() => ids.forEach((id, r) => {
        const dx = gradOf(x), dt = gradOf(table), dp = learned && gradOf(learned);
        for (let i = 0; i < c.d_model; i++) {
          dt[id * c.d_model + i] += scale * dx[r * c.d_model + i];
          if (dp) dp[place(r) + i] += dx[r * c.d_model + i];
        }
      }));
      return x;
    }

    // Attention, then a feed-forward network, each added to the residual stream, with the norm where the model has it.
    block(tape, x, s, layer, cache) {
      const name = `blocks.${layer}`;
      x = this.sublayer(tape, x, `${name}.attention_norm`, z => this.attention(tape, z, s, layer, cache));
      return this.sublayer(tape, x, `${name}.feedforward_norm`, z => this.feedforward(tape, z, `${name}.feedforward`));
    }

    sublayer(tape, x, norm, part) {
      const place = this.config.norm_placement;
      if (place === "pre") return add(tape, x, part(this.norm(tape, x, norm)));
      if (place === "output") return add(tape, x, this.norm(tape, part(x), norm));
      return this.norm(tape, add(tape, x, part(x)), norm);
    }

    attention(tape, x, s, layer, cache) {
      const c = this.config, name = `blocks.${layer}.attention`, w = this.weights;
      const heads = ["q", "k", "v"].map(letter => this.linear(tape, x, `${name}.${letter}_proj`));
      for (let i = 0; i < 2; i++) { // queries and keys, not values
        const norm = w[`${name}.${"qk"[i]}_norm.weight`];
        if (norm) heads[i] = normalise(tape, heads[i], norm, null, c.norm_eps, false);
        if (s.angles) heads[i] = rotate(tape, heads[i], s.angles, c.rope_interleaved);
      }
      const [q, k, v] = heads, read = cache ? cache.update(layer, k, v) : { k, v };
      return this.linear(tape, attend(tape, q, read.k, read.v, s), `${name}.o_proj`);
    }

    feedforward(tape, x, name) {
      const up = this.linear(tape, x, `${name}.up`), kind = this.config.activation;
      const gate = kind === "swiglu" ? this.linear(tape, x, `${name}.gate`) : null;
      const hidden = gate ? multiply(tape, activate(tape, gate, kind), up) : activate(tape, up, kind);
      return this.linear(tape, hidden, `${name}.down`);
    }
  }

  // The last token of each sequence.
  function lastRows(x, batch) {
    const y = newRows(batch, x.width), seq = x.count / batch;
    for (let b = 0; b < batch; b++) {
      const from = ((b + 1) * seq - 1) * x.width;
      y.data.set(x.data.subarray(from, from + x.width), b * x.width);
    }
    return y;
  }

  // ---- Checks ----------------------------------------------------------------------------------------------------------

  const andMore = names => names[0] + (names.length > 1 ? ` and ${names.length - 1} more` : "");

  function takeWeights(given, shapes) {
    const missing = Object.keys(shapes).filter(name => !(name in given));
    if (missing.length) refuse(`The weights lack ${andMore(missing)}; they don't fit this configuration.`);
    const unknown = Object.keys(given).filter(name => !(name in shapes));
    if (unknown.length) refuse(`The weights hold the unknown ${andMore(unknown)}; they don't fit this configuration.`);
    const weights = {};
    for (const [name, shape] of Object.entries(shapes)) {
      const data = given[name].data ?? given[name], found = given[name].shape ?? shape;
      if (data.length !== shape.reduce((a, b) => a * b) || String(found) !== String(shape)) {
        refuse(`${name} is ${(given[name].shape ?? [data.length]).join(" × ")}, but the configuration asks for ` +
               `${shape.join(" × ")}; take the config.json that was saved with these weights.`);
      }
      weights[name] = { name, shape, data, grad: null };
    }
    return weights;
  }

  function asBatch(ids) {
    const batch = typeof ids[0] === "number" ? [Array.from(ids)] : Array.from(ids ?? [], row => Array.from(row));
    if (!batch.length || !batch[0].length) refuse("The text is empty; give at least one token.");
    if (batch.some(row => row.length !== batch[0].length)) refuse("The sequences of a batch must be equally long.");
    return batch;
  }

  function checkReading(c, batch, cache, past) {
    const total = past + batch[0].length;
    if (total > c.context_length) {
      refuse(`The text has ${total} tokens, but the model's context_length is ${c.context_length}; shorten it.`);
    }
    for (const id of batch.flat()) checkNumber("A token id", id, 0, c.vocab_size - 1, true);
    if (!cache) return;
    if (batch.length > 1) refuse(`A cache reads one sequence, not ${batch.length}; read them one after the other.`);
    if (total > cache.capacity) refuse(`The cache holds ${cache.capacity} tokens, not ${total}; make it larger.`);
    if (c.rope_scaling?.kind === "dynamic" && total > c.rope_scaling.original_context_length) {
      refuse(`With rope_scaling kind="dynamic", cached keys would be wrong for ${total} tokens; read without a cache.`);
    }
  }

  function checkTargets(targets, inputs, c) {
    const flat = asBatch(targets).flat();
    if (flat.length !== asBatch(inputs).flat().length) refuse("There must be one target for each input token.");
    for (const id of flat) if (id !== -100) checkNumber("A target", id, 0, c.vocab_size - 1, true);
    return flat;
  }

  // ---- Training --------------------------------------------------------------------------------------------------------

  // Chapter 07's AdamW: running means of the gradients and their squares, and decay apart from both.
  class AdamW {
    constructor(model, options = {}) {
      const usual = { lr: 1e-3, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, decay_vectors: true };
      Object.assign(this, usual, options, { steps: 0 });
      this.states = Object.values(model.weights).map(weight => ({
        weight, average: new Float32Array(weight.data.length), square: new Float32Array(weight.data.length),
        decay: weight.shape.length > 1 || this.decay_vectors ? this.weight_decay : 0,
      }));
    }

    step(lr = this.lr) {
      this.steps++;
      for (const state of this.states) if (state.weight.grad) this.move(state, lr);
    }

    move({ weight: { data, grad }, average, square, decay }, lr) {
      const [beta1, beta2] = this.betas, kept = 1 - lr * decay;
      const rate = lr / (1 - beta1 ** this.steps), spread = Math.sqrt(1 - beta2 ** this.steps);
      for (let i = 0; i < data.length; i++) {
        average[i] += (1 - beta1) * (grad[i] - average[i]);
        square[i] = beta2 * square[i] + (1 - beta2) * grad[i] * grad[i];
        data[i] = kept * data[i] - rate * average[i] / (Math.sqrt(square[i]) / spread + this.eps);
      }
    }
  }

  // Scale all gradients together so that their joint norm is at most `max_norm` (0: only measure); the norm before.
  function clipGradients(model, max_norm) {
    const grads = Object.values(model.weights).map(weight => weight.grad).filter(Boolean);
    let square = 0;
    for (const grad of grads) for (let i = 0; i < grad.length; i++) square += grad[i] * grad[i];
    const norm = Math.sqrt(square), factor = max_norm / (norm + 1e-6);
    if (max_norm > 0 && factor < 1) for (const grad of grads) for (let i = 0; i < grad.length; i++) grad[i] *= factor;
    return norm;
  }

  // The share of the top learning rate that an update uses: warm-up, then the schedule (equation 7.6).
  function scheduleFactor(step, options) {
    const usual = { max_steps: 1000, warmup_steps: 50, schedule: "cosine", min_lr_fraction: 0.1, decay_fraction: 0.2 };
    const o = { ...usual, ...options }, low = o.min_lr_fraction, rest = Math.max(1, o.max_steps - o.warmup_steps);
    if (step < o.warmup_steps) return (step + 1) / o.warmup_steps;
    const progress = Math.min(1, (step - o.warmup_steps) / rest);
    if (o.schedule === "cosine") return low + (1 - low) * 0.5 * (1 + Math.cos(Math.PI * progress));
    if (o.schedule === "linear") return 1 - (1 - low) * progress;
    if (o.schedule === "constant") return 1;
    if (o.schedule !== "wsd") refuse(`schedule must be cosine, linear, wsd or constant, not ${o.schedule}.`);
    const decay = Math.max(1, Math.min(o.decay_fraction * o.max_steps, rest));
    return 1 - (1 - low) * Math.min(1, Math.max(0, step - o.max_steps + decay) / decay);
  }

  Object.assign(Live, {
    InputError, refuse, checkNumber, fullConfig, weightShapes, kernels, Model, AdamW, clipGradients, scheduleFactor,
    softmax, crossEntropy, linear, newRows, gradOf,
  });
})();
