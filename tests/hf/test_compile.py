"""``attn_implementation="scree"`` under ``torch.compile(fullgraph=True)``."""

import pytest

pytest.importorskip("transformers")

import torch
import zoo
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter

pytestmark = [
    pytest.mark.hf,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's and transformers' own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(model, backend="aot_eager"):
    model.set_attn_implementation("scree")
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize(("name", "form"), [("gemma2", "packed"), ("mistral", "padded"), ("llama", "positions")])
def test_forward_and_backward(name, form):
    batch, packed = zoo.padded(name), zoo.packed(name)
    inputs, tokens = {
        "packed": (packed, None),
        "padded": (batch.inputs, batch.tokens),
        "positions": ({key: packed[key] for key in ("input_ids", "position_ids")}, None),
    }[form]
    model = zoo.make(name)
    expected, gradients = zoo.outputs(model, "eager", batch.inputs, batch.tokens, gradients=True)
    model.zero_grad()
    out = compiled(model)(**inputs, use_cache=False)[0]
    out = out[0] if tokens is None else out[tokens]
    zoo.assert_rounding(out.detach(), expected)
    torch.manual_seed(2)
    (out * torch.randn_like(out)).sum().backward()
    whole = max(value.abs().max().item() for value in gradients.values())
    for key, parameter in model.named_parameters():
        zoo.assert_rounding(parameter.grad, gradients[key], whole)


def test_other_lengths_compile_once_more_at_most():
    counter = CompileCounter()
    model = zoo.make("llama")
    run = compiled(model, counter)
    with torch.no_grad():
        for lengths in ((7, 1, 13, 4), (3, 5, 2), (9, 9), (4, 4, 4, 4, 4), (1, 2, 20)):
            batch = zoo.packed("llama", lengths)
            out = run(**batch, use_cache=False)[0]
            zoo.assert_rounding(out, model(**batch, use_cache=False)[0])
    assert counter.frame_count <= 2


def test_generation_with_a_compiled_step():
    from transformers import CompileConfig

    model, batch = zoo.make("llama"), zoo.padded("llama", "left", (6, 1, 3))
    given = {key: batch.inputs[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    model.set_attn_implementation("eager")
    expected = model.generate(**given, **options)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    settings = CompileConfig(fullgraph=True, backend=count, mode=None)
    settings._compile_all_devices = True
    model.set_attn_implementation("scree")
    out = model.generate(**given, **options, compile_config=settings)
    assert len(graphs) in (1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_what_a_compiler_hides_is_refused():
    import transformers

    options = zoo._GROUPED | {"attention_chunk_size": 4, "intermediate_size_mlp": 48, "num_local_experts": 2}
    config = transformers.Llama4TextConfig(**options, head_dim=8)
    model = transformers.Llama4ForCausalLM._from_config(config, attn_implementation="scree").eval()
    with pytest.raises(Unsupported, match=r"attention in chunks under torch\.compile cannot be served"):
        torch.compile(model, fullgraph=True, backend="eager")(torch.arange(3, 9)[None])
