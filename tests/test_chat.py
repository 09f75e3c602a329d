"""Conversations that keep their cache, and the command that holds them."""
import contextlib
import io
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config as shape_checks

from transformer_llm.chat import Conversation
from transformer_llm.cli import main
from transformer_llm.foundations import InputError, largest_difference
from transformer_llm.generation import Sampling
from transformer_llm.templates import encode_rendered
from transformer_llm.tokenizer import BPETokenizer
from transformer_llm.transformer import GPT, GPTConfig

ROOT = Path(__file__).parent.parent

SMOL = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def is_sentence(text: str) -> bool:
    return text.endswith(".") and "\n" not in text and len(text) < 400 and "Traceback" not in text


WORDS = (
    "the cat sat on a mat and saw one red hat by the old oak tree near our small house "
    "user assistant system You answer questions. "
).split(" ")
NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|user|>", "<|assistant|>"]


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    draw = random.Random(0)
    return BPETokenizer.train(" ".join(draw.choices(WORDS, k=3000)), 330, special_tokens=NAMES)


# Conversations
# ----------------------------------------------------------------------------------------------------------

def make_model(tokenizer, context_length: int = 512, **changes) -> GPT:
    torch.manual_seed(0)
    settings = dict(
        vocab_size=tokenizer.vocab_size,
        context_length=context_length,
        d_model=32,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        init_std=0.2,
    )
    return GPT(GPTConfig(**{**settings, **changes})).eval()


def start(tokenizer, model=None, **options) -> Conversation:
    model = make_model(tokenizer) if model is None else model
    return Conversation(
        model, tokenizer, **{"template": SMOL, "stop_tokens": [tokenizer.special_tokens["<|im_end|>"]], **options}
    )


def anew(conversation: Conversation, messages: list[dict], max_new_tokens: int, **options) -> tuple[str, torch.Tensor]:
    "The answer and the last logits of a conversation that begins with these messages, without any cache."
    from transformer_llm.generation import decode_pieces, stream

    ids = torch.tensor([encode_rendered(conversation.tokenizer, conversation.render(messages))])
    tokens = stream(
        conversation.model, ids, max_new_tokens, stop_tokens=conversation.stop_tokens, use_cache=False, **options
    )
    return "".join(decode_pieces(conversation.tokenizer, tokens, conversation.stop_tokens)), ids


SAY = st.sampled_from(["the cat", "saw the red hat", " and so on ", "<|im_end|>", "😀é", "x" * 30, "You\n\n"])


@pytest.mark.parametrize(
    "changes",
    [{}, {"position": "learned"}, {"position": "alibi"}, {"window": 16}, {"qk_norm": True, "tied_embeddings": False}],
    ids=str,
)
@settings(max_examples=8)
@given(
    turns=st.lists(
        st.tuples(SAY, st.integers(1, 12), st.sampled_from(["whole", "closed", "again", "reset", "system", "edit"])),
        min_size=2,
        max_size=6,
    )
)
def test_a_kept_cache_changes_no_answer(tokenizer, changes, turns):
    "Random conversations, with answers left in the middle, resets, other system messages and edited messages."
    conversation = start(tokenizer, make_model(tokenizer, 2048, **changes))
    for text, length, what in turns:
        before = [dict(m) for m in conversation.messages]
        wanted, ids = anew(conversation, [*before, {"role": "user", "content": text}], length, temperature=0)
        pieces = conversation.say(text, length, temperature=0, top_p=None)
        if what == "closed":
            first = next(pieces, "")
            pieces.close()
            assert wanted.startswith(first)
        else:
            assert "".join(pieces) == wanted and conversation.messages[-1] == {"role": "assistant", "content": wanted}
        assert conversation.turn.kept + conversation.turn.read == ids.shape[1]
        check_memory(conversation)
        if what == "reset":
            conversation.reset()
        elif what == "system":
            conversation.system = text
        elif what == "edit" and conversation.messages:
            conversation.messages[0]["content"] = "tree"


def check_memory(conversation: Conversation) -> None:
    "The cache holds the keys of exactly the tokens that it says it holds."
    memory, model = conversation.memory, conversation.model
    ids = memory.ids()
    if not ids:
        return
    fresh = model.new_cache(1)
    with torch.inference_mode():
        model(torch.tensor([ids]), cache=fresh)
    for kept, new in zip(memory.cache, fresh):
        assert largest_difference(kept.k[:, :, : len(ids)], new.k[:, :, : len(ids)]) < 1e-4
        assert largest_difference(kept.v[:, :, : len(ids)], new.v[:, :, : len(ids)]) < 1e-4


def test_what_was_read_is_not_read_again(tokenizer):
    conversation = start(tokenizer)
    "".join(conversation.say("the cat sat", 10, temperature=0))
    first = conversation.turn
    "".join(conversation.say("the red hat", 10, temperature=0))
    second = conversation.turn
    assert first.kept == 0 and second.kept >= first.read and second.read < first.read + 15
    kept = second.kept + second.read
    conversation.reset()
    "".join(conversation.say("the cat sat", 10, temperature=0))
    assert conversation.turn.kept == first.read - 1 < kept  # the same beginning, but for the last token, is still there


def test_an_interruption_anywhere(tokenizer, monkeypatch):
    """Ctrl-C inside any layer of any pass, the first (the message is forgotten) or a later one: the next answer is as
    if nothing had happened.
    """
    from transformer_llm.transformer import Block

    forward = Block.forward
    for moment in (0, 1, 2, 3, 4, 5, 8, 10):
        conversation, calls = start(tokenizer), [0]
        "".join(conversation.say("the cat", 4, temperature=0))

        def interrupted(self, *args, calls=calls, moment=moment, **options):
            calls[0] += 1
            if calls[0] == moment + 1:
                raise KeyboardInterrupt
            return forward(self, *args, **options)

        before = [dict(m) for m in conversation.messages]
        monkeypatch.setattr(Block, "forward", interrupted)
        said = ""
        with pytest.raises(KeyboardInterrupt):
            for piece in conversation.say("red hat", 8, temperature=0, repetition_penalty=1.3):
                said += piece
        monkeypatch.setattr(Block, "forward", forward)
        if moment < 3:
            assert conversation.messages == before
        else:
            assert conversation.messages == [
                *before,
                {"role": "user", "content": "red hat"},
                {"role": "assistant", "content": said},
            ]
            assert conversation.turn.ended == "interrupted" and conversation.turn.written == moment // 3
        check_memory(conversation)
        wanted, _ = anew(conversation, [*conversation.messages, {"role": "user", "content": "tree"}], 6, temperature=0)
        assert "".join(conversation.say("tree", 6, temperature=0)) == wanted


def test_an_answer_left_open_is_ended_by_the_next(tokenizer):
    conversation = start(tokenizer)
    pieces = conversation.say("the cat", 50, temperature=0)
    first = next(pieces)
    "".join(conversation.say("hat", 3, temperature=0))
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2 and conversation.messages[1][
        "content"
    ] == first
    assert list(pieces) == []
    waiting = conversation.say("never read", 3)
    assert len(conversation.messages) == 4
    conversation.reset()
    assert list(waiting) == [] and conversation.messages == []


def test_a_conversation_that_outgrows_the_context(tokenizer):
    conversation = start(tokenizer, make_model(tokenizer, 160), system="the old oak")
    forgotten = 0
    for i in range(14):
        text = f"the cat saw {i}"
        "".join(conversation.say(text, 20, temperature=0, repetition_penalty=1.2))
        forgotten += conversation.turn.forgotten
        assert conversation.turn.kept + conversation.turn.read + conversation.turn.written <= 160
        assert conversation.messages[-2]["content"] == text and conversation.messages[0]["role"] == "user"
        assert "the old oak" in conversation.render(conversation.messages)
        check_memory(conversation)
    assert forgotten and len(conversation.messages) + forgotten == 28


def test_one_message_longer_than_the_context(tokenizer):
    conversation = start(tokenizer, make_model(tokenizer, 96))
    "".join(conversation.say("the cat", 5))
    before = [dict(m) for m in conversation.messages]
    with pytest.raises(InputError, match="at most 96") as caught:
        conversation.say("the cat " * 100)
    assert is_sentence(str(caught.value)) and conversation.messages == before
    "".join(conversation.say("hat", 5))


def test_an_answer_ends_where_the_context_does(tokenizer):
    conversation = start(tokenizer, make_model(tokenizer, 128), stop_tokens=())
    "".join(conversation.say("the cat", 1000, temperature=0))
    turn = conversation.turn
    assert turn.ended == "context" and turn.kept + turn.read + turn.written == 128
    "".join(conversation.say("hat", 5, temperature=0))
    assert conversation.turn.ended == "length" and conversation.turn.forgotten == 2


def test_a_stop_token_ends_an_answer_and_is_not_shown(tokenizer):
    model = make_model(tokenizer)
    open_end = start(tokenizer, model, stop_tokens=())
    "".join(open_end.say("the cat", 30, temperature=0))
    written = open_end.memory.window.ids[0, -open_end.turn.written:].tolist()
    stop = written[4]
    closed = start(tokenizer, model, stop_tokens=[stop])
    text = "".join(closed.say("the cat", 30, temperature=0))
    assert text == tokenizer.decode(written[: written.index(stop)]) and closed.turn.ended == "stop"
    assert closed.turn.written == written.index(stop) + 1


def test_the_same_seed_gives_the_same_conversation(tokenizer):
    model = make_model(tokenizer)
    texts = [
        ["".join(start(tokenizer, model, seed=seed).say("the cat", 20, temperature=1.5, top_p=None)) for _ in range(2)]
        for seed in (0, 1)
    ]
    assert texts[0][0] == texts[0][1] and texts[1][0] == texts[1][1] and texts[0][0] != texts[1][0]
    conversation = start(tokenizer, model)
    first = "".join(conversation.say("the cat", 20, temperature=1.5))
    conversation.reset()
    assert "".join(conversation.say("the cat", 20, temperature=1.5)) == first


@pytest.mark.parametrize(
    "bad",
    [
        dict(temperature=-1.0),
        dict(top_p=2.0),
        dict(top_k=0),
        dict(min_p=-0.5),
        dict(repetition_penalty=0.0),
        dict(max_new_tokens=0),
    ],
    ids=str,
)
def test_settings_that_can_not_be(tokenizer, bad):
    conversation = start(tokenizer)
    with pytest.raises(InputError, match=next(iter(bad))):
        conversation.say("the cat", **bad)
    for text in ("", " \n"):
        with pytest.raises(InputError, match="empty"):
            conversation.say(text)
    with pytest.raises(InputError):
        conversation.say("half \ud800")
    shape_checks.update("jaxtyping_disable", True)
    try:
        with pytest.raises(InputError, match="must be text, not a list"):
            conversation.say([{"type": "text", "text": "Hi"}])
    finally:
        shape_checks.update("jaxtyping_disable", False)
    assert conversation.messages == []


@pytest.mark.parametrize("options", [
    dict(temperature=0),
    dict(temperature=1.3, top_k=9, min_p=0.01, repetition_penalty=1.2),
    dict(sampling=Sampling(temperature=0.8, top_p=0.5)),
], ids=str)
def test_a_decoder_answers_as_its_model_does(tokenizer, options):
    from transformer_llm.decoding import Decoder

    model = make_model(tokenizer)
    plain, fast = start(tokenizer, model), start(tokenizer, Decoder(model))
    for text in ("the cat", "and a red hat", "saw"):
        answers = ["".join(conversation.say(text, 12, **options)) for conversation in (plain, fast)]
        assert answers[0] == answers[1] and plain.turn == fast.turn


def test_settings_of_an_answer_are_one_object_or_keywords(tokenizer):
    model = make_model(tokenizer)
    sampling = Sampling(temperature=1.5, top_k=20, top_p=0.8, min_p=0.02, repetition_penalty=1.3)

    def answer(**options) -> str:
        return "".join(start(tokenizer, model).say("the cat", 20, **options))

    assert answer(sampling=sampling) == answer(**sampling.to_dict())
    assert answer(sampling=sampling, temperature=0) == answer(**sampling.to_dict() | {"temperature": 0})
    assert answer() == answer(temperature=0.2, top_p=0.9)
    for name in (field.name for field in fields(Sampling)):
        with pytest.raises(InputError, match=name):
            answer(**{name: -1})
    with pytest.raises(TypeError, match="temprature"):
        answer(temprature=1)


def test_special_tokens_end_an_answer_unless_told_otherwise(tokenizer):
    assert start(tokenizer, stop_tokens=None).stop_tokens == tuple(sorted(tokenizer.special_tokens.values()))
    assert start(tokenizer, stop_tokens=()).stop_tokens == ()


def test_a_template_of_ones_own_ends_answers_with_its_own_token(folder):
    end = Conversation.from_pretrained(folder).tokenizer.special_tokens["</s>"]
    own = Conversation.from_pretrained(folder, template=SMOL.replace("<|im_end|>", "</s>"))
    assert end in own.stop_tokens and end not in Conversation.from_pretrained(folder).stop_tokens


@pytest.fixture
def unchecked():
    "As for a user: the notebooks' and tests' checks of shapes and types are off."
    shape_checks.update("jaxtyping_disable", True)
    yield
    shape_checks.update("jaxtyping_disable", False)


@pytest.mark.parametrize("changes, says", [
    (dict(model=None), "model must be a GPT"),
    (dict(model=torch.nn.Linear(2, 2)), "model must be a GPT"),
    (dict(tokenizer=None), "tokenizer must be"),
    (dict(template=None), "template must be a text"),
    (dict(template=5), "template must be a text"),
    (dict(template=["a"]), "template must be a text"),
    (dict(system=5), "system must be a text"),
    (dict(stop_tokens=[10**9]), "stop_tokens"),
    (dict(seed=-1), "seed"),
], ids=str)
def test_what_is_no_conversation(tokenizer, unchecked, changes, says):
    parts = dict(model=make_model(tokenizer), tokenizer=tokenizer, template=SMOL) | changes
    with pytest.raises(InputError, match=says) as caught:
        Conversation(parts.pop("model"), parts.pop("tokenizer"), **parts)
    assert is_sentence(str(caught.value))


@pytest.mark.parametrize("messages, says", [
    ([{"role": "user"}], "'content', which is undefined"),
    ([{"role": "user", "content": None}], "None"),
    ([{"content": "a"}], "with a role such as"),
    ([{"role": "two words", "content": "a"}], "with a role such as"),
    (["a"], "with a role such as"),
    ("a", "must be a list"),
    (None, "must be a list"),
], ids=str)
def test_messages_that_are_none(tokenizer, unchecked, messages, says):
    conversation = start(tokenizer)
    conversation.messages = messages
    with pytest.raises(InputError, match=says) as caught:
        conversation.say("the cat")
    assert is_sentence(str(caught.value)) and conversation.messages == messages


def test_an_empty_system_message_is_one(tokenizer):
    conversation = start(tokenizer)
    assert "Be brief." in conversation.render([{"role": "user", "content": "Hi"}])
    conversation.system = ""
    assert conversation.render([{"role": "user", "content": "Hi"}]).startswith("<|im_start|>system\n<|im_end|>\n")


def test_a_model_without_a_template(monkeypatch):
    from transformer_llm import pretrained

    monkeypatch.setattr(pretrained, "chat_settings", lambda name: pretrained.ChatSettings(None, (), "", ""))
    with pytest.raises(InputError, match="no chat template.* use transformer-llm generate"):
        Conversation.from_pretrained("some-model")


# The command
# ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    "A tiny model that answers nonsense and never stops by itself, as a folder that Hugging Face would read."
    export = pytest.importorskip("transformer_llm.export")
    path = tmp_path_factory.mktemp("models") / "tiny"
    export.save_pretrained(make_model(tokenizer, 4096), path, tokenizer, chat_template=SMOL, eos_token="<|endoftext|>")
    return path


def environment() -> dict:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


def chat_process(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "transformer_llm", "chat", *map(str, words)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment(), timeout=300)


def chat_command(*words, input: str = "") -> subprocess.CompletedProcess:
    "The same in this process, which has imported PyTorch already."
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(input)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["chat", *map(str, words)])
    finally:
        sys.stdin = before
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def test_one_answer_for_a_script(folder):
    first = chat_process("--model", folder, "--prompt", "the cat", "--max_new_tokens", 12)
    assert first.returncode == 0 and first.stderr == "(Cut off after 12 tokens; --max_new_tokens allows more.)\n"
    again = chat_command("--model", folder, "--prompt", "the cat", "--max_new_tokens", 12)
    other = chat_command(
        "--model", folder, "--prompt", "the cat", "--max_new_tokens", 12, "--temperature", 3, "--top_p", 1, "--seed", 7
    )
    assert first.stdout == again.stdout != other.stdout and other.returncode == 0


def test_the_fast_decoder_answers_the_same(folder):
    words = ("--model", folder, "--max_new_tokens", 300, "--temperature", 0)
    plain, fast = (
        chat_command(*words, *more, input="the cat\nand the red hat\n") for more in ((), ("--dtype", "float32"))
    )
    assert plain.returncode == fast.returncode == 0 and fast.stdout == plain.stdout and len(plain.stdout) > 100
    for dtype in ("bfloat16", "int8"):
        done = chat_command("--model", folder, "--prompt", "the cat", "--max_new_tokens", 5, "--dtype", dtype)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_lines_from_a_pipe(folder):
    lines = "the cat\n\n/temperature 0\n/reset\n/system You answer.\n red hat\n/help\n/quit\nnever said\n"
    done = chat_command("--model", folder, "--max_new_tokens", 5, input=lines)
    assert done.returncode == 0, done.stderr
    assert "(temperature 0)\n(forgotten)\n(the system message has changed)\n" in done.stderr and "/reset" in done.stderr
    assert done.stderr.count("(Cut off after 5 tokens") == 2 and ">" not in done.stdout.splitlines()[0][:2]


@pytest.mark.parametrize("words, says", [
    (["--prompt", " "], "--prompt is empty"),
    (["--model", "nowhere", "--prompt", "a"], "There is no model 'nowhere'"),
    (["--model", "nowhere.gguf"], "nowhere.gguf"),
    (["--prompt", "a", "--temperature", "-1"], "--temperature must be"),
    (["--prompt", "a", "--top_p", "2"], "--top_p must be"),
    (["--device", "toaster"], "--device"),
], ids=str)
def test_mistakes_are_one_sentence(words, says):
    done = chat_command(*words)
    assert done.returncode == 2 and done.stdout == "" and says in done.stderr
    assert done.stderr.startswith("transformer-llm: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    "line, says",
    [
        ("/foo", "there is no command '/foo'"),
        ("/quit now", "there is no command"),
        ("/temperature hot", "/temperature must be a number"),
        ("/temperature", "/temperature must be"),
        ("the cat " * 3000, "at most 4,096"),
    ],
    ids=lambda text: text[:20],
)
def test_mistakes_in_a_pipe(folder, line, says):
    done = chat_command("--model", folder, input=line + "\n")
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_message_of_any_bytes(folder):
    command = [sys.executable, "-m", "transformer_llm", "chat", "--model", str(folder), "--max_new_tokens", "3"]
    done = subprocess.run(
        command, input=bytes(range(11, 256)) + b"\n", capture_output=True, env=environment(), timeout=300
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr


def test_a_run_of_this_book_is_not_for_talking(tmp_path):
    from transformer_llm.checkpoints import save_checkpoint

    torch.manual_seed(0)
    save_checkpoint(tmp_path / "run", 1, GPT(GPTConfig.preset("demo")))
    for path in (tmp_path / "run", next((tmp_path / "run").glob("step-*"))):
        done = chat_command("--model", path, "--prompt", "a")
        assert (
            done.returncode == 2
            and "has no chat template; use transformer-llm generate --checkpoint" in done.stderr
            and done.stderr.count("\n") == 1
        )


@pytest.mark.skipif(os.name == "nt", reason="pipes end differently on Windows")
def test_a_reader_that_goes_away(folder):
    command = [sys.executable, "-m", "transformer_llm", "chat", "--model", str(folder), "--prompt", "the cat"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(300) == 141 and process.stderr.read() == b""
    process.stderr.close()


class Terminal:
    "The command at a terminal of its own."

    def __init__(self, *words):
        import fcntl
        import pty
        import termios

        self.side, other = pty.openpty()
        command = [sys.executable, "-m", "transformer_llm", "chat", *map(str, words)]
        own = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        self.process = subprocess.Popen(
            command,
            stdin=other,
            stdout=other,
            stderr=other,
            env=environment() | {"TERM": "dumb"},
            start_new_session=True,
            preexec_fn=own,
        )
        os.close(other)
        self.seen = ""

    def until(self, pattern: str, seconds: float = 60) -> str:
        "Read until the pattern has appeared since the last call."
        end, start = time.monotonic() + seconds, len(self.seen)
        while not re.search(pattern, self.seen[start:], re.S):
            assert time.monotonic() < end, self.seen[-2000:]
            if select.select([self.side], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.side, 65536).decode("utf-8", "replace")
                except OSError:  # the other side is closed
                    return self.seen[start:]
        return self.seen[start:]

    def type(self, text: str) -> None:
        os.write(self.side, text.encode())

    def end(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            os.close(self.side)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals of this kind")
def test_a_session_at_a_terminal(folder):
    terminal = Terminal("--model", folder)
    assert "Loading " in terminal.until("/help lists commands.*> $")
    for interrupt in (lambda: terminal.process.send_signal(signal.SIGINT), lambda: terminal.type("\x03")):
        terminal.type("the cat\n")
        terminal.until(r"the cat\r\n.{20,}")  # in the middle of an answer of thousands of tokens
        interrupt()
        assert "(Cut off" not in terminal.until(r"\(stopped\).*> $") and terminal.process.poll() is None
    time.sleep(1)  # Python's readline loses a signal between showing its prompt and waiting for a key
    terminal.type("\x03")  # at the prompt: a new line
    terminal.until("> $")
    terminal.type("/foo\n")
    terminal.until("there is no command '/foo'.*> $")
    terminal.type("/help\n")
    listed = terminal.until("/quit.*> $")
    assert all(name in listed for name in ("/reset", "/temperature", "/system"))
    time.sleep(1)
    terminal.type("\x04")
    terminal.until("nothing more", 60)
    assert terminal.end() == 0 and "Traceback" not in terminal.seen


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals of this kind")
def test_an_answer_can_not_command_a_terminal(tmp_path):
    "A model that knows one word, which wipes the screen; another program gets the word as it is."
    from transformer_llm.export import save_pretrained

    word = "\x1b[2J\x9b\r"
    tokenizer = BPETokenizer.train(word * 40, 257, special_tokens=["<|endoftext|>"])
    wanted = tokenizer.encode("\x1b")[0]
    model = GPT(
        GPTConfig(
            vocab_size=tokenizer.vocab_size, context_length=64, d_model=8, n_layers=1, n_heads=1, tied_embeddings=False
        )
    ).eval()
    with torch.no_grad():
        model.final_norm.weight.zero_()
        model.final_norm.weight[0] = 1
        model.token_embedding.weight[:, 0] = 100
        model.lm_head.weight.zero_()
        model.lm_head.weight[wanted, 0] = 100
    save_pretrained(model, tmp_path / "m", tokenizer, chat_template="{{ messages[0].content }}")
    words = ("--model", tmp_path / "m", "--prompt", "[2J", "--max_new_tokens", 3, "--temperature", 0)
    done = chat_command(*words)
    text = tokenizer.decode([wanted]) * 3
    assert done.stdout == text + "\n" and "\x1b" in text
    terminal = Terminal(*words)
    terminal.until("Cut off")
    assert terminal.end() == 0 and "\x1b" not in terminal.seen and "\u241b" in terminal.seen


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_ctrl_c_ends_one_answer_for_a_script(folder):
    command = [sys.executable, "-m", "transformer_llm", "chat", "--model", str(folder), "--prompt", "the cat"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and errors == b"\nStopped.\n"


def test_ctrl_c_while_the_model_is_loaded(monkeypatch, capsys):
    from transformer_llm import pretrained

    def stop(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "chat_settings", stop)
    assert main(["chat", "--model", "smollm2", "--prompt", "a"]) == 130 and capsys.readouterr() == ("", "\nStopped.\n")


# SmolLM2
# ----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def smollm2() -> Path:
    from transformer_llm.pretrained import find_pretrained

    try:
        return find_pretrained("smollm2")
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def talker(smollm2) -> Conversation:
    "SmolLM2 by its file's place, loaded once."
    return Conversation.from_pretrained(smollm2)


def test_the_capital_of_france(smollm2, talker):
    done = chat_process("--model", "smollm2", "--prompt", "What is the capital of France?")
    assert done.returncode == 0 and "Paris" in done.stdout
    assert not done.stderr or re.fullmatch("Compiling the decoder .*once; it is kept on disk ...\n", done.stderr)
    assert "".join(talker.say("What is the capital of France?")) + "\n" == done.stdout


def test_smollm2_remembers_and_reads_each_token_once(talker):
    conversation = talker
    conversation.reset()
    for text in ("What is the capital of France?", "And of Italy?"):
        wanted, ids = anew(conversation, [*conversation.messages, {"role": "user", "content": text}], 12, temperature=0)
        assert "".join(conversation.say(text, 12, temperature=0)) == wanted
    assert "Rome" in wanted and conversation.turn.kept > conversation.turn.read
    assert conversation.turn.kept + conversation.turn.read == ids.shape[1]
