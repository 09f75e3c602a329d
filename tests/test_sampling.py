"""One way to sample: every field of `Sampling` does, on every path, what the plain definition does, or is refused by
name.

The walk is over `dataclasses.fields(Sampling)` and over `PATHS`. A new field needs a value in `CHANGES` and a rule in
`plain_logits`; a path that forgets it makes the walk fail, which the last tests show.
"""
import dataclasses
import functools
import inspect
import math
from dataclasses import dataclass, fields

import pytest
import torch

from transformer_llm import Sampling, cli, decoding, generation
from transformer_llm.chat import Conversation
from transformer_llm.checkpoints import save_checkpoint
from transformer_llm.decoding import Decoder, Reader, speculative
from transformer_llm.foundations import InputError, largest_difference
from transformer_llm.generation import (
    beam_candidates,
    beam_search,
    generate,
    generate_text,
    resolve_sampling,
    sample,
    stream,
    stream_text,
)
from transformer_llm.tokenizer import CharTokenizer
from transformer_llm.transformer import GPT, GPTConfig

TOKENIZER = CharTokenizer.train("abcdefghijkl")
PROMPT, SEED, NEW = "abcab", 3, 9
IDS = torch.tensor([TOKENIZER.encode(PROMPT)])
NAMES = [field.name for field in fields(Sampling)]
# A value of each field that changes the text, and one that leaves nothing but the most probable token, if there is one
CHANGES = {"temperature": 0.3, "top_k": 2, "top_p": 0.4, "min_p": 0.5, "repetition_penalty": 3.0}
GREEDY = {"temperature": 0.0, "top_k": 1, "top_p": 0.0, "min_p": 1.0}


def make() -> GPT:
    torch.manual_seed(4)
    shape = dict(vocab_size=12, context_length=32, d_model=16, n_layers=1, n_heads=2, init_std=0.25)
    return GPT(GPTConfig(**shape)).eval()


MODEL = make()
DECODER = Decoder(MODEL)


# The definition, one row and one token at a time --------------------------------------------------------------------

def plain_logits(logits: list[float], ids: list[int], settings: dict) -> list[float]:
    "The logits to draw from, by the definitions of chapter 08."
    s = dict(temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0) | settings
    z = list(logits)
    for i in set(ids):
        z[i] = z[i] / s["repetition_penalty"] if z[i] > 0 else z[i] * s["repetition_penalty"]
    if s["temperature"] == 0:
        return [x if x == max(z) else -torch.inf for x in z]
    z = [x / s["temperature"] for x in z]
    order = sorted(range(len(z)), key=lambda i: -z[i])
    if s["top_k"] is not None:
        z = [x if i in order[: s["top_k"]] else -torch.inf for i, x in enumerate(z)]
    if s["top_p"] is not None:
        p, before, kept = torch.tensor(z).softmax(-1).tolist(), 0.0, set()
        for i in order:
            if not kept or before < s["top_p"]:
                kept.add(i)
            before += p[i]
        z = [x if i in kept else -torch.inf for i, x in enumerate(z)]
    if s["min_p"] is not None:
        p = torch.tensor(z).softmax(-1).tolist()
        z = [x if p[i] >= s["min_p"] * max(p) else -torch.inf for i, x in enumerate(z)]
    return z


@functools.cache
def plain_tokens(*settings: tuple[str, object]) -> str:
    "The new text: everything is read again for each token, and drawn with the same random numbers."
    settings, ids, generator = dict(settings), TOKENIZER.encode(PROMPT), torch.Generator().manual_seed(SEED)
    for _ in range(NEW):
        with torch.no_grad():
            logits = MODEL(torch.tensor([ids]))[0, -1].tolist()
        z = torch.tensor(plain_logits(logits, ids, settings))
        noise = 0.0 if settings.get("temperature") == 0 else torch.empty(12).exponential_(generator=generator).log()
        ids.append(int((z - noise).argmax()))
    return TOKENIZER.decode(ids)[len(PROMPT):]


def plain_text(settings: dict) -> str:
    "As `plain_tokens`, from a dictionary."
    return plain_tokens(*settings.items())


# The paths: each a function of keywords (fields, or `sampling`) that gives the new text ------------------------------

def decoded(ids: torch.Tensor) -> str:
    return TOKENIZER.decode(ids[0, len(PROMPT):].tolist())


def say(**options) -> str:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    conversation = Conversation(MODEL, TOKENIZER, template=template, seed=SEED)
    return "".join(conversation.say(PROMPT, NEW, **options))


PATHS = {
    "stream": (stream, lambda **o: decoded(
        torch.stack([IDS[0, :1]] * len(PROMPT) + list(stream(MODEL, IDS, NEW, generator=SEED, **o)), 1))),
    "generate": (generate, lambda **o: decoded(generate(MODEL, IDS, NEW, generator=SEED, **o))),
    "generate, no cache": (generate, lambda **o: decoded(
        generate(MODEL, IDS, NEW, generator=SEED, use_cache=False, **o))),
    "generate with a Decoder": (generate, lambda **o: decoded(generate(DECODER, IDS, NEW, generator=SEED, **o))),
    "generate_text": (generate_text, lambda **o: generate_text(
        MODEL, TOKENIZER, PROMPT, NEW, generator=SEED, **o)[0][len(PROMPT):]),
    "stream_text": (stream_text, lambda **o: "".join(
        stream_text(MODEL, TOKENIZER, PROMPT, NEW, generator=SEED, **o))),
    "Decoder.generate": (Decoder.generate, lambda **o: decoded(DECODER.generate(IDS, NEW, generator=SEED, **o))),
    "Conversation.say": (Conversation.say, say),
}


def walk(path: str, name: str, value, kind: type = Sampling, plain=plain_text) -> None:
    "One field on one path: by keyword and in a `Sampling`, it gives the plain definition's text and no other."
    function, write = PATHS[path]
    wanted = plain({name: value})
    assert wanted != plain({}), f"{name}={value} changes nothing"
    assert write(sampling=kind(**{name: value})) == wanted, f"{path} ignores {name} in a Sampling"
    parameter = inspect.signature(function).parameters.get(name)
    assert parameter is not None and parameter.default is None, f"{path} has no keyword {name} with default None"
    assert write(**{name: value}) == wanted, f"{path} ignores its keyword {name}"
    assert write(sampling=kind(), **{name: value}) == wanted, f"{path} ignores {name} beside a Sampling"


@pytest.fixture(autouse=True)
def plain_conversation(monkeypatch):
    "A conversation's own defaults are cold; here it begins like the other paths."
    monkeypatch.setattr(Conversation, "SAMPLING", Sampling())


def test_every_field_has_its_value_here():
    assert set(CHANGES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", PATHS)
def test_every_field_on_every_path(path, name):
    walk(path, name, CHANGES[name])


def test_all_fields_together_and_the_defaults():
    assert Sampling() == Sampling(**{field.name: field.default for field in fields(Sampling)})
    for settings in (dict(CHANGES, temperature=2.0, top_k=9, top_p=0.9, min_p=0.05), {}):
        for path, (_, write) in PATHS.items():
            assert write(sampling=Sampling(**settings)) == plain_text(settings), path


def test_a_keyword_stands_above_the_object():
    hot = Sampling(temperature=2.0, top_k=3)
    wanted = dict(temperature=0.7, top_k=3)
    for path, (_, write) in PATHS.items():
        assert write(sampling=hot, temperature=0.7) == plain_text(wanted), path


def test_a_conversation_has_defaults_of_its_own(monkeypatch):
    monkeypatch.undo()
    assert Conversation.SAMPLING == Sampling(temperature=0.2, top_p=0.9)
    assert say() == plain_text(Conversation.SAMPLING.to_dict()) and say(temperature=1.5) == plain_text(
        dict(temperature=1.5, top_p=0.9)
    )


def test_sample_takes_what_needs_no_history():
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    for name in NAMES:
        if name == "repetition_penalty":
            with pytest.raises(TypeError, match="sample.*repetition_penalty"):
                inspect.unwrap(sample)(logits, repetition_penalty=2.0)
            continue
        drawn = {int(sample(logits, generator=torch.Generator().manual_seed(i), **{name: CHANGES[name]})[0])
                 for i in range(60)}
        z = torch.tensor(plain_logits(logits[0].tolist(), [], {name: CHANGES[name]}))
        assert drawn <= set(z.isfinite().nonzero()[:, 0].tolist())


# Speculation and beams ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", [MODEL, DECODER], ids=["GPT", "Decoder"])
def test_speculation_has_the_fields_distribution_or_refuses_the_field(form, name):
    settings = {name: CHANGES[name]}
    if name not in Reader.KNOWN:
        with pytest.raises(InputError, match=f"Speculative decoding can't use {name}={CHANGES[name]}"):
            speculative(form, form, IDS, 4, sampling=Sampling(**settings))
        with pytest.raises(TypeError, match=f"speculative.*{name}"):
            inspect.unwrap(speculative)(form, form, IDS, 4, **settings)
        return
    reader = Reader(form, 32, Sampling(**settings))
    with torch.inference_mode():
        p, logits = reader.distributions(IDS, 3), MODEL(IDS)[0, -3:]
    wanted = [plain_logits(row, [], settings) for row in logits.tolist()]
    assert largest_difference(p, torch.tensor(wanted, dtype=torch.double).softmax(-1)) < 1e-5
    greedy = DECODER.generate(IDS, NEW, temperature=0)
    torch.manual_seed(1)
    draft = GPT(MODEL.config).eval()
    for options in ({name: GREEDY[name]}, dict(sampling=Sampling(**{name: GREEDY[name]}))):
        assert torch.equal(speculative(form, draft, IDS, NEW, generator=SEED, **options)[0], greedy)


@pytest.mark.parametrize("name", NAMES)
def test_beams_refuse_every_field(name):
    for search in (beam_search, beam_candidates):
        for options in ({name: CHANGES[name]}, dict(sampling=Sampling(**{name: CHANGES[name]}))):
            with pytest.raises(TypeError, match=f"{search.__name__}.*{[*options][0]}"):
                inspect.unwrap(search)(MODEL, IDS, 4, **options)  # whose sentence no type check replaces


# The command line ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder, 1, MODEL, tokenizer=TOKENIZER)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_a_flag_of_generate(name, saved, capsys):
    for extra in ([], ["--stream"], ["--dtype", "float32"]):
        arguments = ["generate", "--checkpoint", str(saved), "--prompt", PROMPT, "--max_new_tokens", str(NEW)]
        assert cli.main([*arguments, "--seed", str(SEED), f"--{name}", str(CHANGES[name]), *extra]) == 0
        assert capsys.readouterr().out == PROMPT + plain_text({name: CHANGES[name]}) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_a_flag_of_chat(name, capsys, monkeypatch):
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    made = lambda *args, seed, **options: Conversation(MODEL, TOKENIZER, template=template, seed=seed)
    monkeypatch.setattr(Conversation, "from_pretrained", made)
    flags = ["--prompt", PROMPT, "--max_new_tokens", str(NEW), "--seed", str(SEED), f"--{name}", str(CHANGES[name])]
    assert cli.main(["chat", "--model", "anything", *flags]) == 0
    assert capsys.readouterr().out.strip() == plain_text({name: CHANGES[name]})


# The object ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, value", [
    ("temperature", -0.1), ("temperature", 1e-9), ("temperature", float("nan")), ("temperature", "hot"),
    ("temperature", True), ("temperature", None), ("top_k", 0), ("top_k", 2.5), ("top_p", 1.01), ("top_p", -1),
    ("min_p", 2), ("min_p", "0.1"), ("repetition_penalty", 0), ("repetition_penalty", float("inf")),
])
def test_every_field_is_checked_once_for_all(name, value):
    sampling = object.__new__(Sampling)  # as a user's package makes it, without a check of types
    for field in fields(Sampling):
        object.__setattr__(sampling, field.name, value if field.name == name else field.default)
    with pytest.raises(InputError, match=name):
        sampling.__post_init__()


def test_the_object_is_frozen_plain_and_documented():
    sampling = Sampling(**CHANGES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampling.top_k = 5
    assert sampling.to_dict() == CHANGES and Sampling.from_dict(CHANGES) == sampling
    assert sampling.replace(top_k=None) == Sampling(**CHANGES | dict(top_k=None)) != sampling
    assert Sampling(temperature=0) == Sampling(temperature=0.0)
    for name in NAMES:
        assert f"`{name}`" in inspect.getdoc(Sampling)
    for make in (Sampling.from_dict, lambda values: Sampling().replace(**values)):
        with pytest.raises(InputError, match="no field 'temprature'; its fields are temperature, top_k"):
            make({"temprature": 1})


def test_what_is_no_sampling_is_refused():
    with pytest.raises(InputError, match="sampling must be a Sampling"):
        inspect.unwrap(resolve_sampling)({"top_k": 3})  # unwrapped: a user's package checks no types


# The walk fails when it should --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Wider(Sampling):
    "One field more: a token that is never written."

    banned: int | None = None

    def filter(self, logits, seen=None):
        logits = super().filter(logits, seen)
        ban = torch.zeros(logits.shape[-1], dtype=torch.bool)
        ban[[] if self.banned is None else self.banned] = True
        return logits.masked_fill(ban, -torch.inf)


def test_a_new_field_is_obeyed_in_the_object_and_missed_as_a_keyword():
    "No path ignores a field that it has never heard of; the walk asks each for a keyword, and names the path."
    without = plain_text({})
    banned = TOKENIZER.encode(without)[3]

    def plain(settings: dict) -> str:
        "`plain_text`, with the ban done by the object: the rule that a new field would get in `plain_logits`."
        kept = {key: value for key, value in settings.items() if key != "banned"}
        if "banned" not in settings:
            return plain_text(kept)
        return decoded(generate(MODEL, IDS, NEW, generator=SEED, sampling=Wider(**settings)))

    assert TOKENIZER.decode([banned]) not in plain(dict(banned=banned))
    for path in PATHS:
        with pytest.raises(AssertionError, match=f"{path} has no keyword banned"):
            walk(path, "banned", banned, Wider, plain)
    with pytest.raises(InputError, match=f"can't use banned={banned}"):
        speculative(MODEL, MODEL, IDS, 4, sampling=Wider(banned=banned))
    assert {field.name for field in fields(Wider)} - set(CHANGES) == {"banned"}  # the first test would ask for a value


@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_forgets_a_field_is_found(name, monkeypatch):
    neutral = {field.name: field.default for field in fields(Sampling)}[name]
    real = decoding.sampler
    monkeypatch.setattr(decoding, "sampler", lambda batch, vocab, device, sampling, generator: real(
        batch, vocab, device, sampling.replace(**{name: neutral}), generator))
    with pytest.raises(AssertionError, match=f"Decoder.generate ignores {name}"):
        walk("Decoder.generate", name, CHANGES[name])
    monkeypatch.setattr(generation, "resolve_sampling", lambda sampling, **given: resolve_sampling(
        sampling, **given | {name: None}))
    for path in ("stream", "generate_text", "stream_text"):
        with pytest.raises(AssertionError, match=f"{path} ignores its keyword {name}"):
            walk(path, name, CHANGES[name])


def test_a_random_number_of_zero_never_draws_a_filtered_token(monkeypatch):
    "Some devices draw zeros: their logarithm is minus infinity, and a filtered token's logit minus that not a number."
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda noise, generator=None: noise.zero_())
    logits = torch.tensor([[-math.inf, 1.0, 2.0]]).expand(4, 3)
    assert generation.draw(logits).tolist() == [2] * 4
    model = MODEL
    ids = torch.tensor([[1, 2]])
    wanted = generate(model, ids, 5, temperature=0)
    assert torch.equal(generate(model, ids, 5, top_k=2), wanted)
    assert torch.equal(Decoder(model).generate(ids, 5, top_k=2), wanted)
