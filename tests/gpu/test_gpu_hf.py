"""Models of transformers with ``attn_implementation="scree"`` on a GPU: beside the same model, padded and eager."""

import copy

import pytest

import gpu_cases

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gpu_cases.need_cuda()

import zoo  # noqa: E402

pytestmark = pytest.mark.gpu

LENGTHS = (150, 1, 33, 300)
WIDE = {"vocab_size": zoo.VOCABULARY, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 512}


def there(inputs):
    """The inputs, on the device."""
    return {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


def model_of(name):
    """A copy of a model of the zoo, on the device."""
    return copy.deepcopy(zoo.make(name)).cuda()


def compare(model, inputs, tokens, expected):
    out, gradients = zoo.outputs(model, "scree", there(inputs), tokens, gradients=True)
    zoo.assert_rounding(out, expected[0])
    whole = max(value.abs().max().item() for value in expected[1].values())
    for key, value in gradients.items():
        zoo.assert_rounding(value, expected[1][key], whole)


@pytest.mark.parametrize("name", zoo.KINDS)
def test_padded_and_packed(name):
    model, batch = model_of(name), zoo.padded(name)
    tokens = batch.tokens.cuda()
    expected = zoo.outputs(model, "eager", there(batch.inputs), tokens, gradients=True)
    compare(model, batch.inputs, tokens, expected)
    compare(model, zoo.packed(name), None, expected)
    compare(model, zoo.packed(name, (0, *zoo.LENGTHS, 0)), None, expected)
    left = zoo.padded(name, "left")
    expected = zoo.outputs(model, "eager", there(left.inputs), left.tokens.cuda(), gradients=True)
    compare(model, left.inputs, left.tokens.cuda(), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3"])
def test_generation(name, cache):
    model, batch = model_of(name), zoo.padded(name, "left", (9, 2, 14, 5))
    out = {}
    for implementation in ("eager", "scree"):
        model.set_attn_implementation(implementation)
        out[implementation] = model.generate(
            input_ids=batch.inputs["input_ids"].cuda(), attention_mask=batch.inputs["attention_mask"].cuda(),
            max_new_tokens=8, do_sample=False, eos_token_id=None, cache_implementation=cache,
        )  # fmt: skip
    torch.testing.assert_close(out["scree"], out["eager"], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 128])
def test_half_precision(width, dtype):
    """No further from float32 than what the eager model is, padded, in the same precision: head dims of every kernel."""
    heads = {"hidden_size": 4 * width, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE | heads)).cuda().eval()
    import scree.hf

    scree.hf.register()
    batch = zoo.padded("llama", "right", LENGTHS)
    tokens, inputs = batch.tokens.cuda(), there(batch.inputs)
    exact, slopes = zoo.outputs(model, "eager", inputs, tokens, gradients=True)
    model = model.to(dtype)
    eager, eager_slopes = zoo.outputs(model, "eager", inputs, tokens, gradients=True)
    for given, which in ((inputs, tokens), (there(zoo.packed("llama", LENGTHS)), None)):
        out, gradients = zoo.outputs(model, "scree", given, which, gradients=True)
        assert (out - exact).norm() <= 1.2 * (eager - exact).norm()
        for key, slope in slopes.items():
            assert (gradients[key] - slope).norm() <= 1.5 * (eager_slopes[key] - slope).norm() + 1e-3 * slope.norm()


def test_isolation():
    import scree.hf

    model = model_of("llama")
    model.set_attn_implementation("scree")
    rows = [torch.randint(3, zoo.VOCABULARY, (n,)) for n in zoo.LENGTHS]
    assert scree.hf.assert_isolated(model, scree.pack(rows)).sequences == len(rows)
