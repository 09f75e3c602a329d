"""Make data/features.json, the runs that chapter 20 shows.

    python book/features_runs.py [PART ...]

PART is one of recipe, size, width, rare, smollm2. Each result is written as soon as it is there, and one that is there
already is not made again (delete it from the file to begin anew). The first four train dictionaries on the chapter's
toy, about a quarter of a minute of one core each. `smollm2` reads 60,000 tokens of the plays up to the middle of
SmolLM2 and trains three dictionaries on what it finds: two seeds, and the first seed again without help for dead
latents; less than ten minutes of one core. Seconds are of the processor.
"""
import itertools
import sys
import time

import torch
from stored import Stored

from transformer_llm.dataset import load_shakespeare, read_text
from transformer_llm.features import (
    DeadFeatures,
    TopK,
    Toy,
    feature_card,
    grade,
    record_rows,
    share_recovered,
    train_dictionary,
)
from transformer_llm.pretrained import load_pretrained, load_pretrained_tokenizer

RUNS = Stored("features.json")
SEEDS = (0, 1, 2)
LAYER, WINDOW, READ, LATENTS, K = 14, 256, 60_000, 1536, 16  # of SmolLM2's 30 blocks; the tokens; the dictionary
CARDS = 8
OUTLIER = 4  # rows longer than so many medians are left as they are


class Free(TopK):
    "Directions of any length."

    def normalise(self) -> None:
        pass


def toy_run(toy: Toy, n_latents: int = 768, k: int = 8, without: str = "") -> dict:
    "One dictionary on a toy, graded; `without` names the part of the recipe that is left out."
    start = time.process_time()
    generator = torch.Generator().manual_seed(1000 + toy.seed)  # not the toy's own, or it starts at the answer
    draw = lambda n, generator: toy.draw(n, generator)[0]
    kind = Free if without == "unit length" else TopK
    dictionary = kind(toy.width, n_latents, k, generator=generator)
    directions = dictionary.decoder.detach().clone()
    dictionary.start(draw(4096, generator), generator)
    with torch.no_grad():
        if without == "start from data":
            dictionary.decoder.copy_(directions)
            dictionary.encoder.copy_(directions)
        if without == "shared start":
            torch.nn.init.normal_(dictionary.encoder, std=toy.width**-0.5, generator=generator)
    dead = DeadFeatures(n_latents, help=0 if without == "help" else 32)
    losses = train_dictionary(dictionary, draw, dead=dead, generator=generator)
    result = vars(grade(dictionary.decoder, toy.directions))
    result |= {"left": sum(losses[-50:]) / 50, "dead": int(dead.dead.sum()), "seconds": time.process_time() - start}
    best = (toy.directions @ torch.nn.functional.normalize(dictionary.decoder.detach(), dim=1).T).amax(1) > 0.9
    if toy.decay:
        result["by_eighth"] = [part.float().mean().item() for part in best.chunk(8)]
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in result.items()}


def recipe() -> None:
    "All parts, and each left out."
    for seed, without in itertools.product(
        SEEDS, ("", "unit length", "shared start", "start from data", "help")
    ):
        wanted = dict(without=without, seed=seed)
        if not RUNS.has("recipe", wanted):
            RUNS.keep("recipe", wanted | toy_run(Toy(seed=seed), without=without))


def size() -> None:
    "Other numbers of latents, and other k; 768 and 8 are in `recipe`."
    for seed, (n_latents, k) in itertools.product(SEEDS, ((512, 8), (1536, 8), (768, 4), (768, 16))):
        wanted = dict(n_latents=n_latents, k=k, seed=seed)
        if not RUNS.has("size", wanted):
            RUNS.keep("size", wanted | toy_run(Toy(seed=seed), n_latents, k))


def width() -> None:
    "512 features in fewer and in more numbers."
    for seed, numbers in itertools.product(SEEDS, (24, 32, 64)):
        wanted = dict(width=numbers, seed=seed)
        if not RUNS.has("width", wanted):
            RUNS.keep("width", wanted | toy_run(Toy(width=numbers, seed=seed)))


def rare() -> None:
    "Features of which the last occurs 512 times less often than the first."
    for seed in SEEDS:
        if not RUNS.has("rare", dict(seed=seed)):
            RUNS.keep("rare", dict(seed=seed) | toy_run(Toy(decay=1.0, seed=seed)))


def smollm2() -> None:
    "Dictionaries on the middle of SmolLM2, reading the plays."
    text = read_text(load_shakespeare(ROOT / "data" / "shakespeare.txt", progress=False))
    tokenizer, model = load_pretrained_tokenizer("smollm2"), load_pretrained("smollm2").eval()
    name, start = f"blocks.{LAYER}.after", time.process_time()
    ids = torch.tensor(tokenizer.encode(text[:500_000])[: READ // WINDOW * WINDOW]).view(-1, WINDOW)
    unseen = torch.tensor(tokenizer.encode(text[-60_000:])[: 17 * WINDOW]).view(-1, WINDOW)
    all_blocks, model.blocks = model.blocks, model.blocks[: LAYER + 1]  # the rest comes after what is read
    rows, fresh = (record_rows(model, name, part, batch_size=8).view(*part.shape, -1)[:, 1:].flatten(0, 1)
                   for part in (ids, unseen))  # the first place of a window is a thing of its own
    model.blocks = all_blocks
    limit = OUTLIER * rows.norm(dim=1).median()  # a few tokens have streams many times longer than all others
    usual, left_out = rows.norm(dim=1) < limit, int((rows.norm(dim=1) >= limit).sum())
    rows = rows[usual]
    seen = fresh.norm(dim=1) < limit
    tokens = [tokenizer.decode([i]) for i in unseen[:, 1:].flatten()[seen].tolist()]
    fresh = fresh[seen]
    print(f"read: {time.process_time() - start:.0f} s", flush=True)
    made: dict[int, TopK] = {}
    for seed, help_dead in ((0, 32), (1, 32), (0, 0)):
        wanted = dict(layer=LAYER, n_latents=LATENTS, k=K, seed=seed, help=help_dead)
        start = time.process_time()
        generator = torch.Generator().manual_seed(1000 + seed)
        dictionary = TopK(rows.shape[1], LATENTS, K, generator=generator).start(rows, generator)
        dead = DeadFeatures(LATENTS, help=help_dead)
        losses = train_dictionary(dictionary, rows, steps=700, learning_rate=2e-3, dead=dead, generator=generator)
        seconds = time.process_time() - start
        if help_dead:
            made[seed] = dictionary
        with torch.no_grad():
            error = (fresh - dictionary(fresh)).square().sum() / (fresh - fresh.mean(0)).square().sum()
        rebuild = lambda x, made=dictionary: torch.where(x.norm(dim=-1, keepdim=True) < limit, made(x), x)
        recovered = share_recovered(model, name, rebuild, unseen[:8])
        strengths, latents = dictionary.codes(fresh)
        often = torch.bincount(latents[strengths > 0], minlength=LATENTS)
        result = dict(tokens=len(rows), left_out=left_out, left=error.item(), left_training=sum(losses[-50:]) / 50,
                      l0=(strengths > 0).sum(1).float().mean().item(), dead=int(dead.dead.sum()),
                      never_on_unseen=int((often == 0).sum()), loss=recovered.loss, loss_mean=recovered.mean,
                      loss_rebuilt=recovered.rebuilt, share=recovered.share, seconds=seconds)
        result = {key: round(value, 5) if isinstance(value, float) else value for key, value in result.items()}
        if seed == 0 and help_dead:
            enough = ((often >= 20) & (often <= 0.05 * len(fresh))).nonzero()[:, 0]
            chosen = enough[torch.randperm(len(enough), generator=torch.Generator().manual_seed(0))[:CARDS]].sort()[0]
            result["cards"] = [card(feature_card(dictionary, int(i), fresh, tokens)) for i in chosen]
        RUNS.keep("smollm2", wanted | result, unprinted=("cards",))
    pair = grade(made[1].decoder, made[0].decoder)
    chance = grade(torch.randn(LATENTS, rows.shape[1], generator=torch.Generator().manual_seed(5)), made[0].decoder)
    RUNS.keep("smollm2_pair", {name: round(value, 5) for name, value in vars(pair).items()} | {"chance": chance.cosine})


def card(found) -> dict:
    "A card as a few long lines: tokens joined by ¦, strengths by blanks."
    short = lambda texts: [["¦".join(tokens), " ".join(f"{s:.2g}" for s in strengths)] for tokens, strengths in texts]
    return {"latent": found.latent, "share": round(found.share, 5), "loudest": short(found.loudest),
            "anywhere": short(found.anywhere)}


PARTS = {part.__name__: part for part in (recipe, size, width, rare, smollm2)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[1:] or PARTS:
        if part not in PARTS:
            sys.exit(f"There is no part {part}; choose from {', '.join(PARTS)}.")
        PARTS[part]()
