"""Text and images of any size in one sequence, without padding either of them.

    pip install "scree[hf]"
    python examples/05_multimodal.py

Each sample is a text, an image of some number of patches, and a question: three Arrays that are joined row by row, and go
through a model of transformers as embeddings. The model learns to answer what colour an image has, or how bright it is.
"""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaModel

import scree

COLOURS, SHADES = 4, 2
ASK_COLOUR, ASK_SHADE, WORDS = 0, 1, 40  # ids: the two questions, then words that say nothing
PATCH, WIDTH = 12, 48
ANSWERS = COLOURS + SHADES


def make_samples(n, rng):
    """Make texts, images and answers: lists of arrays of every length, and one number each."""
    texts, images, questions, answers = [], [], [], []
    for _ in range(n):
        colour, shade, question = rng.integers(COLOURS), rng.integers(SHADES), rng.integers(2)
        height, width = rng.integers(1, 6, 2)
        patches = 0.5 * rng.standard_normal((height * width, PATCH)).astype(np.float32)
        patches[:, colour] += 2
        patches[:, COLOURS] += 2 * shade - 1
        texts.append(torch.from_numpy(rng.integers(2, WORDS, rng.integers(0, 12))))
        images.append(torch.from_numpy(patches))
        questions.append(torch.tensor([[ASK_COLOUR, ASK_SHADE][question]]))
        answers.append(colour if question == 0 else COLOURS + shade)
    return scree.pack(texts), scree.pack(images), scree.pack(questions), torch.tensor(answers)


class Answerer(torch.nn.Module):
    """A decoder over words and patches."""

    def __init__(self):
        super().__init__()
        config = LlamaConfig(
            vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
            attn_implementation="scree",
        )  # fmt: skip
        self.decoder = LlamaModel(config)
        self.look = torch.nn.Linear(PATCH, WIDTH)
        self.answer = torch.nn.Linear(WIDTH, ANSWERS)

    def embed(self, texts, images, questions):
        """Join the three row by row: an Array of (T, WIDTH)."""
        read = self.decoder.get_input_embeddings()
        return scree.concat([texts.map(read), images.map(self.look), questions.map(read)], dim="ragged")

    def forward(self, texts, images, questions):
        """Score the answers, from what the decoder makes of the last token, the question."""
        sequences = self.embed(texts, images, questions)
        outputs = self.decoder(**scree.hf.model_kwargs(sequences))
        return self.answer(scree.hf.pool(outputs, "last", arr=sequences))


def main():
    """Train for some seconds, and prove that no sample sees another."""
    scree.hf.register()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = Answerer()

    texts, images, questions, _ = make_samples(32, rng)
    joined = model.embed(texts, images, questions)
    print(f"texts   {texts}\nimages  {images}\njoined  {joined}")
    padded = joined.batch_size * (texts.max_length + images.max_length + 1)
    print(f"{joined.total_length} tokens; with words and patches padded apart, {padded}")

    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(61):
        *inputs, answers = make_samples(32, rng)
        loss = torch.nn.functional.cross_entropy(model(*inputs), answers)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0:
            print(f"step {step:2}: loss {loss.item():.3f}")

    model.eval()
    *inputs, answers = make_samples(200, rng)
    with torch.no_grad():
        right = (model(*inputs).argmax(1) == answers).float().mean().item()
        sequences = model.embed(*inputs)
    print(f"{right:.0%} of new questions are answered right")
    assert right > 0.9
    print(scree.hf.assert_isolated(model.decoder, sequences))


if __name__ == "__main__":
    main()
