"""Isolation in the models of transformers: where scree keeps it, and exactly where transformers' own attention does not."""

import pytest

pytest.importorskip("transformers")

import torch
import transformers
import zoo

import scree
from expect import raises
from scree.hf import assert_isolated, model_kwargs
from scree.hf._isolation import IsolationError

pytestmark = pytest.mark.hf


PACKS = list(zoo.KINDS)  # before 5, the encoders take no cu_seq_lens
TINY = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
# What an expert is given changes in number with the other sequences: its products then round in another order.
ATOL = {"gpt_oss": 1e-5}


def batch(lengths=(3, 0, 5, 1, 17, 2)):
    torch.manual_seed(0)
    return scree.pack([torch.randint(3, zoo.VOCABULARY, (n,)) for n in lengths])


def model(name, implementation):
    made = zoo.make(name)
    try:
        made.set_attn_implementation(implementation)
    except ValueError:
        pytest.skip(f"{name} has no {implementation}")
    return made


@pytest.mark.parametrize("name", PACKS)
def test_scree_isolates_packed_batches(name):
    arr = batch()
    shown = assert_isolated(model(name, "scree"), arr, atol=ATOL.get(name, 0.0))
    assert shown.sequences == 5
    assert shown.attn_implementation == "scree"
    assert_isolated(zoo.make(name), scree.with_capacity(arr, 9, 40), atol=ATOL.get(name, 0.0))
    assert_isolated(zoo.make(name), zoo.packed(name), atol=ATOL.get(name, 0.0))  # a cache is filled, and not read


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("name", PACKS)
def test_scree_isolates_padded_batches(name, side):
    assert_isolated(model(name, "scree"), zoo.padded(name, side).inputs, atol=ATOL.get(name, 0.0))


@pytest.mark.parametrize("name", PACKS)
def test_spare_tokens_change_nothing(name):
    arr = batch()
    made = model(name, "scree")
    with torch.no_grad():
        few = scree.hf.unflatten(made(**model_kwargs(arr, model=made)), arr)[0]
        fixed = scree.with_capacity(arr, 9, 40)
        many = scree.hf.unflatten(made(**model_kwargs(fixed, model=made)), fixed)[0]
    torch.testing.assert_close(many.values[: arr.total_length], few.values, rtol=0, atol=ATOL.get(name, 0.0))


def leak(made, given):
    with pytest.raises(IsolationError) as caught:
        assert_isolated(made, given)
    return caught.value


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_causal_models_leak_by_default(name, implementation):
    """A packed batch of transformers' own collator, and no further keyword: the cache hides the sequences."""
    made = model(name, implementation)
    given = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(
        [{"input_ids": row.tolist()} for row in batch((3, 5, 1, 7))]
    )
    if zoo.FIVE or not name.startswith("gemma"):  # which, before 5, fill no cache in training
        leak(made.train(), given)
    else:
        assert_isolated(made.train(), given)
    found = leak(made.eval(), given)
    assert "model.layers.0.self_attn" in str(found)
    assert "use_cache=False" in found.cause
    assert all(i < j for i, j, _ in found.leaks)
    if name == "gpt_oss":  # whose masks are made without position_ids
        assert "does not hand position_ids on" in leak(made, given | {"use_cache": False}).cause
    else:
        assert_isolated(made, given | {"use_cache": False})


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_else_makes_causal_models_leak(implementation):
    made = model("llama", implementation)
    given = model_kwargs(batch())
    assert_isolated(made, given)
    found = leak(made, given | {"attention_mask": torch.ones_like(given["input_ids"])})
    assert "beside an attention_mask" in found.cause
    found = leak(made, {name: value for name, value in given.items() if name != "position_ids"})
    assert "without position_ids" in found.cause
    run_on = given | {"position_ids": torch.arange(given["input_ids"].shape[1])[None]}
    leak(made, run_on)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of ModernBERT, before 5
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", zoo.ENCODERS)
def test_encoders_always_leak(name, implementation):
    kind = zoo.ENCODERS[name]
    config = getattr(transformers, kind.config)(**kind.options)
    made = getattr(transformers, kind.model)._from_config(config, attn_implementation=implementation).eval()
    given = {name: value for name, value in model_kwargs(batch()).items() if name in ("input_ids", "position_ids")}
    found = leak(made, given)
    assert "bidirectional" in found.cause
    leak(made, given | {"attention_mask": torch.ones_like(given["input_ids"])})
    if zoo.FIVE:  # with cu_seq_lens and the rest
        assert "bidirectional" in leak(made, batch()).cause


def test_a_mask_that_reaches_nobody():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    name = "maskless"
    transformers.AttentionInterface.register(name, sdpa_attention_forward)
    try:
        found = leak(model("llama", name), zoo.padded("llama", "left").inputs)
    finally:
        del transformers.AttentionInterface._global_mapping[name]
        zoo.make("llama").set_attn_implementation("scree")
    assert {i for i, _, _ in found.leaks} == {-1}
    assert "'maskless'" in found.cause
    assert "mask function registered" in found.cause


def test_training_mode():
    config = transformers.LlamaConfig(**TINY, attention_dropout=0.5, attn_implementation="eager")
    made = transformers.LlamaForCausalLM(config).train()
    with raises(ValueError, "training mode", "config.attention_dropout=0.5", "model.eval()"):
        assert_isolated(made, batch())
    assert made.training
    assert_isolated(made.eval(), batch())
    config.attention_dropout = 0.0
    assert_isolated(transformers.LlamaForCausalLM(config).train(), batch())


def test_a_head_that_classifies_sequences():
    made = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**TINY, pad_token_id=0)).eval()
    with raises(ValueError, "no output of LlamaForSequenceClassification", "base_model"):
        assert_isolated(made, batch())
    assert_isolated(made.base_model, batch())
    shown = assert_isolated(made, zoo.padded("llama").inputs)
    assert shown.outputs == ("logits",)


def test_positions_that_a_model_works_out_from_padding():
    """RoBERTa counts the ids that are not padding: changing the padding's ids must not look like a leak."""
    kind = zoo.ENCODERS["roberta"]
    made = transformers.RobertaModel(transformers.RobertaConfig(**kind.options)).eval()
    ids, mask = scree.to_padded(batch((7, 1, 13, 4)), side="left", fill_value=kind.options["pad_token_id"])
    assert_isolated(made, {"input_ids": ids, "attention_mask": mask.long()})


def test_bfloat16():
    made = model("llama", "scree")
    half = type(made)(made.config).to(torch.bfloat16).eval()
    half.set_attn_implementation("scree")
    assert assert_isolated(half, batch()).response > 0
