"""A model of transformers without padding: the same numbers, less work, and a proof that no text sees another.

    pip install "scree[hf]"
    python examples/03_huggingface.py

The model is a small Llama with random weights; a pretrained one is used in the same way.
"""

import time

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import scree

N_WORDS, PAD, LONGEST = 256, 0, 160


def make_texts():
    """Make 96 texts of log-normal lengths in which each word says what the next one is, but for some noise."""
    rng = np.random.default_rng(0)
    texts = []
    for n in np.clip(rng.lognormal(3, 1, 96), 2, LONGEST).astype(int):
        words = (rng.integers(1, N_WORDS) + 7 * np.arange(n)) % (N_WORDS - 1) + 1
        texts.append({"input_ids": np.where(rng.random(n) < 0.1, rng.integers(1, N_WORDS, n), words)})
    return texts


def make_model(attn_implementation):
    """Make the same random model each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=N_WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LONGEST, attn_implementation=attn_implementation,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def pad(features):
    """Collate as it is usually done: to the longest text, with a mask."""
    arr = scree.pack([torch.from_numpy(f["input_ids"]) for f in features])
    ids, mask = scree.bridges.to_hf_padded(arr)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train(model, collate, texts):
    """Train one epoch; return the losses, the places that were computed, and the seconds."""
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses, places, begun = [], 0, time.perf_counter()
    for batch in DataLoader(texts, batch_size=16, collate_fn=collate):
        loss = model.train()(**batch, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        places += batch["input_ids"].numel()
    return losses, places, time.perf_counter() - begun


def main():
    """Compare the two ways, then prove that one of them keeps the texts apart."""
    scree.hf.register()
    texts = make_texts()

    # One batch, packed and padded: the same logits for every word.
    arr = scree.pack([torch.from_numpy(text["input_ids"]) for text in texts[:16]])
    padded = pad(texts[:16])
    del padded["labels"]
    model = make_model("scree").eval()
    with torch.no_grad():
        packed = scree.hf.unflatten(model(**scree.hf.model_kwargs(arr)), arr).logits
        expected = make_model("sdpa").eval()(**padded).logits[padded["attention_mask"] == 1]
    furthest = (packed.values - expected).abs().max().item()
    n_words, n_places = arr.total_length, padded["input_ids"].numel()
    print(f"16 texts: {n_words} words, {n_places} places when padded; logits differ by {furthest:.1e} at most")
    assert furthest < 1e-4
    print(f"one vector a text: {tuple(scree.hf.pool(packed, 'last').shape)}, without a padded tensor")

    # A step of training costs what the words cost.
    losses_padded, places, seconds = train(make_model("sdpa"), pad, texts)
    losses, words, seconds_packed = train(make_model("scree"), scree.hf.collator(), texts)
    print(f"padded: {places} places in {seconds:.2f} s; packed: {words} in {seconds_packed:.2f} s")
    print("losses: " + ", ".join(f"{a:.4f} ({b:.4f})" for a, b in zip(losses_padded, losses, strict=True)))
    assert np.allclose(losses_padded, losses, atol=1e-3)

    # The same packed batch, and transformers' own attention: nothing warns, and texts see each other.
    batch = scree.hf.collator()(texts[:16])
    try:
        scree.hf.assert_isolated(make_model("sdpa").eval(), batch)
    except AssertionError as leak:
        print("sdpa:", leak)
    else:
        raise SystemExit("sdpa keeps the texts of this batch apart: then this example is out of date")
    print("scree:", scree.hf.assert_isolated(model, batch))


if __name__ == "__main__":
    main()
