"""The engine that runs in pages, transformer_llm/live, beside the package: node answers, PyTorch is the reference."""
import json
import math
import random
import shutil
import subprocess
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from transformer_llm.attention import causal_mask
from transformer_llm.checkpoints import save_checkpoint
from transformer_llm.demo import TRAINING_LENGTH, TRAINING_STARTS, counting_sequences, train_counter
from transformer_llm.embeddings import SCALINGS
from transformer_llm.export import save_pretrained
from transformer_llm.feedforward import ACTIVATIONS
from transformer_llm.foundations import set_seed
from transformer_llm.generation import Sampling, filter_logits, generate, repetition_penalty
from transformer_llm.live.your_model import your_model_html
from transformer_llm.tokenizer import (
    PATTERNS,
    BPETokenizer,
    CharTokenizer,
    count_words,
    learn_merges,
    visible,
    word_splitter,
)
from transformer_llm.training import TrainingConfig, cross_entropy, schedule_factor
from transformer_llm.transformer import CHOICES, GPT, PRESETS, GPTConfig

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node isn't on PATH: the engine is JavaScript")

TINY = GPTConfig(vocab_size=11, context_length=20, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24)
LONGER = dict(factor=4.0, original_context_length=8)
SCALED = {
    "linear": dict(kind="linear", factor=4.0),
    "dynamic": dict(kind="dynamic", **LONGER),
    "yarn": dict(kind="yarn", **LONGER),
    "yarn, not truncated": dict(kind="yarn", truncate=False, beta_fast=2.0, beta_slow=0.5, **LONGER),
    "llama3": dict(kind="llama3", **LONGER),
    "divisors": dict(kind="divisors", divisors=(1.0, 3.0), attention_factor=1.5),
}
# The wide presets with fewer layers and tokens: a layer is like the others, and the reference computes in float64.
FEWER = dict.fromkeys(("tiny", "small", "medium", "gpt2"), dict(n_layers=2, vocab_size=512))


def all_models() -> dict[str, GPTConfig]:
    "Every preset, and every choice of the configuration at least once."
    models = {f"preset {name}": GPTConfig.preset(name, **FEWER.get(name, {})) for name in PRESETS}
    for field, choices in CHOICES.items():
        models |= {f"{field} {value}": TINY.replace(**{field: value}) for value in choices}
    models |= {f"scaling {name}": TINY.replace(rope_scaling=scaling) for name, scaling in SCALED.items()}
    for norm in CHOICES["norm"]:
        for placement in CHOICES["norm_placement"]:
            models[f"{norm}, {placement}, biased"] = TINY.replace(norm=norm, norm_placement=placement, bias=True)
    for heads in (1, 4):
        models[f"{heads} key heads"] = TINY.replace(n_kv_heads=heads)
    return models | {
        "interleaved": TINY.replace(rope_interleaved=True, rope_base=500.0),
        "heads of their own width": TINY.replace(head_dim=6),
        "qk_norm": TINY.replace(qk_norm=True, norm_eps=1e-3),
        "qk_norm_whole": TINY.replace(qk_norm=True, qk_norm_whole=True, norm_placement="output"),
        "window": TINY.replace(window=5),
        "alibi in a window, six heads": TINY.replace(position="alibi", window=6, n_heads=6, n_kv_heads=3, head_dim=4),
        "own output matrix and biases": TINY.replace(tied_embeddings=False, output_bias=True, qkv_bias=True),
        "GELU with biases": TINY.replace(activation="gelu", bias=True),
    }


MODELS = all_models()
SETTINGS = {
    "plain": {}, "greedy": dict(temperature=0.0), "warm": dict(temperature=1.7), "cold": dict(temperature=0.3),
    "top_k": dict(top_k=3), "all of top_k": dict(top_k=500), "top_p": dict(top_p=0.8), "top_p 0": dict(top_p=0.0),
    "top_p 1": dict(top_p=1.0), "min_p": dict(min_p=0.2), "min_p 0": dict(min_p=0.0), "min_p 1": dict(min_p=1.0),
    "penalty": dict(repetition_penalty=1.8), "reward": dict(repetition_penalty=0.5),
    "penalty, greedy": dict(repetition_penalty=1.8, temperature=0.0),
    "all": dict(temperature=0.8, top_k=7, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
}


def some_weights(config: GPTConfig, seed: int = 0) -> GPT:
    "A model with weights of ordinary size everywhere, biases and norms too, so that no gradient is zero."
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, p.shape[-1] ** -0.5 if p.ndim == 2 else 0.3)
            p += float("norm" in name and name.endswith("weight"))
    return model.eval()


def lengths(config: GPTConfig) -> int:
    return min(config.context_length, 14)


def batch_for(config: GPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    "Two sequences, and their targets with two that don't count."
    torch.manual_seed(1)
    ids = torch.randint(config.vocab_size, (2, lengths(config) + 1))
    targets = ids[:, 1:].clone()
    targets[0, :2] = -100
    return ids[:, :-1], targets


def no_cache(config: GPTConfig) -> bool:
    return config.rope_scaling is not None and config.rope_scaling.kind == "dynamic"


class Asker:
    "Collects questions for one run of node, and keeps the references beside them."

    def __init__(self, folder: Path):
        self.folder, self.cases, self.references = folder, [], {}

    def ask(self, name: str, kind: str, reference: object = None, **case) -> None:
        assert name not in self.references
        self.cases.append(dict(name=name, kind=kind, **case))
        self.references[name] = reference

    def keep(self, name: str, model: GPT) -> dict:
        "A model's weights in a file, and what the engine needs to read them."
        save_file({key: p.detach().contiguous() for key, p in model.state_dict().items()}, self.folder / name)
        return dict(config=model.config.to_dict(), weights=name)

    def run(self) -> dict:
        (self.folder / "cases.json").write_text(json.dumps(self.cases), encoding="utf-8")
        subprocess.run(["node", ROOT / "tests" / "live.js", self.folder], check=True)
        return json.loads((self.folder / "answers.json").read_text(encoding="utf-8"))


# ---- Questions -------------------------------------------------------------------------------------------------------


def ask_models(asker: Asker) -> None:
    for number, (name, config) in enumerate(MODELS.items()):
        model, (inputs, targets) = some_weights(config), batch_for(config)
        pieces = None if no_cache(config) else [4] + [1] * (lengths(config) - 4)
        case = asker.keep(f"model-{number}.safetensors", model)
        asker.ask(f"model-{number}", "model", (name, model, inputs, targets, pieces), **case,
                  inputs=inputs.tolist(), targets=targets.tolist(), pieces=pieces)


def ask_training(asker: Asker) -> None:
    start = {}

    def watch(step: int, model: GPT) -> None:
        if step == 0:
            start.update({name: p.clone() for name, p in model.state_dict().items()})

    counter, generator = train_counter(progress=False, watch=watch), set_seed(0)
    choices = torch.tensor(TRAINING_STARTS)
    batches = [counting_sequences(choices[torch.randint(len(choices), (16,), generator=generator)], TRAINING_LENGTH)
               for _ in counter.losses]
    first = GPT(counter.model.config)
    first.load_state_dict(start)
    asker.ask("counting", "training", counter, **asker.keep("counting.safetensors", first), clip=0,
              batches=[(b[:, :-1].tolist(), b[:, 1:].tolist()) for b in batches], options=dict(weight_decay=0.1),
              rates=[1e-2 * (1 - step / 200) for step in range(200)])
    ask_chapter_07(asker)
    for schedule in ("cosine", "linear", "wsd", "constant"):
        config = TrainingConfig(schedule=schedule, max_steps=40, warmup_steps=7)
        options = {name: getattr(config, name) for name in
                   ("max_steps", "warmup_steps", "schedule", "min_lr_fraction", "decay_fraction")}
        asker.ask(f"schedule {schedule}", "schedule", [schedule_factor(step, config) for step in range(45)],
                  options=options, steps=list(range(45)))


def ask_chapter_07(asker: Asker) -> None:
    "Ten steps as the Trainer makes them: clipped gradients, and decay for matrices only."
    from transformer_llm.training import clip_gradients, make_optimizers, set_learning_rate

    config = TrainingConfig(max_steps=10, warmup_steps=3, learning_rate=5e-3, grad_clip=0.5)
    model, (inputs, targets), steps = some_weights(TINY), batch_for(TINY), []
    case = asker.keep("chapter07.safetensors", model)
    optimizers = make_optimizers(model, config)
    factors = [schedule_factor(step, config) for step in range(10)]
    for factor in factors:
        model.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        norm = clip_gradients(model.parameters(), config.grad_clip)
        set_learning_rate(optimizers, factor)
        optimizers[0].step()
        steps.append((loss.item(), norm.item()))
    asker.ask("chapter 07", "training", steps, **case, clip=0.5, options=dict(weight_decay=0.1, decay_vectors=False),
              batches=[(inputs.tolist(), targets.tolist())] * 10, rates=[config.learning_rate * f for f in factors])


def ask_sampling(asker: Asker) -> None:
    torch.manual_seed(3)
    logits = torch.randn(6, 60) * torch.tensor([0.1, 1, 3, 3, 8, 20])[:, None]
    logits[2] = logits[2].round()  # equal logits
    logits[3, ::2] = -math.inf
    for row, values in enumerate(logits):
        values.numpy().tofile(asker.folder / f"logits-{row}.f32")
    seen = torch.arange(0, 60, 7)[None].repeat(6, 1)
    for name, settings in SETTINGS.items():
        sampling = Sampling(**settings)
        filtered = sampling.filter(logits, sampling.mark(seen, 60))
        for row in range(len(logits)):
            asker.ask(f"filter {name} {row}", "filter", filtered[row], logits=f"logits-{row}.f32", settings=settings,
                      seen=seen[row].tolist())
    ask_texts(asker)
    asker.ask("random", "random", seed=5, count=20_000)


TEXTS = {"rotary": TINY, "learned": TINY.replace(position="learned", norm="layernorm", bias=True),
         "alibi": TINY.replace(position="alibi", window=7)}


def ask_texts(asker: Asker) -> None:
    "Texts of three times the context length, so that the window slides."
    for kind, config in TEXTS.items():
        model = some_weights(config)
        case = asker.keep(f"text-{kind}.safetensors", model)
        for seed, (name, settings) in enumerate(SETTINGS.items()):
            ids = torch.tensor([[1, 2, 3]])
            written = generate(model, ids, 60, sampling=Sampling(**settings), generator=seed)[0, 3:].tolist()
            generator, noise = torch.Generator().manual_seed(seed), None
            if settings.get("temperature") != 0:
                noise = f"noise-{kind}-{seed}.f32"
                rows = [torch.empty(1, 11).exponential_(generator=generator) for _ in range(60)]
                torch.cat(rows).numpy().tofile(asker.folder / noise)
            asker.ask(f"text {kind} {name}", "text", written, **case, prompt=[1, 2, 3], count=60, settings=settings,
                      noise=noise, vocab=11, stops=[])


def mixed_text(rng: random.Random, n: int) -> str:
    "Characters of every kind that Python's tables know, with much of what tokenizers treat specially."
    common = " \n\r\t'’sStTdDlLvVeErRmMaZſé中文0123456789½.,!?-_/\u00a0\u3000\u0085\u001c\ufeff\u0301\u0323🦊"
    pieces = []
    while len(pieces) < n:
        character = chr(rng.randrange(0x30000)) if rng.random() < 0.3 else rng.choice(common)
        if unicodedata.category(character) not in ("Cn", "Cs", "Co"):
            pieces.append(character)
    return "".join(pieces)


def tokenizers() -> dict[str, BPETokenizer | CharTokenizer]:
    text = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = {name: BPETokenizer.train(text, 500, pattern=name) for name in PATTERNS}
    plain = found["gpt2"]
    extra = dict(special_tokens={"<|endoftext|>": 499, "<|a|>": 500}, added_tokens={"<|a|>b": 501, "é!": 502})
    vocab = {token: i for token, i in plain.vocab.items()}
    found["everything"] = BPETokenizer(vocab, plain.merges, **extra, normalized=["é!"], normalization="NFC",
                                       ignore_merges=True, prefix=[500], pattern="llama3")
    found["characters"] = CharTokenizer.train("abc déf中🦊\n")
    return found


def ask_tokenizers(asker: Asker) -> None:
    rng = random.Random(0)
    texts = [mixed_text(rng, 60) for _ in range(150)] + [
        "", " ", "  a  b \n\n c\t\t", "We'll see what they'Re DOIN'S 12345 1,000", "a" * 3000,
        "<|endoftext|>x<|a|>b<|a|> e\u0301! <|endoftext", "e\u0301" * 5, "ſ's'ſ", "a'ſx b'Sx c'lLama I'Vend"]
    for name, tokenizer in tokenizers().items():
        tokenizer.save(asker.folder / f"{name}.json")
        own = ["dé cab", "中🦊", ""] if name == "characters" else texts
        known = sorted(tokenizer.values)
        ids = [[rng.choice(known) for _ in range(20)] for _ in range(40)] if name != "characters" else [[0, 1, 2]]
        for special in (True, False):
            asker.ask(f"tokens {name} {special}", "tokens", (tokenizer, own, ids, special), json=f"{name}.json",
                      texts=own, ids=ids, special=special)
    asker.ask("merges", "merges", tokenizers()["gpt2"], json="gpt2.json", word=" transformers")
    text = "the cat and the hat and the thin cat; aaaa aaaa bébé"
    asker.ask("learn", "learn", text, text=text, count=30)
    asker.ask("characters", "characters", CharTokenizer.train(text + "🦊中").characters, text=text + "🦊中")


FAMILIES = {
    "gpt2": GPTConfig.preset("demo", output_bias=False, vocab_size=300),
    "llama": TINY.replace(vocab_size=300, rope_scaling=SCALED["llama3"], rope_interleaved=True),
    "mistral": TINY.replace(vocab_size=300, window=5),
    "qwen2": TINY.replace(vocab_size=300, qkv_bias=True, tied_embeddings=False),
    "qwen3": TINY.replace(vocab_size=300, qk_norm=True, rope_scaling=SCALED["yarn"]),
    "olmo2": TINY.replace(vocab_size=300, qk_norm=True, qk_norm_whole=True, norm_placement="output"),
}


def ask_files(asker: Asker) -> None:
    tokenizer = BPETokenizer.train("to be or not to be, that is the question " * 3, 270)
    ids = torch.tensor([[1, 5, 2, 9]])
    for family, config in FAMILIES.items():
        model = some_weights(config)
        save_pretrained(model, asker.folder / f"folder-{family}", tokenizer)
        asker.ask(f"folder {family}", "folder", (model, ids), path=f"folder-{family}", ids=ids.tolist())
    sharded = some_weights(FAMILIES["llama"])
    save_pretrained(sharded, asker.folder / "shards", tokenizer, max_shard_bytes=20_000)
    asker.ask("folder shards", "folder", (sharded, ids), path="shards", ids=ids.tolist())
    old, new = some_weights(FAMILIES["llama"], 1), some_weights(FAMILIES["llama"], 2)
    for step, model in ((5, old), (10, new)):
        save_checkpoint(asker.folder / "run", step, model, tokenizer=tokenizer)
    asker.ask("folder run", "folder", (new, ids), path="run", ids=ids.tolist())
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    values = torch.tensor([0.0, -0.0, 1.5, -3.25, 1e-7, 6e-8, 65504.0, 0.1, math.inf, -math.inf, math.nan])
    tensors = {name: values.to(kind) for name, kind in kinds.items()} | {"empty": torch.zeros(0, 3)}
    save_file(tensors, asker.folder / "kinds.safetensors")
    asker.ask("safetensors", "safetensors", tensors, path="kinds.safetensors")


REFUSALS = {  # what a reader may do wrong, and what the sentence must name
    "n_heads": ("new Live.Model({n_heads: 0}, {})", ["n_heads", "0"]),
    "n_kv_heads": ("new Live.Model({n_heads: 4, n_kv_heads: 3}, {})", ["n_kv_heads", "3"]),
    "d_model": ("new Live.Model({d_model: 10, n_heads: 4}, {})", ["d_model", "10"]),
    "odd head": ("new Live.Model({head_dim: 5}, {})", ["head_dim", "5"]),
    "activation": ("new Live.Model({activation: 'tanh'}, {})", ["activation", "tanh", "swiglu"]),
    "unknown field": ("new Live.Model({n_head: 4}, {})", ["n_head"]),
    "scaling": ("new Live.Model({rope_scaling: {kind: 'ntk'}}, {})", ["rope_scaling", "ntk"]),
    "scaling without length": ("new Live.Model({rope_scaling: {kind: 'yarn'}}, {})", ["original_context_length"]),
    "no weights": ("new Live.Model({}, {})", ["token_embedding.weight", "lack"]),
    "more weights": ("open({extra: new Float32Array(1)})", ["extra", "unknown"]),
    "wrong shape": ("open({'final_norm.weight': new Float32Array(3)})", ["final_norm.weight", "3", "16"]),
    "empty text": ("open().logits([])", ["empty"]),
    "long text": ("open().logits(Array(33).fill(1))", ["33", "context_length", "32"]),
    "unknown token": ("open().logits([10])", ["10"]),
    "uneven batch": ("open().logits([[1], [1, 2]])", ["equally long"]),
    "batch with a cache": ("const m = open(); m.logits([[1], [2]], {cache: m.newCache()})", ["cache", "2"]),
    "full cache": ("const m = open(); m.logits([1, 2, 3], {cache: m.newCache(2)})", ["2", "3"]),
    "targets": ("open().backward([[1, 2]], [[1]])", ["target"]),
    "dropout": ("open({}, {dropout: 0.1}).backward([[1]], [[2]])", ["dropout", "0.1"]),
    "schedule": ("Live.scheduleFactor(99, {schedule: 'step'})", ["schedule", "step"]),
    "long prompt": ("[...Live.write(open(), Array(33).fill(1), 1)]", ["33", "32"]),
    "not numbers": ("[...Live.write(open({'final_norm.weight': Array(16).fill(NaN)}), [1], 1)]", ["not numbers"]),
    "temperature": ("Live.sampling({temperature: 1e-5})", ["temperature", "0.00001"]),
    "top_k": ("Live.sampling({top_k: 0})", ["top_k", "0"]),
    "top_p": ("Live.sampling({top_p: 1.5})", ["top_p", "1.5"]),
    "sampling field": ("Live.sampling({topk: 3})", ["topk", "top_k"]),
    "no safetensors": ("Live.readSafetensors(new ArrayBuffer(4))", ["safetensors", "4 bytes"]),
    "long header": ("Live.readSafetensors(new Uint8Array(16).fill(255).buffer)", ["header"]),
    "no header": ("Live.readSafetensors(bytes('noise.bin'))", ["JSON"]),
    "cut off": ("Live.readSafetensors(bytes('demo.safetensors').slice(0, -4))", ["incomplete"]),
    "other kind": ("Live.readSafetensors(bytes('double.safetensors'))", ["F64", "weight", "BF16"]),
    "config": ("Live.readConfig('{')", ["config.json", "JSON"]),
    "architecture": ("Live.readConfig({model_type: 'bert'})", ["bert", "llama"]),
    "foreign field": ("Live.readConfig({model_type: 'llama', num_experts: 8})", ["num_experts"]),
    "infinite": ("made({'final_norm.weight': Array(16).fill(Infinity)})", ["final_norm.weight", "finite"]),
    "no tokenizer": ("Live.readTokenizer('[]')", ["tokenizer.json"]),
    "word pieces": ("Live.readTokenizer({model: {type: 'WordPiece', vocab: {a: 0}}})", ["tokenizer.json"]),
    "own pattern": ("Live.readTokenizer(JSON.parse(new TextDecoder().decode(bytes('own.json'))))", ["pattern"]),
    "half a character": ("Live.characterTokenizer('ab\\ud800')", ["half a character"]),
    "unknown character": ("Live.characterTokenizer('ab').encode('abc')", ['"c"', "position 2"]),
    "unknown id": ("Live.characterTokenizer('ab').decode([2])", ["2", "0 to 1"]),
    "no file": ("await Live.openFiles([])", ["model.safetensors"]),
    "no config": ("await Live.openFiles([file('model.safetensors', 10)])", ["config.json"]),
    "huge": ("await Live.openFiles([file('model.safetensors', 3e9), file('config.json', 9)])", ["3,000 MB", "700 MB"]),
}
HELP = """
const all = Live.readSafetensors(bytes("demo.safetensors"));
const config = JSON.parse(new TextDecoder().decode(bytes("demo.json")));
const floats = more => Object.entries(more ?? {}).map(([name, data]) => [name, Float32Array.from(data)]);
const changed = more => ({...all, ...Object.fromEntries(floats(more))});
const open = (more, fields) => new Live.Model({...config, ...fields}, changed(more));
const unread = () => { throw new Error("it was read") };
const file = (name, size) => ({name, size, text: async () => "{}", arrayBuffer: unread});
const made = more => Live.makeModel({config, weights: pack(changed(more))});
const pack = tensors => { // a safetensors file
  const header = {}, parts = [];
  let at = 0;
  for (const [name, t] of Object.entries(tensors)) {
    const data = t.data ?? t;
    header[name] = {dtype: "F32", shape: t.shape ?? [data.length], data_offsets: [at, at += data.byteLength]};
    parts.push(data);
  }
  const text = new TextEncoder().encode(JSON.stringify(header)), whole = new Uint8Array(8 + text.length + at);
  new DataView(whole.buffer).setBigUint64(0, BigInt(text.length), true);
  whole.set(text, 8);
  let to = 8 + text.length;
  for (const data of parts) {
    whole.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), to);
    to += data.byteLength;
  }
  return whole.buffer;
};
"""


def ask_refusals(asker: Asker) -> None:
    demo = some_weights(GPTConfig.preset("demo"))
    asker.keep("demo.safetensors", demo)
    (asker.folder / "demo.json").write_text(json.dumps(demo.config.to_dict()))
    (asker.folder / "noise.bin").write_bytes((5).to_bytes(8, "little") + b"\xff" * 20)
    save_file({"weight": torch.zeros(2, dtype=torch.float64)}, asker.folder / "double.safetensors")
    BPETokenizer.train("ab ab abc abc abcd", 258, pattern=r"\p{L}+|\s|.").save(asker.folder / "own.json")
    for name, (code, _) in REFUSALS.items():
        asker.ask(f"refusal {name}", "refusal", code=HELP + code)
    asker.ask("no refusal", "refusal", code=HELP + "open(); made(); Live.sampling(); return 'fine'")


FIGURE_TEXT, OWN_MERGES = "abracadabra", [0, 1, 7, 20, 60]
FIGURE_SENTENCE = "the cat sat on the mat, and thät cat  had 12 hats"
HEADS = [
    dict(head=head, causal=causal, window=window, scale=scale, temperature=temperature)
    for head in ("one back", "same letter", "the first", "the mean")
    for causal, window, scale, temperature in ((True, 24, True, 1.0), (True, 3, False, 4.0), (False, 2, True, 0.5))
]
WORD_SCORES = [2.8, 2.4, 2.0, 1.6, 1.2, 0.8, 0.3, -0.4, -0.8, -1.5]  # of chapter 08's ten words
RULES = [
    dict(temperature=1.0, top_k=10, top_p=1.0, min_p=0.0, penalty=1.0) | changes
    for changes in (
        {}, dict(temperature=0.0), dict(temperature=0.0, penalty=3.0), dict(temperature=2.5, min_p=0.5), dict(top_k=3),
        dict(top_p=0.6, penalty=1.5), dict(temperature=0.7, top_k=7, top_p=0.9, min_p=0.05, penalty=1.2),
    )
]


def head_by_torch(head: str, causal: bool, window: int, scale: bool, temperature: float) -> torch.Tensor:
    "A head that is set by hand on the letters of FIGURE_TEXT: a match scores 8, times the root of 8 without the scale."
    n, letters = len(FIGURE_TEXT), torch.tensor([ord(letter) for letter in FIGURE_TEXT])
    matches = {"one back": torch.eye(n).roll(-1, 1).tril(-1), "same letter": letters[:, None] == letters,
               "the first": torch.eye(n)[:1].expand(n, n), "the mean": torch.zeros(n, n)}[head]
    near = torch.arange(n)[:, None] - torch.arange(n) < window
    allowed = causal_mask(n, window=window) if causal else near
    scores = matches * 8.0 / temperature * (1 if scale else 8**0.5)
    return scores.double().masked_fill(~allowed, -math.inf).softmax(-1)


def rules_by_torch(temperature: float, penalty: float, **filters) -> torch.Tensor:
    "The probabilities of the ten words after the package's rules; `cat` and `the` are in the prompt."
    logits = repetition_penalty(torch.tensor([WORD_SCORES]), torch.tensor([[2, 8]]), penalty)
    if temperature == 0:
        return torch.nn.functional.one_hot(logits[0].argmax(), 10).float()
    return filter_logits(logits, temperature=temperature, **filters)[0].softmax(-1)


def ask_figures(asker: Asker) -> None:
    asker.ask("heads", "heads", text=FIGURE_TEXT, settings=HEADS)
    asker.ask("own merges", "own", sentence=FIGURE_SENTENCE, most=OWN_MERGES)
    asker.ask("rules", "rules", settings=RULES)
    asker.ask("twister", "twister", seed=1234, count=700)


@pytest.fixture(scope="module")
def live(tmp_path_factory) -> Asker:
    "All questions, and node's answers to them."
    asker = Asker(tmp_path_factory.mktemp("live"))
    for ask in (ask_models, ask_training, ask_sampling, ask_tokenizers, ask_files, ask_figures, ask_refusals):
        ask(asker)
    asker.answers = asker.run()
    return asker


def answer(live: Asker, name: str) -> tuple[object, object]:
    "The engine's answer and the reference."
    given = live.answers[name]
    assert "value" in given, given
    return given["value"], live.references[name]


# ---- Answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(MODELS)), ids=list(MODELS))
def test_values_and_gradients(live, number):
    "Logits, attention maps, cached logits, loss and every gradient equal PyTorch's in double precision, to 1e-5."
    given, (_, model, inputs, targets, pieces) = answer(live, f"model-{number}")
    model = model.double()
    names = [name for name, _ in model.named_parameters()]
    assert given["names"] == names
    found = torch.from_numpy(np.fromfile(live.folder / f"model-{number}.f32", np.float32)).double()
    logits, maps = model(inputs), model.attention_maps(inputs[:1])
    loss = cross_entropy(logits, targets)
    loss.backward()
    values = [logits, *maps, *([logits[0]] if pieces else [])]
    for wanted in values:
        part, found = found[: wanted.numel()], found[wanted.numel():]
        wanted = wanted.detach().flatten()
        assert (part - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())
    assert given["loss"] == pytest.approx(loss.item(), abs=1e-5) == given["plain"]
    largest = max(p.grad.abs().max() for p in model.parameters())
    for name, p in model.named_parameters():
        part, found = found[: p.numel()], found[p.numel():]
        assert part.abs().max() > 0, name
        size = max(p.grad.abs().max(), 0.01 * largest)
        assert (part - p.grad.flatten()).abs().max() <= 1e-5 * size, name
    assert found.numel() == 0


def test_every_choice_is_asked():
    "A new preset, scaling or choice of the configuration must be answered here too."
    configs = MODELS.values()
    assert {f"preset {name}" for name in PRESETS} <= MODELS.keys()
    assert {c.rope_scaling.kind for c in configs if c.rope_scaling} == set(SCALINGS)
    assert {c.activation for c in configs} == set(ACTIVATIONS)
    for field, choices in CHOICES.items():
        assert {getattr(c, field) for c in configs} == set(choices)
    assert {field for settings in SETTINGS.values() for field in settings} == Sampling().to_dict().keys()


def test_counting_model_trains_as_in_chapter_00(live):
    given, counter = answer(live, "counting")
    losses = [step["loss"] for step in given["steps"]]
    assert len(losses) == 200
    assert max(abs(a - b) for a, b in zip(losses, counter.losses)) < 1e-3
    assert given["counted"] == [(7 + i) % 10 for i in range(1, 32)]


def test_clipping_and_decay_are_chapter_07s(live):
    given, steps = answer(live, "chapter 07")
    for step, (loss, norm) in zip(given["steps"], steps, strict=True):
        assert step["loss"] == pytest.approx(loss, abs=1e-4)
        assert step["norm"] == pytest.approx(norm, rel=1e-4)
    assert steps[0][1] > 0.5


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_schedules(live, schedule):
    given, wanted = answer(live, f"schedule {schedule}")
    assert given == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_filters_leave_the_same_logits(live, name):
    "Bit by bit, with equal logits and with some that are minus infinity."
    for row in range(6):
        given, wanted = answer(live, f"filter {name} {row}")
        assert torch.equal(torch.tensor([-math.inf if x is None else x for x in given]), wanted)


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", SETTINGS)
def test_same_random_numbers_write_the_same_text(live, kind, name):
    (cached, plain), wanted = answer(live, f"text {kind} {name}")
    assert cached == wanted
    assert plain == wanted


def test_random_numbers_are_what_they_say(live):
    given, _ = answer(live, "random")
    wanted = torch.tensor([0.0, 1.0, 2.0]).softmax(0) * 20_000
    assert given["drawn"] == pytest.approx(wanted.tolist(), abs=5 * 20_000**0.5 / 2)
    assert given["mean"] == pytest.approx(0, abs=5 / 20_000**0.5)
    assert given["square"] == pytest.approx(1, abs=5 * (2 / 20_000) ** 0.5)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", [*PATTERNS, "everything", "characters"])
def test_tokenizers_give_the_same_ids_and_text(live, name, special):
    given, (tokenizer, texts, ids, _) = answer(live, f"tokens {name} {special}")
    for text, found in zip(texts, given["encoded"], strict=True):
        assert found == tokenizer.encode(text, special=special), ascii(text)
    if name != "characters":  # what no merge joins may still be cut in the wrong place
        assert given["words"] == [tokenizer.split_words(text) for text in texts]
    assert given["decoded"] == [tokenizer.decode(row) for row in ids] == given["streamed"]
    assert given["vocab_size"] == tokenizer.vocab_size
    assert given["special"] == tokenizer.special_tokens
    assert given["prefix"] == list(tokenizer.prefix)


def test_merges_come_one_by_one(live):
    steps, tokenizer = answer(live, "merges")
    assert steps[0]["shown"] == list(visible(b" transformers"))
    assert tuple(steps[-1]["ids"]) == tokenizer.encode_word(" transformers")
    for before, after in zip(steps, steps[1:]):
        at, (rank, token) = after["at"], tokenizer.ranks[tuple(after["pair"])]
        assert before["ids"][at : at + 2] == after["pair"] and rank == after["rank"]
        assert after["ids"] == [*before["ids"][:at], token, *before["ids"][at + 2 :]]
    assert len(steps) > 3


def test_merges_are_learned_in_the_same_order(live):
    given, text = answer(live, "learn")
    tokens = [*tokenizers()["gpt2"].vocab][:256]
    pairs = learn_merges(count_words([text]), 30)
    for found, (left, right) in zip(given, pairs, strict=True):
        assert found["pair"] == [visible(tokens[left]), visible(tokens[right])]
        tokens.append(tokens[left] + tokens[right])
        assert found["token"] == visible(tokens[-1])
    assert [found["count"] for found in given] == sorted((found["count"] for found in given), reverse=True)
    given, wanted = answer(live, "characters")
    assert given == wanted


def test_the_figures_heads_are_torchs(live):
    given, _ = answer(live, "heads")
    for settings, weights in zip(HEADS, given, strict=True):
        assert torch.tensor(weights, dtype=torch.double) == pytest.approx(head_by_torch(**settings), abs=1e-6), settings


def test_the_figures_rules_are_the_packages(live):
    given, _ = answer(live, "rules")
    for settings, shares in zip(RULES, given, strict=True):
        assert torch.tensor(shares) == pytest.approx(rules_by_torch(**settings), abs=1e-6), settings


def test_the_figures_merges_are_chapter_05s(live):
    "The pieces of the sentence after so many merges; of equal counts the pair of the smallest ids comes first."
    given, _ = answer(live, "own merges")
    words, done = [list(word.encode()) for word in word_splitter("gpt2")(FIGURE_SENTENCE)], 0
    for found, most in zip(given, OWN_MERGES, strict=True):
        while done < most and (pairs := Counter(pair for ids in words for pair in zip(ids, ids[1:]))):
            pair = min(pairs, key=lambda pair: (-pairs[pair], pair))
            for ids in words:
                for at in range(len(ids)):
                    if tuple(ids[at : at + 2]) == pair:
                        ids[at : at + 2] = [256 + done]
            done += 1
        assert [piece["id"] for piece in found["pieces"]] == [i for ids in words for i in ids]
        assert found["done"] == done
    assert done == 60 or not pairs


def test_the_figures_random_numbers_are_torchs(live):
    "Chapter 19's model and batches come from PyTorch's generator, which the page has again."
    given, _ = answer(live, "twister")
    generator = torch.Generator().manual_seed(1234)
    assert given["shares"] == torch.rand(700, generator=generator).tolist()
    assert given["below"] == [int(torch.randint(25, (), generator=generator)) for _ in range(700)]
    normal = torch.empty(64).normal_(generator=generator)
    assert torch.tensor(given["normal"]) == pytest.approx(normal, abs=1e-6)
    uniform = torch.empty(40).uniform_(-0.125, 0.125, generator=generator)
    assert torch.tensor(given["uniform"]) == pytest.approx(uniform, abs=1e-7)


@pytest.mark.parametrize("name", [*FAMILIES, "shards", "run"])
def test_folders_that_the_book_saved_can_be_dropped(live, name):
    given, (model, ids) = answer(live, f"folder {name}")
    with torch.no_grad():
        wanted = model(ids).flatten()
    assert torch.tensor(given["logits"]) == pytest.approx(wanted, abs=1e-5)
    assert given["vocab_size"] == 270
    assert "MB" in given["note"]
    assert name != "run" or "step-0000010" in given["note"]


def test_safetensors_are_read_exactly(live):
    given, tensors = answer(live, "safetensors")
    assert given.keys() == tensors.keys()
    for name, tensor in tensors.items():
        wanted = tensor.float().numpy()
        assert given[name]["shape"] == list(tensor.shape)
        found = np.array([float(x.replace("Infinity", "inf")) for x in given[name]["data"]], np.float32)
        np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


def test_the_stored_page_holds_the_present_engine():
    "Appendix 76 keeps the engine in its output: after a change, it must be executed again."
    page = json.loads((ROOT / "nbs" / "76_your_model.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in page["cells"] for output in cell.get("outputs", [])]
    shown = ["".join(output["data"]["text/html"]) for output in outputs if "text/html" in output.get("data", {})]
    assert shown == [your_model_html()]


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_one_clear_sentence(live, name):
    given = live.answers[f"refusal {name}"]
    assert "refused" in given, given
    sentence = given["refused"]
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 260
    for word in REFUSALS[name][1]:
        assert word in sentence, sentence


def test_what_is_right_is_not_refused(live):
    assert answer(live, "no refusal")[0] == "fine"
