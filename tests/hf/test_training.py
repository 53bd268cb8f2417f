"""Training with ``attn_implementation="scree"``: checkpoints, autocast, `Trainer`, and what is refused."""

import pytest

pytest.importorskip("transformers")

import copy

import torch
import zoo

from expect import raises
from scree.hf import _attention, register

pytestmark = pytest.mark.hf


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames the call
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", ["packed", "padded"])
def test_gradient_checkpointing_changes_nothing(form, reentrant):
    model = zoo.make("gemma2")
    batch = zoo.padded("gemma2")
    given = (zoo.packed("gemma2"), None) if form == "packed" else (batch.inputs, batch.tokens)
    out, gradients = zoo.outputs(model, "scree", *given, gradients=True)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again, recomputed = zoo.outputs(model, "scree", *given, gradients=True)
    model.gradient_checkpointing_disable()
    model.eval()
    assert torch.equal(again, out)
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("way", ["autocast", "cast"])
def test_bfloat16(way):
    model, batch = zoo.make("llama"), zoo.padded("llama")
    exact, _ = zoo.outputs(model, "eager", batch.inputs, batch.tokens)
    if way == "cast":
        model = copy.deepcopy(model).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        eager, _ = zoo.outputs(model, "eager", batch.inputs, batch.tokens)
        padded, _ = zoo.outputs(model, "scree", batch.inputs, batch.tokens)
        packed, _ = zoo.outputs(model, "scree", zoo.packed("llama"))
    assert eager.dtype == padded.dtype == packed.dtype == torch.bfloat16
    usual = (eager.float() - exact).square().mean().sqrt()
    for out in (padded, packed):
        assert (out.float() - exact).square().mean().sqrt() < 1.5 * usual


def sequences(n=24):
    """Return sequences of tokens that can be learned: each counts on from a random number."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, 20, (n,), generator=generator)
    starts = torch.randint(3, 20, (n,), generator=generator)
    return [{"input_ids": (starts[i] + torch.arange(int(lengths[i]))).tolist()} for i in range(n)]


def pad(rows):
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def flatten(rows):
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    ids = torch.tensor([[token for row in rows for token in row["input_ids"]]])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    labels = ids.clone()
    labels[0, offsets[:-1].long()] = -100  # else the last token of a sequence would learn the next one's first
    longest = int(lengths.max())
    return {
        "input_ids": ids, "labels": labels, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def losses(implementation, collator, folder):
    import transformers

    transformers.set_seed(0)
    model = copy.deepcopy(zoo.make("llama"))
    model.config.use_cache = False
    model.set_attn_implementation(implementation)
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=6, max_steps=8, learning_rate=3e-3, logging_steps=1, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, seed=0, remove_unused_columns=False,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=sequences(), data_collator=collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore")  # of other packages, which are many
def test_a_trainer_s_losses(tmp_path):
    pytest.importorskip("accelerate")
    expected = losses("eager", pad, tmp_path)
    assert expected[-1] < 0.8 * expected[0]
    assert losses("scree", pad, tmp_path) == pytest.approx(expected, rel=1e-4)
    assert losses("scree", flatten, tmp_path) == pytest.approx(expected, rel=1e-4)


def test_dropout_is_refused():
    import transformers

    register()
    options = zoo.CAUSAL["llama"].options | {"attention_dropout": 0.1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    model.set_attn_implementation("scree")
    ids = torch.arange(3, 8)[None]
    with raises(
        NotImplementedError,
        "attention dropout (0.1 in LlamaAttention) cannot be served",
        "set the config's attention_dropout",
    ):
        model.train()(ids)
    model.eval()(ids)


@pytest.mark.skipif(not zoo.FIVE, reason="layers of transformers 4 are not told of use_cache")
def test_a_cache_of_a_packed_batch_in_training():
    model = zoo.make("llama")
    model.set_attn_implementation("scree")
    _attention._warned.discard("use_cache")
    model.train()
    with pytest.warns(UserWarning, match="fills a cache that nothing can read; pass use_cache=False"):
        model(**zoo.packed("llama"), use_cache=True)
    model(**zoo.packed("llama"), use_cache=True)  # told once
    model.eval()


def test_the_weights_of_attention_are_refused():
    model = zoo.make("llama")
    model.set_attn_implementation("scree")
    with raises((NotImplementedError, UserWarning), "output_attentions"):  # transformers 4 warns itself
        model(**zoo.padded("llama").inputs, output_attentions=True)
