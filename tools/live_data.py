"""Write what the home page's figure needs of chapter 00's training: first weights, batches and losses, as a script.

    python tools/live_data.py            # book/counting.js
"""
import base64
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import save
from transformer_llm.demo import TRAINING_LENGTH, TRAINING_STARTS, train_counter
from transformer_llm.foundations import set_seed
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


def main() -> int:
    text = f"window.bookLive.counting = {json.dumps(counting(), separators=(',', ':'))};\n"
    (ROOT / "book" / "counting.js").write_text(text, encoding="utf-8")
    print(f"book/counting.js: {len(text):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
