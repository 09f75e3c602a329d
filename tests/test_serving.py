"""Chapter 22: pages, the engine, the grammar and the server; a client of a running server, and malformed requests."""
import json
import random
import shutil
import socket
import subprocess
import threading
import time

import httpx
import openai
import pytest
import torch
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from transformer_llm.foundations import InputError
from transformer_llm.generation import Sampling, generate
from transformer_llm.serving import (
    ByteGrammar,
    Engine,
    Grammar,
    Job,
    Limits,
    PageTable,
    Pieces,
    RowSampler,
    Served,
    Vocabulary,
    make_app,
)
from transformer_llm.tokenizer import BPETokenizer
from transformer_llm.transformer import GPT, GPTConfig

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
TEXT = ("The cat sat on the mat. {\"name\": \"Ada\", \"age\": 36, \"list\": [1, 2, 3]} "
        "user assistant system true false null ") * 3


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train(TEXT, 300)


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    torch.manual_seed(0)
    shape = dict(vocab_size=tokenizer.vocab_size, context_length=256, d_model=32, n_layers=2)
    return GPT(GPTConfig(**shape, n_heads=4, n_kv_heads=2, init_std=0.3)).eval()


@pytest.fixture(scope="module")
def served(model, tokenizer) -> Served:
    engine = Engine(model, n_slots=4, n_pages=64, page_size=8, chunk=16)
    return Served("tiny", engine, tokenizer, template=TEMPLATE, limits=Limits(max_tokens=64, max_body=20_000))


@pytest.fixture(scope="module")
def address(served) -> str:
    "A running server."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(served), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def client(address) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=30)


def settle(served: Served) -> None:
    "Wait until nobody is served any more."
    for _ in range(500):
        if not served.engine.running and not served.engine.waiting:
            return
        time.sleep(0.01)
    raise AssertionError("somebody is still being served")


def run(engine: Engine, jobs: list[Job]) -> None:
    for job in jobs:
        assert engine.submit(job)
    while engine.step():
        pass
    engine.table.check()
    assert engine.table.n_free == engine.table.n_pages and not engine.table.table


def job(prompt: list[int], n: int, seed: int = 0, temperature: float = 1.0, **more) -> Job:
    return Job(list(prompt), n, RowSampler(Sampling(temperature=temperature), seed), **more)


@given(st.data())
@settings(max_examples=8, deadline=None)
def test_random_arrivals_get_their_solo_answers_and_every_page_returns(model, data):
    "Jobs with common beginnings come between steps; pages are few, so that some give way; some hang up."
    slots, chunk = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    engine = Engine(model, n_slots=slots, n_pages=10, page_size=4, chunk=chunk)
    texts = st.tuples(st.sampled_from([[1] * 9, [1, 1, 1, 1, 2, 2], [3]]), st.lists(st.integers(0, 5), max_size=6))
    jobs, cancelled = [], []
    for i in range(6):
        prompt = sum(data.draw(texts), [])
        one = job(prompt, data.draw(st.integers(1, 10)), seed=i)
        jobs.append(one)
        assert engine.submit(one)
        for _ in range(data.draw(st.integers(0, 6))):
            engine.step()
            engine.table.check()
        if data.draw(st.integers(0, 5)) == 0 and one.reason is None:
            one.cancelled = True
            cancelled.append(one)
    while engine.step():
        engine.table.check()
    assert engine.table.n_free == 10 and not engine.table.table
    for i, one in enumerate(jobs):
        alone = generate(model, torch.tensor([one.prompt]), one.max_tokens, generator=i)[0, len(one.prompt):].tolist()
        assert one.written == alone[: len(one.written)]
        assert one.reason == "length" and len(one.written) == one.max_tokens or one in cancelled


def test_neighbours_change_no_logits(model):
    def row(neighbour: list[int]) -> torch.Tensor:
        engine = Engine(model, n_slots=2, n_pages=32, page_size=4)
        jobs = [job([1, 2, 3, 4, 5], 9), job(neighbour, 9)]
        for one in jobs:
            engine.table.open(one)
            engine.prepare(one, len(one.prompt) - 1)
            engine.read([one], len(one.prompt) - 1)
            engine.prepare(one, 1)
        return engine.read(jobs, 1)[0]

    with torch.no_grad():
        plain = model(torch.tensor([[1, 2, 3, 4, 5]]))[0, -1]
    assert torch.equal(row([7, 8, 9]), row([100, 101, 102]))
    assert (row([7, 8, 9]) - plain).abs().max() < 1e-4


def test_greedy_answers_equal_solo_ones(model):
    "Without exception here: no two logits of these answers are nearly tied, as the margins say."
    engine = Engine(model, n_slots=3, n_pages=40, page_size=4, chunk=5)
    jobs = [job([i, 2 * i, 7][: 1 + i % 3] * 4, 6 + i, temperature=0) for i in range(1, 8)]
    run(engine, jobs)
    for one in jobs:
        ids = torch.tensor([one.prompt])
        assert one.written == generate(model, ids, one.max_tokens, temperature=0)[0, len(one.prompt):].tolist()


def test_a_common_prefix_is_read_once(model):
    engine = Engine(model, n_slots=8, n_pages=64, page_size=8, chunk=512)
    first = job([5] * 64 + [9], 2)
    run(engine, [first])
    rest = [job([5] * 64 + [10 + i], 2) for i in range(7)]
    run(engine, rest)
    assert engine.counts.read == 65 + 7 and engine.counts.shared == 7 * 64
    assert [one.known for one in rest] == [64] * 7


def test_a_row_that_breaks_leaves_the_others(model):
    engine = Engine(model, n_slots=2, n_pages=32, page_size=4)
    jobs = [job([1, 2], 5), job([3, 4], 5)]
    read, calls = engine.read, []

    def broken(group, n):
        logits = read(group, n).clone()
        calls.append(len(group))
        if jobs[0] in group and len(jobs[0].written) == 2:
            logits[group.index(jobs[0])] = torch.nan
        return logits

    engine.read = broken
    run(engine, jobs)
    assert jobs[0].reason == "error" and jobs[1].reason == "length" and max(calls) == 2


def test_pages_share_copy_and_refuse():
    table = PageTable(6, 4)
    assert table.open("a", [1] * 9) == 0 and table.grow("a", 9) == []
    table.publish("a", [1] * 9)
    assert table.open("b", [1] * 8) == 4, "one token at least is read"
    table.fork("a", "c")
    copies = table.grow("c", 1)
    assert len(copies) == 1 and copies[0][0] == table.table["a"][-1] and copies[0][1] == table.table["c"][-1]
    assert table.grow("a", 1) == [] and table.grow("b", 100) is None
    for who in ("a", "a", "b", "c", "never"):
        table.close(who)
        table.check()
    assert table.n_free == 6
    with pytest.raises(InputError, match="has pages already"):
        table.open("d")
        table.open("d")


SCHEMAS = [
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}}},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"enum": ["red", "green", 3, None]},
    {"anyOf": [{"type": "null"}, {"type": "number"}]},
    {"type": "object", "properties": {"list": {"type": "array", "items": {"const": "é"}}, "x": {"type": "null"}}},
]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_answer_parses(model, tokenizer, schema):
    grammar = Grammar(schema, Vocabulary(tokenizer, tokenizer.vocab_size))
    jobs = [job([i + 1], 120, seed=i, grammar=grammar) for i in range(8)]
    run(Engine(model, n_slots=8, n_pages=256, page_size=8), jobs)
    for one in jobs:
        value = json.loads(tokenizer.decode(one.written))
        assert one.reason == "stop"
        if schema.get("type") == "object":
            assert list(value) == list(schema["properties"])
        if "enum" in schema:
            assert value in schema["enum"]
        if schema.get("type") == "array":
            assert 1 <= len(value) <= 3 and all(isinstance(item, bool) for item in value)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_masks_are_what_a_walk_allows(tokenizer, schema):
    "The columns at once against one token after another, along a random valid text."
    grammar, dice = Grammar(schema, Vocabulary(tokenizer, tokenizer.vocab_size)), random.Random(1)
    number = grammar.start
    for _ in range(12):
        mask = grammar.mask(number)
        slow = [grammar.walk(number, tokenizer.decode_bytes([i])) != 0 for i in range(tokenizer.vocab_size)]
        assert mask.tolist() == slow
        if not any(slow):
            break
        number = grammar.follow(number, dice.choice([i for i, allowed in enumerate(slow) if allowed]))


@given(st.text(max_size=6))
def test_strings_of_json_are_accepted(text):
    grammar = ByteGrammar({"type": "string", "maxLength": 12})
    said = json.dumps(text.replace("\x7f", ""), ensure_ascii=False).encode("utf-8", "replace")
    end = grammar.walk(grammar.start, said)
    assert end and grammar.last in grammar.sets[end] or any(ord(c) < 32 for c in text)
    assert not grammar.walk(grammar.start, b'"\xff"') and not grammar.walk(grammar.start, b'"' + b"a" * 13)


@pytest.mark.parametrize("schema, words", [
    ({"type": "strin"}, "type must be one of"),
    ({"type": "string", "pattern": "a+"}, "pattern"),
    ({"type": "array"}, "must be an object"),
    ({"type": "object", "required": ["x"]}, "required"),
    ({"enum": []}, "enum"),
    ({"type": "string", "maxLength": 10**9}, "maxLength"),
])
def test_schemas_that_are_not_supported_are_named(schema, words):
    with pytest.raises(InputError, match=words):
        ByteGrammar(schema)


def test_pieces_hold_back_what_may_be_a_stop(tokenizer):
    pieces = Pieces(tokenizer, ["\n\n", "END"])
    assert [pieces.add(text) for text in ("a\n", "b\nE", "N", "x", "y END z")] == ["a", "\nb\n", "", "ENx", "y "]
    assert pieces.stopped and pieces.flush() == ""


def test_the_client_of_openai(client, served):
    assert [one.id for one in client.models.list()] == ["tiny"]
    ask = dict(model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=12, seed=3)
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length"
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    parts = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == whole.choices[0].message.content
    assert parts[-1].usage.completion_tokens == 12 and parts[-2].choices[0].finish_reason == "length"
    two = client.chat.completions.create(**ask, n=2)
    assert two.choices[0].message.content == whole.choices[0].message.content != two.choices[1].message.content
    text = client.completions.create(model="tiny", prompt="The cat", max_tokens=5, temperature=0, logprobs=1)
    assert len(text.choices[0].logprobs.tokens) == 5
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[0]}}
    answer = client.chat.completions.create(**ask | dict(max_tokens=60), response_format=schema)
    assert set(json.loads(answer.choices[0].message.content)) == {"name", "age"}
    stop = whole.choices[0].message.content[3:5]
    stopped = client.chat.completions.create(**ask, stop=[stop])
    assert stopped.choices[0].finish_reason == "stop" and stop not in stopped.choices[0].message.content
    settle(served)
    served.engine.table.check()


def test_the_client_understands_refusals(client):
    ask = dict(model="tiny", messages=[{"role": "user", "content": "Hello"}])
    with pytest.raises(openai.NotFoundError, match="There is no model"):
        client.chat.completions.create(**ask | dict(model="other"))
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**ask, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="frequency_penalty"):
        client.chat.completions.create(**ask, frequency_penalty=0.5)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(address):
    body = json.dumps(dict(prompt="The cat", max_tokens=4, stream=True, seed=1))
    command = ["curl", "-sN", f"{address}/v1/completions", "-d", body]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    events = said.stdout.strip().split("\n\n")
    assert all(event.startswith("data: ") for event in events) and events[-1] == "data: [DONE]"


def test_hanging_up_frees_the_pages(address, served):
    body = dict(prompt="The cat", max_tokens=64, stream=True, seed=1)
    before = served.engine.counts.ended.get("cancelled", 0)
    step, gate = served.engine.step, threading.Event()

    def slow() -> bool:
        gate.wait(0.05)
        return step()

    served.engine.step = slow
    try:
        with httpx.stream("POST", f"{address}/v1/completions", json=body) as reply:
            next(reply.iter_lines())
        settle(served)
    finally:
        served.engine.step = step
        gate.set()
    assert served.engine.counts.ended["cancelled"] == before + 1
    assert served.engine.table.n_free == served.engine.table.n_pages


def test_pages_metrics_and_health(address):
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    said = httpx.get(f"{address}/metrics").text
    assert "llm_pages 64\n" in said and "# TYPE llm_written_total counter" in said
    page = httpx.get(address)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text.split("<style>")[1]
    assert httpx.get(f"{address}/nowhere").json()["error"]["code"] == "not_found"


def malformed(dice: random.Random) -> bytes:
    "A request with something wrong: bytes that aren't JSON, or a field of a wrong kind or size."
    odd = [None, -1, 10**12, 1.5, "x", [], {}, [None], {"a": 1}, "\ud800", True, [[[]]], 1e308]
    good = {"messages": [{"role": "user", "content": "secret-" + str(dice.randrange(9))}], "max_tokens": 1}
    if dice.random() < 0.2:
        return dice.choice([b"", b"{", b"\xff\xfe", b"[" * 5000, b'"x"', b"nul", b"x" * 30_000])
    names = ["messages", "max_tokens", "n", "stop", "seed", "temperature", "top_p", "response_format", "logprobs",
             "stream_options", "model", "tools", "zzz", "top_logprobs", "logit_bias"]
    for name in dice.sample(names, dice.randint(1, 3)):
        good[name] = dice.choice(odd)
    return json.dumps(good).encode()


def test_malformed_requests_are_refused_in_one_sentence(model, tokenizer):
    engine = Engine(model, n_slots=4, n_pages=64, page_size=8)
    served = Served("tiny", engine, tokenizer, template=TEMPLATE, limits=Limits(max_tokens=4, max_body=20_000))
    dice, statuses = random.Random(0), {}
    with TestClient(make_app(served, api_key="k"), raise_server_exceptions=True) as web:
        assert web.post("/v1/chat/completions", json={}).status_code == 401
        for i in range(1000):
            path = "/v1/chat/completions" if i % 3 else "/v1/completions"
            reply = web.post(path, content=malformed(dice), headers={"Authorization": "Bearer k"})
            statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
            if reply.status_code != 200:
                error = reply.json()["error"]
                assert error["message"] and "Traceback" not in error["message"] and len(error["message"]) < 400
    assert set(statuses) <= {200, 400, 404, 413} and statuses[400] > 500
    engine.table.check()
    assert engine.table.n_free == 64 and not engine.running


def test_a_full_queue_is_refused_at_once(model, tokenizer):
    engine = Engine(model, n_slots=1, n_pages=16, page_size=4, max_waiting=1)
    jobs = [job([1], 2) for _ in range(3)]
    assert [engine.submit(one) for one in jobs] == [True, True, False]
    with pytest.raises(InputError, match="all pages"):
        engine.submit(job([1], 100))
    late = job([1], 5, deadline=0.0)
    engine = Engine(model)
    run(engine, [late])
    assert late.reason == "timeout"


def test_the_command_refuses_in_one_sentence(capsys, monkeypatch, tmp_path, model, tokenizer):
    from transformer_llm.cli import main
    from transformer_llm.export import save_pretrained

    save_pretrained(model, tmp_path / "tiny", tokenizer)
    serve = ["serve", "--model", str(tmp_path / "tiny"), "--pages", "16"]
    assert main([*serve, "--host", "0.0.0.0"]) == 2 and "API key" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main([*serve, "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another port" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "starlette.applications", None)
    assert main(serve) == 2 and "pip install 'transformer_llm[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize("body", [
    '{"prompt": "a", "top_k": 1e999}', '{"prompt": "a", "top_k": NaN}',
    '{"prompt": "a", "temperature": 1%s}' % ("0" * 400),
    '{"prompt": "a", "\\ud800": 1}',
    '{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema":'
    ' {"type": "object", "properties": {}, "required": 5}}}}',
])
def test_values_that_no_converter_takes_are_refused_in_the_interfaces_form(served, body):
    with TestClient(make_app(served)) as client:
        answer = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text


def test_a_refused_request_leaves_nothing_in_the_queue(model, tokenizer):
    engine = Engine(model, n_slots=1, n_pages=64, page_size=8, max_waiting=0)
    served = Served("tiny", engine, tokenizer, template=TEMPLATE)
    with TestClient(make_app(served)) as client:
        ask = lambda n: client.post("/v1/completions", json={"prompt": "The cat", "max_tokens": 2, "n": n}).status_code
        assert ask(2) == 429
        settle(served)
        assert ask(1) == 200

