"""Training in PyTorch from a corpus on the disk, without padding, and going on after an interruption.

    pip install "scree[torch]"
    python examples/04_dataloader.py

The corpus is mapped, not read; batches are filled by their tokens; worker processes join them in shared memory.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

import scree
from scree.data import Corpus, collate, save, token_batches

N_WORDS, WIDTH, MAX_TOKENS = 50, 16, 512


def write_corpus(path):
    """Save 2,000 texts: in those of class 1 the words of the upper half are more frequent."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 2000)
    lengths = np.clip(rng.lognormal(3, 1, 2000), 1, MAX_TOKENS).astype(int)
    texts = [
        rng.integers(0, N_WORDS, n) // (2 - label) + (N_WORDS // 4) * label
        for n, label in zip(lengths, labels, strict=True)
    ]
    texts = [np.minimum(text, N_WORDS - 1).astype(np.int32) for text in texts]
    save(path, {"ids": scree.pack(texts), "label": labels})


class Classifier(torch.nn.Module):
    """The mean of the embeddings of a text, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(N_WORDS, WIDTH)
        self.out = torch.nn.Linear(WIDTH, 2)

    def forward(self, ids):
        """Classify an Array of texts: one token after the other, whatever text it belongs to, until the mean."""
        tokens = ids.map(self.embed)
        return self.out(scree.kernels.varlen_reduce(tokens, "mean"))


def main():
    """Train two epochs, interrupted in the second one."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.safetensors"
        write_corpus(path)
        corpus = Corpus(path)
        print(corpus)

        batches = token_batches(corpus.lengths("ids"), MAX_TOKENS, seed=1)
        loader = DataLoader(corpus, batch_sampler=batches, collate_fn=collate, num_workers=2)
        model = Classifier()
        optimiser = torch.optim.Adam(model.parameters(), lr=0.05)

        def train(batch):
            loss = torch.nn.functional.cross_entropy(model(batch["ids"]), batch["label"])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            return loss.item()

        losses = [train(batch) for batch in loader]  # epoch 0
        print(f"epoch 0: {len(losses)} batches, loss {losses[0]:.3f} to {losses[-1]:.3f}")
        assert losses[-1] < losses[0]

        # What a checkpoint has to hold beside the model. Workers fetch ahead, so the loop counts what it trained on.
        seen = []
        for done, batch in enumerate(loader, 1):
            train(batch)
            seen += batch["label"].tolist()
            if done == 5:
                state = batches.state_dict(done)
                break
        print("interrupted:", state)

        # The program that goes on.
        resumed = token_batches(corpus.lengths("ids"), MAX_TOKENS, seed=1)
        resumed.load_state_dict(state)
        for batch in DataLoader(corpus, batch_sampler=resumed, collate_fn=collate, num_workers=2):
            train(batch)
            seen += batch["label"].tolist()
        assert sorted(seen) == sorted(corpus.fields["label"].tolist())  # every text once
        right = sum(
            int((model(batch["ids"]).argmax(1) == batch["label"]).sum())
            for batch in DataLoader(corpus, batch_size=100, collate_fn=collate)
        )
        print(f"epoch 1 was finished; {right / len(corpus):.0%} of the texts are classified right")
        assert right / len(corpus) > 0.9


if __name__ == "__main__":
    main()
