"""The proof of isolation: on models made to leak, and to be no test at all."""

import pytest

import scree
from expect import raises
from scree.hf import assert_isolated, model_kwargs
from scree.hf._isolation import IsolationError

torch = pytest.importorskip("torch")

LENGTHS = (3, 2, 0, 4, 1, 5)


def batch(lengths=LENGTHS, vocabulary=40):
    torch.manual_seed(0)
    return scree.pack([torch.randint(1, vocabulary, (n,)) for n in lengths])


class Toy(torch.nn.Module):
    """Add to every token's embedding the mean of its sequence: a model whose tokens see each other."""

    def __init__(self, size=40, width=4):
        super().__init__()
        torch.manual_seed(1)
        self.embed = torch.nn.Embedding(size, width)

    def get_input_embeddings(self):
        return self.embed

    def rows(self, x, offsets):
        return [x[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]

    def mixed(self, rows):
        return [row + row.mean(0) if len(row) else row for row in rows]

    def forward(self, input_ids=None, cu_seq_lens_q=None, inputs_embeds=None, **_):
        x = (self.embed(input_ids) if inputs_embeds is None else inputs_embeds)[0]
        rows = self.mixed(self.rows(x, cu_seq_lens_q))
        return torch.cat([*rows, x[int(cu_seq_lens_q[-1]) :]])[None]


class Leaking(Toy):
    """The sum of some sequences is added to another one."""

    def __init__(self, sources, victim, size=1.0):
        super().__init__()
        self.sources, self.victim, self.size = sources, victim, size

    def mixed(self, rows):
        made = super().mixed(rows)
        seen = torch.stack([rows[i].sum(0) for i in self.sources]).prod(0)
        made[self.victim] = made[self.victim] + self.size * seen
        return made


def test_what_it_says_of_a_model_that_is_isolated():
    shown = assert_isolated(Toy(), batch())
    assert (shown.sequences, shown.tokens, shown.atol) == (5, 15, 0.0)
    assert shown.outputs == ("output",)
    assert shown.response > 0.01
    assert shown.passes == 3 + 2 * 3  # twice as it is, once within the sequences, and two for each of three digits


def test_embeddings_and_capacity():
    arr = batch()
    embedded = arr.map(Toy().embed)
    assert assert_isolated(Toy(), embedded).sequences == 5
    assert assert_isolated(Toy(), scree.with_capacity(arr, 9, 20)).tokens == 15
    with pytest.raises(IsolationError, match="sequence 0 changes sequence 3"):
        assert_isolated(Leaking([0], 3), scree.with_capacity(embedded, 9, 20))


@pytest.mark.parametrize("source", [0, 1, 3, 4, 5])
@pytest.mark.parametrize("victim", [0, 1, 3, 4, 5])
def test_every_pair_is_found_and_named(source, victim):
    if source == victim:
        assert_isolated(Leaking([source], victim), batch())
        return
    with pytest.raises(IsolationError) as caught:
        assert_isolated(Leaking([source], victim), batch())
    assert f"sequence {source} changes sequence {victim} by" in str(caught.value)
    assert "\n" not in str(caught.value)
    ((i, j, size),) = caught.value.leaks
    assert (i, j) == (source, victim)
    assert size > 0


def test_the_last_bit_is_seen_and_atol_tolerates_it():
    with pytest.raises(IsolationError):
        assert_isolated(Leaking([1], 3, 3e-7), batch())
    assert assert_isolated(Leaking([1], 3, 3e-7), batch(), atol=1e-4).atol == 1e-4
    with pytest.raises(IsolationError):
        assert_isolated(Leaking([1], 3, 1e-2), batch(), atol=1e-4)


def test_all_that_one_sequence_changes_is_listed():
    class First(Toy):
        def mixed(self, rows):
            return [row + rows[0].sum() for row in super().mixed(rows)]

    with pytest.raises(IsolationError, match=r"sequence 0 changes sequence \d by .* \(and 3 more\)") as caught:
        assert_isolated(First(), batch())
    assert sorted(j for _, j, _ in caught.value.leaks) == [1, 3, 4, 5]


def test_a_leak_of_two_sequences_together():
    class Both(Toy):
        def __init__(self):
            super().__init__()
            self.before = None

        def mixed(self, rows):
            made = super().mixed(rows)
            first, second = float(rows[0].sum()), float(rows[3].sum())
            self.before = self.before or (first, second)
            if first != self.before[0] and second != self.before[1]:
                made[1] = made[1] + 1
            return made

    with pytest.raises(IsolationError, match="the sequences 0, 3 together change sequence 1") as caught:
        assert_isolated(Both(), batch())
    assert {(i, j) for i, j, _ in caught.value.leaks} == {(0, 1), (3, 1)}


def test_spare_tokens_that_are_attended():
    class Spare(Toy):
        def forward(self, input_ids, cu_seq_lens_q=None, **_):
            return super().forward(input_ids, cu_seq_lens_q) + self.embed(input_ids[0, -1])

    fixed = scree.with_capacity(batch(), 9, 20)
    with pytest.raises(IsolationError, match="padding changes sequence") as caught:
        assert_isolated(Spare(), fixed)
    assert {i for i, _, _ in caught.value.leaks} == {-1}


def test_the_module_is_named():
    class Deep(Toy):
        def __init__(self, layer):
            super().__init__()
            self.first, self.layer, self.last = torch.nn.Linear(4, 4), layer, torch.nn.Linear(4, 4)

        def forward(self, input_ids, cu_seq_lens_q=None, **_):
            return self.last(self.layer(self.first(super().forward(input_ids, cu_seq_lens_q))))

    class Conv(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv1d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(x.transpose(1, 2)).transpose(1, 2)

    class Mixer(torch.nn.Module):
        def forward(self, x):
            return x - x.mean((0, 1))

    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(x[0])[None]

    for layer, name, cause in ((Conv(), "layer (Conv)", "seq_idx"), (Mixer(), "layer (Mixer)", "mixes tokens"),
                               (Norm(), "layer.norm (BatchNorm1d)", "model.eval()")):  # fmt: skip
        with pytest.raises(IsolationError) as caught:
            assert_isolated(Deep(layer), batch())
        assert f"first in {name}" in str(caught.value)
        assert caught.value.module == name.split()[0]
        assert cause in caught.value.cause
    assert_isolated(Deep(Norm()).eval(), batch())


def test_the_model_is_left_as_it_was():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4))

    class Normed(Toy):
        def __init__(self):
            super().__init__()
            self.norm = model

        def forward(self, input_ids, cu_seq_lens_q=None, **_):
            torch.rand(1)
            return self.norm(super().forward(input_ids, cu_seq_lens_q)[0])[None]

    normed = Normed()
    before = {name: value.clone() for name, value in normed.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    arr = batch()
    torch.set_rng_state(state)
    with pytest.raises(IsolationError):
        assert_isolated(normed, arr)
    assert torch.equal(torch.get_rng_state(), state)
    assert normed.training
    assert all(parameter.grad is None for parameter in normed.parameters())
    assert not any(module._forward_hooks for module in normed.modules())
    for name, value in normed.state_dict().items():
        assert torch.equal(value, before[name]), name


class Noisy(Toy):
    """Not the same twice."""

    def forward(self, input_ids, cu_seq_lens_q=None, **_):
        out = super().forward(input_ids, cu_seq_lens_q)
        return out + 1e-3 * torch.rand_like(out)


class Blind(Toy):
    """The same whatever it gets."""

    def forward(self, input_ids, **_):
        return self.embed(torch.zeros_like(input_ids))


class Tokenwise(Toy):
    """No token sees another."""

    def forward(self, input_ids, **_):
        return self.embed(input_ids)


class Broken(Toy):
    """NaN in one sequence."""

    def forward(self, input_ids, cu_seq_lens_q=None, **_):
        out = super().forward(input_ids, cu_seq_lens_q)
        out[0, 3] = float("nan")
        return out


class Pooled(Toy):
    """No output by token."""

    def forward(self, input_ids, cu_seq_lens_q=None, **_):
        return {"logits": super().forward(input_ids, cu_seq_lens_q).mean(1)}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Noisy(), ["two runs", "differ by", "atol"]),
        (Blind(), ["no token changes another"]),
        (Tokenwise(), ["no token changes another", "no effect"]),
        (Broken(), ["sequence 1", "NaN"]),
        (Pooled(), ["no output of Pooled", "(1, 15) tokens", "base_model"]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_test(model, words):
    with raises(ValueError, "assert_isolated", *words):
        assert_isolated(model, batch())


def test_a_sequence_that_changes_nothing_is_no_test():
    class Deaf(Toy):
        def mixed(self, rows):
            return [row * (i != 3) for i, row in enumerate(super().mixed(rows))]

    with raises(ValueError, "sequence 3", "no power"):
        assert_isolated(Deaf(), batch())
    with raises(ValueError, "no token changes another"):
        assert_isolated(Toy(), batch(), atol=100.0)
    single = batch((1, 1))
    with raises(ValueError, "sequence", "no power", "atol is too large"):
        assert_isolated(Toy(), single, atol=100.0)
    assert assert_isolated(Toy(), single).sequences == 2


def test_a_noise_below_atol_is_tolerated():
    assert assert_isolated(Noisy(), batch(), atol=5e-3).sequences == 5


def test_bad_arguments():
    arr = batch()
    one = model_kwargs(batch((4, 0)))
    with raises(ValueError, "1 sequence", "needs two"):
        assert_isolated(Toy(), one)
    with raises(ValueError, "0 sequence", "needs two"):
        assert_isolated(Toy(), batch((0, 0)).map(torch.Tensor.long))
    with raises(TypeError, "model", "function"):
        assert_isolated(lambda **_: None, arr)
    with raises(TypeError, "batch", "list"):
        assert_isolated(Toy(), [1, 2])
    with raises(ValueError, "input_ids", "inputs_embeds"):
        assert_isolated(Toy(), {"position_ids": one["position_ids"]})
    with raises(ValueError, "input_ids", "2 axes", "(4,)"):
        assert_isolated(Toy(), {"input_ids": torch.arange(4)})
    with raises(ValueError, "where its sequences end"):
        assert_isolated(Toy(), {"input_ids": torch.arange(4)[None]})
    with raises(ValueError, "position_ids", "row 1 of 2", "one packed row"):
        positions = torch.tensor([[0, 1, 2], [0, 1, 0]])
        assert_isolated(Padded(), {"input_ids": torch.ones(2, 3, dtype=int), "position_ids": positions})
    with raises(ValueError, "atol", "-1"):
        assert_isolated(Toy(), arr, atol=-1)
    with raises(ValueError, "attention_mask", "(2, 1, 3, 3)", "(2, 3)"):
        assert_isolated(Toy(), {"input_ids": torch.ones(2, 3, dtype=int), "attention_mask": torch.ones(2, 1, 3, 3)})


def test_sequences_are_found_in_the_keywords():
    class Positions(Toy):
        def forward(self, input_ids, position_ids=None, seq_idx=None, **_):
            marks = (position_ids == 0).cumsum(1) if position_ids is not None else seq_idx
            counts = torch.unique_consecutive(marks, return_counts=True)[1]
            return super().forward(input_ids, torch.tensor([0, *counts.cumsum(0).tolist()]))

    given = model_kwargs(batch(), seq_idx=True)
    for name in ("position_ids", "seq_idx"):
        shown = assert_isolated(Positions(), {"input_ids": given["input_ids"], name: given[name], "labels": 3})
        assert shown.sequences == 5


class Padded(Toy):
    """The mean over the tokens that the mask keeps, of a padded batch."""

    def forward(self, input_ids, attention_mask=None, **_):
        x = self.embed(input_ids)
        mask = attention_mask[..., None] if self.reads_mask else torch.ones_like(attention_mask)[..., None]
        mean = (x * mask).sum(1) / mask.sum(1)
        return {"last_hidden_state": x + mean[:, None], "logits": mean}

    reads_mask = True


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batches(side):
    ids, mask = scree.bridges.to_hf_padded(batch((3, 5, 1)), side)
    shown = assert_isolated(Padded(), {"input_ids": ids, "attention_mask": mask})
    assert shown.outputs == ("last_hidden_state", "logits")
    assert (shown.sequences, shown.tokens) == (3, 9)
    model = Padded()
    model.reads_mask = False
    with pytest.raises(IsolationError, match=r"padding changes sequence \d .*attention_mask does not reach"):
        assert_isolated(model, {"input_ids": ids, "attention_mask": mask})
