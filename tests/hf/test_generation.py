"""Generation with ``attn_implementation="scree"``: with caches of every kind, token for token what the eager model says."""

import pytest

pytest.importorskip("transformers")

import torch
import zoo
from torch._dynamo.trace_rules import get_torch_obj_rule_map

pytestmark = pytest.mark.hf

get_torch_obj_rule_map()  # Dynamo lists the functions of torch once: here none of them has a stand-in that poisons memory

PROMPTS = (9, 2, 14, 5)  # some longer than every window, and one that becomes so


def generated(model, implementation, batch, **options):
    model.set_attn_implementation(implementation)
    return model.generate(
        input_ids=batch.inputs["input_ids"],
        attention_mask=batch.inputs["attention_mask"],
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        **options,
    )


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_generation(name, cache):
    model, batch = zoo.make(name), zoo.padded(name, "left", PROMPTS)
    options = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    expected = generated(model, "eager", batch, **options)
    assert len(expected.unique()) > 8  # not one token again and again
    torch.testing.assert_close(generated(model, "scree", batch, **options), expected, rtol=0, atol=0)


@pytest.mark.no_poison  # Dynamo does not trace what stands in for torch.empty_like
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's and transformers' own
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_compiled_generation(name):
    """What generate does by itself on a GPU: the prompt as it is, then compiled steps, with the mask as an input."""
    import transformers

    model, batch = zoo.make(name), zoo.padded(name, "left", PROMPTS)
    expected = generated(model, "eager", batch, cache_implementation="static")
    how = transformers.CompileConfig(fullgraph=False, backend="eager", mode=None)
    how._compile_all_devices = True
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["ok"]
    actual = generated(model, "scree", batch, cache_implementation="static", compile_config=how)
    assert frames["ok"] > before
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_beams():
    model, batch = zoo.make("llama"), zoo.padded("llama", "left", PROMPTS)
    expected = generated(model, "eager", batch, num_beams=3)
    torch.testing.assert_close(generated(model, "scree", batch, num_beams=3), expected, rtol=0, atol=0)


@pytest.mark.parametrize("cache", ["DynamicCache", "StaticCache"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_prompt_in_pieces(name, padding, cache):
    import transformers

    model, lengths = zoo.make(name), PROMPTS if padding else (14, 14)
    batch = zoo.padded(name, padding or "right", lengths)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    out = {}
    for implementation in ("eager", "scree"):
        model.set_attn_implementation(implementation)
        options = {"max_cache_len": 16} if cache == "StaticCache" else {}
        past = getattr(transformers, cache)(config=model.config, **options)
        parts = []
        for begin, end in ((0, 4), (4, 7), (7, 8), (8, 14)):
            given = {} if padding is None else {"attention_mask": mask[:, :end]}
            given["position_ids"] = batch.inputs["position_ids"][:, begin:end]
            with torch.no_grad():
                parts.append(model(ids[:, begin:end], **given, **zoo.cached(past, begin, end))[0])
        out[implementation] = torch.cat(parts, 1)[batch.tokens]
    zoo.assert_rounding(out["scree"], out["eager"])


def test_a_cache_beside_a_packed_batch():
    import transformers

    model = zoo.make("llama")
    model.set_attn_implementation("scree")
    past = transformers.DynamicCache(config=model.config)
    batch = zoo.packed("llama")
    with torch.no_grad():
        model(**batch, **zoo.cached(past, 0, 25))
        with pytest.raises(ValueError, match="50 keys for 25 packed queries: a cache holds more than this batch"):
            model(**batch, **zoo.cached(past, 25, 50))
