"""What `register` promises, and the refusal of what cannot be served."""

import subprocess
import sys
import types

import pytest

pytest.importorskip("transformers")

import torch
import zoo

import scree.hf
from expect import raises
from scree.hf import _attention, _masks, _register

pytestmark = pytest.mark.hf


def test_importing_it_imports_neither_torch_nor_transformers():
    program = "import sys, scree.hf; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["False", "False"]


def test_registering_again_changes_nothing_and_another_name_works():
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    scree.hf.register()
    before = dict(AttentionInterface._global_mapping)
    scree.hf.register()
    assert AttentionInterface._global_mapping == before
    scree.hf.register("packed")
    assert AttentionInterface._global_mapping.pop("packed") is _attention.attention
    assert AttentionMaskInterface._global_mapping.pop("packed") is _masks.mask


def test_names():
    with raises(TypeError, "register: name is int; needs a str"):
        scree.hf.register(3)
    for name in ("", "a|b", "org/kernel"):
        with raises(ValueError, f"register: name is {name!r}; needs letters and digits"):
            scree.hf.register(name)
    with raises(
        ValueError, "register: name is 'sdpa', which is transformers.integrations.sdpa_attention", "another one"
    ):
        scree.hf.register("sdpa")


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_a_package(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with raises(ImportError, f"register: needs {missing}, which cannot be imported", 'pip install "scree[hf]"'):
        scree.hf.register()


def test_a_transformers_without_the_interface(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    with raises(
        ImportError, "this transformers has no attention interface", "needs 4.57 or newer", "pip install --upgrade"
    ):
        scree.hf.register()


def test_versions(recwarn):
    for version in ("4.57.0", "4.57.6", "5.0.0", "5.24.0.dev0"):
        _register._check_version(version)
    assert not recwarn
    for version in ("4.56.2", "5.25.0", "6.0.0"):
        with pytest.warns(UserWarning, match=f"tested with transformers 4.57 to 5.24, and this is {version}"):
            _register._check_version(version)
        _register._check_version(version)  # told once
    _register._warned.clear()


def call(**keywords):
    module = types.SimpleNamespace(is_causal=True, training=False)
    q = torch.ones(1, 2, 3, 8)
    return _attention.attention(module, q, q, q, None, **keywords)


def test_unknown_keywords():
    scree.hf.register()
    call(use_cache=True, output_attentions=False, whatever=None)
    _attention._warned.discard("tomorrow")
    with pytest.warns(UserWarning, match="the keyword 'tomorrow' of SimpleNamespace is unknown here and has no effect"):
        call(tomorrow=1)
    call(tomorrow=1)  # told once
    with raises(NotImplementedError, "a head_mask (head_mask of SimpleNamespace) cannot be served", '"eager"'):
        call(head_mask=torch.ones(2))
    with raises(NotImplementedError, "a bias of the positions on the scores (position_bias of"):
        call(position_bias=torch.ones(2))
    with raises(NotImplementedError, "output_attentions=True cannot be served", 'use attn_implementation="eager"'):
        call(output_attentions=True)


IDS = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]])


def refused(kind, config, *words):
    """Require that a model that is made with the attention refuses to run, and says why."""
    scree.hf.register()
    model = kind._from_config(config, attn_implementation="scree").eval()
    with raises(NotImplementedError, *words):
        model(input_ids=IDS, attention_mask=(IDS > 0).long())


@pytest.mark.skipif(
    not zoo.FIVE, reason="Bloom of transformers 4 makes masks of its own, and is eager whatever it is told"
)
def test_a_model_that_does_not_use_the_interface():
    import transformers

    config = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4)
    refused(
        transformers.BloomForCausalLM,
        config,
        "does not use transformers' attention interface",
        "computes with its mask",
    )


@pytest.mark.skipif(not zoo.FIVE, reason="T5 of transformers 4 does not use the attention interface")
def test_a_model_with_a_bias_on_its_scores():
    import transformers

    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, num_layers=1, num_heads=4, d_ff=48)
    refused(transformers.T5EncoderModel, config, "a bias of the positions on the scores (position_bias of T5Attention)")


def test_a_model_that_attends_in_chunks():
    import transformers

    options = zoo._GROUPED | {"attention_chunk_size": 4, "intermediate_size_mlp": 48, "num_local_experts": 2}
    config = transformers.Llama4TextConfig(**options, head_dim=8)
    refused(transformers.Llama4ForCausalLM, config, "attention in chunks of 4 over 5 tokens cannot be served")


def bart():
    import transformers

    config = transformers.BartConfig(
        vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    scree.hf.register()
    return transformers.BartForConditionalGeneration(config).eval()


def test_an_encoder_and_a_decoder_of_one_length_with_padding_of_their_own():
    model = bart()
    other = torch.tensor([[5, 6, 0, 0, 0], [5, 6, 7, 8, 0]])
    given = {
        "input_ids": IDS, "attention_mask": (IDS > 0).long(), "decoder_input_ids": other,
        "decoder_attention_mask": (other > 0).long(),
    }  # fmt: skip
    out = {}
    for implementation in ("eager", "scree"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            out[implementation] = model(**given)[0][other > 0]
    zoo.assert_rounding(out["scree"], out["eager"])


def test_a_packed_batch_in_a_model_with_cross_attention():
    module = types.SimpleNamespace(is_causal=False, training=False, config=bart().config)
    q, offsets = torch.ones(1, 2, 3, 8), torch.tensor([0, 3], dtype=torch.int32)
    packed = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 3, "max_length_k": 3}
    with raises(NotImplementedError, "a packed batch in a model with cross-attention (SimpleNamespace)", "pad it"):
        _attention.attention(module, q, q, q, None, **packed)


def test_a_packed_batch_in_a_model_with_layers_that_are_no_attention():
    import transformers

    options = zoo._GROUPED | {"layer_types": ["conv", "full_attention"]}
    model = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**options)).eval()
    model.set_attn_implementation("scree")
    scree.hf.register()
    for batch in (zoo.packed("llama"), {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}):
        _attention._warned.clear()
        with pytest.warns(
            UserWarning, match="layers of the kind 'conv', which keep packed sequences apart with kernels of"
        ):
            model(**batch)
    _attention._warned.clear()
    model(**zoo.padded("llama").inputs)
