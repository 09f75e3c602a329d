"""Write the numbers that figures of the site need, as scripts: pages opened from a folder can load nothing else.

    python tools/live_data.py                              # book/counting.js: chapter 00's first weights and batches
    python tools/live_data.py --poet runs/shakespeare      # book/poet.js: the model that `make shakespeare` trained
"""
import argparse
import base64
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import save
from transformer_llm.checkpoints import load_model
from transformer_llm.demo import TRAINING_LENGTH, TRAINING_STARTS, train_counter
from transformer_llm.foundations import set_seed
from transformer_llm.tokenizer import CharTokenizer
from transformer_llm.transformer import GPT, GPTConfig

STEPS, BATCH = 200, 16


def counting() -> dict:
    "The first weights, the first digits of each step's batch and the loss of each step, as `train_counter` has them."
    generator = set_seed(0)
    model = GPT(GPTConfig.preset("demo"))
    weights = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    choices = torch.tensor(TRAINING_STARTS)
    starts = [choices[torch.randint(len(choices), (BATCH,), generator=generator)].tolist() for _ in range(STEPS)]
    return {
        "config": model.config.to_dict(),
        "length": TRAINING_LENGTH,
        "starts": "".join(str(start) for batch in starts for start in batch),
        "losses": [round(loss, 6) for loss in train_counter(STEPS, progress=False).losses],
        "weights": base64.b64encode(weights).decode("ascii"),
    }


def in_base64(tensors: list[torch.Tensor]) -> str:
    return base64.b64encode(b"".join(tensor.numpy().tobytes() for tensor in tensors)).decode("ascii")


def rounded(model: GPT) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The weights in a byte each: a matrix's rows as whole numbers of up to 127 steps, and the steps' sizes.

    All in the order of `state_dict`; vectors stand among the sizes as they are.
    """
    small, large = [], []
    for tensor in model.state_dict().values():
        step = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127 if tensor.ndim == 2 else tensor
        large.append(step.flatten())
        if tensor.ndim == 2:
            small.append((tensor / step).round().to(torch.int8))
    return small, large


def poet(model: GPT, tokenizer: CharTokenizer) -> dict:
    "A model of characters for the figure of chapter 08."
    small, large = rounded(model)
    return {
        "config": model.config.to_dict(),
        "tokenizer": json.loads(tokenizer.to_json()),
        "rows": in_base64(small),
        "floats": in_base64(large),
    }


def unpacked(data: dict) -> GPT:
    "The model of `poet`, with the rounded weights."
    small, large = (
        torch.frombuffer(bytearray(base64.b64decode(data[name])), dtype=dtype)
        for name, dtype in (("rows", torch.int8), ("floats", torch.float32))
    )
    model = GPT(GPTConfig.from_dict(data["config"]))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            count = tensor.shape[0]
            if tensor.ndim == 2:
                whole, small = small[: tensor.numel()].view(tensor.shape), small[tensor.numel() :]
                tensor.copy_(whole * large[:count, None])
            else:
                tensor.copy_(large[:count])
            large = large[count:]
    return model.eval()


def read_data(name: str) -> dict:
    "What a committed script of `book/` holds."
    text = (ROOT / "book" / f"{name}.js").read_text(encoding="utf-8")
    return json.loads(text[text.index("{") : text.rindex("}") + 1])


def write_data(name: str, data: dict) -> None:
    text = f"window.bookLive.{name} = {json.dumps(data, ensure_ascii=False, separators=(',', ':'))};\n"
    (ROOT / "book" / f"{name}.js").write_text(text, encoding="utf-8")
    print(f"book/{name}.js: {len(text.encode()):,} bytes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--poet", metavar="RUN", help="a run of `make shakespeare`; writes book/poet.js")
    run = parser.parse_args().poet
    if run is None:
        write_data("counting", counting())
    else:
        write_data("poet", poet(*load_model(run)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
